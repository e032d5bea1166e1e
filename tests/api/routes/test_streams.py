import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import httpx
import pytest

from api.client import parse_sse
from api.routes.streams import METRICS, Point, thin_out
from api.sse import Position, fetch, whole_characters
from core.clock import utcnow
from core.db.models import Attempt, Job, LogChunk
from core.db.session import Database
from core.jobs.lifecycle import JobState, append_events, transition
from core.settings import Settings
from tests.api.conftest import Api
from tests.api.live import running
from tests.api.problems import problem
from tests.factories import LAYOUT_7B, hf_7b, submit
from tests.services import wait_until


@dataclass
class Run:
    """A job's life as a supervisor writes it."""

    database: Database
    job_id: str
    number: int = 0
    written: int = 0

    def start(self) -> None:
        self.number, self.written = self.number + 1, 0
        with self.database.write() as session:
            attempt = Attempt(
                id=self.attempt_id, job_id=self.job_id, number=self.number, state="running", started_at=utcnow()
            )
            session.add(attempt)
            job = session.get_one(Job, self.job_id)
            transition(session, job, JobState.STARTING, attempt=self.number)
            transition(session, job, JobState.RUNNING, attempt=self.number)

    @property
    def attempt_id(self) -> str:
        return f"att_{self.number}"

    def log(self, text: bytes, *, rank: int = -1, offset: int | None = None) -> None:
        with self.database.write() as session:
            start = self.written if offset is None else offset
            chunk = {"offset": start, "size": len(text), "data": zlib.compress(text)}
            session.add(LogChunk(attempt_id=self.attempt_id, rank=rank, **chunk))
        if rank == -1:
            self.written += len(text)

    def metric(self, step: int, **values: float | None) -> None:
        data = {"time": 1_800_000_000.25 + step, "step": step, "values": values}
        with self.database.write() as session:
            append_events(session, self.job_id, [("metric", step, data)], attempt=self.number)

    def finish(self, state: JobState = JobState.SUCCEEDED) -> None:
        with self.database.write() as session:
            session.get_one(Attempt, self.attempt_id).finished_at = utcnow()
            transition(session, session.get_one(Job, self.job_id), state, attempt=self.number)


def begin(database: Database, settings: Settings) -> Run:
    with database.write() as session:
        spec = {"operation": "hf_to_mm", "source": {"artifact": hf_7b(session).id}, "parallel": LAYOUT_7B}
        return Run(database, submit(session, settings, "conversion", spec).id)


@pytest.fixture
def run(api: Api) -> Run:
    return begin(api.database, api.settings)


class TestLogs:
    def test_anonymous(self, api: Api, run: Run) -> None:
        problem(api.get(f"/v1/jobs/{run.job_id}/logs", by=None), 401, "unauthenticated")

    def test_foreign_job_does_not_exist(self, api: Api, run: Run) -> None:
        problem(api.get(f"/v1/jobs/{run.job_id}/logs", by="bob"), 404, "not_found")

    def test_before_the_first_attempt(self, api: Api, run: Run) -> None:
        answer = api.get(f"/v1/jobs/{run.job_id}/logs")
        assert (answer.content, answer.headers["temper-complete"], answer.headers["temper-next-offset"]) == (
            b"",
            "false",
            "0",
        )

    def test_pieces_make_the_whole(self, api: Api, run: Run) -> None:
        run.start()
        text = "größer\n".encode() * 100
        for start in range(0, len(text), 130):
            run.log(text[start : start + 130])
        got, offset = b"", 0
        while True:
            answer = api.get(f"/v1/jobs/{run.job_id}/logs", params={"offset": offset, "limit": 77})
            got += answer.content
            offset = int(answer.headers["temper-next-offset"])
            assert offset == len(got)
            if not answer.content:
                if answer.headers["temper-complete"] == "true":
                    break
                run.finish()
        assert got == text

    def test_last_lines(self, api: Api, run: Run) -> None:
        run.start()
        lines = [b"line %d " % n + b"x" * 1000 + b"\n" for n in range(300)]
        run.log(b"".join(lines[:150]))
        run.log(b"".join(lines[150:]) + b"unfinished")
        answer = api.get(f"/v1/jobs/{run.job_id}/logs?tail=101")
        assert answer.content == b"".join(lines[200:]) + b"unfinished"
        assert answer.headers["temper-next-offset"] == str(run.written)
        assert api.get(f"/v1/jobs/{run.job_id}/logs?tail=100000").content.startswith(b"line 0 ")

    def test_of_a_rank_and_of_an_attempt(self, api: Api, run: Run) -> None:
        run.start()
        run.log(b"first")
        run.log(b"rank one", rank=1, offset=0)
        run.finish(JobState.QUEUED)
        run.start()
        run.log(b"second")
        url = f"/v1/jobs/{run.job_id}/logs"
        assert api.get(url).content == b"second"
        old = api.get(f"{url}?attempt=1")
        assert (old.content, old.headers["temper-complete"], old.headers["temper-attempt"]) == (b"first", "true", "1")
        assert api.get(f"{url}?attempt=1&rank=1").content == b"rank one"
        problem(api.get(f"{url}?attempt=7"), 404, "not_found")


