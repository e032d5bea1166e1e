"""Generated requests against /openapi.json: nothing may crash, and no answer may lie outside the schema."""

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import HypothesisException
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.errors import SchemathesisError
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.specs.openapi.checks import (
    allow_header_conformance,
    content_type_conformance,
    ignored_auth,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from core.jobs.lifecycle import JobState
from core.settings import Settings
from tests.api.live import Live, running
from tests.api.routes.test_streams import begin
from tests.factories import add_node

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
    allow_header_conformance,
    unsupported_method,
    ignored_auth,
]
EXAMPLES = 16

schemathesis.serializer.alias("application/offset+octet-stream", "application/octet-stream")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, migrated_home: Path) -> Iterator[Live]:
    """A server with a job that has run, an artifact and an upload."""
    root = tmp_path_factory.mktemp("fuzzed")
    shutil.copytree(migrated_home, root / "home")
    (root / "allowed" / "images").mkdir(parents=True)
    (root / "allowed" / "rows.json").write_text("[]")
    (root / "allowed" / "images" / "ü.png").write_bytes(bytes(2000))
    configured = Settings(home=root / "home", allow_roots=(root / "allowed",), node_ttl_s=3600)
    with running(configured) as live:
        add_node(live.database, configured)
        yield live


@pytest.fixture(scope="module")
def known(server: Live) -> dict[str, str]:
    """Ids of things that exist, by the name of the path parameter."""
    configured: Settings = server.app.state.settings
    run = begin(server.database, configured)
    run.start()
    run.log("größer\n".encode())
    run.metric(1, loss=1.0)
    run.finish(JobState.FAILED)
    body = {"kind": "dataset_source", "path": str(configured.allow_roots[0])}
    upload = {"kind": "dataset_source", "filename": "a.json", "size_bytes": 10}
    return {
        "job_id": run.job_id,
        "artifact_id": server.post("/v1/artifacts", body).json()["id"],
        "path": "images/ü.png",
        "upload_id": server.post("/v1/uploads", upload).json()["id"],
    }


def test_answers_as_described(server: Live, known: dict[str, str]) -> None:
    """Every operation, each with generated requests; all failures are told at once."""
    described = schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")
    operations = [result.ok() for result in described.get_all_operations()]
    assert len(operations) > 30
    failures = {}
    for operation in operations:
        try:
            _fuzz(operation, server, known)
        except (AssertionError, FailureGroup, Failure, SchemathesisError, HypothesisException) as failure:
            failures[operation.label] = failure
    assert not failures, "\n\n".join(f"{label}: {_explain(failure)}" for label, failure in failures.items())


def _fuzz(operation: APIOperation, server: Live, known: dict[str, str]) -> None:
    turns = itertools.count()

    @seed(20261124)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(
        operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
        | operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)
    )
    def check(case: Case) -> None:
        if next(turns) % 2:  # else nothing would ever be found
            case.path_parameters.update({name: known[name] for name in case.path_parameters if name in known})
        headers = {"Authorization": f"Bearer {server.key}"}
        case.call_and_validate(headers=headers, checks=CHECKS, timeout=60)

    check()


def _explain(failure: BaseException) -> str:
    parts = failure.exceptions if isinstance(failure, FailureGroup) else [failure]
    return "\n".join(f"{type(part).__name__}: {str(part)[:2000]}" for part in parts)
