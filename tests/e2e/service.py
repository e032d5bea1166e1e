"""A running Temper of either mode, as the tests of the road and of its perils use it."""

import contextlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from api.client import Client, Job
from tests.digits import write_digits, write_model
from tests.road import digits_road, submit_road
from tests.services import REPOSITORY, Temper, TemperCluster, processes_of_home, wait_until

HASTE = {
    "TEMPER_HEARTBEAT_S": "0.3",
    "TEMPER_LEASE_TTL_S": "8",  # on a loaded machine a supervisor may stand still for seconds
    "TEMPER_FENCE_MARGIN_S": "1",
    "TEMPER_NODE_TTL_S": "5",  # below the lease's: a lost host is out before its job is placed again
    "TEMPER_TICK_S": "0.5",
    "TEMPER_STOP_GRACE_S": "30",
    "TEMPER_DEVICES": "2",
}
"""Short times, so that a lost host is noticed while somebody waits for it."""
ITERATIONS = 40
SAVE_INTERVAL = 5


@dataclass
class Service:
    """The server, a client of it, and inputs that were made once."""

    server: Temper | TemperCluster
    client: Client
    folder: Path
    road: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    made: dict[str, str] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.server.home

    def prepare(self) -> None:
        """Register the tiny model and the digits, and begin to make a checkpoint and a data set of them."""
        model = self.client.register("hf_model", write_model(self.folder / "model"))
        write_digits(self.folder / "digits", limit=160)
        source = self.client.register("dataset_source", self.folder / "digits")
        self.road = digits_road(model.id, source.id, train_iters=ITERATIONS)
        self.road["train"][1]["checkpoint"] = {"save_interval": SAVE_INTERVAL}
        first = {station: self.road[station] for station in ("convert", "dataset")}
        self.made = {station: job.id for station, job in submit_road(self.client, first).items()}

    def train(self, **changes: Any) -> Job:
        kind, spec = self.road["train"]
        inputs = {"model": {"job": self.made["convert"]}, "dataset": {"job": self.made["dataset"]}}
        return self.client.submit(kind, spec | inputs | changes, name="train")

    def cli(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run `temper` as a user on this machine would."""
        environment = {"TEMPER_URL": self.server.url, "TEMPER_HOME": str(self.home), "COLUMNS": "200"}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("TEMPER_")}
        return subprocess.run(
            [sys.executable, "-m", "api.cli", *arguments],
            capture_output=True, text=True, check=False, timeout=300, cwd=REPOSITORY, env=inherited | environment,
        )  # fmt: skip

    def wait_for_step(self, job: Job, step: int) -> None:
        """Wait until the server knows the metrics of that step."""

        def reached() -> bool:
            return (self._unfinished(job).latest_metrics.get("step") or 0) >= step

        wait_until(reached, timeout_s=240, what=f"step {step} of {job.id}")

    def wait_for_checkpoint(self, job: Job) -> int:
        """Wait until a checkpoint is complete, and return its iteration; another attempt goes on from it or a later one."""
        tracker = self.home / "store" / "jobs" / job.id / "checkpoints" / "latest_checkpointed_iteration.txt"
        wait_until(
            lambda: self._unfinished(job).state == "running" and tracker.exists(),
            timeout_s=240,
            what=f"a checkpoint of {job.id}",
        )
        return int(tracker.read_text())

    def _unfinished(self, job: Job) -> Job:
        now = self.client.job(job.id)
        assert not now.finished, (now.state, now.error)
        return now

    def supervisor_of(self, job: Job) -> psutil.Process:
        """The process that supervises the job's running attempt, on one host."""
        runner = next(process for process in self.processes("core.runners") if job.id in " ".join(process.cmdline()))
        (supervisor,) = (parent for parent in runner.parents() if "worker.supervisor" in parent.cmdline())
        return supervisor

    def processes(self, module: str) -> list[psutil.Process]:
        """Processes of this home that run `python -m MODULE`."""
        found = []
        for process in processes_of_home(self.home):
            with contextlib.suppress(psutil.NoSuchProcess):
                if module in process.cmdline():
                    found.append(process)
        return found

    def finished(self, job: Job) -> Job:
        """Wait for the job's success."""
        done = self.client.wait(job.id, timeout_s=300)
        assert done.state == "succeeded", (done.name, done.error, self.client.logs(job.id, tail=30).content.decode())
        return done

    def resumed_from(self, job: Job) -> int:
        """The iteration of the checkpoint from which the newest attempt went on."""
        found = re.search(r"resuming from iter_(\d+)", self.log(job))
        assert found is not None, self.log(job)
        return int(found[1])

    def log(self, job: Job) -> str:
        """The newest attempt's log."""
        return b"".join(self.client.follow_logs(job.id)).decode()

    def check_history(self, job: Job, *, attempts: int) -> None:
        """Each step has its metric; each event its number, live and stored; the last attempt's log its lines, once."""
        done = self.client.job(job.id)
        assert [attempt.number for attempt in done.attempts] == list(range(1, attempts + 1))
        loss = self.client.metrics(job.id, names=["loss"])["loss"]
        assert [step for step, _, _ in loss] == list(range(1, ITERATIONS + 1))
        numbers = [int(event.id or 0) for event in self.client.history(job.id)]
        assert numbers == list(range(1, len(numbers) + 1))
        assert [event.data["seq"] for event in self.client.events(job.id) if event.type != "log"] == numbers
        steps = [int(step) for step in re.findall(r"^iteration (\d+)/", self.log(job), re.MULTILINE)]
        assert steps == list(range(steps[0], ITERATIONS + 1))
        assert steps[0] == (self.resumed_from(job) + 1 if attempts > 1 else 1)
