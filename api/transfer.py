"""Moving files between client and API: a folder as a tar that is read from any offset; what a download verifies."""

from __future__ import annotations

import hashlib
import os
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

BLOCK_BYTES = 1 << 20
PART_SUFFIX = ".part"

# (bytes done, bytes in all, what is being moved)
OnBytes = Callable[[int, int, str], None]


class TransferError(Exception):
    """A transfer that cannot go on; the message says with which file and why."""


# Uploads


@dataclass(frozen=True)
class _Segment:
    """A run of the tar: literal bytes, or a file's content with zeros up to the next 512-byte block."""

    start: int
    size: int
    literal: bytes = b""
    path: Path | None = None
    file_size: int = 0

    def read(self, offset: int, count: int) -> bytes:
        count = min(count, self.size - offset)
        if self.path is None:
            return self.literal[offset : offset + count]
        wanted = max(min(count, self.file_size - offset), 0)
        content = b""
        if wanted:
            with self.path.open("rb") as stream:
                stream.seek(offset)
                content = stream.read(wanted)
            if len(content) != wanted:
                raise TransferError(f"{self.path} changed while it was sent")
        return content + bytes(count - len(content))


@dataclass(frozen=True)
class FileSource:
    """One file, as it is."""

    path: Path

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    @property
    def filename(self) -> str:
        return self.path.name

    def read(self, offset: int, count: int) -> bytes:
        """At most `count` bytes from `offset`; empty at the end."""
        with self.path.open("rb") as stream:
            stream.seek(offset)
            return stream.read(count)


@dataclass(frozen=True)
class FolderSource:
    """A folder as an uncompressed tar that is never written down: its layout is fixed, so any offset can be read.

    Regular files only, sorted by name, without owner, time or mode of this machine. A link to a file is sent as the
    file; other links and special files are refused.
    """

    path: Path
    segments: list[_Segment] = field(default_factory=list)

    @classmethod
    def of(cls, path: Path) -> FolderSource:
        source = cls(path)
        offset = 0
        for file in sorted(_regular_files(path)):
            size = file.stat().st_size
            member = tarfile.TarInfo(file.relative_to(path).as_posix())
            member.size, member.mode = size, 0o644
            header = member.tobuf(tarfile.PAX_FORMAT)
            source.segments.append(_Segment(offset, len(header), literal=header))
            offset += len(header)
            padded = -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if padded:
                source.segments.append(_Segment(offset, padded, path=file, file_size=size))
            offset += padded
        if not source.segments:
            raise TransferError(f"{path} holds no file")
        end = -(-(offset + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
        source.segments.append(_Segment(offset, end - offset, literal=bytes(end - offset)))
        return source

    @property
    def size(self) -> int:
        return self.segments[-1].start + self.segments[-1].size

    @property
    def filename(self) -> str:
        return f"{self.path.resolve().name}.tar"

    def read(self, offset: int, count: int) -> bytes:
        """At most `count` bytes from `offset`; empty at the end."""
        pieces: list[bytes] = []
        index = bisect_right(self.segments, offset, key=lambda segment: segment.start) - 1
        while count and index < len(self.segments):
            segment = self.segments[index]
            piece = segment.read(offset - segment.start, count)
            pieces.append(piece)
            offset, count, index = offset + len(piece), count - len(piece), index + 1
        return b"".join(pieces)


Source = FileSource | FolderSource


def open_source(path: Path) -> Source:
    """What is to be uploaded from `path`; raises TransferError when there is nothing to send."""
    if path.is_dir():
        return FolderSource.of(path)
    if path.is_file():
        return FileSource(path)
    raise TransferError(f"{path} is neither a file nor a folder")


def _regular_files(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        for name in folders:
            if (Path(root) / name).is_symlink():
                raise TransferError(f"{Path(root) / name} is a link to a folder; upload that folder itself")
        for name in names:
            file = Path(root) / name
            if not file.is_file():
                raise TransferError(f"{file} is not a regular file")
            yield file


# Downloads


@dataclass
class Download:
    """What a download did. `unverified`: files for which the server has no SHA-256 (large registered folders)."""

    files: int = 0
    size: int = 0
    fetched_bytes: int = 0
    unverified: list[str] = field(default_factory=list)


def target_path(folder: Path, name: str) -> Path:
    """Where the artifact's file `name` goes below `folder`; a name that would leave it is refused."""
    parts = PurePosixPath(name)
    if not name or parts.is_absolute() or ".." in parts.parts or "\\" in name or "\0" in name:
        raise TransferError(f"the server named a file {name!r}, which does not lie inside the artifact")
    return folder.joinpath(*parts.parts)


def sha256_of(path: Path, on_block: Callable[[int], None] = lambda _: None) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
            on_block(len(block))
    return digest.hexdigest()


def is_complete(path: Path, *, size: int, sha256: str | None) -> bool:
    """Whether the file is there, whole and right, so that it need not be fetched again."""
    return path.is_file() and path.stat().st_size == size and (sha256 is None or sha256_of(path) == sha256)
