import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy.exc import OperationalError

from api.app import create_app
from core.settings import Settings
from tests.api.conftest import Api
from tests.api.problems import problem


class TestImport:
    def test_leaves_torch_out(self) -> None:
        code = "import api.app, api.serve, sys; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy', 'PIL')))"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    def test_does_not_touch_the_file_system(self, tmp_path: Path) -> None:
        create_app(Settings(home=tmp_path / "none"))
        assert not (tmp_path / "none").exists()


class TestStart:
    def test_makes_one_admin_key_that_only_its_owner_can_read(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        settings = Settings(home=tmp_path)
        for _ in range(2):
            with TestClient(create_app(settings)) as client:
                key = (tmp_path / "admin.key").read_text().strip()
                answer = client.get("/v1/keys", headers={"Authorization": f"Bearer {key}"})
                assert [row["role"] for row in answer.json()["data"]] == ["admin"]
        assert (tmp_path / "admin.key").stat().st_mode & 0o777 == 0o600
        assert capsys.readouterr().out.count(key) == 1

    def test_does_not_store_the_key(self, api: Api) -> None:
        secret = api.keys["admin"].removeprefix("temper_").encode()
        files = [path for path in api.settings.home_dir.glob("temper.db*") if path.is_file()]
        assert files
        assert not any(secret in path.read_bytes() for path in files)


class TestErrors:
    def test_unknown_path(self, api: Api) -> None:
        problem(api.get("/v1/nothing"), 404, "not_found")

    def test_wrong_method_names_the_right_ones(self, api: Api) -> None:
        answer = api.call("PUT", "/v1/jobs")
        problem(answer, 405, "method_not_allowed")
        assert "GET" in answer.headers["allow"] or "POST" in answer.headers["allow"]

    def test_malformed_json(self, api: Api) -> None:
        answer = api.post("/v1/jobs", headers={"Content-Type": "application/json"}, content=b'{"kind": ')
        assert "not JSON" in problem(answer, 400, "malformed_json")["detail"]

    def test_body_that_is_not_called_json(self, api: Api) -> None:
        answer = api.post("/v1/jobs", headers={"Content-Type": "text/plain"}, content=b"{}")
        assert "Content-Type" in problem(answer, 422, "invalid_spec")["hint"]

    def test_body_that_is_not_utf8(self, api: Api) -> None:
        answer = api.post("/v1/jobs", headers={"Content-Type": "application/json"}, content=b'{"kind": "\xff"}')
        problem(answer, 400, "malformed_request")

    @pytest.mark.parametrize("value", [b"NaN", b"Infinity", b'"\\ud800"', b'"\\u0000"', b"[" * 5000 + b"]" * 5000])
    def test_values_that_json_cannot_say_back(self, api: Api, value: bytes) -> None:
        body = b'{"kind": "conversion", "spec": ' + value + b"}"
        answer = api.post("/v1/jobs", headers={"Content-Type": "application/json"}, content=body)
        assert answer.status_code in (400, 422), answer.text

    def test_validation_names_each_field_with_its_value(self, api: Api) -> None:
        body = api.conversion()
        body["spec"]["parallel"] = {**body["spec"]["parallel"], "tp_size": 0, "colour": "red"}
        errors = problem(api.post("/v1/jobs", body), 422, "invalid_spec")["errors"]
        found = {tuple(error["loc"]): error["input"] for error in errors}
        assert found == {
            ("body", "spec", "parallel", "tp_size"): 0,
            ("body", "spec", "parallel", "colour"): "red",
        }

    def test_own_messages_carry_no_prefix(self, api: Api) -> None:
        body = api.conversion()
        del body["spec"]["parallel"]
        assert "Value error" not in problem(api.post("/v1/jobs", body), 422, "invalid_spec")["detail"]

    def test_body_that_announces_too_much_is_refused_unread(self, api: Api) -> None:
        def content():
            raise AssertionError("read")
            yield b""

        answer = api.post("/v1/jobs", headers={"Content-Length": str(1 << 40)}, content=content())
        problem(answer, 413, "too_large")

    def test_body_that_grows_too_much_is_refused_while_it_comes(self, api: Api) -> None:
        blocks = (b" " * (1 << 20) for _ in range(9))
        answer = api.post("/v1/jobs", headers={"Content-Type": "application/json"}, content=blocks)
        problem(answer, 413, "too_large")

    def test_crash_tells_nothing_but_the_request_id(self, api: Api) -> None:
        app = api.client.app
        assert isinstance(app, FastAPI)

        @app.get("/crash")
        def crash() -> None:
            raise RuntimeError("secret")

        body = problem(api.get("/crash", headers={"X-Request-Id": "mine"}), 500, "internal_error")
        assert "secret" not in str(body)
        assert body["request_id"] == "mine"

    def test_database_that_is_away_is_a_503(self, api: Api) -> None:
        app = api.client.app
        assert isinstance(app, FastAPI)

        @app.get("/away")
        def away() -> None:
            raise OperationalError("select", {}, Exception("gone"))

        answer = api.get("/away")
        problem(answer, 503, "unavailable")
        assert answer.headers["retry-after"]

    def test_hostile_request_id_is_replaced(self, api: Api) -> None:
        answer = api.get("/v1/nothing", headers={"X-Request-Id": "a b\tc"})
        assert answer.headers["x-request-id"] != "a b\tc"


class TestOpenApi:
    def test_says_of_every_operation_what_it_does(self, api: Api) -> None:
        document = api.get("/openapi.json", by=None).json()
        operations = [operation for path in document["paths"].values() for operation in path.values()]
        assert len(operations) > 30
        assert all(operation["description"] for operation in operations)
        assert len({operation["operationId"] for operation in operations}) == len(operations)

    def test_every_reference_resolves(self, api: Api) -> None:
        text = api.get("/openapi.json", by=None).text
        schemas = api.get("/openapi.json", by=None).json()["components"]["schemas"]
        wanted = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
        assert wanted <= set(schemas)

    def test_examples_are_valid_bodies(self, api: Api) -> None:
        """Each is posted: what it names does not exist here, but nothing is wrong with its form."""
        document = api.get("/openapi.json", by=None).json()
        posted = 0
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                examples = (
                    operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("examples", {})
                )
                for example in examples.values():
                    answer = api.call(method.upper(), path, by="admin", json=example["value"])
                    assert answer.status_code in (201, 404, 422), answer.text
                    assert "errors" not in answer.json(), answer.text
                    posted += 1
        assert posted >= 12

    def test_is_built_once(self, api: Api) -> None:
        app: Any = api.client.app
        assert app.openapi() is app.openapi()
