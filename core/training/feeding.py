"""The batches of a training: its data set checked against spec and model, its loader, its largest micro-batch."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

from core.data.dataset import TokenisedDataset
from core.data.loader import PREFETCH, StepLoader, build_batch
from core.data.plan import StepPlan, plan_step
from core.device import Accelerator
from core.errors import InvalidDataset, InvalidSpec
from core.models.batch import PackedBatch
from core.models.config import Config
from core.models.plan import Stage
from core.parallel.mesh import Mesh
from core.specs.training import TrainingSpec
from core.training.checkpoint import Position
from core.training.checks import largest_micro_batch
from core.training.wiring import reads_pixels

PATCH_HEADROOM = 1.25
"""Static shapes: patches that a micro-batch can hold, relative to what its tokens have on average."""
REHEARSED_STEPS = 200
"""Steps whose micro-batches are looked through for the largest, which runs first."""


def check_dataset(dataset: TokenisedDataset, spec: TrainingSpec, config: Config) -> None:
    """Refuse a data set that cannot be trained as the spec says, before anything is loaded."""
    if len(dataset) == 0:
        raise InvalidDataset("the data set has no training rows")
    too_long = int((dataset.lengths > spec.seq_length).sum())
    if too_long:
        longest = int(dataset.lengths.max())
        raise InvalidSpec(
            f"seq_length is {spec.seq_length}, but {too_long} of {len(dataset)} rows are longer (longest: {longest} tokens)",
            hint=f"set seq_length to {longest} or more, or make the data set with cutoff_len {spec.seq_length}",
        )
    dataset.check_model(config)


def build_loader(
    dataset: TokenisedDataset,
    spec: TrainingSpec,
    mesh: Mesh,
    stage: Stage,
    config: Config,
    accelerator: Accelerator,
    position: Position,
) -> StepLoader:
    """Build the loader of this rank's batches from a position on."""
    token_budget, patch_budget = _budgets(dataset, spec, config, accelerator)
    return StepLoader(
        dataset,
        config,
        _planner(dataset, spec, mesh, token_budget, patch_budget),
        consumed_samples=position.consumed_samples,
        dp_rank=mesh.dp_rank,
        with_pixels=reads_pixels(stage, mesh),
        pad_to_tokens=token_budget if accelerator.static_shapes else None,
        pad_to_patches=patch_budget,
        loss_reduction=spec.loss_reduction,
        num_decoders=_num_decoders(),
    )


def _num_decoders() -> int:
    """Return this process's share of the host's processor cores, as far as four batches prepared ahead can use them."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(2, min(PREFETCH, len(os.sched_getaffinity(0)) // processes))


def largest_batch(
    dataset: TokenisedDataset, spec: TrainingSpec, mesh: Mesh, stage: Stage, config: Config, accelerator: Accelerator
) -> PackedBatch:
    """Build the dearest micro-batch of the first steps (an epoch of them, at most REHEARSED_STEPS)."""
    token_budget, patch_budget = _budgets(dataset, spec, config, accelerator)
    plan = _planner(dataset, spec, mesh, token_budget, patch_budget)
    num_steps = min(spec.train_iters, REHEARSED_STEPS, math.ceil(len(dataset) / spec.global_batch_size))
    plans = [plan(index * spec.global_batch_size) for index in range(num_steps)]
    return build_batch(
        [dataset.row(row) for row in largest_micro_batch(plans, dataset.lengths, dataset.patches)],
        config,
        processing=dataset.meta.image_processing,
        videos=dataset.meta.video_processing,
        with_pixels=reads_pixels(stage, mesh),
        pad_to_tokens=token_budget if accelerator.static_shapes else None,
        pad_to_patches=patch_budget,
        pad_token_id=dataset.meta.pad_token_id,
    )


def _planner(
    dataset: TokenisedDataset, spec: TrainingSpec, mesh: Mesh, token_budget: int, patch_budget: int | None
) -> Callable[[int], StepPlan]:
    """Return the plan of the step that begins after so many samples."""
    return lambda consumed_samples: plan_step(
        dataset.lengths,
        dataset.patches,
        seed=spec.seed,
        consumed_samples=consumed_samples,
        global_batch_size=spec.global_batch_size,
        dp_size=mesh.dp_size,
        token_budget=token_budget,
        patch_budget=patch_budget,
        min_micro_batches=mesh.pp_size,
    )


def _budgets(
    dataset: TokenisedDataset, spec: TrainingSpec, config: Config, accelerator: Accelerator
) -> tuple[int, int | None]:
    """Return the most tokens and patches of a micro-batch; patches are limited on their own for static shapes only."""
    token_budget = spec.micro_batch_size * spec.seq_length
    return token_budget, _patch_budget(dataset, token_budget, config) if accelerator.static_shapes else None


def _patch_budget(dataset: TokenisedDataset, token_budget: int, config: Config) -> int:
    """Return patches per micro-batch for static shapes: what its tokens have on average and some room, but any one row must fit."""
    unit = config.vision.spatial_merge_size**2
    average = token_budget * float(dataset.patches.sum()) / float(dataset.lengths.sum())
    wanted = max(int(dataset.patches.max()), math.ceil(PATCH_HEADROOM * average))
    return math.ceil(wanted / unit) * unit
