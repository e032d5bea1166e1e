"""Uploads: chunks straight to disk, resumable at any byte, and archives unpacked as if their maker were an enemy."""

from __future__ import annotations

import errno
import fcntl
import gzip
import hashlib
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import anyio

from core.clock import utcnow
from core.db.models import Artifact, Upload
from core.db.session import Database
from core.errors import AppError, Conflict, DigestMismatch, DiskFull, NotFound, OffsetMismatch, TooLarge, UnsafeArchive
from core.ids import new_id
from core.jobs import service
from core.jobs.inspection import inspect_folder
from core.jobs.principal import Principal
from core.settings import Settings
from core.storage.local import Store
from core.storage.manifest import Manifest, describe, hash_file

_BLOCK = 1 << 20
_MAX_HEADER_BYTES = 1 << 20
_FREE_RATIO_BYTES = 64 << 20
"""Up to this size an archive may unpack to without regard to the ratio: short texts compress well, and fill no disk."""
_ROOT_MARKS = {
    "hf_model": "config.json",
    "hf_adapter": "adapter_config.json",
    "mm_checkpoint": "latest_checkpointed_iteration.txt",
    "mm_adapter": "latest_checkpointed_iteration.txt",
}


# Receiving


def begin(
    settings: Settings,
    store: Store,
    principal: Principal,
    *,
    filename: str,
    kind: str,
    name: str | None,
    size_bytes: int,
    sha256: str | None,
) -> Upload:
    """Make room for an upload; the caller stores the row."""
    if size_bytes > settings.max_upload_bytes:
        raise TooLarge(f"size_bytes ({size_bytes}) is larger than an upload may be ({settings.max_upload_bytes})")
    folder = store.upload_path("x").parent
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if size_bytes > free:
        raise DiskFull(f"size_bytes ({size_bytes}) is more than the {free} bytes that are free on the server")
    upload_id = new_id("upl")
    return Upload(
        id=upload_id,
        owner=principal.user,
        filename=filename,
        kind=kind,
        name=name or _stem(filename),
        size_bytes=size_bytes,
        offset=0,
        sha256=sha256,
        state="receiving",
        created_at=utcnow(),
    )


def find(database: Database, principal: Principal, upload_id: str) -> Upload:
    """An upload of the caller."""
    with database.read() as session:
        upload = session.get(Upload, upload_id)
    if upload is None or not (principal.is_admin or upload.owner == principal.user):
        raise NotFound(f"no upload {upload_id}")
    return upload


async def receive(database: Database, store: Store, upload: Upload, offset: int, body: AsyncIterator[bytes]) -> int:
    """Append a chunk at `offset`; return the new offset. What arrived of a chunk that broke off stays, and is counted."""
    with _held(store, upload.id) as stream:
        upload = await anyio.to_thread.run_sync(_fresh, database, upload.id)
        if upload.state != "receiving":
            raise Conflict(f"upload {upload.id} is {upload.state}")
        if offset != upload.offset:
            raise OffsetMismatch(
                f"Upload-Offset is {offset}, but the upload stands at {upload.offset}",
                hint=f"send the bytes from {upload.offset}",
            )
        position = offset
        try:
            await anyio.to_thread.run_sync(_rewind, stream, offset)
            async for block in body:
                if position + len(block) > upload.size_bytes:
                    raise TooLarge(f"the chunk goes beyond the {upload.size_bytes} bytes that were announced")
                await anyio.to_thread.run_sync(stream.write, block)
                position += len(block)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(_settle, database, stream, upload.id, position)
    return position


def _fresh(database: Database, upload_id: str) -> Upload:
    with database.read() as session:
        return session.get_one(Upload, upload_id)


def _rewind(stream: IO[bytes], offset: int) -> None:
    stream.truncate(offset)  # bytes of a chunk whose server died before it counted them
    stream.seek(offset)


