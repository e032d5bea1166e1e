"""What is in an mm checkpoint folder (MindSpeed-MM's layout), read from names alone (no torch).

latest_checkpointed_iteration.txt      "release" or the iteration
release/ | iter_0005000/
    mp_rank_TT/                        one pipeline rank;  TT = tensor-parallel rank
    mp_rank_TT_PPP/                    several;            PPP = pipeline rank
        model_optim_rng.pt
hf/                                    ours: config, tokenizer and processor files of the model, for export
"""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

from core.errors import CorruptCheckpoint, IncompatiblePlan
from core.models.hf_folder import listed
from core.models.plan import Split

TRACKER = "latest_checkpointed_iteration.txt"
RANK_FILE = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(?:_(\d{3}))?")


@dataclass(frozen=True)
class MMFolder:
    """A checkpoint whose rank files are all there."""

    path: Path
    iteration: int | None
    """None for a converted checkpoint ("release")."""
    tp_size: int
    pp_size: int

    @property
    def hf_dir(self) -> Path | None:
        """Config and tokenizer files that travel with the checkpoint."""
        folder = self.path / "hf"
        return folder if folder.is_dir() else None

    @property
    def total_bytes(self) -> int:
        """Bytes of all rank files."""
        return sum(file.stat().st_size for _, _, file in self.rank_files())

    def rank_files(self) -> list[tuple[int, int, Path]]:
        """(pp rank, tp rank, file) in order."""
        name = self.iteration if self.iteration is not None else "release"
        return [
            (pp_rank, tp_rank, self.path / rank_dir(name, tp_rank, pp_rank, self.pp_size) / RANK_FILE)
            for pp_rank in range(self.pp_size)
            for tp_rank in range(self.tp_size)
        ]


def iteration_dir(iteration: int | str) -> str:
    """ "release" as it is; 5000 -> iter_0005000."""
    return iteration if isinstance(iteration, str) else f"iter_{iteration:07d}"


def rank_dir(iteration: int | str, tp_rank: int, pp_rank: int, pp_size: int) -> str:
    """Folder of one rank below the checkpoint's folder."""
    suffix = f"_{pp_rank:03d}" if pp_size > 1 else ""
    return f"{iteration_dir(iteration)}/mp_rank_{tp_rank:02d}{suffix}"


def inspect_mm_folder(path: Path, parallel: Split | None = None, *, iteration: int | None = None) -> MMFolder:
    """Check the tracker and that every rank file is there; with `parallel`, that the layout is that one.

    `iteration` picks another than the tracker's. Raises CorruptCheckpoint naming the file, IncompatiblePlan for a wrong
    `parallel`.
    """
    found = iteration if iteration is not None else _read_tracker(path)
    folder = path / iteration_dir(found if found is not None else "release")
    if not folder.is_dir():
        raise CorruptCheckpoint(f"{path / TRACKER} names {folder.name}, which is not there")
    ranks = _ranks(folder)
    tp_size = 1 + max(tp for tp, _ in ranks)
    pp_size = 1 + max(pp or 0 for _, pp in ranks)
    if parallel is not None:
        _check_layout(folder, parallel, tp_size, pp_size)
    checkpoint = MMFolder(path, found, tp_size, pp_size)
    lacking = [str(file.relative_to(path)) for _, _, file in checkpoint.rank_files() if not file.is_file()]
    if lacking:
        raise CorruptCheckpoint(f"a checkpoint of tp {tp_size} x pp {pp_size} lacks {listed(lacking)}")
    for _, _, file in checkpoint.rank_files():
        if not zipfile.is_zipfile(file):
            size = file.stat().st_size
            raise CorruptCheckpoint(f"{file.relative_to(path)} is truncated or not a torch.save file ({size} bytes)")
    return checkpoint


def _read_tracker(path: Path) -> int | None:
    tracker = path / TRACKER
    if not tracker.is_file():
        raise CorruptCheckpoint(f"{path} has no {TRACKER}, so it is not an mm checkpoint")
    text = tracker.read_bytes()[:32].decode("utf-8", "replace").strip()
    if text == "release":
        return None
    if not text.isdecimal():
        raise CorruptCheckpoint(f"{TRACKER} says {text!r}; it must be 'release' or an iteration")
    return int(text)


def _ranks(folder: Path) -> set[tuple[int, int | None]]:
    """(tp rank, pp rank or None) of every rank folder."""
    ranks: set[tuple[int, int | None]] = set()
    for entry in folder.iterdir():
        found = _RANK.fullmatch(entry.name)
        if found is None:
            continue
        if found[3] is not None:
            raise CorruptCheckpoint(f"{folder.name}/{entry.name}: expert-parallel checkpoints are not supported")
        ranks.add((int(found[1]), None if found[2] is None else int(found[2])))
    if not ranks:
        raise CorruptCheckpoint(f"{folder.name} has no mp_rank_* folder")
    if len({pp is None for _, pp in ranks}) > 1:
        raise CorruptCheckpoint(f"{folder.name} has rank folders of two layouts: mp_rank_TT and mp_rank_TT_PPP")
    return ranks


def _check_layout(folder: Path, parallel: Split, tp_size: int, pp_size: int) -> None:
    wanted = (parallel.tp_size, len(parallel.llm_pp_layers[0]))
    if wanted != (tp_size, pp_size):
        raise IncompatiblePlan(
            f"{folder.name} has rank folders of tp {tp_size} x pp {pp_size}, but the layout given is "
            f"tp {wanted[0]} x pp {wanted[1]}"
        )
