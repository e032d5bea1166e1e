import gzip
import hashlib
import io
import json
import os
import socket
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

from core.settings import Settings
from tests.api.conftest import Api
from tests.api.live import running
from tests.api.problems import problem
from tests.services import wait_until
from tests.tiny import tiny_model

ROWS = json.dumps([{"id": n} for n in range(100)]).encode()


def archive(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


CONTENT = archive({"rows.json": ROWS, "images/0.png": b"\x89PNG" * 500})


def begin(api: Api, content: bytes = CONTENT, **changes: Any) -> str:
    body = {"kind": "dataset_source", "filename": "digits.tar", "size_bytes": len(content), **changes}
    answer = api.post("/v1/uploads", body)
    assert answer.status_code == 201, answer.text
    assert answer.headers["location"] == f"/v1/uploads/{answer.json()['id']}"
    return str(answer.json()["id"])


def send(api: Api, upload: str, offset: int, block: bytes, **options: Any) -> Any:
    headers = {"Upload-Offset": str(offset), "Content-Type": "application/offset+octet-stream"}
    return api.call("PATCH", f"/v1/uploads/{upload}", content=block, headers=headers, **options)


class TestBegin:
    def test_anonymous(self, api: Api) -> None:
        problem(
            api.post("/v1/uploads", {"kind": "hf_model", "filename": "a.tar", "size_bytes": 1}, by=None),
            401,
            "unauthenticated",
        )

    @pytest.mark.parametrize("filename", ["../evil", "a/b", "", "a\0", "a\\b"])
    def test_refuses_a_filename_that_is_a_path(self, api: Api, filename: str) -> None:
        body = {"kind": "hf_model", "filename": filename, "size_bytes": 1}
        problem(api.post("/v1/uploads", body), 422, "invalid_spec")

    def test_refuses_more_than_is_free(self, api: Api) -> None:
        body = {"kind": "hf_model", "filename": "a.tar", "size_bytes": 1 << 40}
        problem(api.post("/v1/uploads", body), 507, "disk_full")

    def test_refuses_more_than_the_limit(self, api: Api) -> None:
        body = {"kind": "hf_model", "filename": "a.tar", "size_bytes": (1 << 40) + 1}
        problem(api.post("/v1/uploads", body), 413, "too_large")


class TestChunks:
    def test_anonymous(self, api: Api) -> None:
        problem(send(api, begin(api), 0, b"x", by=None), 401, "unauthenticated")

    def test_foreign_upload_does_not_exist(self, api: Api) -> None:
        upload = begin(api)
        problem(send(api, upload, 0, b"x", by="bob"), 404, "not_found")
        problem(api.get(f"/v1/uploads/{upload}", by="bob"), 404, "not_found")

    def test_advance_the_offset(self, api: Api) -> None:
        upload = begin(api)
        for start in range(0, len(CONTENT), 4000):
            block = CONTENT[start : start + 4000]
            answer = send(api, upload, start, block)
            assert (answer.status_code, answer.headers["upload-offset"]) == (204, str(start + len(block)))
            head = api.call("HEAD", f"/v1/uploads/{upload}")
            assert head.headers["upload-offset"] == str(start + len(block))
            assert head.headers["upload-length"] == str(len(CONTENT))
        assert api.store.upload_path(upload).read_bytes() == CONTENT

    def test_elsewhere_than_at_the_offset_are_refused(self, api: Api) -> None:
        upload = begin(api)
        send(api, upload, 0, CONTENT[:100])
        for offset in (0, 99, 101):
            assert "100" in problem(send(api, upload, offset, b"x"), 409, "offset_mismatch")["hint"]

    def test_beyond_the_announced_size_are_refused(self, api: Api) -> None:
        upload = begin(api)
        problem(send(api, upload, 0, CONTENT + b"x"), 413, "too_large")

    def test_bytes_that_a_crash_left_uncounted_are_overwritten(self, api: Api) -> None:
        upload = begin(api)
        send(api, upload, 0, CONTENT[:100])
        with api.store.upload_path(upload).open("ab") as stream:
            stream.write(b"garbage")
        send(api, upload, 100, CONTENT[100:])
        assert api.store.upload_path(upload).read_bytes() == CONTENT


class TestLimit:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        return settings.model_copy(update={"max_chunk_bytes": 1024})

    def test_chunks_have_one_of_their_own(self, api: Api) -> None:
        upload = begin(api)
        problem(send(api, upload, 0, CONTENT[:1025]), 413, "too_large")
        assert send(api, upload, 0, CONTENT[:1024]).status_code == 204


class TestBrokenConnection:
    def test_keeps_what_arrived(self, settings: Settings) -> None:
        content = os.urandom(1 << 20)
        with running(settings) as server:
            upload = server.post(
                "/v1/uploads", {"kind": "dataset_source", "filename": "a.bin", "size_bytes": len(content)}
            ).json()["id"]
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                head = (
                    f"PATCH /v1/uploads/{upload} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\n"
                    f"Upload-Offset: 0\r\nContent-Length: {len(content)}\r\n\r\n"
                )
                connection.sendall(head.encode() + content[:700_000])
            offset = 0

            def counted() -> bool:
                nonlocal offset
                offset = server.get(f"/v1/uploads/{upload}").json()["offset"]
                return offset > 0

            wait_until(counted, timeout_s=60, what="the count of the partial chunk")
            assert 0 < offset <= 700_000
            headers = {"Upload-Offset": str(offset)}
            rest = server.http.patch(f"/v1/uploads/{upload}", content=content[offset:], headers=headers)
            assert rest.headers["upload-offset"] == str(len(content))
        assert (settings.store_dir / "uploads" / upload).read_bytes() == content

    def test_two_writers_do_not_mix(self, settings: Settings) -> None:
        with running(settings) as server:
            upload = server.post(
                "/v1/uploads", {"kind": "dataset_source", "filename": "a.bin", "size_bytes": 8}
            ).json()["id"]
            first_block, go_on = threading.Event(), threading.Event()

            def slowly() -> Iterator[bytes]:
                yield b"1234"
                first_block.set()
                go_on.wait(60)
                yield b"5678"

            answers: list[int] = []

            def write() -> None:
                answers.append(
                    server.http.patch(
                        f"/v1/uploads/{upload}", content=slowly(), headers={"Upload-Offset": "0"}
                    ).status_code
                )

            writer = threading.Thread(target=write)
            writer.start()
            first_block.wait(60)
            path = settings.store_dir / "uploads" / upload
            wait_until(path.exists, timeout_s=60, what="the first writer's file")
            second = server.http.patch(f"/v1/uploads/{upload}", content=b"abcdefgh", headers={"Upload-Offset": "0"})
            go_on.set()
            writer.join()
        assert (answers, second.status_code) == ([204], 409)
        assert path.read_bytes() == b"12345678"


class TestComplete:
    def test_anonymous(self, api: Api) -> None:
        problem(api.post(f"/v1/uploads/{begin(api)}/complete", by=None), 401, "unauthenticated")

    def test_makes_an_artifact_once(self, api: Api) -> None:
        upload = begin(api, name="digits")
        send(api, upload, 0, CONTENT)
        body = {"sha256": hashlib.sha256(CONTENT).hexdigest()}
        first, second = (api.post(f"/v1/uploads/{upload}/complete", body) for _ in range(2))
        assert first.status_code == second.status_code == 201, first.text
        assert first.json() == second.json()
        assert first.json()["name"] == "digits"
        files = {entry["path"]: entry["sha256"] for entry in first.json()["files"]}
        assert files == {"rows.json": hashlib.sha256(ROWS).hexdigest(), "images/0.png": ANY}
        assert api.get(f"/v1/artifacts/{first.json()['id']}/files/rows.json").content == ROWS
        assert api.get(f"/v1/uploads/{upload}").json()["state"] == "complete"
        assert not api.store.upload_path(upload).exists()

    def test_takes_no_body(self, api: Api) -> None:
        upload = begin(api)
        send(api, upload, 0, CONTENT)
        assert api.post(f"/v1/uploads/{upload}/complete", headers={"Idempotency-Key": "k"}).status_code == 201
        assert api.post(f"/v1/uploads/{upload}/complete", headers={"Idempotency-Key": "k"}).status_code == 201

    def test_a_plain_file_becomes_the_only_one(self, api: Api) -> None:
        upload = begin(api, ROWS, filename="rows.json")
        send(api, upload, 0, ROWS)
        made = api.post(f"/v1/uploads/{upload}/complete").json()
        assert [entry["path"] for entry in made["files"]] == ["rows.json"]

    def test_before_all_bytes_are_there(self, api: Api) -> None:
        upload = begin(api)
        send(api, upload, 0, CONTENT[:100])
        assert "100" in problem(api.post(f"/v1/uploads/{upload}/complete"), 409, "conflict")["hint"]

    def test_wrong_digest(self, api: Api) -> None:
        upload = begin(api, sha256="0" * 64)
        send(api, upload, 0, CONTENT)
        problem(api.post(f"/v1/uploads/{upload}/complete"), 422, "digest_mismatch")
        problem(api.post(f"/v1/uploads/{upload}/complete"), 409, "conflict")
        problem(send(api, upload, len(CONTENT), b""), 409, "conflict")

    def test_hostile_archive_leaves_nothing_behind(self, api: Api) -> None:
        content = archive({"a.json": b"[]", "../../evil": b"x"})
        upload = begin(api, content)
        send(api, upload, 0, content)
        problem(api.post(f"/v1/uploads/{upload}/complete"), 422, "unsafe_archive")
        assert not list(api.settings.store_dir.rglob("evil"))
        assert not list(api.settings.store_dir.rglob("a.json"))
        assert api.get("/v1/artifacts").json()["data"] == []

    def test_content_is_checked_as_its_kind(self, api: Api) -> None:
        upload = begin(api, kind="hf_model")
        send(api, upload, 0, CONTENT)
        problem(api.post(f"/v1/uploads/{upload}/complete"), 422, "invalid_model")

    def test_weights_packed_in_a_folder_are_lifted_to_the_top(self, api: Api, tmp_path: Path) -> None:
        folder = tiny_model(tmp_path / "tiny")
        content = gzip.compress(archive({f"tiny/{path.name}": path.read_bytes() for path in folder.iterdir()}))
        upload = begin(api, content, kind="hf_model", filename="tiny.tar.gz")
        send(api, upload, 0, content)
        made = api.post(f"/v1/uploads/{upload}/complete")
        assert made.status_code == 201, made.text
        assert made.json()["metadata"]["family"] == "qwen2_5_vl"
        found = {entry["path"]: entry["sha256"] for entry in made.json()["files"]}
        assert found["config.json"] == hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
        assert api.get(f"/v1/artifacts/{made.json()['id']}/files/config.json").status_code == 200


class TestAbort:
    def test_anonymous(self, api: Api) -> None:
        problem(api.call("DELETE", f"/v1/uploads/{begin(api)}", by=None), 401, "unauthenticated")

    def test_forgets_the_bytes(self, api: Api) -> None:
        upload = begin(api)
        send(api, upload, 0, CONTENT[:100])
        assert api.call("DELETE", f"/v1/uploads/{upload}").status_code == 204
        problem(api.get(f"/v1/uploads/{upload}"), 404, "not_found")
        assert not api.store.upload_path(upload).exists()
