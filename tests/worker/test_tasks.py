"""Tests of the Celery tasks: a lease gets one supervisor, however often it is asked for."""

import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from core.ids import new_id
from worker import tasks
from worker.rendezvous import PORTS, reserve_port
from worker.tasks import hold


class TestHold:
    def test_a_name_is_taken_once(self) -> None:
        lease_id = new_id("lea")
        first = hold(lease_id)
        assert first is not None
        with first:
            assert hold(lease_id) is None
        again = hold(lease_id)
        assert again is not None
        again.close()

    def test_a_process_that_inherits_it_keeps_it_until_it_ends(self) -> None:
        lease_id = new_id("lea")
        name = hold(lease_id)
        assert name is not None
        with name:
            waiting = subprocess.Popen(
                [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, pass_fds=[name.fileno()]
            )
        assert hold(lease_id) is None
        waiting.communicate()
        free = hold(lease_id)
        assert free is not None
        free.close()


class TestLog:
    def test_a_long_one_is_put_aside_in_place_of_the_one_before(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tasks, "LOG_BYTES", 3)
        path = tmp_path / "supervisor-a.b.log"
        tasks.begin_anew_if_long(path)
        for text in ("one", "three", "four"):
            path.write_text(text)
            tasks.begin_anew_if_long(path)
        assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("supervisor-a.b.log.1", "four")]


class TestReservePort:
    def test_one_that_is_bound_or_another_supervisors_is_passed_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        first, taken = reserve_port()
        bound = socket.socket()
        with first, bound:
            second, port = reserve_port()
            second.close()
            bound.bind(("", port))
            free = next(number for number in PORTS if number not in (taken, port))
            monkeypatch.setattr(random, "sample", lambda *_: [taken, port, free])
            third, found = reserve_port()
            third.close()
        assert found == free
