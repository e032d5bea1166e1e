"""Several training processes taking turns on one machine, so that noise hits all of them alike.

    driver:   go(A, 1 step) → go(B, 1 step) → go(C, 1 step) → go(A, 1 step) ...
    process:  trains on; after each step it reports its loss and waits for its next turn, stopped (SIGSTOP) in between, so that
              no thread of it can work ahead in another's time

Each process measures nothing itself: wall and CPU time of a turn are taken by the driver from `go` to the report.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
CHANNEL = "TEMPER_BENCH_CHANNEL"
"""Environment variable: file descriptors to read turns from and write reports to, "3,4"."""


class Turns:
    """The process's end: call `wait` once everything is ready, `done` after each step."""

    def __init__(self) -> None:
        read, write = map(int, os.environ[CHANNEL].split(","))
        self._read = os.fdopen(read, "r")
        self._write = os.fdopen(write, "w")
        self._left = 0
        self._losses: list[float] = []

    def wait(self) -> None:
        """Report and wait for a turn; ends the process when there is none any more."""
        print(json.dumps(self._losses), file=self._write, flush=True)
        self._losses = []
        line = self._read.readline()
        if not line:
            os._exit(0)
        self._left = int(line)

    def done(self, loss: float) -> None:
        """Count a step."""
        self._losses.append(loss)
        self._left -= 1
        if self._left == 0:
            self.wait()


@dataclass
class Runner:
    """The driver's end of one process."""

    name: str
    process: subprocess.Popen[bytes]
    read: Any
    write: Any
    log: Path
    losses: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    """Per step, by turn."""
    cpu_s: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    """Most resident memory while training."""

    @classmethod
    def start(
        cls, name: str, command: Sequence[str | Path], *, log: Path, threads: int, environment: Mapping[str, str] = {}
    ) -> Runner:
        """Start a process and wait until it is ready for its first turn."""
        turn_read, turn_write = os.pipe()
        report_read, report_write = os.pipe()
        variables = {
            **os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1", CHANNEL: f"{turn_read},{report_write}", **environment,
        }  # fmt: skip
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=REPOSITORY, env=variables, stdout=output, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, pass_fds=(turn_read, report_write), start_new_session=True,
            )  # fmt: skip
        os.close(turn_read)
        os.close(report_write)
        runner = cls(name, process, os.fdopen(report_read, "r"), os.fdopen(turn_write, "w"), log)
        runner._await_report()
        runner._reset_peak()
        return runner

    def turn(self, steps: int) -> None:
        """Let the process train `steps` steps."""
        cpu, begun = self._cpu_s(), time.perf_counter()
        os.killpg(self.process.pid, signal.SIGCONT)
        print(steps, file=self.write, flush=True)
        self.losses += self._await_report()
        self.wall_s.append((time.perf_counter() - begun) / steps)
        self.cpu_s.append((self._cpu_s() - cpu) / steps)
        self.peak_bytes = self._peak_bytes()

    def stop(self) -> None:
        """End the process."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.read.close()
        self.write.close()

    def _await_report(self) -> list[float]:
        line = self.read.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with {self.process.wait()}:\n{self.log.read_text()[-6000:]}")
        os.killpg(self.process.pid, signal.SIGSTOP)
        return list(json.loads(line))

    def _cpu_s(self) -> float:
        family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        return sum(sum(member.cpu_times()[:2]) for member in family)

    def _reset_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def _peak_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024


def take_turns(runners: Sequence[Runner], *, rounds: int, warmup: int = 2, steps: int = 1) -> None:
    """`warmup` + `rounds` turns each, in rotation with a new first one every round; times of the warm-up are dropped."""
    for number in range(warmup + rounds):
        first = number % len(runners)
        for runner in (*runners[first:], *runners[:first]):
            runner.turn(steps)
    for runner in runners:
        del runner.wall_s[:warmup], runner.cpu_s[:warmup]


def ratio(slower: Sequence[float], faster: Sequence[float]) -> tuple[float, float, float]:
    """Median of the ratios round by round, and the least and greatest of them: both sides of a round saw the same machine."""
    ratios = [a / b for a, b in zip(slower, faster, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def machine() -> str:
    """Cores and how busy they are with other things."""
    load = os.getloadavg()[0]
    note = " (busy: wall times are inflated, compare the ratios)" if load > (os.cpu_count() or 1) * 1.5 else ""
    return f"{os.cpu_count()} cores, load average {load:.1f}{note}"
