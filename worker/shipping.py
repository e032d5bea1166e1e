"""From the attempt's spool (files) to the database: events and logs, each byte exactly once.

The offsets up to which the spool is stored live in the lease's row and change in the transaction that stores what lies
before them. Every transaction begins with the renewal of the lease, guarded by its token: a supervisor that lost its lease
cannot write.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import structlog
from pydantic import ValidationError
from sqlalchemy import update
from sqlalchemy.orm import Session

from core.clock import utcnow
from core.db.models import Artifact, Job, Lease, LogChunk
from core.db.session import Database
from core.jobs.lifecycle import JobState, append_events, transition
from core.jobs.repository import MAIN_LOG
from core.settings import Settings
from core.specs.events import RUNNER_EVENT, ArtifactReady, Failed, MetricPoint, Progress, RunnerEvent, Started
from core.storage.local import Store

log = structlog.get_logger(__name__)

_BATCH_BYTES = 1 << 20
_TAIL_BYTES = 1 << 16
"""Of a log beyond `max_log_bytes`, the end that is kept."""


class Fenced(Exception):
    """The lease is no longer ours: another attempt may run, nothing may be written."""


@dataclass(frozen=True)
class Grip:
    """The lease that this supervisor holds."""

    lease_id: str
    token: str
    ttl_s: float

    @contextmanager
    def write(self, database: Database) -> Iterator[tuple[Session, Lease]]:
        """A transaction that renews the lease first; `Fenced` when it is lost."""
        with database.write() as session:
            renewed = session.execute(
                update(Lease)
                .where(Lease.id == self.lease_id, Lease.token == self.token, Lease.state == "held")
                .values(expires_at=utcnow() + timedelta(seconds=self.ttl_s)),
            )
            if renewed.rowcount != 1:  # type: ignore[attr-defined]  # an UPDATE gives a CursorResult
                raise Fenced(self.lease_id)
            yield session, session.get_one(Lease, self.lease_id, populate_existing=True)


@dataclass(frozen=True)
class Spool:
    """The files of one host's part of one attempt, and the lease whose row says how much of them is stored."""

    lease_id: str
    attempt_id: str
    number: int
    leader: bool
    ranks: Sequence[int]


