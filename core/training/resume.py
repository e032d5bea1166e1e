"""Going on from a checkpoint, and loading weights completely or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from core.device.base import Accelerator
from core.errors import CorruptCheckpoint, IncompatiblePlan, InvalidSpec, UnknownWeights
from core.specs.training import TrainingSpec
from core.training.checkpoint import FACTS, Facts, SavedState
from core.training.optimizer import Optimizer
from core.training.trainer import Reporter


def newest_inside(given: Path) -> Path:
    """Return the newest iteration folder of what `resume_from` names."""
    kept = sorted(path.parent for path in given.glob(f"iter_*/{FACTS}"))
    if not kept:
        raise CorruptCheckpoint(
            f"resume_from ({given.name}) is not a training checkpoint of Temper: no iter_*/{FACTS} in it",
            hint="give it as `model` to start a new training from its weights",
        )
    return kept[-1]


def resumed_facts(path: Path, now: Facts, spec: TrainingSpec, reporter: Reporter, *, own: bool) -> Facts:
    """Check that a job can go on from a checkpoint (`own`: written by itself), and return its facts at the checkpoint's position."""
    then = Facts.read(path)
    if then.layout != now.layout or then.precision != now.precision:
        raise IncompatiblePlan(
            f"the checkpoint has layout {then.layout} and precision {then.precision}, the job {now.layout} and {now.precision}",
            hint="use the same, or give the checkpoint as `model` to start a new training from its weights",
        )
    if not own and then.position.iteration >= spec.train_iters:
        raise InvalidSpec(
            f"the checkpoint is at iteration {then.position.iteration} already, train_iters is {spec.train_iters}"
        )
    if (then.dataset, then.seed) != (now.dataset, now.seed):
        reporter.warn("other_data", "the data set or seed is not the checkpoint's: samples may be repeated or left out")
    if not then.has_optimizer:
        reporter.warn("no_optimizer_state", "the checkpoint has no optimizer state: AdamW's moments start from zero")
    reporter.log.info("resuming from %s at iteration %d", path.name, then.position.iteration)
    return replace(now, position=then.position, has_optimizer=then.has_optimizer)


def restore(state: SavedState, optimizer: Optimizer, accelerator: Accelerator) -> None:
    """Take up the optimizer's and the random state."""
    try:
        optimizer.load_state(state.num_steps, state.read)
    except KeyError as error:
        raise IncompatiblePlan(
            f"the checkpoint has no optimizer state for {error}",
            hint="use the freeze settings of the checkpoint's training",
        ) from error
    torch.set_rng_state(state.rng["host"].clone())
    accelerator.set_rng_state(state.rng["device"].clone())


def load_weights(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copy weights into the model. Raises UnknownWeights listing those that are missing, left over, or of another shape."""
    missing = dict(model.named_parameters())
    left_over, misshapen = [], []
    for name, tensor in weights:
        parameter = missing.pop(name, None)
        if parameter is None:
            left_over.append(name)
        elif parameter.shape != tensor.shape:
            misshapen.append(f"{name} {list(tensor.shape)} instead of {list(parameter.shape)}")
        else:
            parameter.data.copy_(tensor)
    problems = (("missing", sorted(missing)), ("not of this model", left_over), ("of another shape", misshapen))
    if any(names for _, names in problems):
        told = "; ".join(f"{len(names)} {what}: {_shortened(names)}" for what, names in problems if names)
        raise UnknownWeights(
            f"the weights do not fit the model: {told}", hint="was the checkpoint made with this config?"
        )


def _shortened(names: Sequence[str], limit: int = 10) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
