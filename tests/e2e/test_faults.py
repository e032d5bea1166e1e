"""What must survive: killed workers, supervisors and hosts, a database that goes away, a loss of power. All processes are real."""

import psutil
import pytest

from tests.e2e.service import Service
from tests.services import Postgres, Temper, TemperCluster, kill_tree, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class TestKilled:
    def test_a_celery_worker_and_no_training_notices(self, service: Service) -> None:
        job = service.train()
        service.wait_for_step(job, 8)
        node = service.client.job(job.id).attempts[0].placement[0]["node"]
        if isinstance(service.server, TemperCluster):
            service.server.kill_worker(node)
            service.server.start_worker(node)
        else:
            for process in service.processes("worker"):
                process.kill()
        service.finished(job)
        service.check_history(job, attempts=1)

    def test_a_supervisor_and_its_job_resumes_from_the_last_checkpoint(self, service: Service) -> None:
        job = service.train()
        saved = service.wait_for_checkpoint(job)
        supervisor = service.supervisor_of(job)
        runners = supervisor.children(recursive=True)
        supervisor.kill()
        wait_until(
            lambda: not any(runner.is_running() and runner.status() != psutil.STATUS_ZOMBIE for runner in runners),
            timeout_s=60,
            what="the end of the runners",
        )
        done = service.finished(job)
        assert [attempt.state for attempt in done.attempts] == ["lost", "succeeded"]
        service.check_history(job, attempts=2)
        assert service.resumed_from(job) >= saved

    def test_a_cancelled_training_leaves_nobody_and_its_last_checkpoint(self, service: Service) -> None:
        job = service.train(train_iters=5000)
        service.wait_for_step(job, 7)
        service.client.cancel(job.id)
        done = service.client.wait(job.id, timeout_s=90)
        assert done.state == "cancelled"
        assert not any(job.id in " ".join(process.cmdline()) for process in service.processes("core.runners"))
        assert any(output.name.startswith("checkpoint-") for output in done.outputs)


class TestHost:
    def test_a_lost_one_hands_its_job_to_another(self, cluster: Service) -> None:
        assert isinstance(cluster.server, TemperCluster)
        job = cluster.train()
        saved = cluster.wait_for_checkpoint(job)
        lost = cluster.client.job(job.id).attempts[0].placement[0]["node"]
        cluster.server.kill_worker(lost)
        kill_tree(cluster.supervisor_of(job).pid)
        done = cluster.finished(job)
        cluster.server.start_worker(lost)
        assert [attempt.state for attempt in done.attempts] == ["lost", "succeeded"]
        assert done.attempts[1].placement[0]["node"] != lost
        cluster.check_history(job, attempts=2)
        assert cluster.resumed_from(job) >= saved


class TestDatabase:
    def test_an_outage_delays_and_loses_nothing(self, cluster: Service, cluster_database: Postgres) -> None:
        job = cluster.train()
        cluster.wait_for_step(job, 8)
        cluster_database.stop()
        cluster_database.start()
        cluster.finished(job)
        cluster.check_history(job, attempts=1)


class TestPower:
    def test_a_machine_that_lost_it_goes_on_when_it_is_back(self, embedded: Service) -> None:
        assert isinstance(embedded.server, Temper)
        job = embedded.train()
        kind, spec = embedded.road["export"]
        export = embedded.client.submit(kind, {**spec, "source": {"job": job.id}})
        saved = embedded.wait_for_checkpoint(job)
        embedded.server.crash()
        embedded.server.start()
        embedded.finished(job)
        embedded.finished(export)
        embedded.check_history(job, attempts=2)
        assert embedded.resumed_from(job) >= saved
