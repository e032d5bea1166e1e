"""`temper` as a user runs it: a process, its output, its exit code."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from api.cli import DEFAULT_HOME, DEFAULT_URL, UsageError, main, read_jobs, with_references
from core.settings import Settings
from tests.api.answering import Handler, Server, in_turn, running, says
from tests.services import REPOSITORY

JOB = {
    "id": "job_1",
    "kind": "training",
    "name": "first",
    "owner": "ada",
    "state": "running",
    "created_at": "2026-01-01T00:00:00Z",
}
STEP = {"step": 7, "values": {"loss": 1.5, "tokens_per_second": 1234.5}}


@pytest.fixture
def server() -> Iterator[Server]:
    with running() as started:
        yield started


def temper(
    *arguments: str, url: str = "http://127.0.0.1:9", home: Path = Path("/nonexistent"), **environment: str
) -> "subprocess.CompletedProcess[str]":
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TEMPER_")}
    return subprocess.run(
        [sys.executable, "-m", "api.cli", "--url", url, *arguments],
        capture_output=True, text=True, check=False, timeout=120, cwd=REPOSITORY,
        env={**inherited, "TEMPER_HOME": str(home), "COLUMNS": "200", **environment},
    )  # fmt: skip


def within(
    *arguments: str, url: str = "http://127.0.0.1:9", home: Path = Path("/nonexistent"), **environment: str
) -> "subprocess.CompletedProcess[str]":
    """The same without a process of its own, which takes most of a second."""
    with pytest.MonkeyPatch.context() as patch, io.StringIO() as out, io.StringIO() as err:
        for name in [name for name in os.environ if name.startswith("TEMPER_")]:
            patch.delenv(name)
        for name, value in {"TEMPER_HOME": str(home), "COLUMNS": "200", **environment}.items():
            patch.setenv(name, value)
        patch.setattr("sys.argv", ["temper", "--url", url, *arguments])
        patch.setattr("sys.stdout", out)
        patch.setattr("api.cli.out", Console(file=out))
        patch.setattr("api.cli.err", Console(file=err))
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


class TestExitCodes:
    def test_wrong_usage_is_2(self) -> None:
        assert temper("jobs", "--nonsense").returncode == 2

    def test_a_file_that_is_not_there_is_2_and_said(self) -> None:
        result = temper("submit", "/nonexistent.yaml")
        assert result.returncode == 2
        assert "cannot be read: No such file" in result.stderr

    def test_a_refusal_is_3_with_message_fields_and_hint(self, server: Server) -> None:
        errors = [{"loc": ["spec", "parallel", "tp_size"], "message": "must divide 2", "input": 3}]
        problem = {"code": "incompatible_plan", "detail": "tp=3 does not divide [kv]", "hint": "use 1 or 2"}
        server.answers["GET /v1/jobs/job_1"] = says(422, {**problem, "errors": errors})
        result = temper("show", "job_1", url=server.url)
        assert result.returncode == 3
        assert result.stderr.splitlines() == [
            "temper: tp=3 does not divide [kv]", "  spec.parallel.tp_size: must divide 2", "hint: use 1 or 2",
        ]  # fmt: skip

    def test_no_server_is_4_with_what_to_do(self) -> None:
        result = temper("jobs")
        assert result.returncode == 4
        assert "is the server running (`temper serve`)" in result.stderr

    def test_a_failed_job_is_1_with_its_error(self, server: Server, tmp_path: Path) -> None:
        failed = {**JOB, "state": "failed", "error": {"code": "disk_full", "message": "no room", "hint": "make some"}}
        server.answers["POST /v1/jobs"] = says(201, JOB)
        server.answers["GET /v1/jobs/job_1"] = in_turn(says(200, JOB), says(200, failed))
        server.answers["GET /v1/jobs/job_1/events"] = says(
            200, f"event: metric\ndata: {json.dumps(STEP)}\n\nevent: end\ndata: {{}}\n\n".encode()
        )
        (tmp_path / "job.json").write_text(json.dumps({"kind": "training", "spec": {}}))
        result = temper("submit", str(tmp_path / "job.json"), "--follow", url=server.url)
        assert result.returncode == 1
        assert "step 7  loss 1.5000  1,234 tokens/s" in result.stderr
        assert "no room" in result.stderr
        assert "make some" in result.stderr

    def test_of_several_jobs_those_before_the_refused_one_are_named(self, server: Server, tmp_path: Path) -> None:
        refusal = says(422, {"code": "invalid_spec", "detail": "body.spec: no"})
        server.answers["POST /v1/jobs"] = in_turn(says(201, JOB), refusal)
        server.answers["GET /v1/jobs/job_1/events"] = says(200, {"data": [], "has_more": False, "next": None})
        (tmp_path / "jobs.json").write_text(json.dumps([{"kind": "training", "spec": {}}] * 2))
        result = within("submit", str(tmp_path / "jobs.json"), url=server.url)
        assert result.returncode == 3
        assert "jobs.json was refused; those above it are submitted: job_1" in result.stderr


class TestConnection:
    def test_defaults_are_those_of_the_server(self) -> None:
        fields = Settings.model_fields
        assert f"http://{fields['host'].default}:{fields['port'].default}" == DEFAULT_URL
        assert fields["home"].default == DEFAULT_HOME

    def test_the_embedded_servers_key_is_found_in_its_home(self, server: Server, tmp_path: Path) -> None:
        (tmp_path / "admin.key").write_text("secret\n")
        server.answers["GET /v1/jobs"] = says(200, {"data": [], "has_more": False, "next": None})
        assert within("jobs", url=server.url, home=tmp_path).returncode == 0
        assert server.seen[0][2]["Authorization"] == "Bearer secret"

    def test_a_key_that_is_given_goes_first(self, server: Server, tmp_path: Path) -> None:
        (tmp_path / "admin.key").write_text("secret\n")
        server.answers["GET /v1/jobs"] = says(200, {"data": [], "has_more": False, "next": None})
        within("jobs", url=server.url, home=tmp_path, TEMPER_API_KEY="mine")
        assert server.seen[0][2]["Authorization"] == "Bearer mine"

    def test_the_key_of_this_machine_is_not_sent_elsewhere(self, tmp_path: Path) -> None:
        from api.cli import Connection

        (tmp_path / "admin.key").write_text("secret\n")
        assert Connection("http://127.0.0.1:1", None, tmp_path)._embedded_key() == "secret"
        assert Connection("https://temper.example.org", None, tmp_path)._embedded_key() is None


class TestOutput:
    def test_jobs_are_a_table_or_json(self, server: Server) -> None:
        server.answers["GET /v1/jobs"] = says(200, {"data": [JOB], "has_more": False, "next": None})
        (row,) = within("jobs", url=server.url).stdout.splitlines()[1:]
        assert row.split()[:4] == ["job_1", "training", "first", "running"]
        assert json.loads(within("jobs", "--json", url=server.url).stdout)[0]["id"] == "job_1"

    def test_a_narrow_table_keeps_ids_whole_and_names_the_users_of_several(self, server: Server) -> None:
        jobs = [{**JOB, "id": f"job_{number:026}", "owner": f"user{number}"} for number in range(2)]
        server.answers["GET /v1/jobs"] = says(200, {"data": jobs, "has_more": False, "next": None})
        lines = within("jobs", url=server.url, COLUMNS="60").stdout.splitlines()[1:]
        assert [line.split()[0] for line in lines] == [job["id"] for job in jobs]
        assert all(f"user{number}"[:3] in line for number, line in enumerate(lines))

    def test_logs_are_bytes_as_they_came(self, server: Server) -> None:
        def log(handler: Handler, _: bytes) -> None:
            first = "offset=0" in handler.path
            handler.reply(200, b"\xff line\n" if first else b"", Temper_Next_Offset="7", Temper_Complete="true")

        server.answers["GET /v1/jobs/job_1/logs"] = log
        result = subprocess.run(
            [sys.executable, "-m", "api.cli", "--url", server.url, "logs", "job_1"],
            capture_output=True, check=True, timeout=120, cwd=REPOSITORY,
        )  # fmt: skip
        assert result.stdout == b"\xff line\n"

    def test_hosts_are_a_table_with_what_is_free_and_drained_by_name(self, server: Server) -> None:
        devices = [{"id": number, "healthy": True, "in_use": number < 2, "job_id": "job_1"} for number in range(8)]
        node = {
            "name": "ascend 1", "device_kind": "npu", "devices": devices, "healthy": True, "alive": True, "drained": True,
            "reason": None, "version": "1", "last_seen_at": "2026-01-01T00:00:00Z",
        }  # fmt: skip
        server.answers["GET /v1/nodes"] = says(200, {"data": [node], "has_more": False, "next": None})
        server.answers["POST /v1/nodes/ascend%201/drain"] = says(200, node)
        assert within("nodes", url=server.url).stdout.splitlines()[1].split() == [
            "ascend", "1", "drained", "8", "npu", "6", "job_1", "1",
        ]  # fmt: skip
        told = within("nodes", "drain", "ascend 1", url=server.url).stdout
        assert told == "ascend 1 is drained; still running there: job_1\n"

    def test_a_job_is_deleted_with_its_artifacts_where_that_is_said(self, server: Server) -> None:
        server.answers["DELETE /v1/jobs/job_1"] = server.answers["DELETE /v1/jobs/job_2?artifacts=true"] = says(
            204, b""
        )
        assert within("delete", "job_1", url=server.url).stdout == "job_1 is deleted\n"
        within("delete", "job_2", "--artifacts", url=server.url)
        assert [request[1] for request in server.asked("DELETE")] == ["/v1/jobs/job_1", "/v1/jobs/job_2?artifacts=true"]

    def test_artifacts_are_deleted_until_one_is_refused(self, server: Server) -> None:
        server.answers["DELETE /v1/artifacts/art_1"] = says(204, b"")
        server.answers["DELETE /v1/artifacts/art_2"] = says(409, {"code": "conflict", "detail": "used by job job_1"})
        result = within("delete", "art_1", "art_2", "art_3", url=server.url)
        assert (result.returncode, result.stdout) == (3, "art_1 is deleted\n")
        assert "used by job job_1" in result.stderr

    def test_metrics_are_summed_up(self, server: Server) -> None:
        server.answers["GET /v1/jobs/job_1/metrics"] = says(200, {"series": {"loss": [[1, 0.0, 2.0], [2, 1.0, 0.5]]}})
        row = within("metrics", "job_1", url=server.url).stdout.splitlines()[1].split()
        assert row == ["loss", "2", "2", "2", "0.5", "0.5", "2"]

    def test_help_names_every_command_of_the_contract(self) -> None:
        text = temper("--help").stdout
        commands = (
            *("serve", "api", "worker", "submit", "jobs", "show", "logs", "metrics", "cancel", "retry"),
            *("upload", "register", "download", "doctor", "keys"),
        )
        assert [command for command in commands if f" {command} " not in text] == []


class TestReadJobs:
    def test_json_yaml_lists_and_documents_are_all_read(self, tmp_path: Path) -> None:
        file = tmp_path / "jobs"
        one = {"kind": "dataset", "spec": {"a": 1}}
        for text in (json.dumps(one), "kind: dataset\nspec: {a: 1}"):
            file.write_text(text)
            assert read_jobs(file) == [one]
        for text in (json.dumps([one, one]), "kind: dataset\nspec: {a: 1}\n---\nkind: dataset\nspec: {a: 1}"):
            file.write_text(text)
            assert read_jobs(file) == [one, one]

    @pytest.mark.parametrize(
        ("text", "message"),
        [("{", "neither JSON nor YAML"), ("[]", "no job"), ("- 1", "job 1 of"), ("kind: x", "needs `kind` and `spec`"),
         ("{kind: x, spec: {}, nmae: y}", "unknown \\['nmae'\\]")],
    )  # fmt: skip
    def test_what_is_wrong_is_said(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "f").write_text(text)
        with pytest.raises(UsageError, match=message):
            read_jobs(tmp_path / "f")


class TestWithReferences:
    def test_names_become_ids_wherever_a_reference_stands(self) -> None:
        spec = {"model": {"job": "$a", "output": "x"}, "list": [{"job": "$b"}], "job": "job_9"}
        found = with_references(spec, {"a": "job_1", "b": "job_2"})
        assert found == {"model": {"job": "job_1", "output": "x"}, "list": [{"job": "job_2"}], "job": "job_9"}

    def test_an_unknown_name_is_refused_with_those_there_are(self) -> None:
        with pytest.raises(UsageError, match=r"no job named 'c' above this one; there are \['a'\]"):
            with_references({"model": {"job": "$c"}}, {"a": "job_1"})


class TestStart:
    def test_the_command_line_loads_neither_torch_nor_the_server(self) -> None:
        code = (
            "import sys, api.cli; print([m for m in ('torch', 'fastapi', 'sqlalchemy', 'celery') if m in sys.modules])"
        )
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
        )
        assert result.stdout.strip() == "[]"
