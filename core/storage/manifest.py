"""The manifest of an artifact: every file with size and SHA-256, what it is, and where it comes from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

_BLOCK = 1 << 20


class FileEntry(BaseModel):
    """One file; `path` is relative with forward slashes, `sha256` is None where a registered folder was not hashed."""

    path: str
    size: int
    sha256: str | None


class Lineage(BaseModel):
    """What an artifact was made from."""

    job_id: str | None = None
    attempt: int | None = None
    spec_sha256: str | None = None
    code_version: str | None = None
    parents: list[str] = []


class Manifest(BaseModel):
    """`manifest.json`, beside the artifact's `files/`."""

    model_config = ConfigDict(extra="ignore")

    version: int = 1
    id: str
    kind: str
    name: str
    created_at: datetime
    files: list[FileEntry]
    metadata: dict[str, Any] = {}
    lineage: Lineage = Lineage()

    @property
    def size_bytes(self) -> int:
        """Sum of all files."""
        return sum(entry.size for entry in self.files)


def walk_files(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield (relative path, path) of every regular file below `root`, sorted; links to directories are not followed."""
    found = []
    for folder, _, names in os.walk(root):
        found += [Path(folder) / name for name in names]
    for path in sorted(found):
        if path.is_file():
            yield path.relative_to(root).as_posix(), path


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def describe(
    root: Path,
    *,
    digests: dict[str, str] | None = None,
    hashed: bool = True,
    progress: Callable[[int], None] = lambda _: None,
) -> list[FileEntry]:
    """List the files below `root`; SHA-256 known already (by relative path) is taken from `digests`."""
    entries = []
    for relative, path in walk_files(root):
        size = path.stat().st_size
        known = (digests or {}).get(relative)
        entries.append(FileEntry(path=relative, size=size, sha256=known or (hash_file(path) if hashed else None)))
        progress(size)
    return entries
