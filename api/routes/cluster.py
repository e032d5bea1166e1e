"""The cluster: its hosts and devices, and the line of jobs with the reason why each one waits."""

from __future__ import annotations

from collections import defaultdict
from datetime import timedelta
from typing import Any

import structlog
from fastapi import APIRouter, Response
from sqlalchemy import select
from sqlalchemy.orm import Session

from api.deps import AdminDep, After, DatabaseDep, Limit, PrincipalDep, SettingsDep
from api.idempotency import Answer, OnceDep
from api.problems import responses
from api.schemas import NodeOut, Page, QueuedOut, QueueOut, page
from core.clock import utcnow
from core.db.models import Attempt, Job, JobInput, Lease, Node
from core.errors import Conflict, NotFound
from core.jobs.lifecycle import JobState
from core.jobs.principal import Principal
from core.settings import Settings

router = APIRouter(prefix="/v1", tags=["cluster"])
log = structlog.get_logger(__name__)


@router.get("/nodes", response_model=Page[NodeOut], responses=responses())
def list_nodes(
    principal: PrincipalDep, settings: SettingsDep, database: DatabaseDep, after: After = None, limit: Limit = 100
) -> dict[str, Any]:
    """Hosts by name, with their devices and which of them are in use."""
    with database.read() as session:
        query = select(Node).order_by(Node.name).limit(limit + 1)
        nodes = session.scalars(query.where(Node.name > after) if after else query).all()
        holders = _holders(session, principal)
    rows = [NodeOut.of(node, holders=holders[node.name], alive=_is_alive(node, settings)) for node in nodes]
    return page(rows, limit, lambda node: node.name)


@router.post("/nodes/{name}/drain", response_model=NodeOut, responses=responses(403, 404))
def drain_node(name: str, admin: AdminDep, settings: SettingsDep, once: OnceDep) -> Response:
    """Take a host out of service: no new jobs are placed there, running ones go on. `/v1/nodes` tells when it is empty."""
    return once.run(lambda session: _set_drained(session, settings, admin, name, drained=True))


@router.post("/nodes/{name}/resume", response_model=NodeOut, responses=responses(403, 404))
def resume_node(name: str, admin: AdminDep, settings: SettingsDep, once: OnceDep) -> Response:
    """Put a drained host back into service."""
    return once.run(lambda session: _set_drained(session, settings, admin, name, drained=False))


@router.delete("/nodes/{name}", status_code=204, responses=responses(403, 404, 409))
def forget_node(name: str, admin: AdminDep, settings: SettingsDep, database: DatabaseDep) -> None:
    """Forget a host that is gone for good, so that nothing counts on its devices. Its worker would register it again."""
    with database.write() as session:
        node = _find(session, name)
        if _is_alive(node, settings):
            raise Conflict(f"host {name} is alive", hint="stop its worker first; to keep jobs away from it, drain it")
        if holders := _holders(session, admin)[name]:
            raise Conflict(f"host {name} still holds devices {sorted(holders)} for a job", hint="try again in a minute")
        session.delete(node)
    log.info("node.forgotten", node=name, by=admin.user)


def _set_drained(session: Session, settings: Settings, admin: Principal, name: str, *, drained: bool) -> Answer:
    node = _find(session, name)
    node.drained = drained
    session.flush()
    log.info("node.drained" if drained else "node.resumed", node=name, by=admin.user)
    return Answer(200, NodeOut.of(node, holders=_holders(session, admin)[name], alive=_is_alive(node, settings)))


def _find(session: Session, name: str) -> Node:
    node = session.get(Node, name)
    if node is None:
        known = ", ".join(session.scalars(select(Node.name).order_by(Node.name).limit(20))) or "none"
        raise NotFound(f"no host {name!r}; there are: {known}")
    return node


def _is_alive(node: Node, settings: Settings) -> bool:
    return node.last_seen_at > utcnow() - timedelta(seconds=settings.node_ttl_s)


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
