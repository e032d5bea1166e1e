"""Lists: pages of jobs, artifacts and the rest, newest first, each page in a fixed number of queries."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, or_, select
from sqlalchemy.orm import Session

from api.schemas import AttemptOut, InputOut, JobOut, OutputOut
from core.db.models import Artifact, Attempt, Event, Job, JobInput, Lease
from core.jobs.principal import Principal


@dataclass(frozen=True)
class JobFilter:
    """Which jobs; empty lists filter nothing."""

    kinds: Sequence[str] = ()
    states: Sequence[str] = ()
    labels: Sequence[str] = ()
    owner: str | None = None
    name: str | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None


def find_jobs(
    session: Session, principal: Principal, wanted: JobFilter, *, after: str | None, limit: int
) -> Sequence[Job]:
    """Up to `limit` + 1 jobs that the caller may see."""
    query = select(Job).order_by(Job.id.desc()).limit(limit + 1)
    if not principal.is_admin:
        query = query.where(Job.owner == principal.user)
    if wanted.kinds:
        query = query.where(Job.kind.in_(wanted.kinds))
    if wanted.states:
        query = query.where(Job.state.in_(wanted.states))
    for label in wanted.labels:
        query = query.where(_has_label(label))
    if wanted.owner is not None:
        query = query.where(Job.owner == wanted.owner)
    if wanted.name is not None:
        query = query.where(Job.name == wanted.name)
    if wanted.created_after is not None:
        query = query.where(Job.created_at > wanted.created_after)
    if wanted.created_before is not None:
        query = query.where(Job.created_at < wanted.created_before)
    return session.scalars(_after(query, Job.id < after if after else None)).all()


def find_artifacts(
    session: Session, principal: Principal, *, kind: str | None, job: str | None, after: str | None, limit: int
) -> Sequence[Artifact]:
    """Up to `limit` + 1 artifacts that the caller may see."""
    query = select(Artifact).where(Artifact.deleted_at.is_(None)).order_by(Artifact.id.desc()).limit(limit + 1)
    if not principal.is_admin:
        query = query.where(or_(Artifact.owner == principal.user, Artifact.shared))
    if kind is not None:
        query = query.where(Artifact.kind == kind)
    if job is not None:
        query = query.where(Artifact.job_id == job)
    return session.scalars(_after(query, Artifact.id < after if after else None)).all()


def job_out(session: Session, job: Job) -> JobOut:
    """One job with all that belongs to it."""
    return jobs_out(session, [job])[0]


def jobs_out(session: Session, jobs: Sequence[Job]) -> list[JobOut]:
    """Jobs with all that belongs to them."""
    ids = [job.id for job in jobs]
    leases: dict[str, list[Lease]] = defaultdict(list)
    attempts: dict[str, list[AttemptOut]] = defaultdict(list)
    inputs: dict[str, list[InputOut]] = defaultdict(list)
    outputs: dict[str, dict[str, OutputOut]] = defaultdict(dict)
    of_jobs = select(Lease).join(Attempt, Attempt.id == Lease.attempt_id).where(Attempt.job_id.in_(ids))
    for lease in session.scalars(of_jobs.order_by(Lease.node_rank)):
        leases[lease.attempt_id].append(lease)
    for attempt in session.scalars(select(Attempt).where(Attempt.job_id.in_(ids)).order_by(Attempt.number)):
        attempts[attempt.job_id].append(AttemptOut.of(attempt, leases[attempt.id]))
    for item in session.scalars(select(JobInput).where(JobInput.job_id.in_(ids)).order_by(JobInput.field)):
        inputs[item.job_id].append(InputOut.of(item))
    risks: dict[str, list[str]] = defaultdict(list)
    warned = select(Event).where(Event.job_id.in_(ids), Event.type == "warning", Event.attempt.is_(None))
    for event in session.scalars(warned.order_by(Event.seq)):
        risks[event.job_id].append(event.data["message"])
    made = select(Artifact).where(Artifact.job_id.in_(ids), Artifact.deleted_at.is_(None))
    for artifact in session.scalars(made.order_by(Artifact.created_at, Artifact.id)):
        outputs[artifact.job_id or ""][artifact.name] = OutputOut.of(artifact)
    return [
        JobOut.model_validate(
            {
                **{name: getattr(job, name) for name in _JOB_FIELDS},
                "attempts": attempts[job.id],
                "risks": risks[job.id],
                "inputs": inputs[job.id],
                "outputs": list(outputs[job.id].values()),
            }
        )
        for job in jobs
    ]


_JOB_FIELDS = tuple(name for name in JobOut.model_fields if name not in ("attempts", "risks", "inputs", "outputs"))


def _after(query: Select[Any], beyond: ColumnElement[bool] | None) -> Select[Any]:
    return query if beyond is None else query.where(beyond)


def _has_label(label: str) -> ColumnElement[bool]:
    """`key=value`, or `key` for any value."""
    key, separator, value = label.partition("=")
    stored = Job.labels[key].as_string()
    return and_(stored.is_not(None), stored == value) if separator else stored.is_not(None)
