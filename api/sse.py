"""A job's life as server-sent events: what happened (state, progress, metric, …) and what it wrote (log), in one resumable stream.

An event's id is `<seq>-<attempt>-<offset>`: the last event seen, the attempt whose log is being followed, and the byte of that
log where the client stands. `Last-Event-ID` with it goes on exactly there: nothing is lost, nothing comes twice.

The database is polled in threads, each time in a short transaction; nothing is held in between.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import anyio
import structlog
from anyio import CapacityLimiter
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from api.schemas import EventOut
from core.db.models import Event, Job
from core.db.session import Database
from core.errors import InvalidSpec
from core.jobs import repository
from core.jobs.lifecycle import FINISHED, JobState
from core.telemetry.metrics import EVENT_STREAMS

POLL_S = 0.2
HEARTBEAT_S = 15.0
_OUTAGE_S = 1.0
_MAX_EVENTS = 200
_MAX_LOG_BYTES = 64 << 10
_ID = re.compile(r"(\d{1,18})(?:-(\d{1,9})-(\d{1,18}))?")

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Position:
    """Where a client stands."""

    seq: int = 0
    attempt: int = 0
    offset: int = 0

    @classmethod
    def parse(cls, text: str | None) -> Position:
        """Read a `Last-Event-ID`; the number of an event alone means the start of the newest log."""
        if not text:
            return cls()
        match = _ID.fullmatch(text)
        if match is None:
            raise InvalidSpec(
                f"Last-Event-ID {text!r} is not one of this stream", hint="leave it out to start at the beginning"
            )
        return cls(*(int(part or 0) for part in match.groups()))

    def __str__(self) -> str:
        return f"{self.seq}-{self.attempt}-{self.offset}"


@dataclass
class Batch:
    """What is new since a position."""

    position: Position
    frames: list[str] = field(default_factory=list)
    more: bool = False
    """True when there is more to fetch at once."""
    finished: bool = False

    def add(self, event: str, position: Position, data: dict[str, Any]) -> None:
        """Append an event and move to its position."""
        self.position = position
        self.frames.append(frame(event, data, str(position)))


def frame(event: str, data: dict[str, Any], identifier: str | None = None) -> str:
    """One event on the wire."""
    head = f"id: {identifier}\n" if identifier else ""
    return f"{head}event: {event}\ndata: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def stream(
    database: Database,
    job_id: str,
    position: Position,
    *,
    lifetime_s: float,
    limiter: CapacityLimiter,
    stopping: Callable[[], bool],
) -> AsyncIterator[str]:
    """Yield frames until the job has finished, the stream is old, or the server stops; the client resumes the latter two."""
    ends = time.monotonic() + lifetime_s
    last_sent = time.monotonic()
    EVENT_STREAMS.inc()
    try:
        yield "retry: 1000\n\n"
        while not stopping() and time.monotonic() < ends:
            batch = await anyio.to_thread.run_sync(_poll, database, job_id, position, limiter=limiter)
            if batch is None:
                await anyio.sleep(_OUTAGE_S)
                continue
            position = batch.position
            if batch.frames:
                yield "".join(batch.frames)
                last_sent = time.monotonic()
            if batch.finished:
                yield frame("end", {"job_id": job_id}, str(position))
                return
            if time.monotonic() - last_sent > HEARTBEAT_S:
                yield ": heartbeat\n\n"
                last_sent = time.monotonic()
            if not batch.more:
                await anyio.sleep(POLL_S)
    finally:
        EVENT_STREAMS.dec()


def _poll(database: Database, job_id: str, position: Position) -> Batch | None:
    """What is new, or None while the database does not answer."""
    try:
        with database.read() as session:
            return fetch(session, job_id, position)
    except SQLAlchemyError as error:
        log.warning("sse.database.unavailable", job_id=job_id, error=str(error).splitlines()[0])
        return None


def fetch(session: Session, job_id: str, position: Position) -> Batch:
    """What is new since `position`: events in order, and between them the log of the attempt that they belong to.

    The state is read first: what a finished job wrote was stored before it finished.
    """
    found = session.execute(select(Job.state, Job.last_seq).where(Job.id == job_id)).one_or_none()
    batch = Batch(position)
    if found is None:  # deleted meanwhile
        batch.finished = True
        return batch
    state, last_seq = found
    events = repository.events_after(session, job_id, position.seq, _MAX_EVENTS) if last_seq > position.seq else []
    for event in events:
        if event.attempt is not None and event.attempt > batch.position.attempt:
            if not _add_log(session, job_id, batch, last=True):
                batch.more = True
                return batch
            batch.position = replace(batch.position, attempt=event.attempt, offset=0)
        batch.add(event.type, replace(batch.position, seq=event.seq), _event_data(event))
    at_end = batch.position.seq >= last_seq
    over = at_end and JobState(state) in FINISHED
    log_at_end = _add_log(session, job_id, batch, last=over)
    batch.more = not (at_end and log_at_end)
    batch.finished = over and log_at_end
    return batch


def _event_data(event: Event) -> dict[str, Any]:
    out = EventOut.of(event).model_dump(mode="json")
    data: dict[str, Any] = out.pop("data")
    return {"seq": event.seq, "attempt": out["attempt"], "time": out["time"], **data}


def _add_log(session: Session, job_id: str, batch: Batch, *, last: bool) -> bool:
    """Add the next piece of the followed attempt's log; return whether that was all there is. `last`: nothing will follow."""
    if batch.position.attempt == 0:
        return True
    attempt = repository.attempt(session, job_id, batch.position.attempt)
    if attempt is None:
        return True
    offset = batch.position.offset
    piece = repository.read_log(session, attempt.id, repository.MAIN_LOG, offset, _MAX_LOG_BYTES)
    full = len(piece) == _MAX_LOG_BYTES
    if full or not last:
        piece = whole_characters(piece)
    if piece:
        moved = replace(batch.position, offset=offset + len(piece))
        text = piece.decode(errors="replace")
        batch.add(
            "log", moved, {"attempt": attempt.number, "offset": offset, "next_offset": moved.offset, "text": text}
        )
    return not full


def whole_characters(piece: bytes) -> bytes:
    """`piece` without a UTF-8 character that is cut off at its end."""
    for back in range(1, min(4, len(piece)) + 1):
        lead = piece[-back]
        if lead < 0x80:
            break
        if lead >= 0xC0:
            needed = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return piece[:-back] if back < needed else piece
    return piece
