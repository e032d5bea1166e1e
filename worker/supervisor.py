"""`python -m worker.supervisor LEASE_ID`: one host's part of one attempt, from lease to outcome.

A process of its own, detached from the Celery worker: it alone holds the lease. It starts the runner, ships its spool,
renews the lease, obeys cancel from the database (TERM, grace, KILL), and ends itself and the runner when it cannot renew.
The supervisor of node rank 0 leads: it moves the job's state.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType

import structlog
from sqlalchemy import update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from core.clock import utcnow
from core.db.models import Attempt, Job, Lease, Node
from core.db.session import Database
from core.errors import AppError, InvalidTransition
from core.jobs import queue, repository, service
from core.jobs.inputs import resolve_inputs
from core.jobs.lifecycle import JobState, transition
from core.settings import Settings
from core.specs.events import JobFile
from core.storage.local import Store
from core.telemetry.logging import configure
from worker.launch import Launch, Part, command
from worker.processes import ProcessTree
from worker.rendezvous import reserve_port
from worker.shipping import Fenced, Grip, Shipper, Spool

log = structlog.get_logger(__name__)

_POLL_S = 0.05
_LOG_TAIL_BYTES = 8000
_KILLED_RANK = re.compile(r"rank +: (\d+) .*\n.*exitcode +: (-(?!15\b)\d+) ")
"""In torchrun's report of ranks that failed (torch/distributed/elastic/multiprocessing/errors), what failed first at its end; but for
TERM, by which it ends the others itself."""


@dataclass(frozen=True)
class Task:
    """What the lease is for."""

    grip: Grip
    job_id: str
    attempt_id: str
    number: int
    node_rank: int
    num_nodes: int
    devices: tuple[int, ...]
    device_kind: str
    address: str

    @property
    def leader(self) -> bool:
        """True on the host that speaks for the attempt."""
        return self.node_rank == 0

    @property
    def ranks(self) -> range:
        """The ranks that run on this host."""
        return ranks_of(self.node_rank, self.devices)


def ranks_of(node_rank: int, devices: Sequence[int]) -> range:
    """The ranks that a host runs; one process without a device counts as one."""
    per_node = max(1, len(devices))
    return range(node_rank * per_node, (node_rank + 1) * per_node)


class Supervisor:
    """Runs one task to its end."""

    def __init__(
        self, database: Database, settings: Settings, task: Task, *, build_command: Callable[..., Launch] = command
    ) -> None:
        self.database, self.settings, self.task = database, settings, task
        self.build_command = build_command
        self.store = Store(settings.store_dir)
        self.attempt_dir = self.store.attempt_dir(task.job_id, task.number)
        spool = Spool(task.grip.lease_id, task.attempt_id, task.number, task.leader, task.ranks)
        self.shipper = Shipper(database, settings, task.grip, job_id=task.job_id, spool=spool)
        self.renewed = self.shipped = time.monotonic()
        self.stopping_since: float | None = None
        self.next_term_s = 0.0
        self.draining = False
        self.reserved_port: socket.socket | None = None
        """Held until this process ends."""

    def run(self) -> None:
        """Start the runner, watch it, record the outcome."""
        try:
            launch = self._prepare()
        except AppError as error:
            self._finish(None, error)
            return
        log_name = "run.log" if self.task.leader else f"run_{self.task.node_rank}.log"
        tree = ProcessTree(launch.argv, env=launch.env, log=self.attempt_dir / log_name)
        log.info("runner.started", job_id=self.task.job_id, attempt=self.task.number, pid=tree.pid)
        try:
            code = self._watch(tree, launch)
            if not tree.kill():
                log.error("runner.immortal", job_id=self.task.job_id)
            self._finish(code, None)
        except Fenced:
            tree.kill()
            log.warning("lease.lost", job_id=self.task.job_id, attempt=self.task.number)

    def _prepare(self) -> Launch:
        """Write `job.json` (leader) or wait for it, and agree on the rendezvous."""
        (self.attempt_dir / "logs").mkdir(parents=True, exist_ok=True)
        rendezvous = None
        if self.task.num_nodes > 1:
            rendezvous = self._offer_rendezvous() if self.task.leader else self._await_rendezvous()
        if self.task.leader:
            self._ship_leftovers()
            self._write_job_file()
        else:
            self._until((self.attempt_dir / "job.json").exists)
        part = Part(
            device_kind=self.task.device_kind,
            devices=self.task.devices,
            num_nodes=self.task.num_nodes,
            node_rank=self.task.node_rank,
            rendezvous=rendezvous,
        )
        return self.build_command(part, self.attempt_dir, base_env=os.environ, num_cores=os.cpu_count() or 1)

    def _ship_leftovers(self) -> None:
        """Store what lost attempts had written when their supervisors ended: nothing that a runner said is lost."""
        with self.database.read() as session:
            spools = [
                Spool(
                    lease.id, attempt.id, attempt.number, lease.node_rank == 0, ranks_of(lease.node_rank, lease.devices)
                )
                for attempt in repository.attempts(session, self.task.job_id)
                if attempt.state == "lost"
                for lease in repository.leases(session, attempt.id)
            ]
        for spool in spools:
            leftovers = Shipper(
                self.database, self.settings, self.task.grip, job_id=self.task.job_id, spool=spool, current=False
            )
            leftovers.ship(drain=True)

    def _write_job_file(self) -> None:
        with self.database.read() as session:
            job = session.get_one(Job, self.task.job_id)
            content = JobFile(
                job_id=job.id,
                attempt=self.task.number,
                kind=job.kind,
                spec=job.spec,
                inputs=resolve_inputs(session, job, self.settings),
                store=str(self.settings.store_dir),
                device=self.task.device_kind,
                allow_roots=[str(root) for root in self.settings.allow_roots],
            )
        temporary = self.attempt_dir / "job.json.tmp"
        temporary.write_text(content.model_dump_json(indent=1), encoding="utf-8")
        temporary.rename(self.attempt_dir / "job.json")

    def _offer_rendezvous(self) -> str:
        self.reserved_port, port = reserve_port()
        rendezvous = f"{self.task.address}:{port}"
        with self.task.grip.write(self.database) as (session, _):
            session.execute(update(Attempt).where(Attempt.id == self.task.attempt_id).values(rendezvous=rendezvous))
        return rendezvous

    def _await_rendezvous(self) -> str:
        def offered() -> str | None:
            with self.database.read() as session:
                return session.get_one(Attempt, self.task.attempt_id).rendezvous

        self._until(lambda: offered() is not None)
        return offered() or ""

    def _until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self.settings.start_timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise AppError("the first host did not start in time", code="rendezvous_timeout")
            time.sleep(0.2)

    def _watch(self, tree: ProcessTree, launch: Launch) -> int:
        """Ship, renew and obey until the runner has ended; return its exit code."""
        killed = False
        while (code := tree.poll()) is None:
            self._ship()
            self._renew()
            if self.draining and self.stopping_since is None:
                self._begin_stop()
            if self.stopping_since is not None:
                waited = time.monotonic() - self.stopping_since
                if waited > self.settings.stop_grace_s:
                    tree.kill()
                    killed = True
                elif not killed and self._term_due(waited):
                    tree.terminate(spare_root=launch.through_torchrun)
            time.sleep(_POLL_S)
        return code

    def _term_due(self, waited: float) -> bool:
        """TERM once at the start of the grace, and again each 5 s for a process that came later."""
        due = self.next_term_s <= waited
        if due:
            self.next_term_s = waited + 5.0
        return due

    def _begin_stop(self) -> None:
        self.stopping_since = time.monotonic()
        log.info("runner.stopping", job_id=self.task.job_id, attempt=self.task.number, draining=self.draining)

    def _ship(self) -> None:
        now = time.monotonic()
        if now - self.shipped < self.settings.ship_s:
            return
        self.shipped = now
        try:
            self.shipper.ship()
        except SQLAlchemyError as error:
            self._tolerate(error)

    def _renew(self) -> None:
        now = time.monotonic()
        if now - self.renewed < self.settings.heartbeat_s:
            return
        try:
            with self.task.grip.write(self.database) as (session, _):
                state = session.get_one(Job, self.task.job_id).state
            self.renewed = now
        except SQLAlchemyError as error:
            self._tolerate(error)
            return
        if state == JobState.CANCELLING.value and self.stopping_since is None:
            self._begin_stop()

    def _tolerate(self, error: SQLAlchemyError) -> None:
        """The database is away: go on while the lease surely holds, then give up the devices."""
        log.warning("database.unavailable", job_id=self.task.job_id, error=str(error).splitlines()[0])
        if time.monotonic() - self.renewed > self.settings.lease_ttl_s:
            raise Fenced(self.task.grip.lease_id)
        time.sleep(min(0.5, self.settings.heartbeat_s))

    def drain(self, _signum: int, _frame: FrameType | None) -> None:
        """Signal handler: stop the runner, which saves, and hand the job back to the queue."""
        self.draining = True

    def _finish(self, code: int | None, refusal: AppError | None) -> None:
        """Ship the rest and record the outcome; try again while the database is away and the lease holds."""
        surplus: list[str] = []
        while True:
            try:
                self.shipper.ship(drain=True)
                with self.task.grip.write(self.database) as (session, lease):
                    lease.state, lease.exit_code = "released", code
                    if self.task.leader:
                        self._conclude(session, code, refusal)
                        surplus = service.drop_surplus(session, session.get_one(Job, self.task.job_id))
                break
            except SQLAlchemyError as error:
                self._tolerate(error)
        queue.kick(self.settings)
        for artifact_id in surplus:
            self.store.delete(artifact_id)

    def _conclude(self, session: Session, code: int | None, refusal: AppError | None) -> None:
        job = session.get_one(Job, self.task.job_id, with_for_update=True)
        attempt = session.get_one(Attempt, self.task.attempt_id)
        attempt.finished_at = utcnow()
        error = self._error(code, refusal)
        asked = self.stopping_since is not None
        if job.state == JobState.STARTING.value and code == 0:
            transition(session, job, JobState.RUNNING, "the runner has started", attempt=self.task.number)
        if code == 0:
            outcome, reason = JobState.SUCCEEDED, "done"
        elif job.state == JobState.CANCELLING.value:
            outcome, reason, error = JobState.CANCELLED, job.reason or "cancelled", None
        elif asked and self.draining:
            outcome, reason, error = JobState.QUEUED, "its host is being drained; it goes on elsewhere", None
        else:
            outcome, reason = JobState.FAILED, (error or {}).get("message") or "failed"
        attempt.state = "returned" if outcome is JobState.QUEUED else outcome.value
        attempt.exit = {"code": code, "reason": reason}
        transition(session, job, outcome, reason, attempt=self.task.number, error=None if code == 0 else error)
        log.info("attempt.finished", job_id=job.id, attempt=self.task.number, state=outcome.value, code=code)

    def _error(self, code: int | None, refusal: AppError | None) -> dict[str, str | None] | None:
        if code == 0:
            return None
        told, tail = refusal or self.shipper.error, self._log_tail()
        killed = _KILLED_RANK.findall(tail)
        # Of a killed rank others tell the connection that broke by it.
        if killed and (told is None or told.code == "runner_error"):
            rank, signal_number = killed[-1]
            return _crash(f"rank {rank}", int(signal_number))
        if told is not None:
            return {"code": told.code, "message": told.message, "hint": told.hint}
        crash = _crash("the runner", code)
        last_line = tail.splitlines()[-1] if tail else "it wrote no log"
        return {**crash, "message": f"{crash['message']}: {last_line}"}

    def _log_tail(self) -> str:
        path = self.attempt_dir / "run.log"
        if not path.exists():
            return ""
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - _LOG_TAIL_BYTES))
            return stream.read().decode(errors="replace").strip()


def _crash(who: str, code: int | None) -> dict[str, str | None]:
    if code is None or code >= 0:
        return {"code": "runner_crashed", "message": f"{who} exited with code {code}", "hint": None}
    hint = "out of memory on the host is the usual cause" if code == -signal.SIGKILL else None
    return {"code": "runner_crashed", "message": f"{who} was killed by {signal.Signals(-code).name}", "hint": hint}


def claim(database: Database, settings: Settings, lease_id: str) -> Task | None:
    """Take a pending lease; None when it is somebody else's or gone."""
    with database.write() as session:
        taken = session.execute(
            update(Lease)
            .where(
                Lease.id == lease_id,
                Lease.state == "pending",
                Lease.node == settings.node_name,
                Lease.expires_at > utcnow(),
            )
            .values(
                state="held",
                pid=os.getpid(),
                acquired_at=utcnow(),
                expires_at=utcnow() + timedelta(seconds=settings.lease_ttl_s),
            )
        )
        if taken.rowcount != 1:  # type: ignore[attr-defined]  # an UPDATE gives a CursorResult
            return None
        lease = session.get_one(Lease, lease_id)
        attempt = session.get_one(Attempt, lease.attempt_id)
        node = session.get_one(Node, settings.node_name)
        return Task(
            grip=Grip(lease.id, lease.token, settings.lease_ttl_s),
            job_id=attempt.job_id,
            attempt_id=attempt.id,
            number=attempt.number,
            node_rank=lease.node_rank,
            num_nodes=len(repository.leases(session, attempt.id)),
            devices=tuple(lease.devices),
            device_kind=node.device_kind,
            address=node.address,
        )


def main(lease_id: str) -> int:
    """Entry of the detached process."""
    settings = Settings()
    configure(settings)
    database = Database(settings.sqlalchemy_url, pool_size=2)
    task = claim(database, settings, lease_id)
    if task is None:
        log.info("lease.taken", lease_id=lease_id)
        return 0
    try:
        supervisor = Supervisor(database, settings, task)
        signal.signal(signal.SIGTERM, supervisor.drain)
        supervisor.run()
    except InvalidTransition as race:
        log.warning("attempt.superseded", job_id=task.job_id, error=race.message)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
