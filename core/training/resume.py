"""Going on from a checkpoint of this or of another layout, and loading weights completely or not at all.

                          same layout                    other tp, pp or virtual chunks      other dp
    weights               the rank's own file            rectangles of all files             as they are
    exp_avg, exp_avg_sq,  the rank's own folder          rectangles of all folders           pieces put together
    master                                               (`core.training.saved_optimizer`)
    data position         as it is: which samples a step has does not depend on the layout
    learning rate         follows from the iteration and this job's spec
    random state          as it is                       not carried                         not carried

Nothing in a training draws random numbers after its start (no dropout; the order of samples is a function of the seed), so a resume
without the random state is as exact as one with it. It is saved for layers that will draw some.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from core.conversion.load import load_stage
from core.device.base import Accelerator
from core.errors import CorruptCheckpoint, IncompatiblePlan, InvalidSpec, UnknownWeights
from core.models.config import Config
from core.models.plan import Stage
from core.parallel.mesh import Mesh
from core.specs.parallel import ParallelSpec
from core.specs.training import TrainingSpec
from core.training.checkpoint import FACTS, Checkpoints, Facts
from core.training.optimizer import Optimizer
from core.training.saved_optimizer import RankState, RecutState
from core.training.together import Together
from core.training.trainer import Reporter


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a training goes on from."""

    checkpoints: Checkpoints
    path: Path
    """The folder of its iteration."""
    facts: Facts
    is_own: bool
    """Written by an earlier attempt of this job, not given by `resume_from`."""

    @classmethod
    def find(cls, checkpoints: Checkpoints, given: Path | None) -> Origin | None:
        """Return this job's newest checkpoint, or the one that `resume_from` gives; all ranks call it together."""
        newest = checkpoints.newest()
        if newest is None and given is None:
            return None
        with Together(checkpoints.mesh):
            if newest is not None:
                return cls(checkpoints, newest, Facts.read(newest), is_own=True)
            assert given is not None
            path = newest_inside(given)
            return cls(checkpoints, path, Facts.read(path), is_own=False)

    def resumed(self, now: Facts, spec: TrainingSpec, reporter: Reporter) -> Facts:
        """Check that a job can go on from here, warn of what is not as it was, and return its facts at this position."""
        then = self.facts
        if then.precision != now.precision:
            raise IncompatiblePlan(
                f"the checkpoint has precision {then.precision}, the job {now.precision}",
                hint="use the same, or give the checkpoint as `model` to start a new training from its weights",
            )
        if not self.is_own and then.position.iteration >= spec.train_iters:
            raise InvalidSpec(
                f"the checkpoint is at iteration {then.position.iteration} already, train_iters is {spec.train_iters}"
            )
        if (then.dataset, then.seed) != (now.dataset, now.seed):
            reporter.warn(
                "other_data", "the data set or seed is not the checkpoint's: samples may be repeated or left out"
            )
        if not self.loads_optimizer(spec):
            reason = "checkpoint.load_optim is false" if then.has_optimizer else "the checkpoint has no optimizer state"
            reporter.warn(
                "no_optimizer_state",
                f"{reason}: AdamW's moments start from zero, and float32 master weights from the rounded ones",
            )
        reporter.log.info("resuming from %s at iteration %d", self.path.name, then.position.iteration)
        if not self.has_same_ranks(now):
            reporter.log.info(
                "its layout was %s with dp %d: weights and optimizer state are cut anew, random state is not carried",
                then.layout,
                then.dp_size,
            )
        return replace(now, position=then.position)

    def has_same_ranks(self, now: Facts) -> bool:
        """Whether each rank finds what it wrote itself."""
        return (self.facts.layout, self.facts.dp_size) == (now.layout, now.dp_size)

    def loads_optimizer(self, spec: TrainingSpec) -> bool:
        """Whether optimizer state is there and wanted; a new attempt of the same job wants all there is."""
        return self.facts.has_optimizer and (self.is_own or spec.checkpoint.load_optim)

    def loads_rng(self, spec: TrainingSpec, now: Facts) -> bool:
        """Whether random state is there and wanted."""
        return self.facts.has_rng and self.has_same_ranks(now) and (self.is_own or spec.checkpoint.load_rng)

    def weights(
        self, now: Facts, config: Config, own_stages: Sequence[Stage], mesh: Mesh
    ) -> Iterator[tuple[str, Tensor]]:
        """Read this rank's weights."""
        if self.facts.layout == now.layout:
            yield from self.checkpoints.load_weights(self.path)
            return
        for index, stage in enumerate(own_stages):
            prefix = f"model{index}." if len(own_stages) > 1 else ""
            weights = load_stage(
                self.path.parent,
                ParallelSpec.model_validate(self.facts.layout),
                config,
                stage,
                tp=(mesh.tp_size, mesh.tp_rank),
                iteration=self.facts.position.iteration,
            )
            yield from ((prefix + name, tensor) for name, tensor in weights)

    def load_optimizer(
        self, optimizer: Optimizer, now: Facts, config: Config, own_stages: Sequence[Stage], mesh: Mesh
    ) -> None:
        """Take up AdamW's state of what this rank trains. Raises IncompatiblePlan where it is not saved."""
        state = (
            RankState(self.path / self.checkpoints.rank_folder)
            if self.facts.layout == now.layout
            else RecutState(self.path, ParallelSpec.model_validate(self.facts.layout), config, own_stages, mesh)
        )
        try:
            optimizer.load_state(state.num_steps, state.read)
        except KeyError as error:
            raise IncompatiblePlan(
                f"the checkpoint has no optimizer state for {error}",
                hint="use the freeze settings of the checkpoint's training, or set checkpoint.load_optim to false",
            ) from error

    def load_rng(self, accelerator: Accelerator) -> None:
        """Take up this rank's random state."""
        state = self.checkpoints.load_rng(self.path)
        torch.set_rng_state(state["host"].clone())
        accelerator.set_rng_state(state["device"].clone())


def newest_inside(given: Path) -> Path:
    """Return the newest iteration folder of what `resume_from` names."""
    kept = sorted(path.parent for path in given.glob(f"iter_*/{FACTS}"))
    if not kept:
        raise CorruptCheckpoint(
            f"resume_from ({given.name}) is not a training checkpoint of Temper: no iter_*/{FACTS} in it",
            hint="give it as `model` to start a new training from its weights",
        )
    return kept[-1]


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
