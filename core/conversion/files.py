"""Files: inputs mapped into memory, outputs hashed while they are written.

Output files have mode 0640 and folders 0750, as MindSpeed-MM's converter makes them.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.conversion.apply import ITEM_SIZE, Bytes
from core.errors import DiskFull
from core.models.mapping import Shape, width

FILE_MODE = 0o640
FOLDER_MODE = 0o750
_SMALL_BYTES = 256 << 10


@dataclass(frozen=True)
class OutTensor:
    """A tensor to be written: its bytes come in chunks when their turn is there."""

    dtype: str
    shape: Shape
    chunks: Callable[[], Iterable[Bytes]]

    @property
    def size_bytes(self) -> int:
        """Bytes of its values."""
        return self.shape[0] * width(self.shape) * ITEM_SIZE[self.dtype] if self.shape else ITEM_SIZE[self.dtype]


class MappedFile:
    """A file whose bytes are read where they are used."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as stream:
            self._mmap = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        with suppress(OSError, AttributeError):  # a system without huge pages does not know the advice
            # A touch would otherwise make 2 MiB resident, and opening a checkpoint touches thousands of places.
            self._mmap.madvise(mmap.MADV_NOHUGEPAGE)
        self.data: Bytes = np.frombuffer(self._mmap, np.uint8)

    def release(self) -> None:
        """Let go of the pages that were read; they stay in the system's cache and come back when they are read again."""
        self._mmap.madvise(mmap.MADV_DONTNEED)

    def drop_cache(self) -> None:
        """Sync the file and let the system forget its pages, so that what is read next comes from the disk."""
        self.release()
        descriptor = os.open(self._path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


class HashingWriter:
    """A sequential file that knows its SHA-256. Not seekable, so that what was hashed cannot change any more.

    Hashing goes on in a thread of its own, at most two blocks behind the writing; what is written must not change afterwards.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._hashing = _Hashing()
        self.position = 0

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[HashingWriter]:
        """Create `path`, which must not exist; on failure it is removed. A full disk raises DiskFull."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE)
        try:
            os.fchmod(descriptor, FILE_MODE)
            writer = cls(descriptor)
            with writer._hashing, disk_full_named(path):
                yield writer
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)

    def write(self, data: bytes | memoryview) -> int:
        """Append; returns the number of bytes."""
        view = memoryview(data).cast("B")
        self._hashing.update(view)
        written = 0
        while written < len(view):
            written += os.write(self._descriptor, view[written:])
        self.position += written
        return written

    def flush(self) -> None:
        """Nothing is buffered here."""

    def hexdigest(self) -> str:
        """SHA-256 of all that was written; nothing can be written after."""
        return self._hashing.finish()


class _Hashing:
    """SHA-256 in a thread. Small pieces are joined, so that a step is worth its hand-over."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._small = bytearray()
        self._queue: queue.Queue[bytes | bytearray | memoryview | None] = queue.Queue(maxsize=2)
        self._thread = threading.Thread(target=self._run, name="sha256", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self.finish()

    def update(self, view: memoryview) -> None:
        if len(view) < _SMALL_BYTES:
            self._small += view
        else:
            self._put_small()
            self._queue.put(view)
        if len(self._small) >= _SMALL_BYTES:
            self._put_small()

    def finish(self) -> str:
        if self._thread.is_alive():
            self._put_small()
            self._queue.put(None)
            self._thread.join()
        return self._sha256.hexdigest()

    def _put_small(self) -> None:
        if self._small:
            self._queue.put(self._small)
            self._small = bytearray()

    def _run(self) -> None:
        while (piece := self._queue.get()) is not None:
            self._sha256.update(piece)
            del piece  # or its memory stays until the next one comes


@contextmanager
def disk_full_named(path: Path) -> Iterator[None]:
    """Turn the system's "no space left", or the end of a quota or of a file size limit, into DiskFull."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFull(f"writing {path.name} failed: {error.strerror}") from error
        raise


def make_folder(path: Path) -> Path:
    """Create a folder and its parents, mode 0750."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        path.chmod(FOLDER_MODE)
    return path
