"""How one rank's stage is connected: to its neighbours in the pipeline, and on the last stage to the loss."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from core.device.base import Accelerator
from core.models.batch import PackedBatch
from core.models.plan import Stage
from core.models.qwen2_5_vl.family import Config
from core.models.qwen2_5_vl.model import outgoing_shape
from core.parallel.mesh import Mesh
from core.parallel.pipeline import Boundary, Pipeline
from core.specs.training import FreezeSpec
from core.training.freeze import gradient_reaches
from core.training.loss import loss_and_gradient, target_positions


class Head:
    """The end of the last stage: loss of each micro-batch, and the gradient that starts the backward pass."""

    def __init__(self, model: Any, device: torch.device) -> None:
        """`model.logits` maps hidden states [N, H] to scores [N, vocab]."""
        self.model = model
        self.device = device
        self.losses: list[Tensor] = []
        """Sum of losses of each micro-batch of this step so far."""

    def __call__(self, hidden_TH: Tensor, batch: PackedBatch) -> Tensor | None:
        positions_N = target_positions(batch.targets_T).to(self.device)
        result = loss_and_gradient(hidden_TH, batch.targets_T.to(self.device), positions_N, self.model.logits)
        self.losses.append(result.loss_sum)
        return result.gradient_TH

    def take(self) -> list[float]:
        """Return the loss sums of the step's micro-batches, in one copy from the device, and forget them."""
        losses, self.losses = self.losses, []
        return torch.stack(losses).tolist() if losses else []


def build_pipeline(
    model: Any,
    head: Head,
    mesh: Mesh,
    config: Config,
    all_stages: Sequence[Stage],
    freeze: FreezeSpec,
    accelerator: Accelerator,
) -> Pipeline[PackedBatch]:
    """Build this rank's end of the pipeline around its stage's module."""
    reached = gradient_reaches(all_stages, freeze)

    def boundary(after: int) -> Boundary[PackedBatch] | None:
        """Between stage `after` and the next one."""
        if not 0 <= after < mesh.pp_size - 1:
            return None
        return Boundary(partial(_outgoing_shape, config, all_stages[after]), reached[after + 1])

    def forward(batch: PackedBatch, incoming: Tensor | None = None) -> Tensor:
        output: Tensor = model(batch.to(accelerator.device), incoming)
        return output

    return Pipeline(
        mesh,
        forward,
        head,
        before=boundary(mesh.pp_rank - 1),
        after=boundary(mesh.pp_rank),
        dtype=next(model.parameters()).dtype,
        device=accelerator.device,
    )


def _outgoing_shape(config: Config, stage: Stage, batch: PackedBatch) -> tuple[int, int]:
    """Shape that a stage sends, from what every rank knows of the batch (only the first stage has its pixels)."""
    return outgoing_shape(config, stage, batch.num_tokens, sum(t * h * w for t, h, w in batch.grid_thw))
