"""The supervisor with real child processes: small scripts stand in for the runner, everything else is real."""

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from core.clock import utcnow
from core.db.models import Artifact, Job, Lease
from core.db.session import Database
from core.jobs import dispatch, repository, service
from core.settings import Settings
from core.storage.local import Store
from tests.factories import LAYOUT_7B, add_node, hf_7b, submit
from tests.services import REPOSITORY, alive, wait_until
from worker.supervisor import claim

PRELUDE = """
import json, os, signal, subprocess, sys, time
attempt_dir = sys.argv[1]
def emit(**event):
    with open(attempt_dir + "/events.jsonl", "a") as stream:
        stream.write(json.dumps({"time": time.time(), **event}) + "\\n")
emit(type="started")
"""
LONG_S = 120
"""For what takes well under a second on a machine that has nothing else to do."""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        home=tmp_path / "home",
        allow_roots=(tmp_path,),
        node_name="node-a",
        heartbeat_s=0.1,
        ship_s=0.05,
        node_ttl_s=3600,
        start_timeout_s=600,
    )


class Bench:
    """A job placed on this host, and a supervisor for it in a thread."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self.database, self.settings = database, settings
        add_node(database, settings)
        with database.write() as session:
            spec = {"operation": "hf_to_mm", "source": {"artifact": hf_7b(session).id}, "parallel": LAYOUT_7B}
            self.job_id = submit(session, settings, "conversion", spec).id
        self.place()

    def place(self) -> None:
        dispatch.tick(self.database, self.settings)
        with self.database.read() as session:
            attempt = repository.attempt(session, self.job_id)
            assert attempt is not None
            (lease,) = repository.leases(session, attempt.id)
        self.attempt_id, self.lease_id = attempt.id, lease.id
        self.attempt_dir = Store(self.settings.store_dir).attempt_dir(self.job_id, attempt.number)

    def start(self, script: str, **settings: Any) -> "subprocess.Popen[bytes]":
        """The supervisor, with other settings where given; its runner tells that it has started, then does what `script` says."""
        path = Path(self.settings.home) / "runner.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(PRELUDE + script)
        changed = self.settings.model_copy(update=settings).environment()
        environment = {**os.environ, **changed, "TEMPER_DATABASE_URL": self.database.url}
        return subprocess.Popen(
            [sys.executable, "-m", "tests.worker.supervise", self.lease_id, str(path)], env=environment, cwd=REPOSITORY
        )

    def run(self, script: str) -> Job:
        self.start(script).wait(LONG_S)
        return self.job()

    def job(self) -> Job:
        with self.database.read() as session:
            return session.get_one(Job, self.job_id)

    def wait_for(self, condition: Callable[[Job], bool]) -> None:
        wait_until(lambda: condition(self.job()), timeout_s=LONG_S, what="the job to get there")

    def log(self) -> bytes:
        with self.database.read() as session:
            return repository.read_log(session, self.attempt_id, repository.MAIN_LOG, 0, 1 << 30)


@pytest.fixture
def bench(database: Database, settings: Settings) -> Bench:
    return Bench(database, settings)


class TestOutcome:
    def test_success_with_its_log_metrics_and_artifact(self, bench: Bench) -> None:
        job = bench.run(
            """
print("hello")
for step in range(1, 4):
    emit(type="metric", step=step, values={"loss": 1.0 / step})
emit(type="artifact", artifact_id="art_x", name="checkpoint", kind="mm_checkpoint", size_bytes=5, num_files=1,
     metadata={"a": 1}, parents=[])
