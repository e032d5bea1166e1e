"""What depends on the database, on SQLite and on PostgreSQL: races, text that it cannot hold, JSON queries."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from api.auth import ensure_admin_key
from core.db.migrate import upgrade
from core.db.models import ApiKey, Job
from core.db.session import Database
from core.settings import Settings
from tests.api.conftest import Api
from tests.api.problems import problem


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    return Settings(
        home=tmp_path / "home", database_url=database_url, allow_roots=(tmp_path,), log_format="json", node_ttl_s=120
    )


class TestRaces:
    def test_equal_requests_at_once_have_one_effect_and_one_answer(self, api: Api) -> None:
        body, headers = api.conversion(), {"Idempotency-Key": "k"}
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: api.post("/v1/jobs", body, headers=headers), range(8)))
        assert {answer.status_code for answer in answers} == {201}
        assert len({answer.json()["id"] for answer in answers}) == 1
        with api.database.read() as session:
            assert session.query(Job).count() == 1

    def test_cancels_at_once_agree(self, api: Api) -> None:
        job_id = api.submit()
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: api.post(f"/v1/jobs/{job_id}/cancel"), range(8)))
        assert {answer.status_code for answer in answers} == {200}
        assert api.get(f"/v1/jobs/{job_id}").json()["state"] == "cancelled"

    def test_servers_that_start_at_once_make_one_admin_key(self, settings: Settings) -> None:
        settings.home_dir.mkdir()
        database = Database.from_settings(settings)
        upgrade(database)
        with ThreadPoolExecutor(4) as pool:
            made = list(pool.map(lambda _: ensure_admin_key(database, settings), range(4)))
        assert len([secret for secret in made if secret]) == 1
        assert (settings.home_dir / "admin.key").read_text().strip() in made
        with database.read() as session:
            assert session.query(ApiKey).count() == 1
        database.dispose()


class TestText:
    def test_nul_is_refused_or_stored_but_never_crashes(self, api: Api) -> None:
        answer = api.post("/v1/jobs", api.conversion(name="a\0b"))
        if answer.status_code != 201:
            problem(answer, 422, "invalid_spec")
        assert api.get("/v1/jobs", params={"after": "a\0b"}).status_code in (200, 422)
        assert api.get("/v1/jobs/a%00b").status_code in (404, 422)

    def test_labels_of_all_scripts_are_found(self, api: Api) -> None:
        job_id = api.submit(labels={"a.b/c-d": "größe 大 'x' \"y\" %_"})
        found = api.get("/v1/jobs", params={"label": "a.b/c-d=größe 大 'x' \"y\" %_"}).json()["data"]
        assert [job["id"] for job in found] == [job_id]
        assert api.get("/v1/jobs", params={"label": "a.b"}).json()["data"] == []


class TestHealth:
    def test_ready_and_measured(self, api: Api) -> None:
        api.submit()
        assert api.get("/readyz", by=None).status_code == 200
        assert 'temper_jobs{state="queued"} 1.0' in api.get("/metrics", by=None).text


def test_database_that_goes_away_is_said_and_survived(api: Api) -> None:
    """The engine is pointed at nothing: what a restart of the database looks like to a request."""
    api.client.app.state.database = Database("postgresql+psycopg://temper@127.0.0.1:1/none")  # type: ignore[attr-defined]
    try:
        problem(api.get("/v1/jobs"), 503, "unavailable")
        problem(api.get("/readyz", by=None), 503, "not_ready")
        assert "temper_database_up 0.0" in api.get("/metrics", by=None).text
        assert api.get("/healthz", by=None).status_code == 200
    finally:
        api.client.app.state.database.dispose()  # type: ignore[attr-defined]
        api.client.app.state.database = api.database  # type: ignore[attr-defined]
