"""Checkpoints of a training: mm weights, and beside them what a resume needs to go on bit for bit.

    FOLDER/
      latest_checkpointed_iteration.txt      "50"; moved last, by rename
      iter_0000050/
        checkpoint.json                      Facts: iteration, data position, layout, the size of every file
        mp_rank_00_000/                      one folder per slice and stage (mp_rank_TT_PPP)
          model_optim_rng.pt                 weights, as MindSpeed-MM reads them; written by the first data-parallel rank
          temper_optim_000.pt                what data-parallel rank 0 holds of AdamW's state, and random state
                                             (absent without save_optim)
      .iter_0000100.tmp/                     being written; whoever dies leaves only this

A folder gets its final name once every rank has written and synced its files, so a folder of that name is complete; sizes are checked
all the same before one is used. The folder must lie on a file system that all ranks share.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from core.errors import CorruptCheckpoint, DiskFull
from core.parallel.mesh import Mesh
from core.storage.local import fsync
from core.training.optimizer import Kind, OptimizerState
from core.training.together import Together

FACTS = "checkpoint.json"
TRACKER = "latest_checkpointed_iteration.txt"
WEIGHTS_FILE = "model_optim_rng.pt"
SPARE_BYTES = 64 << 20
"""Left free beyond what a checkpoint needs."""


class WriteWeights(Protocol):
    """Writes one rank's file of mm weights and returns its SHA-256."""

    def __call__(self, path: Path, state_dict: Mapping[str, Tensor], *, iteration: int | None = None) -> str:
        """Write the file at `path`, which is not there yet."""


@dataclass(frozen=True)
class Position:
    """How far a training is."""

    iteration: int = 0
    consumed_samples: int = 0


