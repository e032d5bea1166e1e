"""`make bench`: how fast the service starts, takes a job, and passes on what a training says. Prints; asserts only the limits promised."""

import statistics
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from api.client import Client
from tests.digits import write_digits, write_model
from tests.road import digits_road, submit_road
from tests.services import Temper, start_temper, stop_process, wait_until_ready

pytestmark = [pytest.mark.bench, pytest.mark.timeout(600)]


def percentiles(values: list[float]) -> str:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return f"p50 {cuts[49] * 1e3:.1f} ms, p99 {cuts[98] * 1e3:.1f} ms ({len(values)} samples)"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Temper, Client]]:
    folder = tmp_path_factory.mktemp("bench")
    with Temper(folder / "home", allow_roots=[folder]) as server, Client(server.url, server.admin_key) as client:
        yield server, client


class TestStart:
    def test_the_api_starts_in_under_two_seconds_without_torch(self, tmp_path: Path) -> None:
        server = Temper(tmp_path / "home")
        server.home.mkdir()
        environment = {"TEMPER_PORT": str(server.port)}
        times = []
        for _ in range(5):  # the first one makes the database
            begun = time.monotonic()
            arguments = ["api", "--port", str(server.port)]
            process = start_temper(arguments, home=server.home, environment=environment, output=tmp_path / "out")
            wait_until_ready(server.url, process, tmp_path / "out", timeout_s=30, path="/healthz")
            times.append(time.monotonic() - begun)
            memory = psutil.Process(process.pid).memory_info().rss
            stop_process(process)
        listed = ", ".join(f"{seconds:.2f}" for seconds in times)
        print(f"\nAPI: start {statistics.median(times):.2f} s (of {listed}), resident {memory / 2**20:.0f} MiB")
        assert statistics.median(times) < 2


class TestLatency:
    def test_submitting_and_following(
        self, service: tuple[Temper, Client], tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        server, client = service
        folder = server.home.parent
        model = client.register("hf_model", write_model(folder / "model"))
        write_digits(folder / "digits", limit=200)
        source = client.register("dataset_source", folder / "digits")
        jobs = submit_road(client, digits_road(model.id, source.id, train_iters=300))
        while client.job(jobs["train"].id).state in {"waiting", "queued"}:
            time.sleep(0.1)

        # Jobs that wait for the training: taken and stored, without taking the machine from what is measured.
        spec = {"operation": "mm_to_hf", "source": {"job": jobs["train"].id}}
        submits = []
        for _ in range(200):
            begun = time.monotonic()
            client.submit("conversion", spec)
            submits.append(time.monotonic() - begun)
        print(f"\nsubmit, while a training runs: {percentiles(submits)}")

        arrivals, opened = [], time.time()
        for event in client.events(jobs["train"].id):
            now = time.time()
            if event.type == "metric":
                emitted = datetime.fromisoformat(event.data["time"].replace("Z", "+00:00")).timestamp()
                if emitted > opened:  # earlier ones lay there when the stream was opened
                    arrivals.append(now - emitted)
        print(f"metric, from the runner to a client of the event stream: {percentiles(arrivals)}")
        assert client.job(jobs["train"].id).state == "succeeded"
