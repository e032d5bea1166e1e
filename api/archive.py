"""An artifact as an uncompressed tar that exists nowhere: its layout follows from the manifest, so any byte can be given at once.

    per file, in the manifest's order:   [pax header, if the name is long or not ASCII, or the size ≥ 8 GiB]
                                         ustar header (512)   content   zeros up to a multiple of 512
    at the end:                          1024 zeros

Owner, mode and time are the same for all files (the time is the artifact's), so two archives of an artifact are equal, and a
download that broke off goes on with `Range`.
"""

from __future__ import annotations

import hashlib
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from core.errors import Conflict
from core.storage.manifest import FileEntry

_BLOCK = tarfile.BLOCKSIZE
_END = bytes(2 * _BLOCK)
_MAX_PLAIN_SIZE = 8**11
_READ_BYTES = 1 << 20


class Archive:
    """The layout of one artifact's tar. `locate` gives a file's path on disk when its turn comes."""

    def __init__(self, files: Sequence[FileEntry], *, mtime: int, locate: Callable[[FileEntry], Path]) -> None:
        self._files, self._mtime, self._locate = files, mtime, locate
        self._starts: list[int] = []
        position = 0
        for entry in files:
            self._starts.append(position)
            position += self._header_size(entry) + _padded(entry.size)
        self._end = position
        self.size = position + len(_END)

    @property
    def etag(self) -> str:
        """Changes whenever a byte of the archive could."""
        digest = hashlib.sha256(f"tar {self._mtime}\n".encode())
        for entry in self._files:
            version = entry.sha256 or self._locate(entry).stat().st_mtime_ns
            digest.update(f"{entry.size} {version} {entry.path}\n".encode())
        return f'"tar-{digest.hexdigest()}"'

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes [start, stop)."""
        index = max(0, bisect_right(self._starts, start) - 1)
        while index < len(self._files) and self._starts[index] < stop:
            base = self._starts[index]
            yield from self._read_member(self._files[index], max(0, start - base), stop - base)
            index += 1
        if stop > self._end:
            yield _END[max(0, start - self._end) : stop - self._end]

    def _read_member(self, entry: FileEntry, start: int, stop: int) -> Iterator[bytes]:
        """Yield [start, stop) of a member, counted from its header; `stop` may lie beyond its end."""
        header_size = self._header_size(entry)
        if start < header_size:
            yield self._header(entry)[start:stop]
        content_end = header_size + entry.size
        if start < content_end and stop > header_size and entry.size:
            yield from read_file(
                self._locate(entry), entry.size, max(0, start - header_size), min(stop, content_end) - header_size
            )
        member_end = header_size + _padded(entry.size)
        padding = min(stop, member_end) - max(start, content_end)
        if padding > 0:
            yield bytes(padding)

    def _header_size(self, entry: FileEntry) -> int:
        plain = len(entry.path) <= tarfile.LENGTH_NAME and entry.path.isascii() and entry.size < _MAX_PLAIN_SIZE
        return _BLOCK if plain else len(self._header(entry))

    def _header(self, entry: FileEntry) -> bytes:
        member = tarfile.TarInfo(entry.path)
        member.size, member.mode, member.mtime = entry.size, 0o644, self._mtime
        return member.tobuf(tarfile.PAX_FORMAT)


def read_file(path: Path, size: int, start: int, stop: int) -> Iterator[bytes]:
    """Yield the bytes [start, stop) of a file that must still be `size` bytes long; Conflict if it is not."""
    with path.open("rb") as stream:
        if stream.seek(0, 2) != size:
            raise Conflict(f"{path.name} is no longer {size} bytes long: it was changed after the artifact was made")
        stream.seek(start)
        while start < stop:
            block = stream.read(min(_READ_BYTES, stop - start))
            if not block:
                raise Conflict(f"{path.name} became shorter while it was read")
            start += len(block)
            yield block


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
