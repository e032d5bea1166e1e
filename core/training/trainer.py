"""The training loop.

Each iteration trains one global batch, whatever the number of ranks: forward and backward of this rank's micro-batches, one sum of
gradients over data-parallel ranks, one exchange of a few numbers over all ranks, one optimizer step. The exchange makes every rank take
the same decisions in the same iteration: skip, stop, fail.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import Enum
from typing import Protocol

import torch
from torch import nn

from core.data.loader import LoadedStep
from core.device.base import Accelerator
from core.errors import NonFiniteLoss
from core.models.batch import PackedBatch
from core.models.flops import ModelFlops
from core.parallel.data import all_reduce_rows
from core.parallel.mesh import Mesh
from core.parallel.pipeline import Pipeline
from core.specs.training import TrainingSpec
from core.training.checkpoint import Checkpoints, Facts, Position
from core.training.checks import FirstStep, out_of_memory_told
from core.training.contents import Contents
from core.training.heartbeat import Heartbeat
from core.training.lora import adapter_weights
from core.training.meters import LogLine, Meters
from core.training.optimizer import Optimizer, build_schedule
from core.training.tensorboard import TensorBoard
from core.training.wiring import Head

MAX_SKIPPED = 10
"""Steps in a row without a finite loss and gradient, after which the job fails."""


class Reporter(Protocol):
    """What the loop needs of the runner's context."""

    log: logging.Logger

    def progress(self, done: float, total: float | None, unit: str) -> None:
        """Tell how far it is."""

    def metric(self, step: int, **values: float) -> None:
        """Tell metrics."""

    def warn(self, code: str, message: str) -> None:
        """Tell the user of something that does not stop the job."""

    def should_stop(self) -> bool:
        """Whether this process was asked to end."""


class Outcome(Enum):
    """How the loop ended."""

    FINISHED = "finished"
    STOPPED = "stopped"


@dataclass(frozen=True)
class Exchanged:
    """What all ranks know after a step."""

    loss_sum: float
    squared_norm: float
    stop: bool
    memory_peak_bytes: int
    bad_losses: dict[int, int]
    """Ranks with a loss that is not finite, and the first of their micro-batches that has one."""
    bad_gradients: list[int]
    """Ranks with a gradient that is not finite."""
    num_padded_tokens: int
    """Tokens computed by all data-parallel ranks, padding included."""
    wait_s: float
    """Longest time that a rank waited for its data."""
    save_failed: bool
    """Whether a rank could not write its part of the last checkpoint."""

    @property
    def is_finite(self) -> bool:
        """Whether the step may be taken."""
        return not self.bad_losses and not self.bad_gradients


