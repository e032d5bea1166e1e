"""The whole road in cluster mode on one machine, through an outage of Redis; one job on two hosts; many jobs on two hosts."""

from collections import Counter

import pytest

from tests.e2e.service import Service
from tests.road import submit_road
from tests.services import RedisServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class TestTheRoad:
    def test_a_redis_that_goes_and_comes_back_costs_nothing(
        self, cluster: Service, cluster_broker: RedisServer
    ) -> None:
        client = cluster.client
        jobs = submit_road(client, cluster.road, made=cluster.made)
        cluster.wait_for_step(jobs["train"], 3)
        cluster_broker.stop()
        late = client.submit("conversion", {"operation": "mm_to_hf", "source": {"job": jobs["train"].id}})
        cluster.wait_for_step(jobs["train"], 15)  # an outage has a length
        cluster_broker.start()
        finished = {station: cluster.finished(job) for station, job in {**jobs, "late": late}.items()}
        cluster.check_history(finished["train"], attempts=1)


class TestHosts:
    def test_both_are_seen_and_take_work(self, cluster: Service) -> None:
        client = cluster.client
        assert {node.model_dump()["name"] for node in client.nodes()} == {"node-a", "node-b"}
        kind, spec = cluster.road["convert"]
        finished = [cluster.finished(job) for job in [client.submit(kind, spec) for _ in range(4)]]
        taken = Counter(part["node"] for job in finished for part in job.attempts[-1].placement)
        assert set(taken) == {"node-a", "node-b"}

    def test_one_training_over_both_equals_the_one_on_one(self, cluster: Service) -> None:
        parallel = cluster.road["train"][1]["parallel"]
        alone = cluster.train()
        both = cluster.train(parallel={**parallel, "nnodes": 2, "nproc_per_node": 1})
        assert len(cluster.finished(both).attempts[0].placement) == 2
        cluster.finished(alone)
        curves = [cluster.client.metrics(job.id, names=["loss"])["loss"] for job in (alone, both)]
        assert [value for _, _, value in curves[0]] == pytest.approx([value for _, _, value in curves[1]], rel=1e-5)