"""
        )
        assert (job.state, job.error, job.latest_metrics["step"]) == ("succeeded", None, 3)
        assert bench.log() == b"hello\n"
        with bench.database.read() as session:
            series = repository.metric_series(session, job.id)
            artifact = session.get_one(Artifact, "art_x")
            attempt = repository.attempt(session, job.id)
        assert [(step, value) for step, _, value in series["loss"]] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
        assert (artifact.job_id, artifact.owner, artifact.meta) == (job.id, job.owner, {"a": 1})
        assert attempt is not None
        assert (attempt.state, attempt.exit) == ("succeeded", {"code": 0, "reason": "done"})

    def test_a_reported_error_becomes_the_jobs(self, bench: Bench) -> None:
        job = bench.run('emit(type="error", code="disk_full", message="no room", hint="make some"); sys.exit(1)')
        assert job.state == "failed"
        assert job.error == {"code": "disk_full", "message": "no room", "hint": "make some"}

    def test_a_silent_crash_names_the_signal_and_the_last_line(self, bench: Bench) -> None:
        job = bench.run('print("about to go", flush=True); os.kill(os.getpid(), signal.SIGKILL)')
        assert job.state == "failed"
        assert job.error is not None
        assert job.error["code"] == "runner_crashed"
        assert "SIGKILL" in job.error["message"]
        assert "about to go" in job.error["message"]

    def test_of_several_ranks_the_one_that_was_killed_is_named(self, bench: Bench) -> None:
        ranks = Path(bench.settings.home) / "ranks.py"
        ranks.parent.mkdir(exist_ok=True)
        ranks.write_text(
            PRELUDE
            + """
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
signal.signal(signal.SIGTERM, lambda *_: None)
emit(type="error", code="runner_error", message="connection closed by peer")
sys.exit(1)
"""
        )
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(ranks)]
        job = bench.run(f"os.execv(sys.executable, [sys.executable, *{torchrun}, *sys.argv[1:]])")
        assert job.error == {
            "code": "runner_crashed",
            "message": "rank 1 was killed by SIGKILL",
            "hint": "out of memory on the host is the usual cause",
        }

    def test_a_vanished_input_fails_the_job_before_anything_starts(self, bench: Bench) -> None:
        with bench.database.write() as session:
            session.execute(update(Artifact).values(deleted_at=utcnow()))
        job = bench.run("")
        assert job.state == "failed"
        assert job.error is not None
        assert "spec.source" in job.error["message"]


class TestShipping:
    def test_a_flood_of_output_arrives_whole_and_in_order(self, bench: Bench) -> None:
        job = bench.run("for line in range(200_000): print('line', line)")
        assert job.state == "succeeded"
        assert bench.log() == b"".join(b"line %d\n" % line for line in range(200_000))

    def test_of_a_log_that_is_too_long_the_beginning_and_the_end_are_kept(self, bench: Bench) -> None:
        limit = 1 << 16
        script = "for line in range(100_000):\n    print('line', line)\n    if line % 1000 == 0: time.sleep(0.01)\n"
        bench.start(script + "sys.exit('the reason')", max_log_bytes=limit).wait(LONG_S)
        log = bench.log()
        assert log.startswith(b"line 0\nline 1\n")
        assert log.index(b"[temper] the log has reached 65536 bytes") == limit + 1
        assert log.endswith(b"\nline 99999\nthe reason\n")
        assert len(log) < limit + (1 << 16) + 200
        assert (bench.attempt_dir / "run.log").stat().st_size < 1_000_000  # of 1.2 MB that were printed
        job = bench.job()
        assert job.error is not None
        assert job.error["message"].endswith("the reason")

    def test_any_window_of_the_log_is_that_window(self, bench: Bench) -> None:
        bench.run("for line in range(300): print('line', line, flush=True); time.sleep(0.001)")
        whole = bench.log()
        with bench.database.read() as session:
            for offset, limit in ((0, 10), (7, 100), (1000, 1), (len(whole) - 3, 50), (len(whole), 5)):
                piece = repository.read_log(session, bench.attempt_id, repository.MAIN_LOG, offset, limit)
                assert piece == whole[offset : offset + limit]

    def test_a_line_that_is_no_event_is_passed_over(self, bench: Bench) -> None:
        job = bench.run(
            'open(attempt_dir + "/events.jsonl", "a").write("{broken\\n"); emit(type="metric", step=1, values={"loss": 2})'
        )
        assert (job.state, job.latest_metrics) == ("succeeded", {"step": 1, "loss": 2.0})


class TestCancel:
    def cancel(self, bench: Bench) -> None:
        bench.wait_for(lambda job: job.state == "running")
        with bench.database.write() as session:
            service.cancel(session, session.get_one(Job, bench.job_id))

    def test_term_gives_the_runner_time_to_save(self, bench: Bench) -> None:
        process = bench.start(
            """
