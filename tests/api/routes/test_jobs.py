from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from core.db.models import Artifact, Attempt, Event, IdempotencyKey, Job, Lease
from core.jobs.lifecycle import JobState, append_events, transition
from tests.api.conftest import Api
from tests.api.problems import problem
from tests.factories import add_artifact, hf_7b


def count(api: Api, model: type[Any]) -> int:
    with api.database.read() as session:
        return int(session.query(model).count())


def fail(api: Api, job_id: str) -> None:
    with api.database.write() as session:
        transition(session, session.get_one(Job, job_id), JobState.FAILED, "for the test")


class TestSubmit:
    def test_anonymous(self, api: Api) -> None:
        answer = api.post("/v1/jobs", api.conversion(), by=None)
        problem(answer, 401, "unauthenticated")
        assert answer.headers["www-authenticate"] == "Bearer"

    def test_unknown_key(self, api: Api) -> None:
        problem(api.get("/v1/jobs", by=None, headers={"Authorization": "Bearer temper_0"}), 401, "unauthenticated")

    def test_foreign_artifact(self, api: Api) -> None:
        body = api.conversion()
        answer = api.post("/v1/jobs", body, by="bob")
        assert body["spec"]["source"]["artifact"] in problem(answer, 404, "not_found")["detail"]

    def test_refusal_names_field_and_remedy(self, api: Api) -> None:
        body = api.conversion()
        body["spec"]["parallel"] = {"tp_size": 8, "llm_pp_layers": [[28]], "vit_pp_layers": [[32]]}
        refused = problem(api.post("/v1/jobs", body), 422, "incompatible_plan")
        assert "8" in refused["detail"]
        assert count(api, Job) == 0

    def test_an_unknown_field_is_answered_with_the_known_ones(self, api: Api) -> None:
        body = api.conversion()
        body["spec"]["parallel"] = {"tp": 2, "llm_pp_layers": [[28]], "vit_pp_layers": [[32]]}
        refused = problem(api.post("/v1/jobs", body), 422, "invalid_spec")
        assert refused["errors"][0]["loc"] == ["body", "spec", "parallel", "tp"]
        assert refused["hint"] == "known here: tp_size, llm_pp_layers, vit_pp_layers"
        body = api.conversion()
        body["spec"]["operatoin"] = "hf_to_mm"
        assert problem(api.post("/v1/jobs", body), 422, "invalid_spec")["hint"].startswith(
            "did you mean operation? known"
        )

    @pytest.mark.parametrize(
        ("change", "detail"),
        [
            ({"kind": "convert"}, "body: kind must be one of 'conversion', 'dataset', 'training', 'evaluation', got 'convert'"),
            ({"priority": 1.5}, "body.priority: Input should be a valid integer, got a number with a fractional part, got 1.5"),
            ({"spec": {"operation": "up"}}, "body.spec.operation: Input should be 'hf_to_mm', 'mm_to_hf' or 'reshard', got \"up\""),
            (
                {"spec": {"parallel": {"llm_pp_layers": [28], "vit_pp_layers": [[32]]}}},
                "body.spec.parallel.llm_pp_layers.0: Input should be a list, got 28",
            ),
        ],
    )  # fmt: skip
    def test_a_wrong_value_is_named(self, api: Api, change: dict[str, Any], detail: str) -> None:
        body = api.conversion()
        body |= {**change, "spec": body["spec"] | change.get("spec", {})}
        assert problem(api.post("/v1/jobs", body), 422, "invalid_spec")["detail"] == detail

    def test_a_user_has_at_most_so_many_unfinished_jobs(self, api: Api) -> None:
        api.client.app.state.settings = api.settings.model_copy(update={"max_user_jobs": 2})  # type: ignore[attr-defined]
        first, _ = api.submit(), api.submit()
        refused = problem(api.post("/v1/jobs", api.conversion()), 409, "over_limit")
        assert "alice has 2 unfinished jobs" in refused["detail"]
        api.submit(by="admin")
        fail(api, first)
        api.submit()

    def test_a_job_beyond_what_one_user_may_hold_is_refused(self, api: Api) -> None:
        api.client.app.state.settings = api.settings.model_copy(update={"max_user_devices": 1})  # type: ignore[attr-defined]
        with api.database.write() as session:
            data, model = add_artifact(session, "dataset"), hf_7b(session)
        spec = {
            "model": {"artifact": model.id}, "dataset": {"artifact": data.id}, "train_iters": 1, "global_batch_size": 2,
            "parallel": {"nproc_per_node": 2, "llm_pp_layers": [[28]], "vit_pp_layers": [[32]]},
        }  # fmt: skip
        refused = problem(api.post("/v1/jobs", {"kind": "training", "spec": spec}), 422, "over_limit")
        assert refused["detail"] == "needs 2 devices; one user may hold 1 at once"

    def test_answers_with_the_job(self, api: Api) -> None:
        body = api.conversion(name="split it", labels={"team": "vision"}, priority=3)
        answer = api.post("/v1/jobs", body)
        assert answer.status_code == 201
        job = answer.json()
        assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
        assert (job["name"], job["labels"], job["priority"], job["owner"]) == (
            "split it",
            {"team": "vision"},
            3,
            "alice",
        )
        assert (job["state"], job["attempts"], job["outputs"], job["error"]) == ("queued", [], [], None)
        assert job["inputs"] == [
            {
                "field": "source",
                "artifact": body["spec"]["source"]["artifact"],
                "job": None,
                "output": None,
                "path": None,
            }
        ]
        assert datetime.fromisoformat(job["created_at"].replace("Z", "+00:00")).tzinfo is not None