def _settle(database: Database, stream: IO[bytes], upload_id: str, position: int) -> None:
    """Count only what is on the disk."""
    stream.flush()
    os.fsync(stream.fileno())
    with database.write() as session:
        session.get_one(Upload, upload_id).offset = position


@contextmanager
def _held(store: Store, upload_id: str) -> Iterator[IO[bytes]]:
    """The upload's file, for one writer at a time, also among several API processes."""
    path = store.upload_path(upload_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "r+b") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise Conflict(
                f"upload {upload_id} is being written or completed by another request", hint="wait and try again"
            ) from None
        yield stream


def abort(database: Database, store: Store, upload: Upload) -> None:
    """Forget an upload that is not complete, with what arrived of it."""
    with _held(store, upload.id), database.write() as session:
        fresh = session.get_one(Upload, upload.id)
        if fresh.state == "complete":
            raise Conflict(f"upload {upload.id} is complete", hint=f"delete artifact {fresh.artifact_id} instead")
        session.delete(fresh)
    store.upload_path(upload.id).unlink(missing_ok=True)


# Completing


def complete(
    database: Database, settings: Settings, store: Store, principal: Principal, upload: Upload, sha256: str | None
) -> Artifact:
    """Verify, unpack, check and publish; the same again gives the same artifact."""
    if upload.state == "complete":
        return _finished(database, principal, upload)
    with _held(store, upload.id):
        upload = _fresh(database, upload.id)
        if upload.state == "complete":
            store.upload_path(upload.id).unlink(missing_ok=True)
            return _finished(database, principal, upload)
        if upload.state == "failed":
            raise Conflict(f"upload {upload.id} has failed", hint="begin a new upload")
        if upload.offset != upload.size_bytes:
            raise Conflict(
                f"upload {upload.id} has {upload.offset} of {upload.size_bytes} bytes",
                hint=f"send the bytes from {upload.offset}",
            )
        try:
            manifest = _publish(settings, store, upload, sha256)
        except AppError as error:
            if not isinstance(error, DiskFull):
                _fail(database, store, upload)
            raise
        with database.write() as session:
            row = session.get_one(Upload, upload.id)
            artifact = service.adopt(session, store=store, principal=_owner(principal, upload), manifest=manifest)
            row.state, row.artifact_id = "complete", artifact.id
    store.upload_path(upload.id).unlink(missing_ok=True)
    return artifact


def _finished(database: Database, principal: Principal, upload: Upload) -> Artifact:
    with database.read() as session:
        return service.get_artifact(session, principal, upload.artifact_id or "")


def _owner(principal: Principal, upload: Upload) -> Principal:
    """An admin may complete somebody's upload; it stays theirs."""
    return Principal(principal.key_id, upload.owner, principal.role)


def _fail(database: Database, store: Store, upload: Upload) -> None:
    with database.write() as session:
        session.get_one(Upload, upload.id).state = "failed"
    store.upload_path(upload.id).unlink(missing_ok=True)


def _publish(settings: Settings, store: Store, upload: Upload, sha256: str | None) -> Manifest:
    path, artifact_id = store.upload_path(upload.id), "art_" + upload.id.removeprefix("upl_")
    if (store.artifact_dir(artifact_id) / "manifest.json").exists():
        return store.manifest(artifact_id)  # a server died between publication and its record
    _verify(path, {upload.sha256, sha256} - {None})
    store.abort(artifact_id)
    root = store.begin(artifact_id)
    try:
        digests = unpack(path, upload.filename, root, Limits.of(settings))
        digests = _strip_single_folder(root, upload.kind, digests)
        kind, metadata, _ = inspect_folder(root, upload.kind)
        manifest = Manifest(
            id=artifact_id,
            kind=kind,
            name=upload.name,
            created_at=utcnow(),
            files=describe(root, digests=digests),
            metadata=metadata,
        )
        store.publish(manifest)
    except OSError as error:
        store.abort(artifact_id)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                "the server's disk is full", hint="delete artifacts that are no longer needed, then complete again"
            ) from error
        raise
    except BaseException:
        store.abort(artifact_id)
        raise
    return manifest


