from datetime import timedelta

import pytest
from sqlalchemy import select, update

from core.clock import utcnow
from core.db.models import Attempt, Job, Lease, Node
from core.db.session import Database
from core.jobs import dispatch, repository
from core.jobs.lifecycle import JobState, transition
from core.settings import Settings
from tests.factories import BOB, add_artifact, add_node, hf_7b, submit

PARALLEL = {"nproc_per_node": 2, "llm_pp_layers": [[28]], "vit_pp_layers": [[32]]}


def submit_training(database: Database, settings: Settings, **more: object) -> str:
    with database.write() as session:
        parallel = {**PARALLEL, **more.pop("parallel", {})}  # type: ignore[dict-item]  # a test's own keyword
        spec = {
            "model": {"artifact": hf_7b(session, shared=True).id},
            "dataset": {"artifact": add_artifact(session, "dataset", shared=True).id},
            "parallel": parallel,
            "train_iters": 1,
            "global_batch_size": 8,
        }
        return submit(session, settings, "training", spec, **more).id


def state_of(database: Database, job_id: str) -> str:
    with database.read() as session:
        return session.get_one(Job, job_id).state


def leases_of(database: Database, job_id: str) -> list[Lease]:
    with database.read() as session:
        attempt = repository.attempt(session, job_id)
        return list(repository.leases(session, attempt.id)) if attempt else []