class TestIdempotency:
    def test_same_request_has_one_effect_and_one_answer(self, api: Api) -> None:
        body, headers = api.conversion(), {"Idempotency-Key": "k1"}
        first, second = (api.post("/v1/jobs", body, headers=headers) for _ in range(2))
        assert first.status_code == second.status_code == 201
        assert first.json() == second.json()
        assert first.headers["location"] == second.headers["location"]
        assert second.headers["idempotent-replayed"] == "true"
        assert count(api, Job) == 1

    def test_other_body_is_refused(self, api: Api) -> None:
        headers = {"Idempotency-Key": "k1"}
        api.post("/v1/jobs", api.conversion(), headers=headers)
        problem(api.post("/v1/jobs", api.conversion(name="other"), headers=headers), 422, "idempotency_key_reused")
        assert count(api, Job) == 1

    def test_keys_of_users_do_not_meet(self, api: Api) -> None:
        headers = {"Idempotency-Key": "k1"}
        api.post("/v1/jobs", api.conversion(), headers=headers)
        assert api.post("/v1/jobs", api.conversion(), headers=headers, by="admin").status_code == 201
        assert count(api, Job) == 2

    def test_refusal_leaves_the_key_free(self, api: Api) -> None:
        body, headers = api.conversion(), {"Idempotency-Key": "k1"}
        wrong = {**body, "spec": {**body["spec"], "source": {"artifact": "art_" + "0" * 26}}}
        problem(api.post("/v1/jobs", wrong, headers=headers), 404, "not_found")
        assert api.post("/v1/jobs", body, headers=headers).status_code == 201

    def test_expired_key_is_new_again(self, api: Api) -> None:
        body, headers = api.conversion(), {"Idempotency-Key": "k1"}
        api.post("/v1/jobs", body, headers=headers)
        with api.database.write() as session:
            session.query(IdempotencyKey).update({"created_at": datetime.now(timezone.utc) - timedelta(hours=25)})
        answer = api.post("/v1/jobs", body, headers=headers)
        assert answer.status_code == 201
        assert "idempotent-replayed" not in answer.headers
        assert count(api, Job) == 2

    @pytest.mark.parametrize("key", ["", "x" * 256, "a\tb"])
    def test_malformed_key(self, api: Api, key: str) -> None:
        problem(api.post("/v1/jobs", api.conversion(), headers={"Idempotency-Key": key}), 422, "invalid_spec")


class TestPlan:
    def test_anonymous(self, api: Api) -> None:
        problem(api.post("/v1/jobs/plan", api.conversion(), by=None), 401, "unauthenticated")

    def test_says_what_it_needs_and_stores_nothing(self, api: Api) -> None:
        answer = api.post("/v1/jobs/plan", api.conversion())
        assert answer.status_code == 200, answer.text
        assert answer.json()["resources"] == {"nodes": 1, "devices_per_node": 0}
        assert count(api, Job) == 0