class TestMetrics:
    def test_anonymous(self, api: Api, run: Run) -> None:
        problem(api.get(f"/v1/jobs/{run.job_id}/metrics", by=None), 401, "unauthenticated")

    def test_names_every_series_even_when_empty(self, api: Api, run: Run) -> None:
        assert api.get(f"/v1/jobs/{run.job_id}/metrics").json() == {"series": {name: [] for name in METRICS}}

    def test_points_have_step_time_and_value(self, api: Api, run: Run) -> None:
        run.start()
        run.metric(1, loss=2.5, grad_norm=None)
        run.metric(2, loss=2.0)
        series = api.get(f"/v1/jobs/{run.job_id}/metrics").json()["series"]
        assert [(step, value) for step, _, value in series["loss"]] == [(1, 2.5), (2, 2.0)]
        assert series["grad_norm"][0][2] is None
        moment = datetime.fromisoformat(series["loss"][0][1].replace("Z", "+00:00"))
        assert moment == datetime.fromtimestamp(1_800_000_001.25, timezone.utc)

    def test_filters(self, api: Api, run: Run) -> None:
        run.start()
        for step in range(10):
            run.metric(step, loss=float(step), grad_norm=1.0)
        url = f"/v1/jobs/{run.job_id}/metrics"
        assert set(api.get(f"{url}?names=loss").json()["series"]) == {"loss"}
        assert len(api.get(f"{url}?since_step=7").json()["series"]["loss"]) == 3
        assert len(api.get(f"{url}?max_points=4").json()["series"]["loss"]) == 4


class TestThinOut:
    def points(self, values: list[float | None]) -> list[Point]:
        return [(step, float(step), value) for step, value in enumerate(values)]

    @pytest.mark.parametrize("max_points", [4, 5, 10, 33])
    def test_keeps_first_last_lowest_and_highest(self, max_points: int) -> None:
        values: list[float | None] = [float((7 * n) % 101) for n in range(1000)]
        values[333], values[666] = -5.0, 500.0
        points = self.points(values)
        kept = thin_out(points, max_points)
        assert len(kept) <= max_points
        assert {points[0], points[-1], points[333], points[666]} <= set(kept)
        assert list(kept) == sorted(kept)

    def test_leaves_short_series_alone(self) -> None:
        points = self.points([1.0, 2.0])
        assert thin_out(points, 4) == points

    def test_keeps_a_run_without_finite_values_visible(self) -> None:
        kept = thin_out(self.points([1.0] + [None] * 100 + [1.0]), 10)
        assert None in [value for _, _, value in kept]