def _verify(path: Path, announced: set[str | None]) -> None:
    if not announced:
        return
    found = hash_file(path)
    for digest in announced - {found}:
        raise DigestMismatch(f"the upload's SHA-256 is {found}, announced was {digest}", hint="begin a new upload")


def _strip_single_folder(root: Path, kind: str, digests: dict[str, str]) -> dict[str, str]:
    """Weights that were packed as `model/…` are lifted to the top, where their kind has its marker file."""
    mark, entries = _ROOT_MARKS.get(kind), list(root.iterdir())
    if mark is None or len(entries) != 1 or not (entries[0] / mark).is_file():
        return digests
    lifted = root.with_name("lifted")
    entries[0].rename(lifted)
    root.rmdir()
    lifted.rename(root)
    return {path.partition("/")[2]: digest for path, digest in digests.items()}


# Unpacking


@dataclass
class Limits:
    """What an archive may become, and how much of it was used up."""

    max_bytes: int
    max_files: int
    max_ratio: float
    packed_bytes: int = 1
    bytes: int = 0
    entries: int = 0
    seen: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, settings: Settings) -> Limits:
        """The configured limits."""
        return cls(settings.max_unpacked_bytes, settings.max_unpacked_files, settings.max_unpack_ratio)

    def entry(self) -> None:
        """Count an entry of any kind."""
        self.entries += 1
        if self.entries > self.max_files:
            raise UnsafeArchive(f"the archive holds more than {self.max_files} entries")

    def name(self, path: str) -> None:
        """Note a file's path."""
        if path in self.seen:
            raise UnsafeArchive(f"the archive holds {path!r} twice")
        self.seen.add(path)

    def grow(self, count: int) -> None:
        """Count unpacked bytes."""
        self.bytes += count
        if self.bytes > self.max_bytes:
            raise UnsafeArchive(f"the archive unpacks to more than {self.max_bytes} bytes")
        if self.bytes > _FREE_RATIO_BYTES and self.bytes > self.max_ratio * self.packed_bytes:
            raise UnsafeArchive(f"the archive unpacks to more than {self.max_ratio:g} times its size")


def unpack(path: Path, filename: str, root: Path, limits: Limits) -> dict[str, str]:
    """Unpack an archive (by its name, which its content must bear out) into the empty folder `root`, or move a plain file there.

    Return the SHA-256 of each file. Only regular files and folders are taken; anything else, any path that could leave `root`, and
    any path that comes twice is an UnsafeArchive.
    """
    limits.packed_bytes = max(1, path.stat().st_size)
    lower = filename.lower()
    try:
        if lower.endswith(".zip"):
            return _unpack_zip(path, root, limits)
        if lower.endswith(".tar"):
            with path.open("rb") as plain:
                return _unpack_tar(plain, root, limits)
        if lower.endswith((".tar.gz", ".tgz")):
            with gzip.open(path) as packed:
                return _unpack_tar(packed, root, limits)  # type: ignore[arg-type]  # a GzipFile is read like any file
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        NotImplementedError,
        ValueError,
    ) as error:
        raise UnsafeArchive(f"{filename} cannot be read as an archive: {error}", code="corrupt_archive") from error
    except OSError as error:
        if error.errno in (None, errno.EINVAL):  # gzip.BadGzipFile, and a seek to where no byte can be
            raise UnsafeArchive(f"{filename} cannot be read as an archive: {error}", code="corrupt_archive") from error
        raise
    with path.open("rb") as source:
        return {filename: _write(source, root / safe_path(filename), path.stat().st_size, limits)}


