"""A child process and everything that it starts, also what leaves its session or loses its parent (Linux)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


class ProcessTree:
    """Starts one command in a session of its own and can end all of its descendants.

    The calling process becomes the reaper of orphans, so that a grandchild that lost its parent becomes its child and
    is found; torchrun, for one, puts its workers in sessions of their own.
    """

    def __init__(self, argv: Sequence[str], *, env: Mapping[str, str], log: Path) -> None:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        with log.open("ab") as stream:
            self._child = subprocess.Popen(
                argv,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        self.pid = self._child.pid

    def poll(self) -> int | None:
        """Exit code of the command, or None while it runs; negative = ended by that signal."""
        return self._child.poll()

    def terminate(self, *, spare_root: bool) -> None:
        """Send TERM to all; `spare_root` leaves out the command itself (torchrun, which would soon send KILL)."""
        for process in self._descendants():
            if not (spare_root and process.pid == self.pid):
                _send(process, signal.SIGTERM)

    def kill(self, timeout_s: float = 10.0) -> bool:
        """Send KILL until nobody is left; True when that was reached."""
        deadline = time.monotonic() + timeout_s
        while living := self._descendants():
            for process in living:
                _send(process, signal.SIGKILL)
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def _descendants(self) -> list[psutil.Process]:
        self._child.poll()
        self._reap_orphans()
        living = []
        for process in psutil.Process().children(recursive=True):
            try:
                if process.status() != psutil.STATUS_ZOMBIE:
                    living.append(process)
            except psutil.NoSuchProcess:
                continue
        return living

    def _reap_orphans(self) -> None:
        """Collect ended orphans; the command itself is left to `poll`."""
        for process in psutil.Process().children():
            if process.pid != self.pid:
                try:
                    os.waitpid(process.pid, os.WNOHANG)
                except ChildProcessError:
                    continue


def _die_with_parent() -> None:
    """In the new process: have the kernel kill it when the supervisor ends, however that ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _send(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)
