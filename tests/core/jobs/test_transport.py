import multiprocessing
import time
from collections import Counter
from pathlib import Path

from kombu import Connection
from kombu.simple import SimpleQueue

from core.jobs.queue import build_app
from core.settings import Settings

PRODUCERS, MESSAGES = 3, 150


def connect(home: Path) -> Connection:
    return build_app(Settings(home=home)).connection_for_write()


def produce(home: Path, producer: int) -> None:
    with connect(home) as connection:
        queue = SimpleQueue(connection, "work")
        for number in range(MESSAGES):
            queue.put([producer, number, "x" * 20_000])


def consume(home: Path, got: "multiprocessing.Queue[list[tuple[int, int]]]") -> None:
    seen, idle_since = [], time.monotonic()
    with connect(home) as connection:
        queue = SimpleQueue(connection, "work")
        while time.monotonic() - idle_since < 5 and len(seen) < PRODUCERS * MESSAGES:
            try:
                message = queue.get(timeout=0.2)
            except queue.Empty:
                continue
            message.ack()
            seen.append((message.payload[0], message.payload[1]))
            idle_since = time.monotonic()
    got.put(seen)


class TestTransport:
    def test_many_processes_at_once_lose_double_and_tear_no_message(self, tmp_path: Path) -> None:
        spawn = multiprocessing.get_context("spawn")
        got: multiprocessing.Queue[list[tuple[int, int]]] = spawn.Queue()
        consumers = [spawn.Process(target=consume, args=(tmp_path, got)) for _ in range(2)]
        producers = [spawn.Process(target=produce, args=(tmp_path, number)) for number in range(PRODUCERS)]
        for process in consumers + producers:
            process.start()
        seen = Counter(item for _ in consumers for item in got.get(timeout=120))
        for process in consumers + producers:
            process.join(30)
            assert process.exitcode == 0
        assert seen == Counter((producer, number) for producer in range(PRODUCERS) for number in range(MESSAGES))