def safe_path(name: str) -> str:
    """The entry's path below the root, normalised; UnsafeArchive for one that could lead elsewhere."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        raise UnsafeArchive(f"the archive holds a name that is not UTF-8: {name!r}") from None
    bad = name.startswith("/") or "\\" in name or ".." in parts or any(ord(character) < 32 for character in name)
    if bad or not parts or len(encoded) > 4000 or any(len(part.encode()) > 255 for part in parts):
        raise UnsafeArchive(f"the archive holds an unsafe path: {name[:200]!r}")
    return "/".join(parts)


class _Metered:
    """An archive's stream, which lets no header grow without bounds: tarfile would take a pax header of any size into memory."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._headers, self.in_content = stream, 0, False

    def read(self, size: int = -1) -> bytes:
        """Read on; UnsafeArchive when too much came since the last content."""
        piece = self._stream.read(size)
        self._headers = 0 if self.in_content else self._headers + len(piece)
        if self._headers > _MAX_HEADER_BYTES:
            raise UnsafeArchive(f"the archive has a header of more than {_MAX_HEADER_BYTES} bytes")
        return piece


def _unpack_tar(stream: IO[bytes], root: Path, limits: Limits) -> dict[str, str]:
    digests, metered = {}, _Metered(stream)
    with tarfile.open(fileobj=metered, mode="r|", errorlevel=2) as archive:  # type: ignore[call-overload]  # it only reads
        for member in archive:
            archive.members = []  # else every header of a long archive stays in memory
            limits.entry()
            if member.isdir():
                if member.name.strip("./"):
                    _make_folder(root, safe_path(member.name))
                continue
            if not member.isreg() or member.issparse():
                raise UnsafeArchive(f"the archive holds {member.name!r}, which is neither a regular file nor a folder")
            name = safe_path(member.name)
            limits.name(name)
            content = archive.extractfile(member)
            assert content is not None
            metered.in_content = True
            digests[name] = _write(content, _target(root, name), member.size, limits)
            metered.in_content = False
    while rest := stream.read(_BLOCK):  # padding, and to where gzip checks its sum
        limits.grow(len(rest))
    return digests


def _unpack_zip(path: Path, root: Path, limits: Limits) -> dict[str, str]:
    digests = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            limits.entry()
            kind = stat.S_IFMT(member.external_attr >> 16)
            if member.flag_bits & 0x1:
                raise UnsafeArchive(f"the archive holds {member.filename!r} encrypted")
            if "\0" in member.orig_filename or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise UnsafeArchive(
                    f"the archive holds {member.filename!r}, which is neither a regular file nor a folder"
                )
            name = safe_path(member.filename)
            if member.is_dir():
                _make_folder(root, name)
                continue
            limits.name(name)
            with archive.open(member) as content:
                digests[name] = _write(content, _target(root, name), member.file_size, limits)
    return digests


def _make_folder(root: Path, name: str) -> None:
    try:
        (root / name).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UnsafeArchive(f"the archive holds {name!r} as a file and as a folder") from None


def _target(root: Path, name: str) -> Path:
    parent = name.rpartition("/")[0]
    if parent:
        _make_folder(root, parent)
    return root / name


def _write(source: IO[bytes], target: Path, size: int, limits: Limits) -> str:
    """Write what `source` gives, counted while it comes; return its SHA-256."""
    digest, written = hashlib.sha256(), 0
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o640)
    except (FileExistsError, IsADirectoryError):
        raise UnsafeArchive(f"the archive holds {target.name!r} twice, or as a file and as a folder") from None
    with os.fdopen(descriptor, "wb") as sink:
        while block := source.read(_BLOCK):
            limits.grow(len(block))
            digest.update(block)
            sink.write(block)
            written += len(block)
    if written != size:
        raise UnsafeArchive(f"the archive is cut off in {target.name!r}", code="corrupt_archive")
    return digest.hexdigest()


def _stem(filename: str) -> str:
    for suffix in (".tar.gz", ".tgz", ".tar", ".zip"):
        if filename.lower().endswith(suffix) and len(filename) > len(suffix):
            return filename[: -len(suffix)]
    return filename