class TestList:
    def test_anonymous(self, api: Api) -> None:
        problem(api.get("/v1/jobs", by=None), 401, "unauthenticated")

    def test_users_see_their_own_and_admins_all(self, api: Api) -> None:
        mine, theirs = api.submit(), api.submit(by="admin")
        assert [job["id"] for job in api.get("/v1/jobs").json()["data"]] == [mine]
        assert [job["id"] for job in api.get("/v1/jobs", by="admin").json()["data"]] == [theirs, mine]

    def test_pages_give_each_job_once(self, api: Api) -> None:
        jobs = [api.submit() for _ in range(5)]
        seen, after = [], None
        while True:
            page = api.get("/v1/jobs", params={"limit": 2} | ({"after": after} if after else {})).json()
            seen += [job["id"] for job in page["data"]]
            after = page["next"]
            assert page["has_more"] == (after is not None)
            if not page["has_more"]:
                break
        assert sorted(seen) == sorted(jobs)
        assert seen == sorted(seen, reverse=True)

    @pytest.mark.parametrize(
        ("query", "found"),
        [
            ({"kind": "conversion"}, 2),
            ({"kind": "training"}, 0),
            ({"state": ["queued", "failed"]}, 2),
            ({"state": "failed"}, 1),
            ({"label": "team=vision"}, 1),
            ({"label": "team"}, 2),
            ({"label": ["team", "a.b/c=x=y"]}, 1),
            ({"label": "team=vis"}, 0),
            ({"owner": "alice"}, 2),
            ({"owner": "bob"}, 0),
            ({"name": "mine"}, 1),
            ({"created_after": "2020-01-01T00:00:00Z"}, 2),
            ({"created_before": "2020-01-01T00:00:00+02:00"}, 0),
        ],
    )
    def test_filters(self, api: Api, query: dict[str, Any], found: int) -> None:
        api.submit(labels={"team": "vision"}, name="mine")
        fail(api, api.submit(labels={"team": "speech", "a.b/c": "x=y"}))
        answer = api.get("/v1/jobs", params=query)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["data"]) == found

    def test_a_filter_that_there_is_not_is_refused(self, api: Api) -> None:
        body = problem(api.get("/v1/jobs?states=failed"), 422, "invalid_spec")
        assert body["detail"] == "query.states: there is no such parameter here"
        assert body["hint"].startswith("did you mean state? known here: after, created_after, ")
        assert problem(api.get("/v1/queue?limit=1"), 422, "invalid_spec")["hint"] == "it takes none"

    def test_naive_time_is_refused(self, api: Api) -> None:
        problem(api.get("/v1/jobs?created_after=2020-01-01T00:00:00"), 422, "invalid_spec")


class TestGet:
    def test_anonymous(self, api: Api) -> None:
        problem(api.get(f"/v1/jobs/{api.submit()}", by=None), 401, "unauthenticated")

    def test_foreign_job_does_not_exist(self, api: Api) -> None:
        problem(api.get(f"/v1/jobs/{api.submit()}", by="bob"), 404, "not_found")

    def test_shows_why_it_may_fail_as_it_was_told_at_submission(self, api: Api) -> None:
        job_id = api.submit()
        assert api.get(f"/v1/jobs/{job_id}").json()["risks"] == []
        with api.database.write() as session:
            of_run = ("warning", None, {"code": "unknown_chat_template", "message": "told by the run", "time": 1.0})
            append_events(session, job_id, [of_run], attempt=1)
            append_events(session, job_id, [("warning", None, {"code": "risk", "message": "tight"})], attempt=None)
        assert api.get(f"/v1/jobs/{job_id}").json()["risks"] == ["tight"]
        assert [job["risks"] for job in api.get("/v1/jobs").json()["data"]] == [["tight"]]

    def test_shows_attempts_outputs_and_progress(self, api: Api) -> None:
        job_id, now = api.submit(), datetime.now(timezone.utc)
        with api.database.write() as session:
            session.add(Attempt(id="att_1", job_id=job_id, number=1, state="running", started_at=now))
            session.flush()
            lease = {"token": "t", "state": "held", "expires_at": now, "created_at": now, "shipped": {}}
            session.add(Lease(id="lea_1", attempt_id="att_1", node="node-a", node_rank=0, devices=[2, 3], **lease))
            first = add_artifact(session, "mm_checkpoint", job_id=job_id, name="checkpoint")
            last = add_artifact(session, "mm_checkpoint", job_id=job_id, name="checkpoint")
            job = session.get_one(Job, job_id)
            job.progress = {"done": 3, "total": 10, "unit": "tensors", "rate": 1.5}
            job.latest_metrics = {"step": 3, "loss": None}
        shown = api.get(f"/v1/jobs/{job_id}").json()
        assert shown["attempts"][0]["placement"] == [
            {"node": "node-a", "node_rank": 0, "devices": [2, 3], "state": "held"}
        ]
        assert shown["progress"] == {"done": 3, "total": 10, "unit": "tensors", "rate": 1.5, "remaining_s": 7 / 1.5}
        assert shown["latest_metrics"] == {"step": 3, "loss": None}
        assert [output["artifact_id"] for output in shown["outputs"]] == [last.id]
        assert first.id != last.id


