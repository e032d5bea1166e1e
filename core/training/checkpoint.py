"""Checkpoints of a training: mm weights, and beside them what a resume needs to go on bit for bit.

    FOLDER/
      latest_checkpointed_iteration.txt      "50"; moved last, by rename
      iter_0000050/
        checkpoint.json                      Facts: iteration, data position, layout, size and digest of every file
        mp_rank_00_000/                      one folder per slice and stage (mp_rank_TT_PPP)
          model_optim_rng.pt                 weights, as MindSpeed-MM reads them; written by the first data-parallel rank
          temper_optim_DDD.pt                AdamW's state of what data-parallel rank DDD owns (absent without save_optim)
          temper_rng_DDD.pt                  random state of that rank (absent without save_rng)
      .iter_0000100.tmp/                     being written, or removed; whoever dies leaves only this

Saving copies all of it to host memory; the rest goes on in the background (`core.training.background`). A folder gets its final name
once every rank has written its files, synced them and read them back, so a folder of that name is complete; sizes are checked all the
same before one is used. The folder must lie on a file system that all ranks share. The learning rate needs no state of its own: it
follows from the iteration.
"""

from __future__ import annotations

import io
import json
import logging
import platform
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.conversion.mm import write_rank_file
from core.conversion.pt import write_pt
from core.errors import CorruptCheckpoint, DiskFull
from core.parallel.mesh import Mesh
from core.storage.local import fsync
from core.storage.manifest import hash_file
from core.training.background import Writing, Written, settled
from core.training.contents import Contents, load_file, tree_of
from core.training.host_memory import has_room_for
from core.training.together import Together

FACTS = "checkpoint.json"
TRACKER = "latest_checkpointed_iteration.txt"
WEIGHTS_FILE = "model_optim_rng.pt"
SPARE_BYTES = 64 << 20
"""Left free beyond what a checkpoint needs."""
PATIENCE_S = 20.0
"""After an error: how long rank 0 waits for the other ranks' parts of the checkpoint that is being written."""

