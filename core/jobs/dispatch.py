"""One round of the scheduler: reap dead leases, release dependants, place jobs.

One scheduler works at a time (a mutex in the database). Every step is its own short transaction, guarded by the state
that it saw, so that a scheduler that dies half-way, or two at once, leave nothing wrong behind.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog
from sqlalchemy import or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from core.clock import utcnow
from core.db.models import Attempt, Job, JobInput, Lease, Mutex, Node
from core.db.session import Database
from core.errors import InvalidTransition
from core.ids import new_id
from core.jobs import queue, repository
from core.jobs.lifecycle import JobState, transition
from core.scheduler.placement import FreeNode, Need, Refusal, Share, choose, fits_when_empty, offers_devices
from core.settings import Settings

log = structlog.get_logger(__name__)

_MUTEX_TTL_S = 15.0
_RESEND_S = 3.0


def tick(database: Database, settings: Settings) -> None:
    """Run one round, unless another scheduler is at it."""
    with _alone(database) as alone:
        if not alone:
            return
        reap(database, settings, utcnow())
        release_dependants(database)
        place(database, settings, utcnow())
        resend(database, settings, utcnow())


def reap(database: Database, settings: Settings, now: datetime) -> None:
    """End attempts of which a lease ran out (plus the margin in which its supervisor ends itself)."""
    margin = timedelta(seconds=settings.fence_margin_s)
    with database.read() as session:
        expired = session.scalars(
            select(Lease.attempt_id)
            .where(Lease.state.in_(("pending", "held")), Lease.expires_at < now - margin)
            .distinct()
        ).all()
    for attempt_id in expired:
        try:
            with database.write() as session:
                _lose(session, session.get_one(Attempt, attempt_id), settings)
        except InvalidTransition as race:
            log.info("attempt.lose.raced", attempt_id=attempt_id, error=race.message)


def _lose(session: Session, attempt: Attempt, settings: Settings) -> None:
    job = session.get_one(Job, attempt.job_id)
    unreleased = [lease for lease in repository.leases(session, attempt.id) if lease.state != "released"]
    nodes = ", ".join(lease.node for lease in unreleased)
    never_started = all(lease.state == "pending" for lease in unreleased)
    reason = f"attempt {attempt.number} on {nodes} " + (
        f"was not taken up within {settings.start_timeout_s:g} s" if never_started else "stopped renewing its lease"
    )
    session.execute(
        update(Lease).where(Lease.attempt_id == attempt.id, Lease.state != "released").values(state="released")
    )
    attempt.state, attempt.finished_at, attempt.exit = "lost", utcnow(), {"reason": reason}
    log.warning("attempt.lost", job_id=job.id, attempt=attempt.number, nodes=nodes)
    match JobState(job.state):
        case JobState.CANCELLING:
            transition(session, job, JobState.CANCELLED, reason, attempt=attempt.number)
        case JobState.STARTING | JobState.RUNNING if job.retries_left > 0:
            transition(session, job, JobState.QUEUED, reason, attempt=attempt.number, retries_left=job.retries_left - 1)
        case JobState.STARTING | JobState.RUNNING:
            error = {
                "code": "attempt_lost",
                "message": reason,
                "hint": f"all {job.max_attempts} attempts are used; POST …/retry tries again; "
                f"the supervisor's log, HOME/logs/supervisor-NODE.log on {nodes}, may say more",
            }
            transition(session, job, JobState.FAILED, reason, attempt=attempt.number, error=error)
        case _:
            pass


def release_dependants(database: Database) -> None:
    """Queue the waiting jobs whose inputs are there; fail those whose inputs can never come."""
    with database.read() as session:
        waiting = session.scalars(select(Job.id).where(Job.state == JobState.WAITING.value).order_by(Job.id)).all()
    for job_id in waiting:
        try:
            with database.write() as session:
                _release(session, session.get_one(Job, job_id))
        except InvalidTransition as race:
            log.info("job.release.raced", job_id=job_id, error=race.message)


def _release(session: Session, job: Job) -> None:
    sources = session.scalars(
        select(Job).join(JobInput, JobInput.source_job_id == Job.id).where(JobInput.job_id == job.id)
    ).all()
    broken = [source for source in sources if source.state in (JobState.FAILED.value, JobState.CANCELLED.value)]
    if broken:
        message = f"input job {broken[0].id} ({broken[0].name}) {broken[0].state}"
        error = {"code": "dependency_failed", "message": message, "hint": "retry that job, then this one"}
        transition(session, job, JobState.FAILED, message, error=error)
    elif all(source.state == JobState.SUCCEEDED.value for source in sources):
        transition(session, job, JobState.QUEUED, "all inputs are there")


def place(database: Database, settings: Settings, now: datetime) -> None:
    """Give devices to queued jobs, highest priority and then longest wait first.

    A job that does not fit lets others pass, until it has waited `reserve_after_s`: from then on devices that become free
    are kept for it, so that a stream of small jobs cannot hold up a large one for ever. Not so while hosts that it needs are
    drained or gone: it could not start however long the others wait.
    """
    with database.read() as session:
        queued = session.scalars(
            select(Job).where(Job.state == JobState.QUEUED.value).order_by(Job.priority.desc(), Job.queued_at, Job.id)
        ).all()
        free = free_nodes(session, settings, now)
    patience = timedelta(seconds=settings.reserve_after_s)
    starving: Job | None = None
    for job in queued:
        if starving is not None and job.devices_per_node > 0:
            _explain(database, job, f"devices are being kept for job {starving.id}, which has waited longer")
            continue
        match _beyond_limit(database, settings, job) or choose(need_of_row(job), free):
            case UserLimit(reason):
                _explain(database, job, reason)
            case Refusal(reason):
                _explain(database, job, reason)
                waits_long = job.queued_at is not None and now - job.queued_at > patience
                if job.devices_per_node > 0 and waits_long and fits_when_empty(need_of_row(job), free):
                    starving = job
            case _:
                _place(database, job.id, settings, now)
                with database.read() as session:
                    free = free_nodes(session, settings, now)


@dataclass(frozen=True)
class UserLimit:
    """The job's owner holds as many devices as one user may: it waits for that user's own jobs, and nothing is kept for it."""

    reason: str


def _beyond_limit(database: Database, settings: Settings, job: Job) -> UserLimit | None:
    most, wanted = settings.max_user_devices, job.num_nodes * job.devices_per_node
    if most is None or wanted == 0:
        return None
    with database.read() as session:
        held = session.scalars(
            select(Lease.devices)
            .join(Attempt, Attempt.id == Lease.attempt_id)
            .join(Job, Job.id == Attempt.job_id)
            .where(Lease.state != "released", Job.owner == job.owner)
        ).all()
    used = sum(map(len, held))
    if used + wanted <= most:
        return None
    return UserLimit(f"needs {wanted} device(s); {job.owner} holds {used} of at most {most} (TEMPER_MAX_USER_DEVICES)")


def need_of_row(job: Job) -> Need:
    """What a stored job takes of the cluster."""
    return Need(job.num_nodes, job.devices_per_node)


def _explain(database: Database, job: Job, reason: str) -> None:
    """Tell why a job still waits, if it is not told yet."""
    if job.reason != reason:
        with database.write() as session:
            session.execute(
                update(Job).where(Job.id == job.id, Job.state == JobState.QUEUED.value).values(reason=reason)
            )


def _place(database: Database, job_id: str, settings: Settings, now: datetime) -> None:
    """Place one job if it still is queued and what it needs still is free."""
    try:
        with database.write() as session:
            job = session.get_one(Job, job_id, with_for_update=True)
            shares = choose(need_of_row(job), free_nodes(session, settings, now))
            if job.state != JobState.QUEUED.value or isinstance(shares, Refusal):
                return
            leases = _grant(session, job, shares, settings, now)
    except (InvalidTransition, IntegrityError) as race:
        log.info("job.place.raced", job_id=job_id, error=str(race))
        return
    for lease in leases:
        queue.send_launch(settings, lease.id, lease.node)


def _grant(session: Session, job: Job, shares: tuple[Share, ...], settings: Settings, now: datetime) -> list[Lease]:
    previous = repository.attempt(session, job.id)
    number = previous.number + 1 if previous else 1
    attempt = Attempt(id=new_id("att"), job_id=job.id, number=number, state="starting", started_at=now)
    session.add(attempt)
    session.flush()
    granted = [
        Lease(
            id=new_id("lea"),
            attempt_id=attempt.id,
            node=share.node,
            node_rank=rank,
            devices=list(share.devices),
            token=secrets.token_hex(16),
            state="pending",
            expires_at=now + timedelta(seconds=settings.start_timeout_s),
            created_at=now,
            shipped={},
        )
        for rank, share in enumerate(shares)
    ]
    session.add_all(granted)
    where = ", ".join(f"{share.node}{list(share.devices) or ''}" for share in shares)
    transition(session, job, JobState.STARTING, f"placed on {where}", attempt=number, error=None, progress=None)
    log.info("job.placed", job_id=job.id, attempt=number, where=where)
    return granted


def free_nodes(session: Session, settings: Settings, now: datetime) -> list[FreeNode]:
    """Live, healthy hosts with their free devices and slots."""
    seen_after = now - timedelta(seconds=settings.node_ttl_s)
    nodes = session.scalars(select(Node).where(Node.healthy, Node.last_seen_at > seen_after).order_by(Node.name)).all()
    kinds = set(session.scalars(select(Node.device_kind)))
    used: dict[str, set[int]] = {node.name: set() for node in nodes}
    hosted = dict.fromkeys(used, 0)
    for lease in session.scalars(select(Lease).where(Lease.state != "released", Lease.node.in_(used))):
        used[lease.node].update(lease.devices)
        hosted[lease.node] += not lease.devices
    offered = {
        node.name: [device["id"] for device in node.devices if device["healthy"]]
        if offers_devices(node.device_kind, kinds)
        else []
        for node in nodes
    }
    return [
        FreeNode(
            name=node.name,
            devices=tuple(device for device in offered[node.name] if device not in used[node.name]),
            host_slots=node.host_jobs - hosted[node.name],
            drained=node.drained,
            size=len(offered[node.name]),
        )
        for node in nodes
    ]


def resend(database: Database, settings: Settings, now: datetime) -> None:
    """Send the launch message again for leases that nobody has taken up: the first one may be lost."""
    with database.read() as session:
        pending = session.scalars(
            select(Lease).where(Lease.state == "pending", Lease.created_at < now - timedelta(seconds=_RESEND_S))
        ).all()
    for lease in pending:
        queue.send_launch(settings, lease.id, lease.node)


@contextmanager
def _alone(database: Database) -> Iterator[bool]:
    holder, now = secrets.token_hex(8), utcnow()
    expires_at = now + timedelta(seconds=_MUTEX_TTL_S)
    with database.write() as session:
        taken = session.execute(
            update(Mutex)
            .where(Mutex.name == "scheduler", or_(Mutex.expires_at < now, Mutex.holder == ""))
            .values(holder=holder, expires_at=expires_at)
        ).rowcount  # type: ignore[attr-defined]  # an UPDATE gives a CursorResult
    try:
        yield taken == 1
    finally:
        if taken == 1:
            with database.write() as session:
                session.execute(
                    update(Mutex).where(Mutex.name == "scheduler", Mutex.holder == holder).values(holder="")
                )
