from collections.abc import Iterator

import pytest
from fastapi import FastAPI, Request, Response
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from api.ranges import Content, Unsatisfiable, parse, respond

BODY = bytes(range(256)) * 4


def read(start: int, stop: int) -> Iterator[bytes]:
    yield BODY[start:stop]


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()

    @app.api_route("/file", methods=["GET", "HEAD"])
    def file(request: Request) -> Response:
        content = Content(len(BODY), '"v1"', "ü.bin", "application/octet-stream", read, sha256="00" * 32)
        return respond(request, content)

    return TestClient(app)


class TestParse:
    @pytest.mark.parametrize(
        ("header", "found"),
        [
            (None, None),
            ("bytes=0-0", (0, 1)),
            ("bytes=10-", (10, 100)),
            ("bytes=-10", (90, 100)),
            ("bytes=-1000", (0, 100)),
            ("bytes=90-1000", (90, 100)),
            ("bytes= 1 - 2 ", (1, 3)),
            ("BYTES=1-2", (1, 3)),
            ("bytes=0-1,3-4", None),
            ("bytes=5-4", None),
            ("bytes=-", None),
            ("items=0-1", None),
            ("bytes=a-b", None),
            ("bytes=0-" + "9" * 40, None),
        ],
    )
    def test_reads_one_range_and_ignores_the_rest(self, header: str | None, found: tuple[int, int] | None) -> None:
        assert parse(header, 100) == found

    @pytest.mark.parametrize(
        ("header", "size"), [("bytes=100-", 100), ("bytes=-0", 100), ("bytes=0-", 0), ("bytes=-5", 0)]
    )
    def test_refuses_what_lies_outside(self, header: str, size: int) -> None:
        with pytest.raises(Unsatisfiable):
            parse(header, size)

    @given(st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 1000))
    def test_is_never_longer_than_asked_for(self, first: int, last: int, size: int) -> None:
        try:
            found = parse(f"bytes={first}-{last}", size)
        except Unsatisfiable:
            assert first >= size
            return
        if found is None:
            assert last < first
        else:
            assert found == (first, min(last + 1, size))


class TestRespond:
    def test_whole(self, client: TestClient) -> None:
        answer = client.get("/file")
        assert (answer.status_code, answer.content) == (200, BODY)
        assert answer.headers["content-length"] == str(len(BODY))
        assert answer.headers["accept-ranges"] == "bytes"
        assert "filename*=UTF-8''%C3%BC.bin" in answer.headers["content-disposition"]
        assert answer.headers["repr-digest"].startswith("sha-256=:AAAA")

    def test_part(self, client: TestClient) -> None:
        answer = client.get("/file", headers={"Range": "bytes=5-9"})
        assert (answer.status_code, answer.content) == (206, BODY[5:10])
        assert answer.headers["content-range"] == f"bytes 5-9/{len(BODY)}"
        assert answer.headers["content-length"] == "5"

    def test_head_has_the_headers_of_the_whole(self, client: TestClient) -> None:
        answer = client.head("/file", headers={"Range": "bytes=5-9"})
        assert (answer.status_code, answer.content) == (200, b"")
        assert answer.headers["content-length"] == str(len(BODY))

    @pytest.mark.parametrize(
        ("condition", "status"), [('"v1"', 206), ('"v0"', 200), ('W/"v1"', 200), ("Tue, 24 Nov 2026 08:00:00 GMT", 200)]
    )
    def test_if_range_gives_the_whole_of_another_version(self, client: TestClient, condition: str, status: int) -> None:
        assert client.get("/file", headers={"Range": "bytes=5-9", "If-Range": condition}).status_code == status

    @pytest.mark.parametrize(("tags", "status"), [('"v1"', 304), ('"a", W/"v1"', 304), ("*", 304), ('"v0"', 200)])
    def test_if_none_match(self, client: TestClient, tags: str, status: int) -> None:
        assert client.get("/file", headers={"If-None-Match": tags}).status_code == status

    def test_outside_says_the_size(self, client: TestClient) -> None:
        answer = client.get("/file", headers={"Range": "bytes=5000-"})
        assert answer.status_code == 416
        assert answer.headers["content-range"] == f"bytes */{len(BODY)}"
        assert answer.json()["code"] == "range_not_satisfiable"