_log = logging.getLogger("temper.runner")


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
    has_rng: bool = False
    dp_size: int = 1
    files: dict[str, int] = field(default_factory=dict)
    """Relative path to size in bytes."""
    digests: dict[str, str] = field(default_factory=dict)
    """Relative path to SHA-256."""

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
    """The checkpoints of one job, in one folder; all ranks together call `save`, `wait` and `newest`."""

    def __init__(self, folder: Path, mesh: Mesh, *, rank_folder: str, keep_last: int) -> None:
        """`rank_folder` is the `mp_rank_…` of this rank's slice and stage."""
        self.folder = folder
        self.mesh = mesh
        self.rank_folder = rank_folder
        self.keep_last = keep_last
        self._writing: Writing | None = None
        self._copy: Contents | None = None
        """Host memory for all saves in the background."""
        self._reserving: threading.Thread | None = None
        self._temporary = folder

    @property
    def has_failed(self) -> bool:
        """Whether this rank's part of the last checkpoint could not be written; `wait` on all ranks then raises the error."""
        return self._writing is not None and self._writing.error is not None

    def reserve(self, contents: Contents) -> None:
        """Begin to take the memory for copies, in a thread: touching new memory takes longer than training should wait in a save."""
        contents = self._own(contents)
        if has_room_for(_on_this_host(Together(self.mesh).gather((platform.node(), contents.size_bytes)))):
            self._reserving = threading.Thread(target=self._take_memory, args=(contents,), name="reserve", daemon=True)
            self._reserving.start()

    def save(self, facts: Facts, contents: Contents, *, in_background: bool = True) -> None:
        """Begin to write a checkpoint, after the one before is complete: when this returns, training may go on.

        Without `in_background`, or memory for a copy, it is this rank that waits while its files are written.
        Raises the same error on all ranks when one fails, DiskFull when there is no room.
        """
        self.wait()
        began = time.perf_counter()
        final = self.folder / f"iter_{facts.position.iteration:07d}"
        self._temporary = self.folder / f".{final.name}.tmp"
        contents = self._own(contents)
        with Together(self.mesh) as step:
            told = step.gather((platform.node(), contents.size_bytes))
            if self.mesh.rank == 0:
                self._make_room(sum(size for _, size in told))
        with Together(self.mesh):
            self._end_reserving()
            needed = _on_this_host(told)
            is_copied = in_background and (self._copy is not None or has_room_for(needed))
            if is_copied:
                contents = self._copy = contents.copied(self._copy)
            elif in_background:
                _log.warning("training waits for the checkpoint: no host memory for a copy of %d bytes", needed)
        self._writing = Writing(
            self._temporary,
            rank=self.mesh.rank,
            world_size=self.mesh.world_size,
            write=partial(self._write, facts.position.iteration, contents),
            complete=partial(self._complete, final, facts, began),
        )
        if not is_copied:
            self._writing.wait_for_own_part()

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is complete; on failure remove it and raise on all ranks."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            with Together(self.mesh):
                writing.wait_for_own_part()
                if writing.error is not None:
                    raise writing.error
            with Together(self.mesh):
                writing.join()
                if writing.error is not None:
                    raise writing.error
        except Exception:
            writing.abandon()
            if self.mesh.rank == 0:
                shutil.rmtree(self._temporary, ignore_errors=True)
            raise

    def close(self) -> None:
        """Let what is being written come to its end if it can, whatever the other ranks do. For the way out of an error."""
        self._end_reserving()
        if self._writing is not None:
            self._writing.join(PATIENCE_S)
            self._writing = None

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint; all ranks get rank 0's answer."""
        with Together(self.mesh) as step:
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
        for key, chunk in load_file(path / self.rank_folder / WEIGHTS_FILE).items():
            if key == "model":
                yield from chunk.items()
            elif key.startswith("model"):  # a virtual chunk
                yield from ((f"{key}.{name}", tensor) for name, tensor in chunk.items())

    def load_rng(self, path: Path) -> dict[str, Tensor]:
        """Read this rank's random state."""
        return load_file(path / self.rank_folder / self._name_of("rng"))

    def _own(self, contents: Contents) -> Contents:
        """Return what this rank writes: of all data-parallel ranks the first writes the weights."""
        return contents if self.mesh.dp_rank == 0 else replace(contents, weights={})

    def _take_memory(self, contents: Contents) -> None:
        self._copy = contents.copied(None)

    def _end_reserving(self) -> None:
        if self._reserving is not None:
            self._reserving.join()
            self._reserving = None

    def _name_of(self, content: str) -> str:
        return f"temper_{content}_{self.mesh.dp_rank:03d}.pt"

    def _make_room(self, needed_bytes: int) -> None:
        for leftover in self.folder.glob(".iter_*.tmp"):
            shutil.rmtree(leftover)
        self._temporary.mkdir(parents=True)
        free = shutil.disk_usage(self.folder).free
        if free < needed_bytes + SPARE_BYTES:
            self._temporary.rmdir()
            raise DiskFull(
                f"a checkpoint needs {needed_bytes} bytes, {free} are free in {self.folder}",
                hint="free space there, lower checkpoint.keep_last, or set checkpoint.save_optim to false",
            )

    def _write(self, iteration: int, contents: Contents) -> Written:
        """Write this rank's files, have them on disk, and return what they are."""
        folder = self._temporary / self.rank_folder
        folder.mkdir(exist_ok=True)
        digests: dict[Path, str] = {}
        try:
            if self.mesh.dp_rank == 0:
                path = folder / WEIGHTS_FILE
                digests[path] = write_rank_file(path, contents.weights, iteration=iteration)
            if contents.optimizer is not None:
                path = folder / self._name_of("optim")
                digests[path] = write_pt(path, tree_of(contents.optimizer))
            if contents.rng is not None:
                path = folder / self._name_of("rng")
                buffer = io.BytesIO()
                torch.save(dict(contents.rng), buffer)
                path.write_bytes(buffer.getvalue())
                digests[path] = hash_file(path)
        except DiskFull as error:
            raise DiskFull(
                f"the checkpoint of iteration {iteration} was not written: {error.message}",
                hint="free space, lower checkpoint.keep_last, or set checkpoint.save_optim to false",
            ) from error
        written = {str(path.relative_to(self._temporary)): settled(path, digest) for path, digest in digests.items()}
        fsync(folder)
        return written

    def _complete(self, final: Path, facts: Facts, began: float, written: Written) -> None:
        """Give the checkpoint its name, point the tracker at it, and only then remove old ones."""
        temporary = self._temporary
        facts = replace(
            facts,
            files={name: file.size_bytes for name, file in written.items()},
            digests={name: file.sha256 for name, file in written.items()},
        )
        (temporary / FACTS).write_text(json.dumps(asdict(facts), indent=1), encoding="utf-8")
        fsync(temporary / FACTS)
        fsync(temporary)
        if final.exists():  # from an earlier attempt, and refused by `newest`
            _remove(final)
        temporary.rename(final)
        write_tracker(self.folder, facts.position.iteration)
        for old in self.kept()[: -self.keep_last]:
            _remove(old)
        seconds = time.perf_counter() - began
        _log.info("checkpoint of iteration %d is complete, after %.1f s", facts.position.iteration, seconds)


def write_tracker(folder: Path, iteration: int) -> None:
    """Point `latest_checkpointed_iteration.txt` at an iteration, by rename."""
    temporary = folder / f".{TRACKER}.tmp"
    temporary.write_text(str(iteration), encoding="ascii")
    fsync(temporary)
    temporary.rename(folder / TRACKER)
    fsync(folder)


def _on_this_host(told: list[tuple[str, int]]) -> int:
    """Sum the bytes of the ranks on this host, of (host, bytes) of all ranks."""
    return sum(size for host, size in told if host == platform.node())


def _remove(path: Path) -> None:
    """Take a checkpoint's name away before its files, so that none is ever seen with some of them gone."""
    doomed = path.with_name(f".{path.name}.old.tmp")
    path.rename(doomed)
    shutil.rmtree(doomed)


def _is_complete(path: Path) -> bool:
    try:
        Facts.read(path)
    except CorruptCheckpoint:
        return False
    return True