class Shipper:
    """Ships a spool under the grip of the lease that is held now.

    The spool is that lease's own, or (`current` false) that of a lost attempt whose supervisor could not finish.
    """

    def __init__(
        self, database: Database, settings: Settings, grip: Grip, *, job_id: str, spool: Spool, current: bool = True
    ) -> None:
        self._database, self._grip, self._job_id, self._spool, self._current = database, grip, job_id, spool, current
        self._store, self._max_log_bytes = Store(settings.store_dir), settings.max_log_bytes
        self._dir = self._store.attempt_dir(job_id, spool.number)
        self._seen_sizes: dict[Path, int] = {}
        self.error: Failed | None = None

    def ship(self, *, drain: bool = False) -> None:
        """Store what is new; with `drain`, everything that is there."""
        streams = [(rank, self._dir / "logs" / f"rank_{rank}.log") for rank in self._spool.ranks]
        if self._spool.leader:
            streams.insert(0, (MAIN_LOG, self._dir / "run.log"))
        events = self._dir / "events.jsonl"
        sources = [path for _, path in streams] + ([events] if self._spool.leader else [])
        at_end = drain
        while at_end or any(_size(path) != self._seen_sizes.get(path, 0) for path in sources):
            at_end, sizes = False, {path: _size(path) for path in sources}
            full = False
            with self._grip.write(self._database) as (session, _):
                lease = session.get_one(Lease, self._spool.lease_id, populate_existing=True)
                shipped = dict(lease.shipped)
                for rank, path in streams:
                    full |= self._ship_log(session, shipped, rank, path, last=drain)
                if self._spool.leader:
                    full |= self._ship_events(session, shipped, events)
                lease.shipped = shipped
            if not full:
                self._seen_sizes = sizes
            for rank, path in streams:
                if shipped.get(f"cut:{rank}") == "begun" and _size(path) > 2 * self._max_log_bytes:
                    _shorten(path, self._max_log_bytes)
            if not drain:
                break

    def _ship_log(self, session: Session, shipped: dict[str, Any], rank: int, path: Path, *, last: bool) -> bool:
        """Store the next piece. Of a log that is too long: its beginning, a line that says so, and with `last` its end."""
        offset, limit, is_full = shipped.get(f"log:{rank}", 0), self._max_log_bytes, False
        match shipped.get(f"cut:{rank}"):
            case None:
                piece = _read(path, offset)[: max(0, limit - offset)]
                is_full = len(piece) == _BATCH_BYTES
                if offset + len(piece) >= limit and _size(path) > limit:
                    piece += _CUT % (limit, _TAIL_BYTES)
                    shipped[f"cut:{rank}"], is_full = "begun", last
            case "begun" if last:
                piece = _tail(path, limit)
                shipped[f"cut:{rank}"] = "ended"
            case _:
                piece = b""
        if piece:
            data = zlib.compress(piece)
            session.add(
                LogChunk(attempt_id=self._spool.attempt_id, rank=rank, offset=offset, size=len(piece), data=data)
            )
            shipped[f"log:{rank}"] = offset + len(piece)
        return is_full

    def _ship_events(self, session: Session, shipped: dict[str, Any], path: Path) -> bool:
        offset = shipped.get("events", 0)
        piece = _read(path, offset)
        whole = piece[: piece.rfind(b"\n") + 1]
        if whole:
            self._apply(session, [event for line in whole.splitlines() if (event := _parse(line)) is not None])
            shipped["events"] = offset + len(whole)
        return len(piece) == _BATCH_BYTES

    def _apply(self, session: Session, events: list[RunnerEvent]) -> None:
        job = session.get_one(Job, self._job_id, with_for_update=True)
        last_progress = max((index for index, event in enumerate(events) if isinstance(event, Progress)), default=-1)
        rows: list[tuple[str, int | None, dict[str, Any]]] = []
        for index, event in enumerate(events):
            data = event.model_dump(exclude={"type"})
            match event:
                case Started():
                    if self._current and job.state == JobState.STARTING.value:
                        transition(session, job, JobState.RUNNING, "the runner has started", attempt=self._spool.number)
                case Progress():
                    if index != last_progress:
                        continue  # of the progress that came at once only the last matters
                    job.progress = {name: data[name] for name in ("done", "total", "unit", "rate")}
                    rows.append(("progress", None, data))
                case MetricPoint(step=step):
                    job.latest_metrics = {"step": step, **event.values}
                    rows.append(("metric", step, data))
                case ArtifactReady():
                    self._record(session, job, event)
                    rows.append(
                        ("artifact", None, {"artifact_id": event.artifact_id, "name": event.name, "kind": event.kind})
                    )
                case Failed():
                    self.error = event
                    rows.append(("error", None, data))
                case _:
                    rows.append((event.type, None, data))
        session.flush()
        if rows:
            append_events(session, self._job_id, rows, attempt=self._spool.number)

    def _record(self, session: Session, job: Job, event: ArtifactReady) -> None:
        session.add(
            Artifact(
                id=event.artifact_id,
                kind=event.kind,
                name=event.name,
                owner=job.owner,
                shared=False,
                path=str(self._store.files_dir(event.artifact_id)),
                size_bytes=event.size_bytes,
                num_files=event.num_files,
                meta=event.metadata,
                parents=event.parents,
                job_id=job.id,
                created_at=utcnow(),
            )
        )


_CUT = b"\n[temper] the log has reached %d bytes (TEMPER_MAX_LOG_BYTES): what follows is left out, up to the last %d bytes\n"


def _tail(path: Path, limit: int) -> bytes:
    """Read the end of a log that is longer than `limit`."""
    return _read(path, max(limit, _size(path) - _TAIL_BYTES))


def _shorten(path: Path, limit: int) -> None:
    """Take away what lies between `limit` and the end. Its writers append, so they go on at the new end."""
    end = _tail(path, limit)
    os.truncate(path, limit)
    with path.open("ab") as stream:
        stream.write(end)


def _read(path: Path, offset: int) -> bytes:
    try:
        with path.open("rb") as stream:
            stream.seek(offset)
            return stream.read(_BATCH_BYTES)
    except FileNotFoundError:
        return b""


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _parse(line: bytes) -> RunnerEvent | None:
    try:
        return RUNNER_EVENT.validate_json(line)
    except ValidationError as error:
        log.warning("event.unreadable", line=line[:200].decode(errors="replace"), error=str(error))
        return None
