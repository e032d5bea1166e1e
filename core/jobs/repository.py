"""Every query on jobs, attempts, events and logs."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from core.db.models import Artifact, Attempt, Event, Job, JobInput, Lease, LogChunk

MAIN_LOG = -1
"""Rank under which the job's own log (the launcher's stdout and stderr) is stored."""


def attempts(session: Session, job_id: str) -> Sequence[Attempt]:
    """All attempts, first to last."""
    return session.scalars(select(Attempt).where(Attempt.job_id == job_id).order_by(Attempt.number)).all()


def attempt(session: Session, job_id: str, number: int | None = None) -> Attempt | None:
    """One attempt by number; the newest if no number is given."""
    query = select(Attempt).where(Attempt.job_id == job_id).order_by(Attempt.number.desc()).limit(1)
    return session.scalars(query if number is None else query.where(Attempt.number == number)).first()


def leases(session: Session, attempt_id: str) -> Sequence[Lease]:
    """The leases of an attempt by node rank."""
    return session.scalars(select(Lease).where(Lease.attempt_id == attempt_id).order_by(Lease.node_rank)).all()


def inputs(session: Session, job_id: str) -> Sequence[JobInput]:
    """The inputs as posted."""
    return session.scalars(select(JobInput).where(JobInput.job_id == job_id).order_by(JobInput.field)).all()


def outputs(session: Session, job_id: str) -> Sequence[Artifact]:
    """The artifacts that the job made and that still exist; later ones of a name replace earlier ones."""
    found = session.scalars(
        select(Artifact)
        .where(Artifact.job_id == job_id, Artifact.deleted_at.is_(None))
        .order_by(Artifact.created_at, Artifact.id)
    )
    return list({artifact.name: artifact for artifact in found}.values())


def output(session: Session, job: Job, name: str) -> Artifact | None:
    """One output by name."""
    return next((artifact for artifact in outputs(session, job.id) if artifact.name == name), None)


def events_after(session: Session, job_id: str, seq: int, limit: int = 500) -> Sequence[Event]:
    """Events with a number above `seq`, in order."""
    return session.scalars(
        select(Event).where(Event.job_id == job_id, Event.seq > seq).order_by(Event.seq).limit(limit)
    ).all()


def metric_series(
    session: Session, job_id: str, *, names: Sequence[str] | None = None, since_step: int | None = None
) -> dict[str, list[tuple[int, float, float | None]]]:
    """Series of (step, time, value) by metric name; of a step computed again after a lost attempt the later value holds."""
    query = select(Event.step, Event.data).where(Event.job_id == job_id, Event.type == "metric").order_by(Event.seq)
    if since_step is not None:
        query = query.where(Event.step >= since_step)
    series: dict[str, dict[int, tuple[int, float, float | None]]] = {}
    for step, data in session.execute(query):
        for name, value in data["values"].items():
            if names is None or name in names:
                series.setdefault(name, {})[step] = (step, data["time"], value)
    return {name: [points[step] for step in sorted(points)] for name, points in series.items()}


def log_size(session: Session, attempt_id: str, rank: int = MAIN_LOG) -> int:
    """Bytes of the log that are in the database."""
    end = session.scalar(
        select(func.max(LogChunk.offset + LogChunk.size)).where(
            LogChunk.attempt_id == attempt_id, LogChunk.rank == rank
        )
    )
    return end or 0


def read_log(session: Session, attempt_id: str, rank: int, offset: int, limit: int) -> bytes:
    """At most `limit` bytes of the log from `offset`."""
    chunks = session.scalars(
        select(LogChunk)
        .where(
            LogChunk.attempt_id == attempt_id,
            LogChunk.rank == rank,
            LogChunk.offset + LogChunk.size > offset,
            LogChunk.offset < offset + limit,
        )
        .order_by(LogChunk.offset)
    )
    parts = []
    for chunk in chunks:
        start, end = max(0, offset - chunk.offset), offset + limit - chunk.offset
        parts.append(zlib.decompress(chunk.data)[start:end])
    return b"".join(parts)
