"""What flows back from a job: its log by byte offset, its metrics as series, its events as history and live."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from sqlalchemy.orm import Session
from starlette.responses import JSONResponse, StreamingResponse

from api import sse
from api.deps import DatabaseDep, PrincipalDep, SettingsDep
from api.problems import responses
from api.schemas import EventOut, Page, SeriesOut, page
from core.db.models import Job
from core.errors import InvalidSpec, NotFound
from core.jobs import repository, service
from core.jobs.lifecycle import FINISHED, JobState
from core.specs.events import TRAINING_METRICS

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["jobs"])

METRICS = tuple(TRAINING_METRICS)
"""Series that every answer names, empty or not."""

_MAX_OFFSET = 1 << 50
_TAIL_BLOCK = 64 << 10
_MAX_TAIL_BYTES = 8 << 20

Point = tuple[int, float, float | None]


@router.get(
    "/logs",
    response_class=Response,
    responses={
        200: {
            "description": "The bytes from `offset`.",
            "content": {"text/plain": {"schema": {"type": "string"}}},
            "headers": {
                "Temper-Next-Offset": {"description": "Where the next piece starts.", "schema": {"type": "integer"}},
                "Temper-Complete": {
                    "description": "`true` when this piece ends the log and nothing more will come.",
                    "schema": {"type": "string", "enum": ["true", "false"]},
                },
                "Temper-Attempt": {
                    "description": "The attempt that wrote it; 0 = none yet.",
                    "schema": {"type": "integer"},
                },
            },
        },
        **responses(404),
    },
)
def read_logs(
    job_id: str,
    principal: PrincipalDep,
    database: DatabaseDep,
    offset: Annotated[int, Query(ge=0, le=_MAX_OFFSET, description="First byte.")] = 0,
    limit: Annotated[int, Query(ge=1, le=16 << 20, description="Most bytes.")] = 1 << 20,
    attempt: Annotated[int | None, Query(ge=1, le=1 << 30, description="Attempt; the newest if absent.")] = None,
    rank: Annotated[
        int | None, Query(ge=0, le=1 << 20, description="One rank's own log; the job's log if absent.")
    ] = None,
    tail: Annotated[int | None, Query(ge=1, le=100_000, description="The last lines, instead of an offset.")] = None,
) -> Response:
    """The job's log, as bytes."""
    with database.read() as session:
        job = service.get_job(session, principal, job_id)
        finished = JobState(job.state) in FINISHED
        found = repository.attempt(session, job_id, attempt)
        if found is None:
            if attempt is not None:
                raise NotFound(f"job {job_id} has no attempt {attempt}")
            return _log_response(b"", 0, finished, 0)
        over = found.finished_at is not None and (finished or attempt is not None)
        stream = repository.MAIN_LOG if rank is None else rank
        if tail is not None:
            size = repository.log_size(session, found.id, stream)
            piece = _last_lines(session, found.id, stream, size, tail)
            return _log_response(piece, size, over, found.number)
        piece = repository.read_log(session, found.id, stream, offset, limit)
        end = offset + len(piece)
        at_end = len(piece) < limit or end >= repository.log_size(session, found.id, stream)
        return _log_response(piece, end, over and at_end, found.number)


def _log_response(piece: bytes, next_offset: int, complete: bool, attempt: int) -> Response:
    headers = {
        "Temper-Next-Offset": str(next_offset),
        "Temper-Complete": "true" if complete else "false",
        "Temper-Attempt": str(attempt),
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
    }
    return Response(piece, headers=headers, media_type="text/plain; charset=utf-8")


def _last_lines(session: Session, attempt_id: str, rank: int, size: int, count: int) -> bytes:
    """The last `count` lines, read from the end in blocks."""
    start, text = size, b""
    while start > 0 and text.count(b"\n", 0, -1) < count and len(text) < _MAX_TAIL_BYTES:
        step = min(_TAIL_BLOCK, start)
        start -= step
        text = repository.read_log(session, attempt_id, rank, start, step) + text
    return b"".join(text.splitlines(keepends=True)[-count:])


