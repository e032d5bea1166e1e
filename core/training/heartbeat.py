"""A stall is found and its culprit named: every rank tells what it is doing, and watches itself and the others.

Each rank's thread writes `heartbeats/rank_N.json` (step, phase, rows, seconds since progress) every few seconds, also while the rank's
main thread is stuck. When a rank has made no progress for the limit, its thread dumps the stacks of all its threads into the log; rank
0's thread also names the culprit, the rank that is furthest behind, tells the job's error and ends the process, on which torchrun ends
the others.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from core.errors import AppError

_log = logging.getLogger("temper.runner")


class Stalled(AppError):
    """A rank has made no progress for the limit."""

    code = "stalled"
    status = 500


@dataclass(frozen=True)
class Beat:
    """What a rank was last seen doing."""

    rank: int
    step: int
    phase: str
    """one of `PHASES`"""
    rows: tuple[int, ...] = ()
    since: float = 0.0
    """Unix time at which the phase began."""


SAVE_FACTOR = 4
"""A checkpoint may take so many times the limit."""
PHASES = ("start", "data", "compute", "reduce", "save")
"""In the order of a step."""


def culprit(beats: Sequence[Beat]) -> Beat:
    """Return the rank that the others wait for: the one furthest behind, of several the one longest there."""
    return min(beats, key=lambda beat: (beat.step, PHASES.index(beat.phase), beat.since))


class Heartbeat:
    """One rank's heartbeat and watch; a context manager.

    `fail` is called on rank 0 with the error and must end the process: the main thread can be in a call that never returns.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        *,
        fail: Callable[[AppError], None],
        limit_s: float,
        interval_s: float = 5.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder, self._rank, self._fail = folder, rank, fail
        self._limit_s, self._interval_s, self._clock = limit_s, min(interval_s, limit_s / 4), clock
        self._ended = threading.Event()
        self._beat = Beat(rank, 0, "start", since=clock())
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def phase(self, step: int, phase: str, rows: Sequence[int] = ()) -> None:
        """Tell that this rank goes on: what it does from now on."""
        self._beat = Beat(self._rank, step, phase, tuple(rows), self._clock())

    def _watch(self) -> None:
        while not self._ended.wait(self._interval_s):
            beat = self._beat
            temporary = self._folder / f".rank_{self._rank}.tmp"
            temporary.write_text(json.dumps(asdict(beat)), encoding="utf-8")
            temporary.replace(self._folder / f"rank_{self._rank}.json")
            if self._clock() - beat.since < self._limit_s * (SAVE_FACTOR if beat.phase == "save" else 1):
                continue
            _log.warning("no progress since step %d, %s; the stacks of rank %d:", beat.step, beat.phase, self._rank)
            faulthandler.dump_traceback(file=2, all_threads=True)
            if self._rank == 0:
                self._ended.wait(2 * self._interval_s)  # the others tell theirs
                if self._beat == beat and not self._ended.is_set():
                    self._fail(self._error())
            return

    def _error(self) -> Stalled:
        beats = [_read(path) for path in sorted(self._folder.glob("rank_*.json"))]
        worst = culprit(beats)
        rows = ", ".join(map(str, worst.rows[:20])) or "none"
        return Stalled(
            f"no progress for {self._limit_s:.0f} s: rank {worst.rank} is furthest behind, "
            f"in step {worst.step}, {worst.phase}, rows {rows}",
            hint="the stacks of all ranks are in the log; a file system that hangs and a lost device are usual causes",
        )


def end_process(code: int = 1) -> None:
    """End this process at once, whatever its main thread is in."""
    sys.stdout.flush()
    os._exit(code)


def _read(path: Path) -> Beat:
    values = json.loads(path.read_bytes())
    return Beat(**{**values, "rows": tuple(values["rows"])})