def save(*_):
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(600)
"""
        )
        bench.wait_for(lambda _: bench.log() == b"ready\n")
        self.cancel(bench)
        process.wait(LONG_S)
        assert bench.job().state == "cancelled"
        assert bench.log() == b"ready\nsaved\n"

    def test_the_whole_tree_dies_also_what_ignores_term_and_left_the_session(self, bench: Bench) -> None:
        process = bench.start(
            '''
signal.signal(signal.SIGTERM, signal.SIG_IGN)
inner = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
print(os.getpid(), flush=True)
time.sleep(600)
"""
subprocess.Popen([sys.executable, "-c", inner], start_new_session=True)
time.sleep(600)
''',
            stop_grace_s=0.5,
        )
        wait_until(lambda: bench.log().count(b"\n") == 2, timeout_s=LONG_S, what="both processes")
        pids = [int(line) for line in bench.log().split()]
        assert all(alive(pid) for pid in pids)
        self.cancel(bench)
        process.wait(LONG_S)
        assert bench.job().state == "cancelled"
        assert not any(alive(pid) for pid in pids)


class TestLease:
    def test_only_one_of_many_supervisors_gets_the_lease(self, bench: Bench) -> None:
        claims = [claim(bench.database, bench.settings, bench.lease_id) for _ in range(5)]
        assert [task is not None for task in claims] == [True, False, False, False, False]

    def test_another_host_cannot_claim_it(self, bench: Bench) -> None:
        assert claim(bench.database, bench.settings.model_copy(update={"node_name": "node-b"}), bench.lease_id) is None

    def test_a_supervisor_that_lost_its_lease_kills_and_writes_nothing(self, bench: Bench) -> None:
        process = bench.start(
            'print(os.getpid(), flush=True)\nwhile True:\n    print("x", flush=True); time.sleep(0.05)'
        )
        bench.wait_for(lambda job: job.state == "running" and len(bench.log()) > 0)
        pid = int(bench.log().split()[0])
        with bench.database.write() as session:
            session.execute(update(Lease).values(expires_at=utcnow() - timedelta(minutes=1), state="released"))
            before = repository.log_size(session, bench.attempt_id)
        process.wait(LONG_S)
        assert not alive(pid)
        assert bench.job().state == "running"  # the reaper, not the fenced supervisor, decides what comes next
        with bench.database.read() as session:
            assert repository.log_size(session, bench.attempt_id) == before

    def test_the_killed_supervisors_job_comes_back_and_runs_again(self, bench: Bench) -> None:
        process = bench.start("print(os.getpid(), flush=True)\ntime.sleep(600)")
        bench.wait_for(lambda job: job.state == "running" and len(bench.log()) > 0)
        pid = int(bench.log())
        process.kill()
        process.wait()
        wait_until(lambda: not alive(pid), timeout_s=LONG_S, what="the runner to die with its supervisor")
        with (bench.attempt_dir / "run.log").open("ab") as log:
            log.write(b"last words")
        dispatch.reap(bench.database, bench.settings, utcnow() + timedelta(hours=1))
        first = bench.attempt_id
        bench.place()
        assert bench.run("print('again')").state == "succeeded"
        with bench.database.read() as session:
            states = [attempt.state for attempt in repository.attempts(session, bench.job_id)]
        assert states == ["lost", "succeeded"]
        with bench.database.read() as session:
            assert repository.read_log(session, first, repository.MAIN_LOG, 0, 100) == b"%d\nlast words" % pid


class TestDrain:
    def test_a_drained_host_hands_the_job_back(self, bench: Bench) -> None:
        process = bench.start("time.sleep(600)")
        bench.wait_for(lambda job: job.state == "running")
        process.terminate()
        process.wait(LONG_S)
        job = bench.job()
        assert (job.state, job.retries_left) == ("queued", job.max_attempts - 1)
