from datetime import datetime, timedelta, timezone

from core.db.models import Attempt, Job, Lease, Node
from core.jobs.lifecycle import JobState, transition
from tests.api.conftest import Api
from tests.api.problems import problem
from tests.factories import LAYOUT_7B, add_artifact, submit


class TestNodes:
    def test_anonymous(self, api: Api) -> None:
        problem(api.get("/v1/nodes", by=None), 401, "unauthenticated")

    def test_shows_devices_and_who_holds_them(self, api: Api) -> None:
        job_id, now = api.submit(), datetime.now(timezone.utc)
        with api.database.write() as session:
            session.add(Attempt(id="att_1", job_id=job_id, number=1, state="running", started_at=now))
            session.flush()
            session.add(
                Lease(
                    id="lea_1", attempt_id="att_1", node="node-a", node_rank=0, devices=[1], token="t", state="held",
                    expires_at=now, created_at=now, shipped={},
                )
            )  # fmt: skip
        for user, holder in (("alice", job_id), ("admin", job_id), ("bob", None)):
            (node,) = api.get("/v1/nodes", by=user).json()["data"]
            assert (node["name"], node["alive"], node["healthy"]) == ("node-a", True, True)
            assert [device["in_use"] for device in node["devices"][:3]] == [False, True, False]
            assert node["devices"][1]["job_id"] == holder


class TestMaintenance:
    def test_a_drained_host_says_so_and_comes_back(self, api: Api) -> None:
        for _ in range(2):  # the second time changes nothing
            assert api.post("/v1/nodes/node-a/drain", by="admin").json()["drained"] is True
        plan = api.post("/v1/jobs/plan", api.conversion()).json()
        assert plan["warnings"] == ["the job waits until enough hosts are in service; drained: node-a"]
        assert 'temper_node_drained{node="node-a"} 1.0' in api.get("/metrics", by=None).text
        assert api.get("/readyz", by=None).status_code == 200  # the service is well, and can be told to go on
        assert api.post("/v1/nodes/node-a/resume", by="admin").json()["drained"] is False

    def test_is_for_admins_and_for_hosts_that_there_are(self, api: Api) -> None:
        for action in ("drain", "resume"):
            problem(api.post(f"/v1/nodes/node-a/{action}"), 403, "forbidden")
            assert "node-a" in problem(api.post(f"/v1/nodes/node-z/{action}", by="admin"), 404, "not_found")["detail"]
        problem(api.call("DELETE", "/v1/nodes/node-a"), 403, "forbidden")
        problem(api.call("DELETE", "/v1/nodes/node-z", by="admin"), 404, "not_found")

    def test_only_a_host_that_is_gone_can_be_forgotten(self, api: Api) -> None:
        problem(api.call("DELETE", "/v1/nodes/node-a", by="admin"), 409, "conflict")
        with api.database.write() as session:
            session.get_one(Node, "node-a").last_seen_at = datetime.now(timezone.utc) - timedelta(minutes=5)
        assert api.call("DELETE", "/v1/nodes/node-a", by="admin").status_code == 204
        assert api.get("/v1/nodes").json()["data"] == []


class TestQueue:
    def test_anonymous(self, api: Api) -> None:
        problem(api.get("/v1/queue", by=None), 401, "unauthenticated")

    def test_users_see_their_own_jobs_at_their_true_place(self, api: Api) -> None:
        first, later, urgent = api.submit(by="admin"), api.submit(), api.submit(by="admin", priority=5)
        mine = api.get("/v1/queue").json()
        assert [(row["job_id"], row["position"]) for row in mine["data"]] == [(later, 3)]
        assert mine["num_queued"] == 3
        everybody = api.get("/v1/queue", by="admin").json()["data"]
        assert [row["job_id"] for row in everybody] == [urgent, first, later]

    def test_says_why_a_job_waits(self, api: Api) -> None:
        source = api.submit()
        with api.database.write() as session:
            data = add_artifact(session, "dataset")
            spec = {
                "model": {"job": source},
                "dataset": {"artifact": data.id},
                "parallel": {**LAYOUT_7B, "nproc_per_node": 2},
                "train_iters": 1,
                "global_batch_size": 1,
            }
            waiting = submit(session, api.settings, "training", spec).id
            session.get_one(Job, source).reason = "no healthy host is connected"
        queue = {row["job_id"]: row for row in api.get("/v1/queue").json()["data"]}
        assert queue[source]["reason"] == "no healthy host is connected"
        assert queue[waiting]["position"] is None
        assert queue[waiting]["waiting_for"] == [source]
        assert source in queue[waiting]["reason"]


class TestHealth:
    def test_lives(self, api: Api) -> None:
        assert api.get("/healthz", by=None).json() == {"status": "ok"}

    def test_ready_with_a_live_host(self, api: Api) -> None:
        assert api.get("/readyz", by=None).status_code == 200

    def test_not_ready_when_the_last_host_fell_silent(self, api: Api) -> None:
        with api.database.write() as session:
            session.get_one(Node, "node-a").last_seen_at = datetime.now(timezone.utc) - timedelta(minutes=5)
        body = problem(api.get("/readyz", by=None), 503, "not_ready")
        assert "node-a" in body["detail"]
        assert [error["loc"] for error in body["errors"]] == [["nodes"]]

    def test_not_ready_with_an_old_schema(self, api: Api) -> None:
        with api.database.engine.begin() as connection:
            connection.exec_driver_sql("DELETE FROM alembic_version")
        assert problem(api.get("/readyz", by=None), 503, "not_ready")["errors"][0]["loc"] == ["migrations"]


class TestMetrics:
    def test_tell_jobs_devices_loss_and_latency(self, api: Api) -> None:
        job_id = api.submit()
        api.submit()
        with api.database.write() as session:
            job = session.get_one(Job, job_id)
            transition(session, job, JobState.STARTING)
            transition(session, job, JobState.RUNNING)
            job.latest_metrics = {"step": 4, "loss": 1.5, "tokens_per_second": 1000.0, "mfu": 0.25, "step_time_ms": 7.0}
        text = api.get("/metrics", by=None).text
        assert 'temper_jobs{state="queued"} 1.0' in text
        assert 'temper_jobs{state="running"} 1.0' in text
        assert f'temper_job_loss{{job="{job_id}"}} 1.5' in text
        assert f'temper_job_tokens_per_second{{job="{job_id}"}} 1000.0' in text
        assert f'temper_job_mfu{{job="{job_id}"}} 0.25' in text
        assert f'temper_job_step_time_milliseconds{{job="{job_id}"}} 7.0' in text
        assert 'temper_devices{kind="cpu",node="node-a"} 8.0' in text
        assert "temper_queue_age_seconds" in text
        assert 'route="/v1/jobs"' in text


class TestFamilies:
    def test_anonymous(self, api: Api) -> None:
        problem(api.get("/v1/families", by=None), 401, "unauthenticated")

    def test_tells_sizes_splits_and_schemas(self, api: Api) -> None:
        body = api.get("/v1/families").json()
        family = next(row for row in body["data"] if row["name"] == "qwen2_5_vl")
        assert family["sizes"]["7B"]["legal_tp"] == [1, 2, 4]
        assert set(body["specs"]) == {"conversion", "dataset", "training", "evaluation"}
        assert "train_iters" in body["specs"]["training"]["properties"]