class TestHistory:
    def test_anonymous(self, api: Api, run: Run) -> None:
        problem(api.get(f"/v1/jobs/{run.job_id}/events", by=None), 401, "unauthenticated")

    def test_pages_in_order(self, api: Api, run: Run) -> None:
        run.start()
        for step in range(5):
            run.metric(step, loss=1.0)
        seen, after = [], "0"
        while after:
            page = api.get(f"/v1/jobs/{run.job_id}/events", params={"after": after, "limit": 3}).json()
            seen += page["data"]
            after = page["next"]
        assert [int(event["id"]) for event in seen] == list(range(1, 9))
        assert [event["type"] for event in seen] == ["state"] * 3 + ["metric"] * 5
        assert seen[-1]["data"] == {"step": 4, "values": {"loss": 1.0}}
        assert seen[-1]["attempt"] == 1


class TestPosition:
    @pytest.mark.parametrize("text", ["0-0-0", "12-1-4096"])
    def test_round_trips(self, text: str) -> None:
        assert str(Position.parse(text)) == text

    @pytest.mark.parametrize("text", ["x", "1-2", "-1-0-0", "1-1-1-1", "9" * 30])
    def test_refuses_what_is_not_ours(self, api: Api, run: Run, text: str) -> None:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": text}
        problem(api.get(f"/v1/jobs/{run.job_id}/events", headers=headers), 422, "invalid_spec")

    def test_refuses_the_future(self, api: Api, run: Run) -> None:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": "99-1-0"}
        problem(api.get(f"/v1/jobs/{run.job_id}/events", headers=headers), 422, "invalid_spec")


class TestWholeCharacters:
    def test_never_cuts_one(self) -> None:
        text = "aé€😀".encode()
        for end in range(len(text) + 1):
            piece = whole_characters(text[:end])
            assert piece.decode() == text[:end].decode(errors="ignore")

    def test_lets_broken_bytes_pass(self) -> None:
        assert whole_characters(b"a\xff\xfe\xfd\x80\x80\x80\x80") == b"a\xff\xfe\xfd\x80\x80\x80\x80"


def collect(
    database: Database, job_id: str, position: Position, *, at_most: int | None = None
) -> tuple[list[Any], Position]:
    """Read the stream from `position`, as one connection does that breaks after `at_most` events."""
    got: list[Any] = []
    while True:
        with database.read() as session:
            batch = fetch(session, job_id, position)
        for event in parse_sse(iter("".join(batch.frames).split("\n"))):
            if at_most is not None and len(got) == at_most:
                return got, position
            got.append((event.type, event.data))
            position = Position.parse(event.id)
        if batch.finished or not (batch.more or batch.frames):
            return got, position
        position = batch.position


class TestFetch:
    """The stream's content without its transport: what comes is the same wherever the connection breaks."""

    @pytest.fixture
    def told(self, run: Run) -> Run:
        """A job with two attempts, each with more log than one piece, and events between."""
        for attempt in range(2):
            run.start()
            for step in range(3):
                run.log(f"attempt {attempt} step {step} größer\n".encode() * 3000)
                run.metric(step, loss=1.0)
            run.finish(JobState.SUCCEEDED if attempt else JobState.QUEUED)
        return run

    def test_gives_each_event_and_each_byte_once_and_in_order(self, api: Api, told: Run) -> None:
        got, _ = collect(api.database, told.job_id, Position())
        numbers = [data["seq"] for kind, data in got if kind != "log"]
        assert numbers == list(range(1, len(numbers) + 1))
        for attempt in (0, 1):
            pieces = [data for kind, data in got if kind == "log" and data["attempt"] == attempt + 1]
            assert "".join(piece["text"] for piece in pieces) == "".join(
                f"attempt {attempt} step {step} größer\n" * 3000 for step in range(3)
            )
            ends = [0, *(piece["next_offset"] for piece in pieces)]
            assert [piece["offset"] for piece in pieces] == ends[:-1]

    def test_log_of_an_attempt_comes_before_the_next_attempt(self, api: Api, told: Run) -> None:
        got, _ = collect(api.database, told.job_id, Position())
        attempts = [data["attempt"] for _, data in got if data["attempt"] is not None]
        assert attempts == sorted(attempts)

    def test_resumes_anywhere_without_loss_or_doubling(self, api: Api, told: Run) -> None:
        whole, _ = collect(api.database, told.job_id, Position())
        for cut in range(1, len(whole)):
            first, position = collect(api.database, told.job_id, Position(), at_most=cut)
            rest, _ = collect(api.database, told.job_id, position)
            assert events_of(first + rest) == events_of(whole)
            assert text_of(first + rest) == text_of(whole)


