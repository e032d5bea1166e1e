"""The whole road in cluster mode on one machine, through an outage of Redis; and in embedded mode, through a loss of power."""

import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from api.client import Client, Job
from tests.digits import write_digits, write_model
from tests.road import digits_road, submit_road
from tests.services import RedisServer, Temper, TemperCluster, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# Short times, so that a lost host is noticed while somebody waits for it.
HASTE = {
    "TEMPER_HEARTBEAT_S": "0.5",
    "TEMPER_LEASE_TTL_S": "6",
    "TEMPER_FENCE_MARGIN_S": "1",
    "TEMPER_NODE_TTL_S": "5",
    "TEMPER_STOP_GRACE_S": "10",
    "TEMPER_DEVICES": "2",
}
TRAIN_ITERS = 40
SAVE_INTERVAL = 10


@pytest.fixture
def cluster(tmp_path: Path, fresh_postgres_url: str, redis: RedisServer) -> Iterator[TemperCluster]:
    started = TemperCluster(tmp_path / "home", fresh_postgres_url, redis.url, [tmp_path], HASTE)
    with started:
        started.start("alpha", "beta")
        yield started


@pytest.fixture
def client(cluster: TemperCluster) -> Iterator[Client]:
    with Client(cluster.url, cluster.admin_key) as opened:
        yield opened


def submit(client: Client, folder: Path) -> dict[str, Job]:
    """The digits' road, small, with a checkpoint every ten steps."""
    model = client.register("hf_model", write_model(folder / "model"))
    write_digits(folder / "digits", limit=160)
    source = client.register("dataset_source", folder / "digits")
    road = digits_road(model.id, source.id, train_iters=TRAIN_ITERS)
    road["train"][1]["checkpoint"] = {"save_interval": SAVE_INTERVAL}
    return submit_road(client, road)


def wait_for_step(client: Client, job_id: str, step: int) -> None:
    def reached() -> bool:
        job = client.job(job_id)
        assert not job.finished, job.error
        return (job.latest_metrics.get("step") or 0) >= step

    wait_until(reached, timeout_s=240, what=f"step {step} of {job_id}", every_s=0.2)


def wait_for_all(client: Client, jobs: dict[str, Job]) -> dict[str, Job]:
    finished = {station: client.wait(job.id, timeout_s=300) for station, job in jobs.items()}
    failures = {job.name: (job.error, client.logs(job.id, tail=20).content) for job in finished.values() if job.error}
    assert not failures
    assert {job.state for job in finished.values()} == {"succeeded"}
    return finished


def assert_nothing_lost_or_doubled(client: Client, job: Job) -> None:
    """Events are numbered without a gap; every step is there once; the log has every step's line once."""
    history = list(client.history(job.id))
    assert [int(event.id or 0) for event in history] == list(range(1, len(history) + 1))
    live = [event.data["seq"] for event in client.events(job.id) if event.type != "log"]
    assert live == list(range(1, len(history) + 1))
    assert [step for step, _, _ in client.metrics(job.id)["loss"]] == list(range(1, TRAIN_ITERS + 1))


def steps_in_log(client: Client, job_id: str, attempt: int) -> list[int]:
    log = b"".join(client.follow_logs(job_id, attempt=attempt)).decode()
    return [int(step) for step in re.findall(rf"^iteration (\d+)/{TRAIN_ITERS} ", log, re.MULTILINE)]


class TestTheRoad:
    def test_a_redis_that_goes_and_comes_back_costs_nothing(
        self, cluster: TemperCluster, client: Client, redis: RedisServer, tmp_path: Path
    ) -> None:
        jobs = submit(client, tmp_path)
        wait_for_step(client, jobs["train"].id, 3)
        redis.stop()
        late = client.submit("conversion", {"operation": "mm_to_hf", "source": {"job": jobs["train"].id}})
        time.sleep(3)  # an outage has a length
        redis.start()
        finished = wait_for_all(client, {**jobs, "late": late})
        assert_nothing_lost_or_doubled(client, finished["train"])
        assert [attempt.number for attempt in finished["train"].attempts] == [1]
        assert steps_in_log(client, jobs["train"].id, 1) == list(range(1, TRAIN_ITERS + 1))

    def test_both_hosts_are_seen_and_take_work(self, cluster: TemperCluster, client: Client, tmp_path: Path) -> None:
        names = {node.model_dump()["name"] for node in client.nodes()}
        assert names == {"alpha", "beta"}
        model = client.register("hf_model", write_model(tmp_path / "model"))
        layout = {"llm_pp_layers": [[4]], "vit_pp_layers": [[4]]}
        spec = {"operation": "hf_to_mm", "source": {"artifact": model.id}, "parallel": layout}
        jobs = {str(number): client.submit("conversion", spec) for number in range(6)}
        finished = wait_for_all(client, jobs)
        taken = Counter(part["node"] for job in finished.values() for part in job.attempts[-1].placement)
        assert set(taken) == {"alpha", "beta"}


class TestEmbedded:
    def test_a_machine_that_loses_its_power_goes_on_when_it_is_back(self, tmp_path: Path) -> None:
        server = Temper(tmp_path / "home", [tmp_path], HASTE)
        with server:
            with Client(server.url, server.admin_key) as client:
                jobs = submit(client, tmp_path)
                wait_for_step(client, jobs["train"].id, SAVE_INTERVAL + 2)
            server.crash()
            server.start()
            with Client(server.url, server.admin_key) as client:
                finished = wait_for_all(client, jobs)
                steps = steps_in_log(client, jobs["train"].id, 2)
                assert steps[0] % SAVE_INTERVAL == 1
                assert steps[0] > 1
                assert_nothing_lost_or_doubled(client, finished["train"])