@router.get("/metrics", response_model=SeriesOut, responses=responses(404))
def read_metrics(
    job_id: str,
    principal: PrincipalDep,
    database: DatabaseDep,
    names: Annotated[
        str | None,
        Query(max_length=1000, pattern=r"^[a-z0-9_,]+$", description="Metrics, separated by commas; all if absent."),
    ] = None,
    since_step: Annotated[int | None, Query(ge=0, le=_MAX_OFFSET, description="From this step on.")] = None,
    max_points: Annotated[
        int | None, Query(ge=4, le=100_000, description="Thin longer series out; first, last, lowest and highest stay.")
    ] = None,
) -> Response:
    """The job's metrics as series of [step, time, value]."""
    wanted = [name for name in names.split(",") if name] if names else None
    with database.read() as session:
        service.get_job(session, principal, job_id)
        found = repository.metric_series(session, job_id, names=wanted, since_step=since_step)
    empty: dict[str, list[Point]] = {name: [] for name in wanted or METRICS}
    series = {
        name: [(step, _moment(at), value) for step, at, value in thin_out(points, max_points)]
        for name, points in {**empty, **found}.items()
    }
    return JSONResponse({"series": series})


def thin_out(points: Sequence[Point], max_points: int | None) -> Sequence[Point]:
    """At most `max_points` (≥ 4) of the points: first, last, and of each equal share of the rest the lowest and highest value.

    A share without any finite value keeps its first point, so that a run of NaN stays visible.
    """
    if max_points is None or len(points) <= max_points:
        return points
    inner, shares = points[1:-1], (max_points - 2) // 2
    kept = [points[0]]
    for share in range(shares):
        part = inner[share * len(inner) // shares : (share + 1) * len(inner) // shares]
        finite = [point for point in part if point[2] is not None]
        if finite:
            lowest = min(finite, key=lambda point: point[2] or 0.0)
            highest = max(finite, key=lambda point: point[2] or 0.0)
            kept += sorted({lowest, highest})
        else:
            kept += part[:1]
    return [*kept, points[-1]]


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat().replace("+00:00", "Z")


@router.get(
    "/events",
    response_model=Page[EventOut],
    responses={
        200: {
            "description": "History as JSON; with `Accept: text/event-stream`, live.",
            "content": {
                "text/event-stream": {
                    "schema": {
                        "type": "string",
                        "description": "Events `state`, `progress`, `metric`, `warning`, `artifact`, `error`, `log`, and at last `end`.",
                    }
                }
            },
        },
        **responses(404),
    },
)
def read_events(
    job_id: str,
    request: Request,
    principal: PrincipalDep,
    database: DatabaseDep,
    settings: SettingsDep,
    accept: Annotated[str, Header(include_in_schema=False)] = "",
    last_event_id: Annotated[str | None, Header(max_length=60, description="Live: go on after this event.")] = None,
    after: Annotated[
        str | None, Query(pattern=r"^[0-9]{1,18}$", description="History: `next` of the page before.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=1000, description="History: entries per page.")] = 200,
) -> Any:
    """What happened to the job: as pages of JSON, or live as server-sent events, with the log between them.

    A live stream ends with the event `end` once the job has finished and all was sent. A stream that ends without it (age,
    restart, broken connection) is resumed with `Last-Event-ID`; nothing is lost and nothing comes twice.
    """
    live = "text/event-stream" in accept
    with database.read() as session:
        service.get_job(session, principal, job_id)
        if not live:
            found = repository.events_after(session, job_id, int(after or 0), limit + 1)
            return page([EventOut.of(event) for event in found], limit, lambda event: event.id)
        position = _check(session, job_id, sse.Position.parse(last_event_id))
    frames = sse.stream(
        database,
        job_id,
        position,
        lifetime_s=settings.sse_lifetime_s,
        limiter=request.app.state.stream_limiter,
        stopping=request.app.state.stopping,
    )
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(frames, media_type="text/event-stream", headers=headers)


def _check(session: Session, job_id: str, position: sse.Position) -> sse.Position:
    last_seq = session.get_one(Job, job_id).last_seq
    if position.seq > last_seq:
        raise InvalidSpec(
            f"Last-Event-ID names event {position.seq}, but the job has {last_seq}", hint="leave it out to start over"
        )
    return position
