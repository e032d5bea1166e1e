"""From the inputs of a job, as posted, to folders."""

from __future__ import annotations

from sqlalchemy.orm import Session

from core.db.models import Artifact, Job, JobInput
from core.errors import NotFound
from core.jobs import repository
from core.jobs.inspection import inspect_folder
from core.jobs.planning import main_output
from core.settings import Settings
from core.specs.events import InputArtifact
from core.storage.local import resolve_allowed


def resolve_inputs(session: Session, job: Job, settings: Settings) -> dict[str, InputArtifact]:
    """Find each input's folder now that all of them must exist; NotFound names what does not."""
    return {item.field: _resolve(session, item, settings) for item in repository.inputs(session, job.id)}


def _resolve(session: Session, item: JobInput, settings: Settings) -> InputArtifact:
    if item.path is not None:
        real = resolve_allowed(item.path, settings.allow_roots)
        kind, metadata, _ = inspect_folder(real, roots=settings.allow_roots)
        return InputArtifact(artifact_id=None, kind=kind, path=str(real), metadata=metadata)
    artifact = _artifact(session, item)
    if artifact is None or artifact.deleted_at is not None:
        raise NotFound(f"spec.{item.field}: the input no longer exists")
    return InputArtifact(artifact_id=artifact.id, kind=artifact.kind, path=artifact.path, metadata=artifact.meta)


def _artifact(session: Session, item: JobInput) -> Artifact | None:
    if item.artifact_id is not None:
        return session.get(Artifact, item.artifact_id)
    if item.source_job_id is None:  # that job was deleted
        return None
    source = session.get_one(Job, item.source_job_id)
    return repository.output(session, source, item.output or main_output(source.kind, source.spec))
