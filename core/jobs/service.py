"""What may be done with jobs and artifacts: the rules behind the API's routes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sqlalchemy import delete, func, or_, select, update
from sqlalchemy.orm import Session

from core.clock import utcnow
from core.db.models import Artifact, Attempt, Event, Job, JobInput, Lease, LogChunk
from core.errors import Conflict, NotFound, OverLimit
from core.ids import new_id
from core.jobs.inspection import inspect_folder
from core.jobs.lifecycle import FINISHED, JobState, append_events, transition
from core.jobs.planning import Plan, Planner, main_output, need_of
from core.jobs.principal import Principal
from core.settings import Settings
from core.specs.request import JobRequest
from core.storage.local import Store, resolve_allowed
from core.storage.manifest import Manifest, describe

_LIVE = [state.value for state in JobState if state not in FINISHED]


def plan(session: Session, *, settings: Settings, store: Store, principal: Principal, request: JobRequest) -> Plan:
    """Say what the job would do, or refuse it with the reasons; nothing is stored."""
    return _planner(session, settings, store, principal).plan(request.kind, request.spec)


def submit(session: Session, *, settings: Settings, store: Store, principal: Principal, request: JobRequest) -> Job:
    """Check the job and put it in line."""
    planned = plan(session, settings=settings, store=store, principal=principal, request=request)
    _check_limit(session, settings, principal)
    need, now = need_of(request.spec), utcnow()
    job = Job(
        id=new_id("job"),
        kind=request.kind,
        name=request.name or request.kind,
        labels=dict(request.labels),
        priority=request.priority,
        owner=principal.user,
        spec=request.spec.model_dump(mode="json"),
        num_nodes=need.num_nodes,
        devices_per_node=need.devices_per_node,
        state=JobState.QUEUED.value,
        max_attempts=request.max_attempts,
        retries_left=request.max_attempts - 1,
        last_seq=0,
        latest_metrics={},
        created_at=now,
        queued_at=now,
    )
    session.add(job)
    session.flush()
    for name, ref in request.spec.references():
        session.add(
            JobInput(
                job_id=job.id,
                field=name,
                source_job_id=ref.job,
                output=ref.output,
                artifact_id=ref.artifact,
                path=ref.path,
            )
        )
    session.flush()
    job.state = _first_state(session, job.id).value
    submitted = ("state", None, {"from": None, "state": job.state, "reason": "submitted"})
    risks = [("warning", None, {"code": "risk", "message": risk}) for risk in planned.risks]
    append_events(session, job.id, [submitted, *risks], attempt=None)
    session.refresh(job)
    return job


def _check_limit(session: Session, settings: Settings, principal: Principal) -> None:
    if settings.max_user_jobs is None:
        return
    count = session.scalar(
        select(func.count()).select_from(Job).where(Job.owner == principal.user, Job.state.in_(_LIVE))
    )
    if (count or 0) >= settings.max_user_jobs:
        raise OverLimit(
            f"{principal.user} has {count} unfinished jobs, the most that one user may have",
            hint="wait for some to finish, or cancel some; an operator sets the limit (TEMPER_MAX_USER_JOBS)",
        )


def cancel(session: Session, job: Job) -> Job:
    """Ask a job to stop. Idempotent while it stops and once it is cancelled; a job that ended otherwise is a Conflict."""
    match JobState(job.state):
        case JobState.WAITING | JobState.QUEUED:
            transition(session, job, JobState.CANCELLED, "cancelled by the user")
        case JobState.STARTING | JobState.RUNNING:
            transition(session, job, JobState.CANCELLING, "cancelled by the user")
        case JobState.SUCCEEDED | JobState.FAILED:
            raise Conflict(f"job {job.id} has already {job.state}")
        case _:
            pass
    return job


def retry(session: Session, job: Job) -> Job:
    """Put a failed or cancelled job in line again; idempotent while it is in line."""
    match JobState(job.state):
        case JobState.FAILED | JobState.CANCELLED:
            transition(
                session,
                job,
                _first_state(session, job.id),
                "retried by the user",
                error=None,
                retries_left=job.max_attempts - 1,
            )
        case JobState.WAITING | JobState.QUEUED:
            pass
        case state:
            raise Conflict(f"job {job.id} is {state.value}; only a failed or cancelled job can be retried")
    return job


def get_job(session: Session, principal: Principal, job_id: str) -> Job:
    """A job that the caller may see."""
    job = session.get(Job, job_id)
    if job is None or not (principal.is_admin or job.owner == principal.user):
        raise NotFound(f"no job {job_id}")
    return job


def get_artifact(session: Session, principal: Principal, artifact_id: str) -> Artifact:
    """An artifact that the caller may see: their own, or a shared one."""
    artifact = session.get(Artifact, artifact_id)
    visible = artifact is not None and (principal.is_admin or artifact.shared or artifact.owner == principal.user)
    if artifact is None or not visible or artifact.deleted_at is not None:
        raise NotFound(f"no artifact {artifact_id}")
    return artifact


def register(
    session: Session, *, settings: Settings, store: Store, principal: Principal, kind: str, path: str, name: str | None
) -> Artifact:
    """Make a folder under an allow-listed root an artifact; its files stay where they are.

    What an admin registers is shared with all users. Folders above `hash_limit_bytes` are listed without SHA-256.
    """
    real = resolve_allowed(path, settings.allow_roots)
    kind, metadata, size = inspect_folder(real, kind, roots=settings.allow_roots)
    manifest = Manifest(
        id=new_id("art"),
        kind=kind,
        name=name or real.name,
        created_at=utcnow(),
        files=describe(real, hashed=size <= settings.hash_limit_bytes),
        metadata=metadata,
    )
    store.publish(manifest)
    return adopt(session, store=store, principal=principal, manifest=manifest, shared=principal.is_admin, path=real)


def adopt(
    session: Session,
    *,
    store: Store,
    principal: Principal,
    manifest: Manifest,
    shared: bool = False,
    path: Path | None = None,
) -> Artifact:
    """Record a published artifact; `path` is where the files lie if not in the store."""
    artifact = Artifact(
        id=manifest.id,
        kind=manifest.kind,
        name=manifest.name,
        owner=principal.user,
        shared=shared,
        path=str(path or store.files_dir(manifest.id)),
        size_bytes=manifest.size_bytes,
        num_files=len(manifest.files),
        meta=manifest.metadata,
        parents=manifest.lineage.parents,
        job_id=manifest.lineage.job_id,
        created_at=manifest.created_at,
    )
    session.add(artifact)
    session.flush()
    return artifact


def delete_artifact(session: Session, artifact: Artifact) -> None:
    """Mark an artifact as deleted; the caller removes its files after the commit. Refused while something needs it."""
    if users := _users(session, artifact):
        raise Conflict(
            f"artifact {artifact.id} is used by job {users[0]}, which has not finished", hint="cancel that job first"
        )
    if artifact.kind == "dataset_source":
        children = _datasets_reading(session, artifact)
        if children:
            raise Conflict(
                f"artifact {artifact.id} holds the images of data set {children[0]}", hint="delete that data set first"
            )
    artifact.deleted_at = utcnow()


def delete_job(session: Session, job: Job, *, artifacts: bool) -> list[str]:
    """Remove a finished job with its history and, if that is asked for, its artifacts; return these.

    The caller removes folder and files after the commit. Refused while the job, or an unfinished one that needs its outputs, could go
    on, and while there are artifacts that nobody asked to delete.
    """
    session.refresh(job, with_for_update=True)
    attempts = select(Attempt.id).where(Attempt.job_id == job.id)
    leases = session.scalars(select(Lease.node).where(Lease.attempt_id.in_(attempts), Lease.state != "released")).all()
    if not JobState(job.state).is_finished or leases:
        still = f", but still ends on {', '.join(leases)}" if JobState(job.state).is_finished else ""
        raise Conflict(
            f"job {job.id} is {job.state}{still}", hint="cancel it, or wait for its end", code="job_not_finished"
        )
    users = session.scalars(
        select(Job.id)
        .join(JobInput, JobInput.job_id == Job.id)
        .where(JobInput.source_job_id == job.id, Job.state.in_(_LIVE))
    ).all()
    if users:
        raise Conflict(
            f"job {job.id} is an input of job {users[0]}, which has not finished",
            hint="cancel that job first",
            code="job_in_use",
        )
    made = session.scalars(select(Artifact).where(Artifact.job_id == job.id, Artifact.deleted_at.is_(None))).all()
    if made and not artifacts:
        raise Conflict(
            f"job {job.id} has {len(made)} artifact(s), among them {made[0].name} ({made[0].id})",
            hint="delete them with it (artifacts=true), or keep the job: it tells how they were made",
            code="job_has_artifacts",
        )
    for artifact in made:
        delete_artifact(session, artifact)
    session.flush()
    session.execute(update(JobInput).where(JobInput.source_job_id == job.id).values(source_job_id=None))
    session.execute(update(Artifact).where(Artifact.job_id == job.id).values(job_id=None))
    session.execute(delete(LogChunk).where(LogChunk.attempt_id.in_(attempts)))
    session.execute(delete(Lease).where(Lease.attempt_id.in_(attempts)))
    for table in (Attempt, Event, JobInput):
        session.execute(delete(table).where(table.job_id == job.id))
    session.execute(delete(Job).where(Job.id == job.id))
    return [artifact.id for artifact in made]


def drop_surplus(session: Session, job: Job) -> list[str]:
    """Mark as deleted what a training's attempts left beyond `keep_last`, and return it; the caller removes the files after the commit.

    Of checkpoints, and of adapters, the highest iterations stay, and of one iteration the newest; of the curves the newest. What an
    unfinished job uses stays too.
    """
    if job.kind != "training":
        return []
    made: dict[str, dict[int, list[Artifact]]] = {}
    for artifact in session.scalars(
        select(Artifact)
        .where(Artifact.job_id == job.id, Artifact.deleted_at.is_(None))
        .order_by(Artifact.created_at, Artifact.id)
    ):
        of_iteration = made.setdefault(artifact.kind, {}).setdefault(artifact.meta.get("iteration", 0), [])
        of_iteration.append(artifact)
    dropped = []
    for iterations in made.values():
        kept = sorted(iterations)[-job.spec["checkpoint"]["keep_last"] :]
        surplus = [artifact for number, of in iterations.items() for artifact in (of[:-1] if number in kept else of)]
        dropped += [artifact for artifact in surplus if not _users(session, artifact)]
    for artifact in dropped:
        artifact.deleted_at = utcnow()
    return [artifact.id for artifact in dropped]


def _first_state(session: Session, job_id: str) -> JobState:
    states = session.scalars(
        select(Job.state).join(JobInput, JobInput.source_job_id == Job.id).where(JobInput.job_id == job_id)
    ).all()
    return JobState.QUEUED if all(state == JobState.SUCCEEDED.value for state in states) else JobState.WAITING


def _users(session: Session, artifact: Artifact) -> Sequence[str]:
    """The unfinished jobs that read it."""
    return [*_jobs_naming(session, artifact), *_jobs_using_output(session, artifact)]


def _jobs_naming(session: Session, artifact: Artifact) -> Sequence[str]:
    return session.scalars(
        select(Job.id)
        .join(JobInput, JobInput.job_id == Job.id)
        .where(JobInput.artifact_id == artifact.id, Job.state.in_(_LIVE))
    ).all()


def _jobs_using_output(session: Session, artifact: Artifact) -> Sequence[str]:
    if artifact.job_id is None:
        return []
    job = session.get_one(Job, artifact.job_id)
    is_meant = JobInput.output == artifact.name
    if artifact.name == main_output(job.kind, job.spec):
        is_meant = or_(is_meant, JobInput.output.is_(None))
    return session.scalars(
        select(Job.id)
        .join(JobInput, JobInput.job_id == Job.id)
        .where(JobInput.source_job_id == artifact.job_id, is_meant, Job.state.in_(_LIVE))
    ).all()


def _datasets_reading(session: Session, artifact: Artifact) -> list[str]:
    rows = session.execute(
        select(Artifact.id, Artifact.parents).where(Artifact.kind == "dataset", Artifact.deleted_at.is_(None))
    )
    return [found for found, parents in rows if artifact.id in parents]


def _planner(session: Session, settings: Settings, store: Store, principal: Principal) -> Planner:
    return Planner(
        session=session,
        settings=settings,
        store=store,
        principal=principal,
        get_artifact=lambda artifact_id: get_artifact(session, principal, artifact_id),
        get_job=lambda job_id: get_job(session, principal, job_id),
    )
