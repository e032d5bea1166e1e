"""Writes one rank's part of a checkpoint in a thread, while training goes on.

    rank k   copy ─► write and hash ─► sync ─► read back ─► part_000k.json
    rank 0   the same, then waits for every rank's part file ─► completes the checkpoint

The threads use no collectives, which training's own could get in between of: a rank tells that it is done, or why it failed, by its
part file in the folder being written, which all ranks share.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from core.errors import CorruptCheckpoint
from core.storage.local import fsync
from core.storage.manifest import hash_file

POLL_S = 0.1
"""Between two looks of rank 0 for the other ranks' parts."""


@dataclass(frozen=True)
class WrittenFile:
    """A file that is complete on disk."""

    size_bytes: int
    sha256: str


Written = dict[str, WrittenFile]
"""By path relative to the checkpoint's folder."""


class Writing:
    """A part that is being written. `complete` is rank 0's, and is given all parts."""

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        world_size: int,
        write: Callable[[], Written],
        complete: Callable[[Written], None],
    ) -> None:
        self.error: Exception | None = None
        self._folder, self._rank, self._world_size = folder, rank, world_size
        self._own_part, self._abandoned = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(write, complete), name="checkpoint", daemon=True)
        self._thread.start()

    def wait_for_own_part(self) -> None:
        """Wait until this rank's files are written, or have failed."""
        self._own_part.wait()

    def join(self, timeout_s: float | None = None) -> None:
        """Wait for the end: on rank 0, of all ranks' parts and of the whole. What is not there after `timeout_s` is given up."""
        self._own_part.wait()
        self._thread.join(timeout_s)
        self.abandon()

    def abandon(self) -> None:
        """Wait for other ranks' parts no longer."""
        self._abandoned.set()
        self._thread.join()

    def _run(self, write: Callable[[], Written], complete: Callable[[Written], None]) -> None:
        try:
            _tell(self._part(self._rank), write())
            del write  # and the copies that it holds
            self._own_part.set()
            if self._rank == 0 and (parts := self._collect()) is not None:
                complete(parts)
        except Exception as error:  # noqa: BLE001  for the main thread, which raises it on all ranks
            self.error = error
        finally:
            self._own_part.set()

    def _collect(self) -> Written | None:
        """Wait for all ranks' parts, and put them together; None when that was given up."""
        found: dict[int, Written] = {}
        while True:
            for rank in set(range(self._world_size)) - set(found):
                if self._part(rank).is_file():
                    values = json.loads(self._part(rank).read_bytes())
                    found[rank] = {name: WrittenFile(**value) for name, value in values.items()}
            if len(found) == self._world_size:
                break
            if self._abandoned.wait(POLL_S):
                return None
        for rank in found:
            self._part(rank).unlink()
        return {name: file for rank in sorted(found) for name, file in found[rank].items()}

    def _part(self, rank: int) -> Path:
        return self._folder / f"part_{rank:04d}.json"


def _tell(path: Path, files: Written) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({name: asdict(file) for name, file in files.items()}), encoding="utf-8")
    fsync(temporary)
    temporary.rename(path)


def settled(path: Path, sha256: str) -> WrittenFile:
    """Have a file written to disk, and read it back from there. Raises CorruptCheckpoint where it is not what was written."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    found = hash_file(path)
    if found != sha256:
        raise CorruptCheckpoint(f"{path.name} reads back as {found}, but {sha256} was written: is the disk sound?")
    return WrittenFile(path.stat().st_size, sha256)
