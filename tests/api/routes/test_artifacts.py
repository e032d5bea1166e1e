import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from core.clock import utcnow
from core.db.models import Artifact
from core.ids import new_id
from core.jobs import service
from core.jobs.principal import Principal
from core.storage.manifest import Manifest, describe
from tests.api.conftest import Api
from tests.api.problems import problem
from tests.factories import ALICE

FILES = {"data.jsonl": b'{"a": 1}\n' * 50, "images/0.png": b"\x89PNG" + bytes(3000), "images/empty": b""}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder under the allowed root."""
    root = tmp_path / "allowed" / "source"
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def publish(api: Api, folder: Path, *, owner: Principal = ALICE) -> str:
    """An artifact in the store, as a job or an upload makes one."""
    artifact_id = new_id("art")
    root = api.store.begin(artifact_id)
    for name in FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes((folder / name).read_bytes())
    manifest = Manifest(
        id=artifact_id, kind="dataset_source", name="ünï/code", created_at=utcnow(), files=describe(root)
    )
    api.store.publish(manifest)
    with api.database.write() as session:
        service.adopt(session, store=api.store, principal=owner, manifest=manifest)
    return artifact_id


class TestRegister:
    def body(self, folder: Path) -> dict[str, str]:
        return {"kind": "dataset_source", "path": str(folder), "name": "digits"}

    def test_anonymous(self, api: Api, folder: Path) -> None:
        problem(api.post("/v1/artifacts", self.body(folder), by=None), 401, "unauthenticated")

    def test_outside_the_roots(self, api: Api, tmp_path: Path) -> None:
        refused = problem(api.post("/v1/artifacts", self.body(tmp_path)), 422, "forbidden_path")
        assert str(tmp_path / "allowed") in refused["hint"]

    def test_link_out_of_the_roots(self, api: Api, folder: Path, tmp_path: Path) -> None:
        (folder.parent / "link").symlink_to(tmp_path)
        problem(api.post("/v1/artifacts", self.body(folder.parent / "link")), 422, "forbidden_path")

    def test_wrong_kind(self, api: Api, folder: Path) -> None:
        answer = api.post("/v1/artifacts", {**self.body(folder), "kind": "hf_model"})
        problem(answer, 422, "invalid_model")

    def test_lists_every_file_with_its_digest(self, api: Api, folder: Path) -> None:
        answer = api.post("/v1/artifacts", self.body(folder))
        assert answer.status_code == 201, answer.text
        files = {entry["path"]: (entry["size"], entry["sha256"]) for entry in answer.json()["files"]}
        assert files == {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in FILES.items()}

    def test_once_per_key(self, api: Api, folder: Path) -> None:
        answers = [api.post("/v1/artifacts", self.body(folder), headers={"Idempotency-Key": "k"}) for _ in range(2)]
        assert answers[0].json() == answers[1].json()

    def test_what_an_admin_registers_everybody_may_read(self, api: Api, folder: Path) -> None:
        shared = api.post("/v1/artifacts", self.body(folder), by="admin").json()["id"]
        assert api.get(f"/v1/artifacts/{shared}", by="bob").status_code == 200
        assert [row["id"] for row in api.get("/v1/artifacts", by="bob").json()["data"]] == [shared]
        problem(api.call("DELETE", f"/v1/artifacts/{shared}", by="bob"), 403, "forbidden")


class TestGet:
    def test_anonymous(self, api: Api, folder: Path) -> None:
        problem(api.get(f"/v1/artifacts/{publish(api, folder)}", by=None), 401, "unauthenticated")

    def test_foreign_artifact_does_not_exist(self, api: Api, folder: Path) -> None:
        artifact_id = publish(api, folder)
        for path in ("", "/archive", "/files/data.jsonl"):
            problem(api.get(f"/v1/artifacts/{artifact_id}{path}", by="bob"), 404, "not_found")
        assert api.get("/v1/artifacts", by="bob").json()["data"] == []

    def test_list_filters(self, api: Api, folder: Path) -> None:
        artifact_id = publish(api, folder)
        assert [row["id"] for row in api.get("/v1/artifacts?kind=dataset_source").json()["data"]] == [artifact_id]
        assert api.get("/v1/artifacts?kind=report").json()["data"] == []


class TestFiles:
    def test_anonymous(self, api: Api, folder: Path) -> None:
        problem(api.get(f"/v1/artifacts/{publish(api, folder)}/files/data.jsonl", by=None), 401, "unauthenticated")

    def test_whole_head_and_part(self, api: Api, folder: Path) -> None:
        artifact_id = publish(api, folder)
        for name, content in FILES.items():
            url = f"/v1/artifacts/{artifact_id}/files/{name}"
            answer = api.get(url)
            assert (answer.status_code, answer.content) == (200, content)
            head = api.call("HEAD", url)
            assert head.headers["etag"] == answer.headers["etag"] == f'"sha256-{hashlib.sha256(content).hexdigest()}"'
            assert head.headers["content-length"] == str(len(content))
        part = api.get(url.replace("images/empty", "data.jsonl"), headers={"Range": "bytes=3-5"})
        assert (part.status_code, part.content) == (206, FILES["data.jsonl"][3:6])

    @pytest.mark.parametrize(
        "path",
        [
            "nothing",
            "images",
            "../manifest.json",
            "..%2fmanifest.json",
            "%2e%2e/manifest.json",
            "images%5c0.png",
            "%00",
            "/etc/passwd",
            "images/../data.jsonl",
        ],
    )
    def test_only_files_of_the_manifest(self, api: Api, folder: Path, path: str) -> None:
        answer = api.get(f"/v1/artifacts/{publish(api, folder)}/files/{path}")
        if answer.status_code == 200:  # the client itself resolved the dots
            assert answer.content == FILES["data.jsonl"]
        else:
            problem(answer, 404, "not_found")

    def test_link_that_leads_out_of_the_roots_is_not_followed(self, api: Api, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text("secret")
        (folder / "inside.json").symlink_to(folder / "data.jsonl")
        (folder / "link.json").write_text("public")
        body = {"kind": "dataset_source", "path": str(folder)}
        artifact_id = api.post("/v1/artifacts", body).json()["id"]
        (folder / "link.json").unlink()
        (folder / "link.json").symlink_to(tmp_path / "secret")
        problem(api.get(f"/v1/artifacts/{artifact_id}/files/link.json"), 404, "not_found")
        assert "link.json" in problem(api.post("/v1/artifacts", body), 422, "forbidden_path")["detail"]
        assert api.get(f"/v1/artifacts/{artifact_id}/files/inside.json").content == FILES["data.jsonl"]

    def test_file_that_was_changed_is_refused(self, api: Api, folder: Path) -> None:
        artifact_id = api.post("/v1/artifacts", {"kind": "dataset_source", "path": str(folder)}).json()["id"]
        (folder / "data.jsonl").write_bytes(b"other")
        problem(api.get(f"/v1/artifacts/{artifact_id}/files/data.jsonl"), 409, "conflict")


class TestArchive:
    def test_anonymous(self, api: Api, folder: Path) -> None:
        problem(api.get(f"/v1/artifacts/{publish(api, folder)}/archive", by=None), 401, "unauthenticated")

    def test_resumed_download_extracts(self, api: Api, folder: Path) -> None:
        url = f"/v1/artifacts/{publish(api, folder)}/archive"
        head = api.call("HEAD", url)
        size, etag = int(head.headers["content-length"]), head.headers["etag"]
        half = api.get(url, headers={"Range": f"bytes=0-{size // 2}"}).content
        rest = api.get(url, headers={"Range": f"bytes={len(half)}-", "If-Range": etag})
        assert rest.status_code == 206
        assert half + rest.content == api.get(url).content
        with tarfile.open(fileobj=io.BytesIO(half + rest.content)) as tar:
            assert {member.name: tar.extractfile(member).read() for member in tar} == FILES  # type: ignore[union-attr]


class TestDelete:
    def test_anonymous(self, api: Api, folder: Path) -> None:
        problem(api.call("DELETE", f"/v1/artifacts/{publish(api, folder)}", by=None), 401, "unauthenticated")

    def test_refused_while_a_live_job_uses_it(self, api: Api) -> None:
        body = api.conversion()
        api.post("/v1/jobs", body)
        url = f"/v1/artifacts/{body['spec']['source']['artifact']}"
        problem(api.call("DELETE", url), 409, "conflict")

    def test_removes_row_and_files(self, api: Api, folder: Path) -> None:
        artifact_id = publish(api, folder)
        assert api.call("DELETE", f"/v1/artifacts/{artifact_id}").status_code == 204
        problem(api.get(f"/v1/artifacts/{artifact_id}"), 404, "not_found")
        assert not api.store.artifact_dir(artifact_id).exists()

    def test_leaves_a_registered_folder_alone(self, api: Api, folder: Path) -> None:
        artifact_id = api.post("/v1/artifacts", {"kind": "dataset_source", "path": str(folder)}).json()["id"]
        assert api.call("DELETE", f"/v1/artifacts/{artifact_id}").status_code == 204
        assert (folder / "data.jsonl").exists()
        with api.database.read() as session:
            assert session.get_one(Artifact, artifact_id).deleted_at is not None
