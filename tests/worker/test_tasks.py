"""Tests of the Celery tasks: a lease gets one supervisor, however often it is asked for."""

import subprocess
import sys

from core.ids import new_id
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