@dataclass
class Trainer:
    """A training of one rank, ready to run."""

    spec: TrainingSpec
    mesh: Mesh
    accelerator: Accelerator
    model: nn.Module
    pipeline: Pipeline[PackedBatch]
    head: Head
    optimizer: Optimizer
    checkpoints: Checkpoints
    facts: Facts
    reporter: Reporter
    flops: ModelFlops
    """What the model needs for forward and backward of what is trained."""
    peak_flops: float | None = None
    """What a device could do per second, if it is known."""
    tensorboard: TensorBoard | None = None
    """On the rank that reports."""
    heartbeat: Heartbeat | None = None
    saved_at: int | None = None
    num_skipped_in_a_row: int = 0
    is_checked: bool = False
    """Whether the first step has been looked at."""
    meters: Meters = field(init=False)

    def __post_init__(self) -> None:
        self.meters = Meters(time.perf_counter, self.flops.of)

    def train(self, steps: Iterable[LoadedStep]) -> Outcome:
        """Train from `facts.position` to `train_iters`, or until asked to stop; the end is saved either way."""
        spec, schedule = self.spec, build_schedule(self.spec.optimizer, self.spec.train_iters)
        self.reporter.progress(self.facts.position.iteration, spec.train_iters, "iteration")
        if (spec.checkpoint.save_interval or spec.train_iters) < spec.train_iters:
            self.checkpoints.reserve(self._contents())
        loaded = iter(steps)
        while self.facts.position.iteration < spec.train_iters:
            learning_rate = schedule.at(self.facts.position.iteration)
            step, batches, wait_s = self._load(loaded)
            everyone = self._compute(step, batches, wait_s)
            grad_norm = self._update(step, everyone, learning_rate)
            self._advance(step, everyone)
            iteration = self.facts.position.iteration
            if iteration % spec.log_interval == 0 or iteration == spec.train_iters or everyone.stop:
                self._log(learning_rate, grad_norm, everyone)
            if everyone.stop:
                self.save(in_background=False)
            elif self._is_save_due(iteration):
                self.save()
            if everyone.stop and iteration < spec.train_iters:
                self.checkpoints.wait()
                return Outcome.STOPPED
        self.save(in_background=False)
        self.checkpoints.wait()
        return Outcome.FINISHED

    def rehearse(self, batch: PackedBatch) -> None:
        """Run forward and backward of the largest micro-batch and forget it, so that what does not fit fails at once.

        As many times as the pipeline has stages, so that it fills. Raises OutOfMemory.
        """
        sizes = f"{batch.num_tokens} tokens, {batch.num_patches} patches"
        with out_of_memory_told(f"the largest micro-batch ({sizes})"):
            self.pipeline.run([batch] * self.mesh.pp_size)
        self.head.take()
        self.optimizer.clear_gradients()
        self.reporter.log.info("the largest micro-batch fits: %s", sizes)
        self.meters.restart()

    def save(self, *, in_background: bool = True) -> None:
        """Begin to write a checkpoint of the present state, unless that was done already; training goes on or waits meanwhile."""
        iteration = self.facts.position.iteration
        if self.saved_at == iteration:
            return
        self._at("save")
        began = time.perf_counter()
        self.checkpoints.save(self.facts, self._contents(), in_background=in_background)
        self.saved_at = iteration
        seconds = time.perf_counter() - began
        self.meters.paused(seconds)
        self.reporter.log.info("checkpoint of iteration %d: training waited %.2f s", iteration, seconds)

    def _contents(self) -> Contents:
        """Return what a checkpoint holds of this rank, as views of the present state."""
        wanted = self.spec.checkpoint
        return Contents(
            adapter_weights(self.model) if self.spec.lora else self.model.state_dict(),
            self.optimizer.state_dict() if wanted.save_optim else None,
            {"host": torch.get_rng_state(), "device": self.accelerator.rng_state()} if wanted.save_rng else None,
        )

    def _at(self, phase: str, rows: Sequence[int] = ()) -> None:
        """Tell the stall guard what comes now."""
        if self.heartbeat is not None:
            self.heartbeat.phase(self.facts.position.iteration + 1, phase, rows)

    def _load(self, loaded: Iterator[LoadedStep]) -> tuple[LoadedStep, list[PackedBatch], float]:
        """Return the next step, this rank's batches of it, and how long they let it wait."""
        began = time.perf_counter()
        self._at("data")
        step = next(loaded)
        self._at("data", self._own_rows(step))
        planned = step.plan.micro_batches[self.mesh.dp_rank]
        # Those without rows are padding alone.
        batches = [batch for rows, batch in zip(planned, step.micro_batches, strict=True) if rows]
        return step, batches, time.perf_counter() - began

    def _compute(self, step: LoadedStep, batches: list[PackedBatch], wait_s: float) -> Exchanged:
        """Sum the gradients of the global batch; return what all ranks know of it."""
        rows = self._own_rows(step)
        self._at("compute", rows)
        self.optimizer.clear_gradients()
        with out_of_memory_told(
            f"a micro-batch of iteration {self.facts.position.iteration + 1}, rows {_listed(rows)},"
        ):
            self.pipeline.run(batches, last_pass=self.optimizer.last_pass)
        self._at("reduce", rows)
        self.optimizer.reduce_gradients()
        everyone = self._exchange(self.head.take(), batches, wait_s)
        if everyone.save_failed:
            self.checkpoints.wait()  # raises the error
        return everyone

    def _exchange(self, losses: list[float], batches: list[PackedBatch], wait_s: float) -> Exchanged:
        """Let every rank know what each has seen in this step, in one all-reduce."""
        mesh = self.mesh
        is_first = mesh.pp_rank == mesh.tp_rank == 0  # of the ranks that share these batches
        bad = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), -1)
        row = [
            math.fsum(losses) if bad < 0 else 0.0,
            float(bad),
            self.optimizer.squared_norm(),
            float(self.reporter.should_stop()),
            float(self.accelerator.memory_peak_bytes()),
            float(sum(batch.num_tokens for batch in batches) if is_first else 0),
            wait_s,
            float(self.checkpoints.has_failed),
        ]
        table = all_reduce_rows(
            row, rank=mesh.rank, world_size=mesh.world_size, group=mesh.world_group, device=self.accelerator.device
        )
        losses_R, bad_R, norms_R, stops_R, memory_R, padded_R, waits_R, failures_R = table.T.tolist()
        return Exchanged(
            loss_sum=math.fsum(losses_R),
            squared_norm=math.fsum(norms_R) if all(map(math.isfinite, norms_R)) else math.nan,
            stop=any(stops_R),
            memory_peak_bytes=int(max(memory_R)),
            bad_losses={rank: int(index) for rank, index in enumerate(bad_R) if index >= 0},
            bad_gradients=[rank for rank, value in enumerate(norms_R) if not math.isfinite(value)],
            num_padded_tokens=int(sum(padded_R)),
            wait_s=max(waits_R),
            save_failed=any(failures_R),
        )

    def _update(self, step: LoadedStep, everyone: Exchanged, learning_rate: float) -> float:
        """Take the step and return the gradient's norm, or skip it: NaN."""
        if not everyone.is_finite or step.work.targets == 0:
            self._skip(step, everyone)
            return math.nan
        self.num_skipped_in_a_row = 0
        first = None if self.is_checked or learning_rate == 0 else FirstStep.before(self.model, self.optimizer)
        grad_norm = self.optimizer.step(
            learning_rate=learning_rate, num_targets=step.loss_weight, squared_norm=everyone.squared_norm
        )
        if first is not None:
            num_trained, num_moved = first.check(self.model, self.optimizer)
            self.is_checked = True
            self.reporter.log.info(
                "first step: %d of %d trained parameters with a gradient moved, %d frozen ones are as they were",
                num_moved,
                num_trained,
                len(first.frozen),
            )
        return grad_norm

    def _skip(self, step: LoadedStep, everyone: Exchanged) -> None:
        """Leave the weights as they are, say which rows and ranks were at fault, and fail once it happens too often."""
        self.num_skipped_in_a_row += 1
        iteration = self.facts.position.iteration + 1
        if self.mesh.rank in everyone.bad_gradients:
            names = self.optimizer.non_finite_parameters()
            self.reporter.log.warning("iteration %d: gradient not finite in %s", iteration, ", ".join(names[:8]))
        message = f"iteration {iteration} is skipped: {self._blame(step, everyone)}"
        self.reporter.warn("skipped_step", message)
        if self.num_skipped_in_a_row >= MAX_SKIPPED:
            raise NonFiniteLoss(
                f"{MAX_SKIPPED} steps in a row without a finite loss and gradient; the last: {message}",
                hint="look at the rows named in the log, lower optimizer.lr, or go on from an earlier checkpoint",
            )

    def _blame(self, step: LoadedStep, everyone: Exchanged) -> str:
        if step.work.targets == 0:
            return "its samples have no target tokens"
        if everyone.bad_losses:
            return "the loss is not finite " + "; ".join(
                f"on rank {rank} in rows {_listed(self._rows(step, rank, index))}"
                for rank, index in everyone.bad_losses.items()
            )
        rows = sorted(set(step.plan.rows))
        return f"the gradient is not finite on rank {_listed(everyone.bad_gradients)}, among rows {_listed(rows)}"

    def _rows(self, step: LoadedStep, rank: int, index: int) -> list[int]:
        """Return the rows of a rank's micro-batch, counted without empty ones."""
        filled = [rows for rows in step.plan.micro_batches[self.mesh.dp_rank_of(rank)] if rows]
        return list(filled[index])

    def _own_rows(self, step: LoadedStep) -> list[int]:
        return [row for part in step.plan.micro_batches[self.mesh.dp_rank] for row in part]

    def _advance(self, step: LoadedStep, everyone: Exchanged) -> None:
        """Count the step, skipped or not."""
        before = self.facts.position
        after = Position(before.iteration + 1, before.consumed_samples + step.num_samples)
        self.facts = replace(self.facts, position=after)
        self.meters.add(
            loss=everyone.loss_sum / (step.loss_weight or 1.0) if everyone.is_finite else math.nan,
            work=step.work,
            num_padded_tokens=everyone.num_padded_tokens,
            num_images=step.num_images,
            wait_s=everyone.wait_s,
        )

    def _is_save_due(self, iteration: int) -> bool:
        interval = self.spec.checkpoint.save_interval
        return interval is not None and iteration % interval == 0 and iteration < self.spec.train_iters

    def _log(self, learning_rate: float, grad_norm: float, everyone: Exchanged) -> None:
        reading, position, spec = self.meters.read(), self.facts.position, self.spec
        line = LogLine(
            iteration=position.iteration,
            train_iters=spec.train_iters,
            consumed_samples=position.consumed_samples,
            step_time_ms=reading.step_time_ms,
            learning_rate=learning_rate,
            global_batch_size=spec.global_batch_size,
            loss=reading.loss,
            grad_norm=grad_norm,
            num_skipped=reading.num_skipped,
        )
        is_ours = spec.log_format == "temper"
        self.reporter.log.info(line.temper() if is_ours else line.mindspeed(datetime.now().astimezone()))
        values = {
            "loss": reading.loss,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "step_time_ms": reading.step_time_ms,
            **reading.rates(self.mesh.world_size, self.peak_flops),
            "host_wait_fraction": reading.host_wait_fraction,
            "skipped_iterations": reading.num_skipped,
            "consumed_samples": position.consumed_samples,
            "memory_peak_bytes": everyone.memory_peak_bytes,
        }
        self.reporter.metric(position.iteration, **values)
        if self.tensorboard is not None:
            sizes = {"global_batch_size": spec.global_batch_size}
            self.tensorboard.write(position.iteration, {**values, **sizes}, time=time.time())
        self.reporter.progress(position.iteration, spec.train_iters, "iteration")


def _listed(values: list[int], limit: int = 20) -> str:
    """Return a comma-separated list, cut off with a count."""
    shown = ", ".join(map(str, values[:limit]))
    return shown if len(values) <= limit else f"{shown} and {len(values) - limit} more"