@dataclass(frozen=True)
class Facts:
    """What a checkpoint is; `checkpoint.json`."""

    position: Position
    layout: dict[str, Any]
    """The `ParallelSpec` of its rank folders."""
    precision: str
    seed: int
    dataset: str
    """Names the data set that the data position counts in."""
    has_optimizer: bool
    files: dict[str, int] = field(default_factory=dict)
    """Relative path to size in bytes."""
    digests: dict[str, str] = field(default_factory=dict)
    """Relative path to SHA-256, of files that were hashed while they were written."""

    @classmethod
    def read(cls, path: Path) -> Facts:
        """Read the facts of a checkpoint folder and check its files' sizes. Raises CorruptCheckpoint naming the file."""
        try:
            values = json.loads((path / FACTS).read_bytes())
            facts = cls(**{**values, "position": Position(**values["position"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptCheckpoint(f"{path.name} has no readable {FACTS}: {error}") from error
        for name, size in facts.files.items():
            found = (path / name).stat().st_size if (path / name).is_file() else None
            if found != size:
                raise CorruptCheckpoint(f"{path.name}/{name} should have {size} bytes, has {found}")
        return facts


class Checkpoints:
    """The checkpoints of one job, in one folder; `save` and `newest` are called by all ranks together."""

    def __init__(
        self, folder: Path, mesh: Mesh, *, rank_folder: str, write_weights: WriteWeights, keep_last: int
    ) -> None:
        """`rank_folder` is the `mp_rank_…` of this rank's slice and stage; `write_weights` writes a file of mm weights."""
        self.folder = folder
        self.mesh = mesh
        self.rank_folder = rank_folder
        self.write_weights = write_weights
        self.keep_last = keep_last

    def save(self, facts: Facts, weights: Mapping[str, Tensor], state: Mapping[str, Any] | None) -> None:
        """Write a checkpoint. Raises the same error on all ranks when one fails, DiskFull when there is no room."""
        final = self.folder / f"iter_{facts.position.iteration:07d}"
        temporary = self.folder / f".{final.name}.tmp"
        needed = _size_bytes(state or {}) + (_size_bytes(weights) if self.mesh.dp_rank == 0 else 0)
        with self._together() as step:
            total = sum(step.gather(needed))
            if self.mesh.rank == 0:
                self._make_room(temporary, total)
        digests: dict[str, str] = {}
        with self._together():
            folder = temporary / self.rank_folder
            folder.mkdir(exist_ok=True)
            if self.mesh.dp_rank == 0:
                name = f"{self.rank_folder}/{WEIGHTS_FILE}"
                digests[name] = self.write_weights(temporary / name, weights, iteration=facts.position.iteration)
                fsync(temporary / name)
            if state is not None:
                torch.save(owned(state), folder / state_file(self.mesh.dp_rank))
                fsync(folder / state_file(self.mesh.dp_rank))
            fsync(folder)
        with self._together() as step:
            for told in step.gather(digests):
                digests.update(told)
            if self.mesh.rank == 0:
                self._complete(temporary, final, replace(facts, digests=digests))

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint; all ranks get rank 0's answer."""
        with self._together() as step:
            found = (
                next((path for path in reversed(self.kept()) if _is_complete(path)), None)
                if self.mesh.rank == 0
                else None
            )
            return step.gather(found)[0]

    def kept(self) -> list[Path]:
        """Return the folders with a final name, oldest first."""
        return sorted(path for path in self.folder.glob("iter_*") if path.is_dir())

    def load_weights(self, path: Path) -> Iterator[tuple[str, Tensor]]:
        """Read this rank's weights, by memory map; names of virtual chunks begin with `model0.`, `model1.` …"""
        file = torch.load(path / self.rank_folder / WEIGHTS_FILE, weights_only=True, mmap=True, map_location="cpu")
        for key, chunk in file.items():
            if key == "model":
                yield from chunk.items()
            elif key.startswith("model"):  # a virtual chunk
                yield from ((f"{key}.{name}", tensor) for name, tensor in chunk.items())

    def load_state(self, path: Path) -> SavedState:
        """Open the optimizer and random state of this rank's slice and stage."""
        return SavedState(path / self.rank_folder, self.mesh.dp_rank)

    def _make_room(self, temporary: Path, needed_bytes: int) -> None:
        for leftover in self.folder.glob(".iter_*.tmp"):
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
        free = shutil.disk_usage(self.folder).free
        if free < needed_bytes + SPARE_BYTES:
            raise DiskFull(
                f"a checkpoint needs {needed_bytes} bytes, {free} are free in {self.folder}",
                hint="free space there, lower checkpoint.keep_last, or set checkpoint.save_optim to false",
            )

    def _complete(self, temporary: Path, final: Path, facts: Facts) -> None:
        """Give the checkpoint its name, point the tracker at it, and only then remove old ones."""
        files = {str(path.relative_to(temporary)): path.stat().st_size for path in sorted(temporary.rglob("*.pt"))}
        (temporary / FACTS).write_text(json.dumps({**asdict(facts), "files": files}, indent=1), encoding="utf-8")
        fsync(temporary / FACTS)
        fsync(temporary)
        if final.exists():  # from an earlier attempt, and refused by `newest`
            shutil.rmtree(final)
        temporary.rename(final)
        write_tracker(self.folder, facts.position.iteration)
        for old in self.kept()[: -self.keep_last]:
            shutil.rmtree(old)

    def _together(self) -> Together:
        return Together(self.mesh)


class SavedState:
    """The optimizer state of a rank folder, put together from the pieces of its data-parallel ranks; and random state."""

    def __init__(self, folder: Path, dp_rank: int) -> None:
        files = [
            torch.load(path, weights_only=True, mmap=True, map_location="cpu")
            for path in sorted(folder.glob(state_file("*")))
        ]
        if not files:
            raise CorruptCheckpoint(f"{folder} has no {state_file(dp_rank)}")
        self.num_steps: int = files[0]["optimizer"]["num_steps"]
        self.rng: dict[str, Tensor] = files[dp_rank if dp_rank < len(files) else 0]["rng"]
        self._pieces = [file["optimizer"]["pieces"] for file in files]

    def read(self, name: str, kind: Kind, start: int, stop: int) -> Tensor:
        """Return elements of a flattened parameter's state, [stop - start]. Raises KeyError(name) if it is not there."""
        found = torch.empty(stop - start)
        num_left = stop - start
        for pieces in self._pieces:
            piece = pieces.get(name)
            first, last = (0, 0) if piece is None else (max(start, piece["start"]), min(stop, piece["stop"]))
            if first < last:
                found[first - start : last - start] = piece["tensors"][kind][
                    first - piece["start"] : last - piece["start"]
                ]
                num_left -= last - first
        if num_left:
            raise KeyError(name)
        return found


def state_file(dp_rank: int | str) -> str:
    """Name of a data-parallel rank's file of optimizer and random state; with "*" a pattern of all."""
    return f"temper_optim_{dp_rank:03d}.pt" if isinstance(dp_rank, int) else f"temper_optim_{dp_rank}.pt"


def plain(state: OptimizerState) -> dict[str, Any]:
    """Return an optimizer's state in types that torch reads back safely."""
    return {"num_steps": state.num_steps, "pieces": {name: vars(piece) for name, piece in state.pieces.items()}}


def write_tracker(folder: Path, iteration: int) -> None:
    """Point `latest_checkpointed_iteration.txt` at an iteration, by rename."""
    temporary = folder / f".{TRACKER}.tmp"
    temporary.write_text(str(iteration), encoding="ascii")
    fsync(temporary)
    temporary.rename(folder / TRACKER)
    fsync(folder)


def owned(value: Any) -> Any:
    """Copy tensors to host memory of their own: torch.save writes the whole storage that a view looks into."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, Mapping):
        return {key: owned(item) for key, item in value.items()}
    return value


def _size_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_size_bytes(item) for item in value.values()) if isinstance(value, Mapping) else 0


def _is_complete(path: Path) -> bool:
    try:
        Facts.read(path)
    except CorruptCheckpoint:
        return False
    return True
