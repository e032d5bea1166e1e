import multiprocessing
from collections import Counter
from multiprocessing.synchronize import Event
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


def consume(home: Path, got: "multiprocessing.Queue[tuple[int, int]]", all_seen: Event) -> None:
    """Take messages until all were seen by somebody and the queue is empty."""
    with connect(home) as connection:
        queue = SimpleQueue(connection, "work")
        while True:
            try:
                message = queue.get(timeout=0.2)
            except queue.Empty:
                if all_seen.is_set():
                    return
                continue
            message.ack()
            got.put((message.payload[0], message.payload[1]))


class TestTransport:
    def test_many_processes_at_once_lose_double_and_tear_no_message(self, tmp_path: Path) -> None:
        spawn = multiprocessing.get_context("spawn")
        got: multiprocessing.Queue[tuple[int, int]] = spawn.Queue()
        all_seen = spawn.Event()
        consumers = [spawn.Process(target=consume, args=(tmp_path, got, all_seen)) for _ in range(2)]
        producers = [spawn.Process(target=produce, args=(tmp_path, number)) for number in range(PRODUCERS)]
        for process in consumers + producers:
            process.start()
        seen = Counter(got.get(timeout=240) for _ in range(PRODUCERS * MESSAGES))
        all_seen.set()
        for process in producers + consumers:
            process.join(120)
            assert process.exitcode == 0
        assert got.empty()
        assert seen == Counter((producer, number) for producer in range(PRODUCERS) for number in range(MESSAGES))
