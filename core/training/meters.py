"""How fast a training runs, and the line that tells it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """Averages since the last reading."""

    loss: float
    """Mean over the steps that were not skipped; NaN when all were."""
    step_time_ms: float
    tokens_per_second: float
    """Real tokens of all ranks, without padding."""
    num_skipped: int


class Meters:
    """Collects what happens between two log lines. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._start()

    def add(self, *, loss: float, num_tokens: int) -> None:
        """Count a finished step; a loss that is not finite counts as skipped."""
        self._num_steps += 1
        self._num_tokens += num_tokens
        if math.isfinite(loss):
            self._losses.append(loss)

    def paused(self, seconds: float) -> None:
        """Leave out time that was not training: writing a checkpoint."""
        self._began += seconds

    def read(self) -> Reading:
        """Return the averages and begin anew."""
        elapsed_s = max(self._clock() - self._began, 1e-9)
        reading = Reading(
            loss=math.fsum(self._losses) / len(self._losses) if self._losses else math.nan,
            step_time_ms=1000 * elapsed_s / self._num_steps,
            tokens_per_second=self._num_tokens / elapsed_s,
            num_skipped=self._num_steps - len(self._losses),
        )
        self._start()
        return reading

    def _start(self) -> None:
        self._began = self._clock()
        self._num_steps = 0
        self._num_tokens = 0
        self._losses: list[float] = []


def log_line(
    *,
    iteration: int,
    train_iters: int,
    consumed_samples: int,
    step_time_ms: float,
    learning_rate: float,
    global_batch_size: int,
    loss: float,
    grad_norm: float,
) -> str:
    """Return the field's usual line."""
    return (
        f"iteration {iteration}/{train_iters} | consumed samples {consumed_samples} | "
        f"elapsed time per iteration (ms) {step_time_ms:.1f} | learning rate {learning_rate:.3E} | "
        f"global batch size {global_batch_size} | loss {_short(loss)} | grad norm {_short(grad_norm)}"
    )


def _short(value: float) -> str:
    """Three decimals, or three digits of a small value, so that a loss near 0 does not read 0.000."""
    return f"{value:.3f}" if value == 0 or not abs(value) < 0.1 else f"{value:.3E}"