class TestCancel:
    def test_anonymous(self, api: Api) -> None:
        problem(api.post(f"/v1/jobs/{api.submit()}/cancel", by=None), 401, "unauthenticated")

    def test_foreign_job_does_not_exist(self, api: Api) -> None:
        problem(api.post(f"/v1/jobs/{api.submit()}/cancel", by="bob"), 404, "not_found")

    def test_twice_changes_nothing(self, api: Api) -> None:
        job_id = api.submit()
        states = [api.post(f"/v1/jobs/{job_id}/cancel").json()["state"] for _ in range(2)]
        assert states == ["cancelled", "cancelled"]
        assert count(api, Event) == 2

    def test_failed_job_is_a_conflict(self, api: Api) -> None:
        job_id = api.submit()
        fail(api, job_id)
        problem(api.post(f"/v1/jobs/{job_id}/cancel"), 409, "conflict")


class TestRetry:
    def test_anonymous(self, api: Api) -> None:
        problem(api.post(f"/v1/jobs/{api.submit()}/retry", by=None), 401, "unauthenticated")

    def test_puts_a_failed_job_in_line_again(self, api: Api) -> None:
        job_id = api.submit()
        fail(api, job_id)
        assert [api.post(f"/v1/jobs/{job_id}/retry").json()["state"] for _ in range(2)] == ["queued", "queued"]

    def test_refuses_one_that_succeeded(self, api: Api) -> None:
        job_id = api.submit()
        with api.database.write() as session:
            for state in (JobState.STARTING, JobState.RUNNING, JobState.SUCCEEDED):
                transition(session, session.get_one(Job, job_id), state)
        problem(api.post(f"/v1/jobs/{job_id}/retry"), 409, "conflict")
        assert count(api, Artifact) == 1


class TestDelete:
    def delete(self, api: Api, job_id: str, query: str = "", *, by: str | None = "alice") -> Any:
        return api.call("DELETE", f"/v1/jobs/{job_id}{query}", by=by)

    def test_anonymous(self, api: Api) -> None:
        problem(self.delete(api, api.submit(), by=None), 401, "unauthenticated")

    def test_foreign_job_does_not_exist(self, api: Api) -> None:
        job_id = api.submit()
        fail(api, job_id)
        problem(self.delete(api, job_id, by="bob"), 404, "not_found")

    def test_one_that_has_not_finished_or_still_ends_on_a_host_is_refused(self, api: Api) -> None:
        job_id, now = api.submit(), datetime.now(timezone.utc)
        problem(self.delete(api, job_id), 409, "job_not_finished")
        fail(api, job_id)
        with api.database.write() as session:
            session.add(Attempt(id="att_1", job_id=job_id, number=1, state="failed", started_at=now))
            session.flush()
            lease = {"token": "t", "state": "held", "expires_at": now, "created_at": now, "shipped": {}}
            session.add(Lease(id="lea_1", attempt_id="att_1", node="node-b", node_rank=1, devices=[], **lease))
        assert "node-b" in problem(self.delete(api, job_id), 409, "job_not_finished")["detail"]

    def test_one_that_an_unfinished_job_needs_is_refused(self, api: Api) -> None:
        job_id = api.submit()
        spec = {"operation": "mm_to_hf", "source": {"job": job_id}}
        later = api.post("/v1/jobs", {"kind": "conversion", "spec": spec}).json()["id"]
        fail(api, job_id)
        assert later in problem(self.delete(api, job_id), 409, "job_in_use")["detail"]

    def test_artifacts_are_deleted_only_where_that_is_said(self, api: Api) -> None:
        job_id = api.submit()
        fail(api, job_id)
        with api.database.write() as session:
            artifact = add_artifact(session, "mm_checkpoint", job_id=job_id, name="checkpoint")
        problem(self.delete(api, job_id), 409, "job_has_artifacts")
        assert api.get(f"/v1/jobs/{job_id}").status_code == 200
        assert self.delete(api, job_id, "?artifacts=true").status_code == 204
        problem(api.get(f"/v1/artifacts/{artifact.id}"), 404, "not_found")
