"""A stall is found and its culprit named: every rank tells what it is doing, and watches itself and the others.

Each rank's thread writes `heartbeats/rank_N.json` (step, phase, rows, seconds since progress) every few seconds, also while the rank's
main thread is stuck. When a rank has made no progress for the limit, its thread dumps the stacks of all its threads into
`heartbeats/rank_N.txt`. When all have, rank 0's thread writes them into the log, one after the other, names the culprit, the rank that is
furthest behind, tells the job's error and ends its process; the others see that and end theirs, since one that is stuck would not hear a
signal. Where rank 0 is stopped or lost itself, so that its file is no longer written anew, the first rank that lives does so in its place.
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
from dataclasses import asdict, dataclass, replace
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
    has_told: bool = False
    """Whether it has found itself stalled and dumped its stacks."""


SLOW = {"start": 4, "save": 4}
"""Phases that may take so many times the limit: weights are read, a checkpoint is written."""
VERDICT = "stalled.txt"
"""File by which a rank tells the others that the job has failed."""
PHASES = ("start", "data", "compute", "reduce", "save")
"""In the order of a step."""


def culprit(beats: Sequence[Beat]) -> Beat:
    """Return the rank that the others wait for: the one furthest behind, of several one that does not answer, or the one longest there."""
    return min(beats, key=lambda beat: (beat.step, PHASES.index(beat.phase), beat.has_told, beat.since))


class Heartbeat:
    """One rank's heartbeat and watch; a context manager.

    `fail` is called on every rank with the error and must end the process: the main thread can be in a call that never returns.
    `tell` is called before that on the one rank that names the culprit, and makes the error the job's.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        *,
        fail: Callable[[AppError], None],
        tell: Callable[[AppError], None] = lambda _: None,
        limit_s: float,
        interval_s: float = 5.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder, self._rank, self._fail, self._tell = folder, rank, fail, tell
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
        self.stop()

    def stop(self) -> None:
        """Watch no longer."""
        self._ended.set()
        self._thread.join()

    def phase(self, step: int, phase: str, rows: Sequence[int] = ()) -> None:
        """Tell that this rank goes on: what it does from now on."""
        self._beat = Beat(self._rank, step, phase, tuple(rows), self._clock())

    def _watch(self) -> None:
        told: Beat | None = None
        while not self._ended.wait(self._interval_s):
            beat = self._beat
            self._write(replace(beat, has_told=beat == told))
            if (self._folder / VERDICT).exists():
                self._fail(Stalled((self._folder / VERDICT).read_text(encoding="utf-8")))
                return
            if self._clock() - beat.since < self._limit_s * SLOW.get(beat.phase, 1):
                continue
            if beat != told:
                _log.warning("rank %d: no progress since step %d, %s", self._rank, beat.step, beat.phase)
                with (self._folder / f"rank_{self._rank}.txt").open("w", encoding="utf-8") as file:
                    faulthandler.dump_traceback(file=file, all_threads=True)
                told = beat
                self._write(replace(beat, has_told=True))
            if self._is_to_judge(beat):
                for stacks in sorted(self._folder.glob("rank_*.txt")):
                    text = stacks.read_text(encoding="utf-8")
                    _log.warning("the stacks of rank %s:\n%s", stacks.stem.removeprefix("rank_"), text)
                error = self._error()
                (self._folder / ".verdict").write_text(error.message, encoding="utf-8")
                (self._folder / ".verdict").replace(self._folder / VERDICT)
                self._tell(error)
                self._fail(error)
                return

    def _is_to_judge(self, beat: Beat) -> bool:
        """Wait until every rank has told its stacks (a lost one never does), or on other ranks than 0 for an earlier one's verdict.

        Return whether it falls to this rank: it is still where it was, and no earlier rank has written its beat meanwhile.
        """
        deadline, before = self._clock() + self._limit_s, self._earlier_ranks()
        verdict = self._folder / VERDICT
        while self._clock() < deadline and not verdict.exists():
            if self._rank == 0 and all(other.has_told for other in self._beats()):
                break
            if self._ended.wait(self._interval_s / 4):
                return False
            self._write(replace(beat, has_told=True))
        return self._beat == beat and not verdict.exists() and self._earlier_ranks() == before

    def _earlier_ranks(self) -> dict[int, int]:
        """When the ranks before this one last wrote their beats."""
        paths = {rank: self._folder / f"rank_{rank}.json" for rank in range(self._rank)}
        return {rank: path.stat().st_mtime_ns for rank, path in paths.items() if path.exists()}

    def _write(self, beat: Beat) -> None:
        temporary = self._folder / f".rank_{self._rank}.tmp"
        temporary.write_text(json.dumps(asdict(beat)), encoding="utf-8")
        temporary.replace(self._folder / f"rank_{self._rank}.json")

    def _beats(self) -> list[Beat]:
        return [_read(path) for path in sorted(self._folder.glob("rank_*.json"))]

    def _error(self) -> Stalled:
        worst = culprit(self._beats())
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
