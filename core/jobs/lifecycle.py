"""The states of a job, which changes are allowed, and the one function that makes them.

waiting ──► queued ──► starting ──► running ──► succeeded
   │          │  ▲        │  │         │  └───► failed
   │          │  └────────┴──┼─────────┤ (lost: back to the queue)
   │          │              ▼         ▼
   └──────────┴──► cancelled ◄── cancelling
failed, cancelled ──► queued | waiting   (retry)
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

from sqlalchemy import update
from sqlalchemy.orm import Session

from core.clock import utcnow
from core.db.models import Event, Job
from core.errors import InvalidTransition


class JobState(str, Enum):
    """Where a job is in its life."""

    WAITING = "waiting"
    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_finished(self) -> bool:
        """True when nothing more happens without the user."""
        return self in FINISHED

    @property
    def is_active(self) -> bool:
        """True while an attempt holds or may hold devices."""
        return self in ACTIVE


FINISHED = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})
ACTIVE = frozenset({JobState.STARTING, JobState.RUNNING, JobState.CANCELLING})

_S = JobState
TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    _S.WAITING: frozenset({_S.QUEUED, _S.FAILED, _S.CANCELLED}),
    _S.QUEUED: frozenset({_S.STARTING, _S.FAILED, _S.CANCELLED}),
    _S.STARTING: frozenset({_S.RUNNING, _S.QUEUED, _S.FAILED, _S.CANCELLING}),
    _S.RUNNING: frozenset({_S.SUCCEEDED, _S.FAILED, _S.CANCELLING, _S.QUEUED}),
    _S.CANCELLING: frozenset({_S.CANCELLED, _S.SUCCEEDED, _S.FAILED}),
    _S.SUCCEEDED: frozenset(),
    _S.FAILED: frozenset({_S.QUEUED, _S.WAITING}),
    _S.CANCELLED: frozenset({_S.QUEUED, _S.WAITING}),
}


def transition(
    session: Session, job: Job, to: JobState, reason: str | None = None, *, attempt: int | None = None, **changes: Any
) -> None:
    """Move `job` to state `to`, together with `changes` of other columns, and record the event.

    The update is conditional on the state that the caller saw: when somebody else was faster, `InvalidTransition`.
    """
    origin = JobState(job.state)
    if to not in TRANSITIONS[origin]:
        raise InvalidTransition(f"job {job.id} is {origin.value} and cannot become {to.value}")
    now = utcnow()
    changes = {"state": to.value, "reason": reason, **changes}
    if to is _S.QUEUED:
        changes["queued_at"] = now
    if to in (_S.QUEUED, _S.WAITING):
        changes |= {"finished_at": None}
    if to is _S.RUNNING:
        changes["started_at"] = job.started_at or now
    if to in FINISHED:
        changes["finished_at"] = now
    updated = session.execute(
        update(Job).where(Job.id == job.id, Job.state == origin.value).values(**changes),
        execution_options={"synchronize_session": False},
    )
    if updated.rowcount != 1:  # type: ignore[attr-defined]  # an UPDATE gives a CursorResult
        raise InvalidTransition(f"job {job.id} is no longer {origin.value}")
    append_events(
        session, job.id, [("state", None, {"from": origin.value, "state": to.value, "reason": reason})], attempt=attempt
    )
    session.refresh(job)


def append_events(
    session: Session, job_id: str, events: Sequence[tuple[str, int | None, dict[str, Any]]], *, attempt: int | None
) -> None:
    """Append (type, step, data) events to a job's history, numbered under the job's row lock."""
    last = session.execute(
        update(Job).where(Job.id == job_id).values(last_seq=Job.last_seq + len(events)).returning(Job.last_seq),
        execution_options={"synchronize_session": False},
    ).scalar_one()
    now, first = utcnow(), last - len(events) + 1
    session.add_all(
        Event(job_id=job_id, seq=first + index, attempt=attempt, type=kind, step=step, data=data, created_at=now)
        for index, (kind, step, data) in enumerate(events)
    )
    session.flush()