def events_of(got: list[Any]) -> list[Any]:
    return [data for kind, data in got if kind != "log"]


def text_of(got: list[Any]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for kind, data in got:
        if kind == "log":
            texts[data["attempt"]] = texts.get(data["attempt"], "") + data["text"]
    return texts


class TestLive:
    """Over a real socket."""

    def frames(self, http: httpx.Client, job_id: str, last: str | None = None) -> Iterator[tuple[str | None, str, Any]]:
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last} if last else {})
        with http.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            for event in parse_sse(answer.iter_lines()):
                yield event.id, event.type, event.data

    def test_follows_to_the_end(self, settings: Settings) -> None:
        with running(settings) as server:
            run = begin(server.database, settings)
            seen: list[tuple[str, Any]] = []
            arrived: set[int] = set()

            def follow() -> None:
                for _, kind, data in self.frames(server.http, run.job_id):
                    seen.append((kind, data))
                    if kind == "metric":
                        arrived.add(data["step"])

            follower = threading.Thread(target=follow)
            follower.start()
            run.start()
            for step in range(3):
                run.log(b"step %d\n" % step)
                run.metric(step, loss=1.0)
                wait_until(lambda step=step: step in arrived, timeout_s=60, what=f"the arrival of step {step}")  # type: ignore[misc]
            run.finish()
            follower.join(60)
            assert not follower.is_alive()
        kinds = [kind for kind, _ in seen]
        assert kinds[-1] == "end"
        assert [data["state"] for kind, data in seen if kind == "state"] == [
            "queued",
            "starting",
            "running",
            "succeeded",
        ]
        assert "".join(data["text"] for kind, data in seen if kind == "log") == "step 0\nstep 1\nstep 2\n"

    def test_finished_job_ends_at_once_and_resuming_gives_only_the_end(self, settings: Settings) -> None:
        with running(settings) as server:
            run = begin(server.database, settings)
            run.start()
            run.finish()
            whole = list(self.frames(server.http, run.job_id))
            again = list(self.frames(server.http, run.job_id, whole[-1][0]))
        assert [kind for _, kind, _ in whole] == ["state"] * 4 + ["end"]
        assert [kind for _, kind, _ in again] == ["end"]

    def test_old_stream_ends_without_the_end_event(self, settings: Settings) -> None:
        with running(settings.model_copy(update={"sse_lifetime_s": 1})) as server:
            run = begin(server.database, settings)
            assert [kind for _, kind, _ in self.frames(server.http, run.job_id)] == ["state"]

    def test_idle_stream_holds_no_connection_to_the_database(self, settings: Settings) -> None:
        with running(settings) as server:
            run = begin(server.database, settings)
            frames = self.frames(server.http, run.job_id)
            next(frames)
            pool: Any = server.database.engine.pool
            wait_until(lambda: pool.checkedout() == 0, timeout_s=60, what="an open stream without a connection")
            frames.close()  # type: ignore[attr-defined]  # a generator

    def test_server_that_stops_lets_streams_go(self, settings: Settings) -> None:
        with running(settings) as server:
            run = begin(server.database, settings)
            frames = self.frames(server.http, run.job_id)
            next(frames)
            server.server.should_exit = True
            assert list(frames) == []
