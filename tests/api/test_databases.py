"""What depends on the database, on SQLite and on PostgreSQL: races, text that it cannot hold, JSON queries."""

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path

import pytest

from api.auth import ensure_admin_key
from core.db.migrate import upgrade
from core.db.models import ApiKey, Attempt, Event, Job, Lease, LogChunk
from core.db.session import Database
from core.errors import NotFound
from core.jobs.inputs import resolve_inputs
from core.jobs.lifecycle import JobState, transition
from core.settings import Settings
from tests.api.conftest import Api
from tests.api.problems import problem
from tests.factories import LAYOUT_7B, add_artifact


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


class TestDelete:
    def test_all_of_a_job_goes_and_a_finished_job_that_read_it_stays(self, api: Api) -> None:
        job_id, now = api.submit(), datetime.now(timezone.utc)
        spec = {"operation": "mm_to_hf", "source": {"job": job_id}}
        later = api.post("/v1/jobs", {"kind": "conversion", "spec": spec}).json()["id"]
        for name in (later, job_id):
            api.post(f"/v1/jobs/{name}/cancel")
        with api.database.write() as session:
            add_artifact(session, "report", job_id=job_id, deleted_at=now)
            session.add(Attempt(id="att_1", job_id=job_id, number=1, state="cancelled", started_at=now))
            session.flush()
            lease = {"token": "t", "state": "released", "expires_at": now, "created_at": now, "shipped": {}}
            session.add(Lease(id="lea_1", attempt_id="att_1", node="node-a", node_rank=0, devices=[], **lease))
            session.add(LogChunk(attempt_id="att_1", rank=-1, offset=0, size=1, data=b"x"))
        (api.store.attempt_dir(job_id, 1)).mkdir(parents=True)
        assert api.call("DELETE", f"/v1/jobs/{job_id}").status_code == 204
        problem(api.get(f"/v1/jobs/{job_id}"), 404, "not_found")
        assert not api.store.job_dir(job_id).exists()
        with api.database.read() as session:
            assert [session.query(table).count() for table in (Attempt, Lease, LogChunk)] == [0, 0, 0]
            assert session.query(Event).where(Event.job_id == job_id).count() == 0
            with pytest.raises(NotFound, match=r"spec\.source: the input no longer exists"):
                resolve_inputs(session, session.get_one(Job, later), api.settings)
        assert api.get(f"/v1/jobs/{later}").json()["inputs"][0]["job"] is None
        assert api.call("DELETE", f"/v1/jobs/{later}").status_code == 204

    def test_a_deletion_and_a_submission_that_needs_the_job_at_once_leave_both_or_none(self, api: Api) -> None:
        for _ in range(5):
            job_id = api.submit()
            with api.database.write() as session:
                add_artifact(session, "mm_checkpoint", {"parallel": LAYOUT_7B}, job_id=job_id, name="checkpoint")
                for state in (JobState.STARTING, JobState.RUNNING, JobState.SUCCEEDED):
                    transition(session, session.get_one(Job, job_id), state)
            spec = {
                "operation": "reshard",
                "source": {"job": job_id},
                "parallel": {"llm_pp_layers": [[28]], "vit_pp_layers": [[32]]},
            }
            hf = api.conversion()["spec"]["source"]
            with ThreadPoolExecutor(2) as pool:
                submitted = pool.submit(api.post, "/v1/jobs", {"kind": "conversion", "spec": {**spec, "hf_source": hf}})
                deleted = pool.submit(api.call, "DELETE", f"/v1/jobs/{job_id}?artifacts=true")
            told = (submitted.result().status_code, deleted.result().status_code)
            assert told in {(201, 409), (404, 204), (409, 204)}, (submitted.result().text, deleted.result().text)


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
