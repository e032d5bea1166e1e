import pytest

from core.db.models import Job
from core.db.session import Database
from core.errors import InvalidTransition
from core.jobs import repository
from core.jobs.lifecycle import FINISHED, TRANSITIONS, JobState, append_events, transition
from core.settings import Settings
from tests.factories import LAYOUT_7B, hf_7b, submit


@pytest.fixture
def job_id(database: Database, settings: Settings) -> str:
    with database.write() as session:
        spec = {"operation": "hf_to_mm", "source": {"artifact": hf_7b(session).id}, "parallel": LAYOUT_7B}
        return submit(session, settings, "conversion", spec).id


class TestTransitions:
    def test_every_state_has_its_row_and_success_is_final(self) -> None:
        assert set(TRANSITIONS) == set(JobState)
        assert not TRANSITIONS[JobState.SUCCEEDED]

    def test_every_unfinished_state_can_reach_an_end(self) -> None:
        for state in JobState:
            reachable, frontier = {state}, [state]
            while frontier:
                new = TRANSITIONS[frontier.pop()] - reachable
                reachable |= new
                frontier += new
            assert state in FINISHED or reachable & FINISHED

    def test_a_change_writes_state_reason_and_event_together(self, database: Database, job_id: str) -> None:
        with database.write() as session:
            transition(session, session.get_one(Job, job_id), JobState.STARTING, "placed")
        with database.read() as session:
            job = session.get_one(Job, job_id)
            last = repository.events_after(session, job_id, 0)[-1]
        assert (job.state, job.reason) == ("starting", "placed")
        assert last.data == {"from": "queued", "state": "starting", "reason": "placed"}

    def test_a_forbidden_change_is_refused_and_leaves_nothing(self, database: Database, job_id: str) -> None:
        with pytest.raises(InvalidTransition, match="queued and cannot become succeeded"), database.write() as session:
            transition(session, session.get_one(Job, job_id), JobState.SUCCEEDED)
        with database.read() as session:
            assert len(repository.events_after(session, job_id, 0)) == 1

    def test_whoever_saw_an_old_state_loses(self, database: Database, job_id: str) -> None:
        with database.read() as session:
            stale = session.get_one(Job, job_id)
            session.expunge(stale)
        with database.write() as session:
            transition(session, session.get_one(Job, job_id), JobState.CANCELLED)
        with pytest.raises(InvalidTransition, match="no longer queued"), database.write() as session:
            transition(session, session.merge(stale, load=False), JobState.STARTING)


class TestAppendEvents:
    def test_numbers_follow_on_without_gaps(self, database: Database, job_id: str) -> None:
        for _ in range(3):
            with database.write() as session:
                append_events(session, job_id, [("metric", 1, {"values": {}}), ("progress", None, {})], attempt=1)
        with database.read() as session:
            assert [event.seq for event in repository.events_after(session, job_id, 0)] == list(range(1, 8))
