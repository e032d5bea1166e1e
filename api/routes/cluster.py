"""The cluster: its hosts and devices, and the line of jobs with the reason why each one waits."""

from __future__ import annotations

from collections import defaultdict
from datetime import timedelta
from typing import Any

from fastapi import APIRouter
from sqlalchemy import select
from sqlalchemy.orm import Session

from api.deps import After, DatabaseDep, Limit, PrincipalDep, SettingsDep
from api.problems import responses
from api.schemas import NodeOut, Page, QueuedOut, QueueOut, page
from core.clock import utcnow
from core.db.models import Attempt, Job, JobInput, Lease, Node
from core.jobs.lifecycle import JobState
from core.jobs.principal import Principal

router = APIRouter(prefix="/v1", tags=["cluster"])


@router.get("/nodes", response_model=Page[NodeOut], responses=responses())
def list_nodes(
    principal: PrincipalDep, settings: SettingsDep, database: DatabaseDep, after: After = None, limit: Limit = 100
) -> dict[str, Any]:
    """Hosts by name, with their devices and which of them are in use."""
    seen_after = utcnow() - timedelta(seconds=settings.node_ttl_s)
    with database.read() as session:
        query = select(Node).order_by(Node.name).limit(limit + 1)
        nodes = session.scalars(query.where(Node.name > after) if after else query).all()
        holders = _holders(session, principal)
    rows = [NodeOut.of(node, holders=holders[node.name], alive=node.last_seen_at > seen_after) for node in nodes]
    return page(rows, limit, lambda node: node.name)


def _holders(session: Session, principal: Principal) -> dict[str, dict[int, str | None]]:
    """Node -> device -> the job that holds it, None for a job that the caller may not see."""
    held: dict[str, dict[int, str | None]] = defaultdict(dict)
    query = (
        select(Lease.node, Lease.devices, Job.id, Job.owner)
        .join(Attempt, Attempt.id == Lease.attempt_id)
        .join(Job, Job.id == Attempt.job_id)
        .where(Lease.state != "released")
    )
    for node, devices, job_id, owner in session.execute(query):
        visible = job_id if principal.is_admin or owner == principal.user else None
        held[node].update(dict.fromkeys(devices, visible))
    return held


@router.get("/queue", response_model=QueueOut, responses=responses())
def get_queue(principal: PrincipalDep, database: DatabaseDep) -> QueueOut:
    """Your jobs in line, in the order in which they are considered, each with its place in the whole line and why it waits."""
    with database.read() as session:
        states = (JobState.QUEUED.value, JobState.WAITING.value)
        query = select(Job).where(Job.state.in_(states)).order_by(Job.priority.desc(), Job.queued_at, Job.id)
        jobs = session.scalars(query).all()
        sources = _unfinished_sources(session)
    queued = [job for job in jobs if job.state == JobState.QUEUED.value]
    waiting = [job for job in jobs if job.state == JobState.WAITING.value]
    places: list[tuple[int | None, Job]] = [*enumerate(queued, start=1), *((None, job) for job in waiting)]
    rows = [
        QueuedOut(
            job_id=job.id,
            name=job.name,
            kind=job.kind,
            state=job.state,
            priority=job.priority,
            position=place,
            reason=_reason(job, sources[job.id]),
            waiting_for=sources[job.id],
            nodes=job.num_nodes,
            devices_per_node=job.devices_per_node,
            queued_at=job.queued_at,
        )
        for place, job in places
        if principal.is_admin or job.owner == principal.user
    ]
    return QueueOut(data=rows, num_queued=len(queued), num_waiting=len(waiting))


def _unfinished_sources(session: Session) -> dict[str, list[str]]:
    """Job -> the jobs that it needs and that have not succeeded."""
    found: dict[str, list[str]] = defaultdict(list)
    query = (
        select(JobInput.job_id, JobInput.source_job_id)
        .join(Job, Job.id == JobInput.source_job_id)
        .where(Job.state != JobState.SUCCEEDED.value)
        .distinct()
        .order_by(JobInput.source_job_id)
    )
    for job_id, source in session.execute(query):
        if source is not None:
            found[job_id].append(source)
    return found


def _reason(job: Job, sources: list[str]) -> str | None:
    if job.state == JobState.WAITING.value and sources:
        return f"waits for {', '.join(sources)}"
    return job.reason
