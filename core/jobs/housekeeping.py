"""What nobody will come back for: abandoned uploads, temporary folders of artifacts whose writers died, what conversions that
were cancelled had finished, the checkpoints from which an old failed or cancelled training could have gone on, and files of deleted
artifacts where a server died before it removed them.

A folder is never removed for want of a row: the database may be an older one, come back from a backup.

The age of a temporary folder is that of its newest file, so one that is being written, however large, is left alone.
"""

from __future__ import annotations

import os
import shutil
import time
from datetime import datetime, timedelta
from pathlib import Path

import structlog
from sqlalchemy import select

from core.db.models import Artifact, Job, Upload
from core.db.session import Database
from core.jobs.lifecycle import JobState
from core.settings import Settings
from core.storage.local import Store

log = structlog.get_logger(__name__)

_SCRAP_AGE_S = 24 * 3600.0


def clean(database: Database, settings: Settings, now: datetime) -> None:
    """Remove what is too old."""
    store = Store(settings.store_dir)
    expire_uploads(database, store, now - timedelta(seconds=settings.upload_ttl_s))
    drop_checkpoints(database, store, now - timedelta(seconds=settings.keep_checkpoints_s))
    finish_deletions(database, store)
    for folder in (store.temporary_root, *store.root.glob("jobs/*/conversion")):
        remove_scraps(folder, older_than=time.time() - _SCRAP_AGE_S)


def expire_uploads(database: Database, store: Store, before: datetime) -> None:
    """Forget uploads that were begun before that time and never completed, and their bytes."""
    with database.write() as session:
        stale = session.scalars(
            select(Upload).where(Upload.state.in_(("receiving", "failed")), Upload.created_at < before)
        ).all()
        for upload in stale:
            session.delete(upload)
    for upload in stale:
        store.upload_path(upload.id).unlink(missing_ok=True)
        log.info("upload.expired", upload_id=upload.id)


def drop_checkpoints(database: Database, store: Store, before: datetime) -> None:
    """Remove the working checkpoints of trainings that failed or were cancelled before that time; what became an artifact stays one.

    A retry afterwards starts anew. The folder is moved away under the job's lock, so that no retry sees half of it.
    """
    over = (JobState.FAILED.value, JobState.CANCELLED.value)
    with database.read() as session:
        old = session.scalars(
            select(Job.id).where(Job.kind == "training", Job.state.in_(over), Job.finished_at < before)
        ).all()
    for job_id in old:
        folder, scrap = store.job_dir(job_id) / "checkpoints", store.temporary_root / f"{job_id}.checkpoints"
        if not folder.is_dir():
            continue
        with database.write() as session:
            job = session.get_one(Job, job_id, with_for_update=True)
            if job.state not in over:
                continue
            scrap.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(scrap)
        shutil.rmtree(scrap, ignore_errors=True)
        log.info("checkpoints.dropped", job_id=job_id)


def finish_deletions(database: Database, store: Store) -> None:
    """Remove the files of artifacts that are marked as deleted."""
    present = {folder.name for folder in store.root.glob("artifacts/*")}  # of all that was ever deleted few are
    with database.read() as session:
        deleted = session.scalars(select(Artifact.id).where(Artifact.deleted_at.is_not(None))).all()
    for artifact_id in present.intersection(deleted):
        store.delete(artifact_id)


def remove_scraps(folder: Path, *, older_than: float) -> None:
    """Remove the entries of `folder` in which nothing has changed since that time (seconds since the epoch)."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if _newest_change(entry) < older_than:
            shutil.rmtree(entry, ignore_errors=True)
            log.info("scrap.removed", name=entry.name)


def _newest_change(entry: Path) -> float:
    newest = entry.stat().st_mtime
    for parent, _, names in os.walk(entry):
        newest = max([newest, *(Path(parent, name).lstat().st_mtime for name in names)])
    return newest