class TestPlace:
    def test_a_job_gets_its_devices_and_a_lease(self, database: Database, settings: Settings) -> None:
        add_node(database, settings)
        job_id = submit_training(database, settings)
        dispatch.tick(database, settings)
        (lease,) = leases_of(database, job_id)
        assert state_of(database, job_id) == "starting"
        assert (lease.node, lease.devices, lease.state) == ("node-a", [0, 1], "pending")

    def test_a_second_job_waits_until_the_devices_are_free(self, database: Database, settings: Settings) -> None:
        add_node(database, settings)
        first, second = (submit_training(database, settings) for _ in range(2))
        dispatch.tick(database, settings)
        assert [state_of(database, first), state_of(database, second)] == ["starting", "queued"]
        with database.read() as session:
            assert "0 free" in (session.get_one(Job, second).reason or "")
        with database.write() as session:
            session.execute(update(Lease).values(state="released"))
        dispatch.tick(database, settings)
        assert state_of(database, second) == "starting"

    def test_priority_goes_before_age(self, database: Database, settings: Settings) -> None:
        old, urgent = submit_training(database, settings), submit_training(database, settings, priority=5)
        add_node(database, settings)
        dispatch.tick(database, settings)
        assert [state_of(database, old), state_of(database, urgent)] == ["queued", "starting"]

    def test_all_hosts_of_a_job_or_none(self, database: Database, settings: Settings) -> None:
        add_node(database, settings, "node-a")
        add_node(database, settings, "node-b")
        blocker = submit_training(database, settings)
        dispatch.tick(database, settings)
        gang = submit_training(database, settings, parallel={"nnodes": 2})
        dispatch.tick(database, settings)
        assert [state_of(database, blocker), state_of(database, gang)] == ["starting", "queued"]
        with database.write() as session:
            session.execute(update(Lease).values(state="released"))
        dispatch.tick(database, settings)
        assert sorted(lease.node for lease in leases_of(database, gang)) == ["node-a", "node-b"]

    def test_a_large_job_is_passed_at_first_and_then_has_devices_kept(
        self, database: Database, settings: Settings
    ) -> None:
        for name in ("node-a", "node-b"):
            add_node(database, settings, name)
        blocker = submit_training(database, settings)
        dispatch.tick(database, settings)
        large = submit_training(database, settings, parallel={"nnodes": 2})
        small = submit_training(database, settings)
        impatient = settings.model_copy(update={"reserve_after_s": 0})
        dispatch.tick(database, impatient)
        assert [state_of(database, job) for job in (blocker, large, small)] == ["starting", "queued", "queued"]
        with database.read() as session:
            assert large in (session.get_one(Job, small).reason or "")
        dispatch.tick(database, settings)
        assert [state_of(database, job) for job in (large, small)] == ["queued", "starting"]

    def test_nothing_is_kept_for_a_job_that_waits_for_a_host_to_come_back(
        self, database: Database, settings: Settings
    ) -> None:
        for name in ("node-a", "node-b"):
            add_node(database, settings, name)
        large = submit_training(database, settings, parallel={"nnodes": 2})
        small = submit_training(database, settings)
        with database.write() as session:
            session.execute(update(Node).where(Node.name == "node-a").values(drained=True))
        dispatch.tick(database, settings.model_copy(update={"reserve_after_s": 0}))
        assert [state_of(database, job) for job in (large, small)] == ["queued", "starting"]

    def test_a_silent_or_unhealthy_host_gets_nothing(self, database: Database, settings: Settings) -> None:
        add_node(database, settings, "silent")
        add_node(database, settings, "broken")
        job_id = submit_training(database, settings)
        with database.write() as session:
            session.execute(
                update(Node).where(Node.name == "silent").values(last_seen_at=utcnow() - timedelta(hours=1))
            )
            session.execute(update(Node).where(Node.name == "broken").values(healthy=False))
        dispatch.tick(database, settings)
        assert state_of(database, job_id) == "queued"

    def test_a_drained_host_gets_nothing_new_and_keeps_what_it_has(
        self, database: Database, settings: Settings
    ) -> None:
        add_node(database, settings, devices=4)
        first, second = (submit_training(database, settings) for _ in range(2))
        self.drain(database, first, settings)
        assert [state_of(database, first), state_of(database, second)] == ["starting", "queued"]
        with database.read() as session:
            assert "drained" in (session.get_one(Job, second).reason or "")
        add_node(database, settings, devices=4)  # its worker reports again, and changes nothing of that
        dispatch.tick(database, settings)
        assert state_of(database, second) == "queued"
        with database.write() as session:
            session.execute(update(Node).values(drained=False))
        dispatch.tick(database, settings)
        assert state_of(database, second) == "starting"

    def drain(self, database: Database, job_id: str, settings: Settings) -> None:
        """Have the job placed alone, then drain every host."""
        with database.write() as session:
            session.execute(update(Job).where(Job.id != job_id).values(state="waiting"))
        dispatch.place(database, settings, utcnow())
        with database.write() as session:
            session.execute(update(Node).values(drained=True))
            session.execute(update(Job).where(Job.id != job_id).values(state="queued"))
        dispatch.tick(database, settings)

    def test_a_user_holds_at_most_so_many_devices_and_holds_up_nobody(
        self, database: Database, settings: Settings
    ) -> None:
        limited = settings.model_copy(update={"max_user_devices": 3, "reserve_after_s": 0})
        add_node(database, settings, devices=8)
        first, second = (submit_training(database, settings) for _ in range(2))
        other = submit_training(database, settings, principal=BOB)
        dispatch.tick(database, limited)
        assert [state_of(database, job) for job in (first, second, other)] == ["starting", "queued", "starting"]
        with database.read() as session:
            assert "alice holds 2 of at most 3" in (session.get_one(Job, second).reason or "")
        with database.write() as session:
            session.execute(update(Lease).values(state="released"))
        dispatch.tick(database, limited)
        assert state_of(database, second) == "starting"

    def test_no_training_lands_on_the_cpu_host_beside_accelerators(
        self, database: Database, settings: Settings
    ) -> None:
        add_node(database, settings, "small", devices=2)
        add_node(database, settings, "npus", devices=8)
        with database.write() as session:
            session.execute(update(Node).where(Node.name == "npus").values(device_kind="npu"))
        job_id = submit_training(database, settings)
        dispatch.tick(database, settings)
        assert [lease.node for lease in leases_of(database, job_id)] == ["npus"]


