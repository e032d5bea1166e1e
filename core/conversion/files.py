"""Files: inputs mapped into memory, outputs hashed while they are written.

Output files have mode 0640 and folders 0750, as MindSpeed-MM's converter makes them.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.conversion.apply import ITEM_SIZE, Bytes
from core.errors import DiskFull
from core.models.mapping import Shape, width

FILE_MODE = 0o640
FOLDER_MODE = 0o750


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
        with path.open("rb") as stream:
            self._mmap = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self.data: Bytes = np.frombuffer(self._mmap, np.uint8)

    def release(self) -> None:
        """Let go of the pages that were read; they stay in the system's cache and come back when they are read again."""
        self._mmap.madvise(mmap.MADV_DONTNEED)


class HashingWriter:
    """A sequential file that knows its SHA-256. Not seekable, so that what was hashed cannot change any more."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._sha256 = hashlib.sha256()
        self.position = 0

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[HashingWriter]:
        """Create `path`, which must not exist; on failure it is removed. A full disk raises DiskFull."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE)
        try:
            os.fchmod(descriptor, FILE_MODE)
            with disk_full_named(path):
                yield cls(descriptor)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)

    def write(self, data: bytes | memoryview) -> int:
        """Append; returns the number of bytes."""
        view = memoryview(data).cast("B")
        self._sha256.update(view)
        written = 0
        while written < len(view):
            written += os.write(self._descriptor, view[written:])
        self.position += written
        return written

    def flush(self) -> None:
        """Nothing is buffered here."""

    def hexdigest(self) -> str:
        """SHA-256 of all that was written."""
        return self._sha256.hexdigest()


@contextmanager
def disk_full_named(path: Path) -> Iterator[None]:
    """Turn the system's "no space left" into DiskFull."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"no space left while writing {path.name}") from error
        raise


def make_folder(path: Path) -> Path:
    """Create a folder and its parents, mode 0750."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        path.chmod(FOLDER_MODE)
    return path
