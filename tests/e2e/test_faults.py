"""What must survive: killed workers, supervisors and hosts, a broker and a database that go away. All processes are real."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from api.client import Client, Job
from tests.digits import write_digits, write_model
from tests.road import digits_road, submit_road
from tests.services import (
    Postgres,
    RedisServer,
    Temper,
    TemperCluster,
    kill_tree,
    processes_of_home,
    running_postgres,
    wait_until,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

QUICK = {
    "TEMPER_LEASE_TTL_S": "4",
    "TEMPER_FENCE_MARGIN_S": "1",
    "TEMPER_HEARTBEAT_S": "0.3",
    "TEMPER_NODE_TTL_S": "3",
    "TEMPER_TICK_S": "0.5",
    "TEMPER_START_TIMEOUT_S": "20",
}
ITERATIONS = 60


@dataclass
class Service:
    """A running Temper of either mode, with a client and prepared inputs."""

    server: Temper | TemperCluster
    client: Client
    folder: Path
    made: dict[str, str] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.server.home

    def prepare(self) -> None:
        """Register the tiny model and the digits once, and make them a checkpoint and a data set."""
        model = self.client.register("hf_model", write_model(self.folder / "model"))
        write_digits(self.folder / "digits", limit=200)
        source = self.client.register("dataset_source", self.folder / "digits")
        self.road = digits_road(model.id, source.id, train_iters=ITERATIONS)
        first = {station: self.road[station] for station in ("convert", "dataset")}
        for station, job in submit_road(self.client, first).items():
            assert self.client.wait(job.id, timeout_s=120).state == "succeeded"
            self.made[station] = job.id

    def train(self, **changes: Any) -> Job:
        kind, spec = self.road["train"]
        spec = spec | {
            "model": {"job": self.made["convert"]},
            "dataset": {"job": self.made["dataset"]},
            "checkpoint": {"save_interval": 5},
        }
        return self.client.submit(kind, spec | changes, name="train")

    def wait_for_step(self, job: Job, step: int) -> None:
        def reached() -> bool:
            now = self.client.job(job.id)
            assert not now.finished, (now.state, now.error)
            return (now.latest_metrics or {}).get("step", 0) >= step

        wait_until(reached, timeout_s=120, what=f"step {step}")

    def processes(self, module: str) -> list[psutil.Process]:
        """Processes of this home that run `python -m MODULE`."""
        found = []
        for process in processes_of_home(self.home):
            try:
                if module in process.cmdline():
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def finished(self, job: Job) -> Job:
        done = self.client.wait(job.id, timeout_s=300)
        assert done.state == "succeeded", (done.error, self.client.logs(job.id, tail=30).content.decode())
        return done

    def check_history(self, job: Job, *, attempts: int) -> None:
        """Each step has its metric; each event its number; the log of the last attempt its lines, once."""
        done = self.client.job(job.id)
        assert [attempt.number for attempt in done.attempts] == list(range(1, attempts + 1))
        loss = self.client.metrics(job.id, names=["loss"])["loss"]
        assert [step for step, _, _ in loss] == list(range(1, ITERATIONS + 1))
        history = list(self.client.history(job.id))
        assert [int(event.id or 0) for event in history] == list(range(1, len(history) + 1))
        log = b"".join(self.client.follow_logs(job.id)).decode()
        steps = [int(step) for step in re.findall(r"iteration (\d+)/", log)]
        assert steps == list(range(steps[0], ITERATIONS + 1))


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("embedded")
    server = Temper(folder / "home", allow_roots=[folder], environment=QUICK)
    with server, Client(server.url, server.admin_key) as client:
        service = Service(server, client, folder)
        service.prepare()
        yield service
    assert processes_of_home(server.home) == []


@pytest.fixture(scope="module")
def database() -> Iterator[Postgres]:
    """A PostgreSQL of its own, which a test may stop."""
    with running_postgres() as server:
        yield server


@pytest.fixture(scope="module")
def cluster(
    tmp_path_factory: pytest.TempPathFactory, database: Postgres, _redis_server: RedisServer
) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("cluster")
    environment = {**QUICK, "TEMPER_DEVICES": "2"}
    server = TemperCluster(folder / "home", database.create_database(), _redis_server.url, [folder], environment)
    with server:
        server.start("node-a", "node-b")
        with Client(server.url, server.admin_key) as client:
            service = Service(server, client, folder)
            service.prepare()
            yield service
    assert processes_of_home(server.home) == []


@pytest.fixture(params=["embedded", "cluster"])
def service(request: pytest.FixtureRequest) -> Service:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Service)
    return found


class TestKilled:
    def test_a_killed_celery_worker_does_not_disturb_a_training(self, service: Service) -> None:
        job = service.train()
        service.wait_for_step(job, 8)
        node = service.client.job(job.id).attempts[0].placement[0]["node"]
        if isinstance(service.server, TemperCluster):
            service.server.kill_worker(node)
        else:
            for process in service.processes("worker"):
                process.kill()
        service.finished(job)
        service.check_history(job, attempts=1)
        if isinstance(service.server, TemperCluster):
            service.server.start_worker(node)

    def test_a_killed_supervisors_job_resumes_from_its_last_checkpoint(self, service: Service) -> None:
        job = service.train()
        service.wait_for_step(job, 18)
        (supervisor,) = service.processes("worker.supervisor")
        runners = supervisor.children(recursive=True)
        supervisor.kill()
        wait_until(
            lambda: not any(runner.is_running() and runner.status() != psutil.STATUS_ZOMBIE for runner in runners),
            timeout_s=20,
            what="the end of the runners",
        )
        done = service.finished(job)
        assert [attempt.state for attempt in done.attempts] == ["lost", "succeeded"]
        service.check_history(job, attempts=2)
        log = b"".join(service.client.follow_logs(job.id)).decode()
        resumed = re.search(r"resuming from iter_(\d+)", log)
        assert resumed is not None
        assert int(resumed[1]) >= 15

    def test_a_cancelled_training_leaves_nobody_and_its_last_checkpoint(self, service: Service) -> None:
        job = service.train(train_iters=5000)
        service.wait_for_step(job, 7)
        service.client.cancel(job.id)
        done = service.client.wait(job.id, timeout_s=90)
        assert done.state == "cancelled"
        assert service.processes("core.runners") == []
        assert any(output.name.startswith("checkpoint-") for output in done.outputs)


class TestCluster:
    def test_one_training_over_two_hosts_equals_the_one_on_one_host(self, cluster: Service) -> None:
        parallel = cluster.road["train"][1]["parallel"]
        alone = cluster.train()
        both = cluster.train(parallel={**parallel, "nnodes": 2, "nproc_per_node": 1})
        assert len(cluster.finished(both).attempts[0].placement) == 2
        cluster.finished(alone)
        curves = [cluster.client.metrics(job.id, names=["loss"])["loss"] for job in (alone, both)]
        assert [value for _, _, value in curves[0]] == pytest.approx([value for _, _, value in curves[1]], rel=1e-5)

    def test_a_lost_host_hands_its_job_to_another(self, cluster: Service) -> None:
        assert isinstance(cluster.server, TemperCluster)
        job = cluster.train()
        cluster.wait_for_step(job, 12)
        lost = cluster.client.job(job.id).attempts[0].placement[0]["node"]
        cluster.server.kill_worker(lost)
        for process in cluster.processes("worker.supervisor"):
            kill_tree(process.pid)
        done = cluster.finished(job)
        assert [attempt.state for attempt in done.attempts] == ["lost", "succeeded"]
        assert done.attempts[1].placement[0]["node"] != lost
        cluster.check_history(job, attempts=2)
        cluster.server.start_worker(lost)

    def test_a_database_outage_delays_and_loses_nothing(self, cluster: Service, database: Postgres) -> None:
        job = cluster.train()
        cluster.wait_for_step(job, 8)
        database.stop()
        database.start()
        cluster.finished(job)
        cluster.check_history(job, attempts=1)
