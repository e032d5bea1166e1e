"""The artifact store on a (shared) file system.

STORE/artifacts/<id>/manifest.json     written last; a folder without it is not an artifact
STORE/artifacts/<id>/files/…           absent for a registered folder, whose files stay where they are
STORE/artifacts/.tmp/<id>/…            being written
STORE/jobs/<job>/attempts/<n>/…        job.json, events.jsonl, run.log, logs/rank_<r>.log
STORE/jobs/<job>/checkpoints/…         survive attempts
STORE/uploads/<id>                     being uploaded
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from core.errors import ForbiddenPath, NotFound
from core.storage.manifest import Manifest


class Store:
    """Paths and atomic publication below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def free_bytes(self) -> int:
        """Room that is left where the store is, or will be."""
        return shutil.disk_usage(next(path for path in (self.root, *self.root.parents) if path.exists())).free

    def artifact_dir(self, artifact_id: str) -> Path:
        """Folder of a published artifact."""
        return self.root / "artifacts" / artifact_id

    def files_dir(self, artifact_id: str) -> Path:
        """Folder of a published artifact's own files."""
        return self.artifact_dir(artifact_id) / "files"

    def job_dir(self, job_id: str) -> Path:
        """Folder of a job, shared by its attempts and hosts."""
        return self.root / "jobs" / job_id

    def attempt_dir(self, job_id: str, number: int) -> Path:
        """Folder of one attempt."""
        return self.job_dir(job_id) / "attempts" / str(number)

    def upload_path(self, upload_id: str) -> Path:
        """File that an upload grows in."""
        return self.root / "uploads" / upload_id

    def begin(self, artifact_id: str) -> Path:
        """Make and return the temporary `files/` folder of a new artifact."""
        path = self._temporary(artifact_id) / "files"
        path.mkdir(parents=True)
        return path

    def publish(self, manifest: Manifest) -> Path:
        """Sync what `begin` started, write its manifest and rename it into place; return the artifact's folder."""
        temporary, final = self._temporary(manifest.id), self.artifact_dir(manifest.id)
        temporary.mkdir(parents=True, exist_ok=True)
        with (temporary / "manifest.json").open("w", encoding="utf-8") as stream:
            stream.write(manifest.model_dump_json(indent=1))
        for folder, _, names in os.walk(temporary):
            for name in names:
                fsync(Path(folder) / name)
            fsync(Path(folder))
        temporary.rename(final)
        fsync(final.parent)
        return final

    def abort(self, artifact_id: str) -> None:
        """Remove what `begin` started, if it is still there."""
        shutil.rmtree(self._temporary(artifact_id), ignore_errors=True)

    def manifest(self, artifact_id: str) -> Manifest:
        """Read a published artifact's manifest."""
        path = self.artifact_dir(artifact_id) / "manifest.json"
        try:
            return Manifest.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise NotFound(f"artifact {artifact_id} has no manifest in the store") from None

    def delete(self, artifact_id: str) -> None:
        """Remove a published artifact; a registered folder's files are left alone."""
        self._remove(self.artifact_dir(artifact_id))

    def delete_job(self, job_id: str) -> None:
        """Remove a job's folder."""
        self._remove(self.job_dir(job_id))

    def _remove(self, folder: Path) -> None:
        """Take a folder's name away before its files, so that none is ever seen with some of them gone."""
        doomed = self._temporary(folder.name).with_suffix(".deleted")
        doomed.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.rename(doomed)
        except FileNotFoundError:
            return
        shutil.rmtree(doomed, ignore_errors=True)

    @property
    def temporary_root(self) -> Path:
        """Folder of the artifacts that are being written or deleted."""
        return self.root / "artifacts" / ".tmp"

    def _temporary(self, artifact_id: str) -> Path:
        return self.temporary_root / artifact_id


def resolve_allowed(path: str, roots: Iterable[Path]) -> Path:
    """Return the real path of a user's `path`, which must exist under one of `roots` after links are resolved."""
    allowed = [root.expanduser().resolve() for root in roots]
    hint = f"allowed roots: {', '.join(map(str, allowed))}" if allowed else "no root is allowed: set TEMPER_ALLOW_ROOTS"
    if "\0" in path or not path.startswith("/"):
        raise ForbiddenPath(f"path {path!r} is not an absolute path", hint=hint)
    real = Path(path).resolve()
    if not any(real.is_relative_to(root) for root in allowed):
        raise ForbiddenPath(f"path {path!r} lies outside the allowed roots", hint=hint)
    if not real.exists():
        raise NotFound(f"path {path!r} does not exist on the server")
    return real


def resolve_inside(root: Path, relative: str) -> Path:
    """Return the real path of `relative` below `root`; refuse what leaves it or does not exist."""
    if not relative or "\0" in relative or "\\" in relative:
        raise NotFound(f"no file {relative!r}")
    real = (root / relative).resolve()
    if not real.is_relative_to(root.resolve()) or not real.is_file():
        raise NotFound(f"no file {relative!r}")
    return real


def fsync(path: Path) -> None:
    """Have a file or folder written to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