class TestReap:
    def expire(self, database: Database) -> None:
        with database.write() as session:
            session.execute(update(Lease).values(expires_at=utcnow() - timedelta(minutes=10)))

    def test_a_lost_attempt_returns_the_job_to_the_queue(self, database: Database, settings: Settings) -> None:
        add_node(database, settings)
        job_id = submit_training(database, settings)
        dispatch.tick(database, settings)
        self.expire(database)
        dispatch.reap(database, settings, utcnow())
        assert state_of(database, job_id) == "queued"
        with database.read() as session:
            assert session.scalars(select(Attempt.state)).all() == ["lost"]
        dispatch.place(database, settings, utcnow())
        with database.read() as session:
            assert [attempt.number for attempt in repository.attempts(session, job_id)] == [1, 2]

    def test_a_lease_is_left_alone_until_the_margin_is_over(self, database: Database, settings: Settings) -> None:
        add_node(database, settings)
        job_id = submit_training(database, settings)
        dispatch.tick(database, settings)
        with database.write() as session:
            session.execute(update(Lease).values(expires_at=utcnow() - timedelta(seconds=settings.fence_margin_s / 2)))
        dispatch.reap(database, settings, utcnow())
        assert state_of(database, job_id) == "starting"

    def test_the_job_fails_when_all_attempts_are_used(self, database: Database, settings: Settings) -> None:
        add_node(database, settings)
        job_id = submit_training(database, settings, max_attempts=1)
        dispatch.tick(database, settings)
        self.expire(database)
        dispatch.reap(database, settings, utcnow())
        with database.read() as session:
            job = session.get_one(Job, job_id)
        assert job.state == "failed"
        assert job.error is not None
        assert job.error["code"] == "attempt_lost"

    def test_a_lost_attempt_that_was_being_cancelled_is_cancelled(self, database: Database, settings: Settings) -> None:
        add_node(database, settings)
        job_id = submit_training(database, settings)
        dispatch.tick(database, settings)
        with database.write() as session:
            transition(session, session.get_one(Job, job_id), JobState.CANCELLING)
        self.expire(database)
        dispatch.reap(database, settings, utcnow())
        assert state_of(database, job_id) == "cancelled"


class TestReleaseDependants:
    @pytest.fixture
    def chain(self, database: Database, settings: Settings) -> tuple[str, str]:
        with database.write() as session:
            parallel = {"llm_pp_layers": [[28]], "vit_pp_layers": [[32]]}
            first = submit(
                session,
                settings,
                "conversion",
                {"operation": "hf_to_mm", "source": {"artifact": hf_7b(session).id}, "parallel": parallel},
            )
            spec = {"operation": "mm_to_hf", "source": {"job": first.id}}
            return first.id, submit(session, settings, "conversion", spec).id

    def finish(self, database: Database, job_id: str, end: JobState) -> None:
        with database.write() as session:
            job = session.get_one(Job, job_id)
            for state in (JobState.STARTING, JobState.RUNNING, end):
                transition(session, job, state)

    def test_a_job_waits_for_its_input_and_is_then_queued(
        self, database: Database, settings: Settings, chain: tuple[str, str]
    ) -> None:
        first, second = chain
        dispatch.release_dependants(database)
        assert state_of(database, second) == "waiting"
        self.finish(database, first, JobState.SUCCEEDED)
        dispatch.release_dependants(database)
        assert state_of(database, second) == "queued"

    def test_a_job_fails_with_its_input(self, database: Database, settings: Settings, chain: tuple[str, str]) -> None:
        first, second = chain
        self.finish(database, first, JobState.FAILED)
        dispatch.release_dependants(database)
        with database.read() as session:
            job = session.get_one(Job, second)
        assert job.state == "failed"
        assert job.error is not None
        assert job.error["code"] == "dependency_failed"
        assert first in job.error["message"]


class TestAlone:
    def test_two_schedulers_never_work_at_once(self, database: Database, settings: Settings) -> None:
        add_node(database, settings)
        job_id = submit_training(database, settings)
        with dispatch._alone(database) as alone:
            assert alone
            dispatch.tick(database, settings)
            assert state_of(database, job_id) == "queued"
        dispatch.tick(database, settings)
        assert state_of(database, job_id) == "starting"
