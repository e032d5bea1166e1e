"""How fast a training runs, and the line that tells it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from core.models.flops import Work


@dataclass(frozen=True)
class Reading:
    """Averages since the last reading."""

    loss: float
    """Mean over the steps that were not skipped; NaN when all were."""
    step_time_ms: float
    tokens_per_second: float
    """Real tokens of all ranks, without padding."""
    num_skipped: int
    target_tokens_per_second: float
    """Learnt tokens of all ranks."""
    padded_tokens_per_second: float
    """Tokens that were computed, padding included; of all data-parallel ranks."""
    model_flops_per_second: float
    """Operations that the model needed (core.models.flops), of all ranks."""
    images_per_second: float
    host_wait_fraction: float
    """Share of the time that the slowest rank waited for its data."""

    def rates(self, num_devices: int, peak_flops: float | None) -> dict[str, float]:
        """Return speeds by their metrics' names, of all devices and per device; `mfu` only where a device's peak is known."""
        rates = {
            "tokens_per_second": self.tokens_per_second,
            "target_tokens_per_second": self.target_tokens_per_second,
            "padded_tokens_per_second": self.padded_tokens_per_second,
            "model_flops_per_second": self.model_flops_per_second,
        }
        told: dict[str, float] = {}
        for name, value in rates.items():
            told |= {name: value, f"{name}_per_device": value / num_devices}
        if peak_flops is not None:
            told["mfu"] = self.model_flops_per_second / (num_devices * peak_flops)
        return {**told, "images_per_second": self.images_per_second}


class Meters:
    """Collects what happens between two log lines. `clock` gives seconds, `flops` the model's operations for some work."""

    def __init__(self, clock: Callable[[], float], flops: Callable[[Work], float]) -> None:
        self._clock, self._flops = clock, flops
        self.restart()

    def add(
        self,
        *,
        loss: float,
        work: Work,
        num_padded_tokens: int = 0,
        num_images: int = 0,
        wait_s: float = 0.0,
    ) -> None:
        """Count a finished step; a loss that is not finite counts as skipped."""
        self._num_steps += 1
        self._num_tokens += work.tokens
        self._num_targets += work.targets
        self._num_flops += self._flops(work)
        self._num_padded_tokens += num_padded_tokens
        self._num_images += num_images
        self._wait_s += wait_s
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
            target_tokens_per_second=self._num_targets / elapsed_s,
            padded_tokens_per_second=self._num_padded_tokens / elapsed_s,
            model_flops_per_second=self._num_flops / elapsed_s,
            images_per_second=self._num_images / elapsed_s,
            host_wait_fraction=min(self._wait_s / elapsed_s, 1.0),
        )
        self.restart()
        return reading

    def restart(self) -> None:
        """Forget what was counted."""
        self._began = self._clock()
        self._num_steps = 0
        self._num_tokens = 0
        self._num_targets = 0
        self._num_flops = 0.0
        self._num_padded_tokens = 0
        self._num_images = 0
        self._wait_s = 0.0
        self._losses: list[float] = []


@dataclass(frozen=True)
class LogLine:
    """What the line of an interval tells; loss and gradient norm may be NaN."""

    iteration: int
    train_iters: int
    consumed_samples: int
    step_time_ms: float
    learning_rate: float
    global_batch_size: int
    loss: float
    grad_norm: float
    num_skipped: int = 0

    def temper(self) -> str:
        """Return the field's usual line."""
        return (
            f"iteration {self.iteration}/{self.train_iters} | consumed samples {self.consumed_samples} | "
            f"elapsed time per iteration (ms) {self.step_time_ms:.1f} | learning rate {self.learning_rate:.3E} | "
            f"global batch size {self.global_batch_size} | loss {_short(self.loss)} | grad norm {_short(self.grad_norm)}"
        )

    def mindspeed(self, now: datetime) -> str:
        """Return MindSpeed-MM's line, for tools that parse its logs. A value that is not finite is left out, as there."""
        parts = [
            f" [{now:%Y-%m-%d %H:%M:%S}] iteration {self.iteration:8d}/{self.train_iters:8d}",
            f"consumed samples: {self.consumed_samples:12d}",
            f"elapsed time per iteration (ms): {self.step_time_ms:.1f}",
            f"learning rate: {self.learning_rate:.6E}",
            f"global batch size: {self.global_batch_size:5d}",
        ]
        if math.isfinite(self.loss):
            parts.append(f"loss: {self.loss:.6E}")
        parts.append("loss scale: 1.0")
        if math.isfinite(self.grad_norm):
            parts.append(f"grad norm: {self.grad_norm:.3f}")
        parts += [f"number of skipped iterations: {self.num_skipped:3d}", f"number of nan iterations: {0:3d}"]
        return " | ".join(parts) + " |"


def _short(value: float) -> str:
    """Three decimals, or three digits of a small value, so that a loss near 0 does not read 0.000."""
    return f"{value:.3f}" if value == 0 or not abs(value) < 0.1 else f"{value:.3E}"
