"""How one rank's stage is connected: to its neighbours in the pipeline, and on the last stage to the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.device.base import Accelerator
from core.device.sending import send
from core.models.batch import PackedBatch
from core.models.config import Config
from core.models.plan import Plan, Stage
from core.models.qwen2_5_vl.model import outgoing_shape
from core.parallel.collectives import gather_rows, reduce_scatter_rows, send_to_all
from core.parallel.mesh import Mesh
from core.parallel.pipeline import Boundary, Pipeline
from core.parallel.tensor import Held, shard
from core.specs.training import FreezeSpec
from core.training.freeze import gradient_reaches
from core.training.loss import loss_and_gradient, target_positions


class Head:
    """The end of the last stage: loss of each micro-batch, and the gradient that starts the backward pass."""

    def __init__(self, model: Any, device: torch.device, mesh: Mesh, *, targets_only: bool = False) -> None:
        """`model.logits` maps hidden states [N, H] to scores [N, vocab], or to this rank's columns of them.

        With `targets_only` the model is asked for the hidden states of target positions and of no others.
        """
        assert not targets_only or mesh.tp_group is None, "tensor-parallel ranks hold rows of their own"
        self.targets_only = targets_only
        self.model = model
        self.device = device
        self.mesh = mesh
        self.losses: list[Tensor] = []
        """Sum of losses of each micro-batch of this step so far."""

    def __call__(self, hidden_TH: Tensor, batch: PackedBatch) -> Tensor | None:
        group = self.mesh.tp_group
        if group is not None:  # sequence parallel: each rank has rows of its own
            hidden_TH = gather_rows(hidden_TH.detach(), group).requires_grad_(hidden_TH.requires_grad)
        targets_T, weights_T, positions_N = batch.targets_T, batch.weights_T, target_positions(batch.targets_T)
        if self.targets_only:
            targets_T, weights_T = targets_T[positions_N], None if weights_T is None else weights_T[positions_N]
            positions_N = torch.arange(len(positions_N))
        result = loss_and_gradient(
            hidden_TH,
            send(targets_T, self.device),
            send(positions_N, self.device),
            self.model.logits,
            weights_T=None if weights_T is None else send(weights_T, self.device),
            tp_group=group,
        )
        self.losses.append(result.loss_sum)
        if group is None or result.gradient_TH is None:
            return result.gradient_TH
        return reduce_scatter_rows(result.gradient_TH, group)

    def take(self) -> list[float]:
        """Return the loss sums of the step's micro-batches, in one copy from the device, and forget them.

        Tensor-parallel ranks have the same; the first of them tells it.
        """
        losses, self.losses = self.losses, []
        return torch.stack(losses).tolist() if losses and self.mesh.tp_rank == 0 else []


def build_pipeline(
    chunks: Sequence[nn.Module],
    head: Head,
    mesh: Mesh,
    config: Config,
    all_stages: Sequence[Stage],
    freeze: FreezeSpec,
    accelerator: Accelerator,
) -> Pipeline[PackedBatch]:
    """Build this rank's end of the pipeline around the modules of its stages."""
    reached = gradient_reaches(all_stages, freeze)
    dtype = next(chunks[0].parameters()).dtype

    def forward(chunk: nn.Module, batch: PackedBatch, incoming: Tensor | None = None) -> Tensor:
        output: Tensor = chunk(batch.to(accelerator.device), incoming)
        return output

    def embedding(chunk: nn.Module, batch: PackedBatch, incoming: Tensor | None = None) -> Tensor:
        output: Tensor = chunk(with_shared_pixels(batch.to(accelerator.device), mesh, dtype), incoming)
        return output

    def trimmed(chunk: nn.Module, batch: PackedBatch, incoming: Tensor | None = None) -> Tensor:
        rows_N = send(target_positions(batch.targets_T), accelerator.device)
        output: Tensor = chunk(batch.to(accelerator.device), incoming, rows_N=rows_N)
        return output

    if mesh.pp_group is not None:
        # What follows is between neighbours, but NCCL and HCCL want all ranks of a group in the first call.
        dist.all_reduce(torch.zeros(1, device=accelerator.device), group=mesh.pp_group)
    own = [partial(forward, chunk) for chunk in chunks]
    if mesh.tp_group is not None and all_stages[mesh.pp_rank].has_patch_embed:
        own[0] = partial(embedding, chunks[0])
    if head.targets_only and mesh.is_last_stage:
        own[-1] = partial(trimmed, chunks[-1])
    return Pipeline(
        mesh,
        own,
        head,
        boundaries=[
            Boundary(partial(_outgoing_shape, config, stage, mesh.tp_size), is_reached)
            for stage, is_reached in zip(all_stages, reached[1:], strict=False)
        ],
        prepare=lambda batch: batch.padded_to(mesh.tp_size),
        dtype=dtype,
        device=accelerator.device,
    )


def reads_pixels(stage: Stage, mesh: Mesh) -> bool:
    """Whether this rank's batches need their pixels: of tensor-parallel ranks the first has them, and sends them."""
    return stage.has_patch_embed and mesh.tp_rank == 0


def with_shared_pixels(batch: PackedBatch, mesh: Mesh, dtype: torch.dtype) -> PackedBatch:
    """Give all tensor-parallel ranks the pixels that the first has, in the dtype that they are computed in; on the device."""
    assert mesh.tp_group is not None, "one rank has them already"
    own_PD, shape = batch.pixel_values_PD, (batch.num_patches, batch.pixel_values_PD.shape[1])
    pixels_PD = own_PD.to(dtype) if mesh.tp_rank == 0 else own_PD.new_empty(shape, dtype=dtype)
    return replace(batch, pixel_values_PD=send_to_all(pixels_PD, mesh.tp_group))


def join(chunks: Sequence[nn.Module]) -> nn.Module:
    """Make one module of a rank's stages; of several, parameters are named `model0.…`, `model1.…` as a rank file keys them."""
    if len(chunks) == 1:
        return chunks[0]
    return nn.ModuleDict({f"model{index}": chunk for index, chunk in enumerate(chunks)})


def shard_chunks(chunks: Sequence[nn.Module], plan: Plan, mesh: Mesh) -> dict[str, Held]:
    """Cut a rank's stages over tensor-parallel ranks (see `shard`); names as `join` gives them."""
    parts = [shard(chunk, plan, mesh) for chunk in chunks]
    if len(chunks) == 1:
        return parts[0]
    return {f"model{index}.{name}": held for index, part in enumerate(parts) for name, held in part.items()}


def _outgoing_shape(config: Config, stage: Stage, tp_size: int, batch: PackedBatch) -> tuple[int, int]:
    """Shape that a rank of a stage sends, from what every rank knows of the batch (only the first stage has its pixels)."""
    rows, width = outgoing_shape(config, stage, batch.num_tokens, batch.num_patches)
    return (rows // tp_size if stage.llm_layers else rows), width  # the language model is sequence parallel
