"""The client over a network and a server that misbehave: a small HTTP server here breaks what a real one rarely breaks.

What the client and Temper's own API do together is tested in tests/e2e, against the real service.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from api.client import ApiError, Client, Event, ServerUnreachable, parse_sse
from api.transfer import TransferError
from tests.api.answering import Handler, Server, in_turn, running, says

JOB = {"id": "job_1", "kind": "training", "state": "running", "something_new": 1}


@pytest.fixture
def server() -> Iterator[Server]:
    with running() as started:
        yield started


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.url, "key", retry_s=60) as opened:
        yield opened


class TestRequests:
    def test_the_key_is_sent_and_unknown_fields_are_kept(self, server: Server, client: Client) -> None:
        server.answers["GET /v1/jobs/job_1"] = says(200, JOB)
        job = client.job("job_1")
        assert server.seen[0][2]["Authorization"] == "Bearer key"
        assert job.model_dump()["something_new"] == 1

    def test_a_get_is_repeated_after_5xx(self, server: Server, client: Client) -> None:
        server.answers["GET /v1/jobs/job_1"] = in_turn(says(503, {}), says(502, b"<html>"), says(200, JOB))
        assert client.job("job_1").state == "running"
        assert len(server.seen) == 3

    def test_a_repeated_post_carries_the_same_idempotency_key(self, server: Server, client: Client) -> None:
        server.answers["POST /v1/jobs"] = in_turn(says(503, {}), says(201, JOB))
        client.submit("training", {"a": 1}, name="n")
        keys = [headers["Idempotency-Key"] for _, _, headers, _ in server.asked("POST")]
        assert len(keys) == 2
        assert len(set(keys)) == 1
        assert json.loads(server.seen[0][3]) == {"kind": "training", "spec": {"a": 1}, "name": "n"}

    def test_two_submissions_carry_two_keys(self, server: Server, client: Client) -> None:
        server.answers["POST /v1/jobs"] = says(201, JOB)
        client.submit("training", {})
        client.submit("training", {})
        assert len({headers["Idempotency-Key"] for _, _, headers, _ in server.seen}) == 2

    def test_a_refusal_is_raised_at_once_with_all_that_was_said(self, server: Server, client: Client) -> None:
        problem = {"code": "incompatible_plan", "detail": "tp=3", "hint": "use 1 or 2", "request_id": "req_1"}
        server.answers["POST /v1/jobs"] = says(
            422, {**problem, "errors": [{"loc": ["spec"], "message": "m", "input": 3}]}
        )
        with pytest.raises(ApiError, match="tp=3") as raised:
            client.submit("training", {})
        assert (raised.value.status, raised.value.code, raised.value.hint) == (422, "incompatible_plan", "use 1 or 2")
        assert raised.value.request_id == "req_1"
        assert raised.value.errors[0]["message"] == "m"
        assert len(server.seen) == 1

    def test_an_answer_that_is_not_json_is_told_as_it_is(self, server: Server, client: Client) -> None:
        server.answers["GET /v1/queue"] = says(413, b"too large, said the proxy")
        with pytest.raises(ApiError, match="said the proxy"):
            client.queue()

    def test_no_server_is_said_with_its_address(self) -> None:
        with (
            Client("http://127.0.0.1:9", retry_s=0) as client,
            pytest.raises(ServerUnreachable, match="no answer from"),
        ):
            client.job("job_1")

    def test_pages_are_read_to_the_end_or_to_the_limit(self, server: Server, client: Client) -> None:
        def page(handler: Handler, _: bytes) -> None:
            second = "after=c1" in handler.path
            data = [{**JOB, "id": name} for name in (["job_3"] if second else ["job_1", "job_2"])]
            handler.reply(200, {"data": data, "has_more": not second, "next": None if second else "c1"})

        server.answers["GET /v1/jobs"] = page
        assert [job.id for job in client.jobs(state="running")] == ["job_1", "job_2", "job_3"]
        assert "state=running" in server.seen[0][1]
        assert [job.id for job in client.jobs(limit=2)] == ["job_1", "job_2"]


class TestEvents:
    def test_a_broken_stream_goes_on_after_the_last_event(self, server: Server, client: Client) -> None:
        def stream(handler: Handler, _: bytes) -> None:
            last = handler.headers.get("Last-Event-ID")
            if last is None:
                handler.reply_cut(
                    200, sse(1, "state", {"state": "running"}) + sse(2, "metric", {"step": 1}), announced=10**6
                )
            else:
                handler.reply(200, sse(3, "state", {"state": "succeeded"}) + sse(3, "end", {}))

        server.answers["GET /v1/jobs/job_1/events"] = stream
        events = list(client.events("job_1"))
        assert [event.id for event in events] == ["1", "2", "3"]
        assert [headers.get("Last-Event-ID") for _, path, headers, _ in server.seen if "events" in path] == [None, "2"]

    def test_a_stream_that_ends_before_the_job_is_opened_again(self, server: Server, client: Client) -> None:
        server.answers["GET /v1/jobs/job_1/events"] = in_turn(
            says(200, sse(1, "progress", {"done": 1})),
            says(503, {}),
            says(200, sse(2, "state", {"state": "failed"}) + sse(2, "end", {})),
        )
        assert [event.id for event in client.events("job_1")] == ["1", "2"]

    def test_an_unknown_job_is_an_error_at_once(self, server: Server, client: Client) -> None:
        with pytest.raises(ApiError, match="no /v1/jobs/job_9/events"):
            next(client.events("job_9"))


class TestParseSse:
    def test_the_standard_forms_are_read(self) -> None:
        lines = [": hello", "", "id: 7", "event: metric", 'data: {"step": 1,', 'data: "x": 2}', "", "event: state", ""]
        events = list(parse_sse(iter(lines)))
        assert events == [Event(id="7", type="metric", data={"step": 1, "x": 2})]


class TestLogs:
    def test_following_stops_when_the_log_is_complete(self, server: Server, client: Client) -> None:
        def piece(handler: Handler, _: bytes) -> None:
            offset = int(re.search(r"offset=(\d+)", handler.path)[1])  # type: ignore[index]
            content = b"one\ntwo\n"[offset : offset + 4]
            complete = "true" if offset >= 4 else "false"
            handler.reply(200, content, Temper_Next_Offset=str(offset + len(content)), Temper_Complete=complete)

        server.answers["GET /v1/jobs/job_1/logs"] = piece
        assert b"".join(client.follow_logs("job_1")) == b"one\ntwo\n"


class TestUpload:
    @pytest.fixture
    def received(self, server: Server) -> bytearray:
        """What a server that takes chunks has got; every third chunk breaks off in the middle."""
        content = bytearray()
        count = 0

        def chunk(handler: Handler, body: bytes) -> None:
            nonlocal count
            count += 1
            if int(handler.headers["Upload-Offset"]) != len(content):
                handler.reply(409, {"code": "offset_mismatch", "detail": "wrong offset"})
            elif count % 3 == 0:
                content.extend(body[: len(body) // 2])
                handler.close_connection = True
            else:
                content.extend(body)
                handler.reply(204, b"", Upload_Offset=str(len(content)))

        def complete(handler: Handler, body: bytes) -> None:
            right = json.loads(body)["sha256"] == hashlib.sha256(content).hexdigest()
            handler.reply(201 if right else 422, {"id": "art_1", "kind": "hf_model", "code": "digest_mismatch"})

        server.answers["POST /v1/uploads"] = lambda handler, _: handler.reply(201, {"id": "upl_1", "offset": 0})
        server.answers["GET /v1/uploads/upl_1"] = lambda handler, _: handler.reply(
            200, {"id": "upl_1", "offset": len(content)}
        )
        server.answers["PATCH /v1/uploads/upl_1"] = chunk
        server.answers["POST /v1/uploads/upl_1/complete"] = complete
        return content

    def test_broken_chunks_go_on_where_the_server_stopped(
        self, client: Client, received: bytearray, tmp_path: Path
    ) -> None:
        (tmp_path / "f.bin").write_bytes(bytes(range(256)) * 40)
        told: list[int] = []
        artifact = client.upload(
            "hf_model", tmp_path / "f.bin", chunk_bytes=1000, on_bytes=lambda done, *_: told.append(done)
        )
        assert artifact.id == "art_1"
        assert received == bytes(range(256)) * 40
        assert told == sorted(told)
        assert told[-1] == 256 * 40

    def test_a_later_process_goes_on_with_the_upload(
        self, server: Server, client: Client, received: bytearray, tmp_path: Path
    ) -> None:
        (tmp_path / "f.bin").write_bytes(b"0123456789" * 500)
        received.extend(b"0123456789" * 200)
        artifact = client.upload("hf_model", tmp_path / "f.bin", resume="upl_1")
        assert artifact.id == "art_1"
        assert received == b"0123456789" * 500
        assert [path for _, path, _, _ in server.asked("POST")] == ["/v1/uploads/upl_1/complete"]


CONTENT = bytes(i % 251 for i in range(50_000))


class TestDownload:
    @pytest.fixture
    def artifact(self, server: Server) -> None:
        entry = {"path": "deep/w.bin", "size": len(CONTENT), "sha256": hashlib.sha256(CONTENT).hexdigest()}
        server.answers["GET /v1/artifacts/art_1"] = says(200, {"id": "art_1", "kind": "hf_model", "files": [entry]})

    def serve_ranges(self, server: Server, *, cut_after: int | None = None, content: bytes = CONTENT) -> None:
        def file(handler: Handler, _: bytes) -> None:
            start = int(re.fullmatch(r"bytes=(\d+)-", handler.headers["Range"])[1])  # type: ignore[index]
            rest = content[start:]
            handler.reply_cut(206, rest[:cut_after], len(rest))

        server.answers["GET /v1/artifacts/art_1/files/deep/w.bin"] = file

    def test_a_connection_cut_again_and_again_costs_nothing_twice(
        self, server: Server, client: Client, artifact: None, tmp_path: Path
    ) -> None:
        self.serve_ranges(server, cut_after=20_000)
        report = client.download("art_1", tmp_path)
        assert (tmp_path / "deep/w.bin").read_bytes() == CONTENT
        assert report.fetched_bytes == len(CONTENT)
        assert not list(tmp_path.rglob("*.part"))

    def test_a_file_that_was_begun_goes_on_where_it_stopped(
        self, server: Server, client: Client, artifact: None, tmp_path: Path
    ) -> None:
        self.serve_ranges(server)
        (tmp_path / "deep").mkdir()
        (tmp_path / "deep/w.bin.part").write_bytes(CONTENT[:30_000])
        assert client.download("art_1", tmp_path).fetched_bytes == 20_000
        assert (tmp_path / "deep/w.bin").read_bytes() == CONTENT

    def test_a_file_that_is_there_and_right_is_not_fetched(
        self, server: Server, client: Client, artifact: None, tmp_path: Path
    ) -> None:
        (tmp_path / "deep").mkdir()
        (tmp_path / "deep/w.bin").write_bytes(CONTENT)
        assert client.download("art_1", tmp_path).fetched_bytes == 0

    def test_a_begun_file_of_something_else_is_fetched_afresh(
        self, server: Server, client: Client, artifact: None, tmp_path: Path
    ) -> None:
        self.serve_ranges(server)
        (tmp_path / "deep").mkdir()
        (tmp_path / "deep/w.bin.part").write_bytes(b"?" * 1000)
        client.download("art_1", tmp_path)
        assert (tmp_path / "deep/w.bin").read_bytes() == CONTENT

    def test_wrong_content_never_gets_the_files_name(
        self, server: Server, client: Client, artifact: None, tmp_path: Path
    ) -> None:
        self.serve_ranges(server, content=CONTENT[:-1] + b"?")
        with pytest.raises(TransferError, match=r"deep/w\.bin arrived with the wrong content"):
            client.download("art_1", tmp_path)
        assert not list(tmp_path.rglob("*.bin*"))

    def test_a_server_without_ranges_sends_the_whole(
        self, server: Server, client: Client, artifact: None, tmp_path: Path
    ) -> None:
        server.answers["GET /v1/artifacts/art_1/files/deep/w.bin"] = says(200, CONTENT)
        (tmp_path / "deep").mkdir()
        (tmp_path / "deep/w.bin.part").write_bytes(CONTENT[:10])
        client.download("art_1", tmp_path)
        assert (tmp_path / "deep/w.bin").read_bytes() == CONTENT

    def test_a_name_that_the_artifact_has_not_is_refused(self, client: Client, artifact: None, tmp_path: Path) -> None:
        with pytest.raises(TransferError, match="holds no other"):
            client.download("art_1", tmp_path, names=["other"])


def sse(identifier: int, kind: str, data: object) -> bytes:
    return f"id: {identifier}\nevent: {kind}\ndata: {json.dumps(data)}\n\n".encode()
