"""Tensor parallelism: cut a stage's weights by the family's shard plan and put layers in their place that talk to each other.

The model is written for one device; `shard` replaces its linear layers and its embedding, in two manners (X activations, W weights,
numbers = tensor-parallel ranks, f = each rank works on features of its own, t = on rows of its own):

    vision encoder      X ─copy──► W1(f) ─► W2(f) ─reduce──────────► X          X whole on every rank
    language model      X(t) ─gather─► W1(f) ─► W2(f) ─reduce_scatter─► X(t)    sequence parallel (Korthikanti et al. 2022)

The second sends as much as the first, but norms and residuals are computed and kept once instead of on every rank. Rows must divide by
the number of ranks (`PackedBatch.padded_to`).
"""

from __future__ import annotations

import re
from enum import IntEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from core.models.plan import Column, Plan, Replicate, ShardRule
from core.parallel.collectives import (
    Pending,
    gather_rows,
    reduce,
    reduce_scatter,
    scatter,
    start_gather_rows,
    start_reduce_scatter_rows,
    start_sum,
)
from core.parallel.mesh import Mesh

SEQUENCE_PARALLEL = "text_decoder.decoder."
"""Names that begin so belong to the part that is sequence parallel."""


class Held(IntEnum):
    """What a rank holds of a parameter and of its gradient."""

    SLICE = 0
    """A slice of its own."""
    COPY = 1
    """All of it, as every rank; the gradient too."""
    ADDEND = 2
    """All of it, as every rank; of the gradient what its own rows add."""


def shard(model: nn.Module, plan: Plan, mesh: Mesh) -> dict[str, Held]:
    """Cut a stage's module to this rank's slice, in place, and return what is held of each parameter.

    Weights keep their values, so it may be done before or after they are loaded. Without tensor parallelism nothing changes.
    """
    group = mesh.tp_group
    if group is None:
        return {}
    for name, module in list(model.named_modules()):
        rule = plan.get(pattern(f"{name}.weight"), Replicate())
        if isinstance(rule, Replicate):
            continue
        match module:
            case nn.Linear():
                _replace(model, name, split_linear(module, rule, group, sequence=name.startswith(SEQUENCE_PARALLEL)))
            case nn.Embedding():
                _replace(model, name, SplitEmbedding(module, rule, group))
            case _:
                raise AssertionError(f"no layer for {name}, a {type(module).__name__} cut by {rule}")
    _scatter_after_embedding(model, group)
    return {name: held(name, plan) for name, _ in model.named_parameters()}


def split_linear(whole: nn.Linear, rule: ShardRule, group: ProcessGroup, *, sequence: bool) -> nn.Module:
    """Make this rank's part of a linear layer that is cut by `rule`; `sequence`: in the sequence-parallel part."""
    kind = SplitInputLinear if isinstance(rule, Column) else SplitOutputLinear
    return kind(whole, rule, group, sequence=sequence)


def held(name: str, plan: Plan) -> Held:
    """Return what a rank holds of a parameter when it is cut by the plan."""
    if not isinstance(plan[pattern(name)], Replicate):
        return Held.SLICE
    return Held.ADDEND if name.startswith(SEQUENCE_PARALLEL) else Held.COPY


def pattern(name: str) -> str:
    """Return a parameter's name in the plan."""
    return re.sub(r"\.\d+\.", ".{layer}.", name)


def local_name(name: str) -> str:
    """Return a parameter's name in its stage, where a rank with several names it `model1.…`."""
    return re.sub(r"^model\d+\.", "", name)


def cut(weight: Tensor, rule: ShardRule, *, tp_size: int, tp_rank: int) -> Tensor:
    """Return a rank's slice of a whole tensor, in memory of its own."""
    part = rule.cut(tuple(weight.shape), tp_size, tp_rank)
    rows = torch.cat([weight[first:last] for first, last in part.rows])
    return rows if part.columns is None else rows[:, slice(*part.columns)].contiguous()


class SplitOutputLinear(nn.Module):
    """A linear layer of which each rank computes some outputs from all inputs (Megatron's ColumnParallelLinear)."""

    def __init__(self, whole: nn.Linear, rule: ShardRule, group: ProcessGroup, *, sequence: bool) -> None:
        super().__init__()
        self.weight = _slice(whole.weight, rule, group)
        self.bias = None if whole.bias is None else _slice(whole.bias, rule, group)
        self.group = group
        self.sequence = sequence

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _SplitOutput.apply(x, self.weight, self.bias, self.group, self.sequence)
        return out


class SplitInputLinear(nn.Module):
    """A linear layer of which each rank adds what some inputs give to all outputs (Megatron's RowParallelLinear)."""

    def __init__(self, whole: nn.Linear, rule: ShardRule, group: ProcessGroup, *, sequence: bool) -> None:
        super().__init__()
        self.weight = _slice(whole.weight, rule, group)
        self.bias = whole.bias
        self.leave = reduce_scatter if sequence else reduce
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        out = self.leave(F.linear(x, self.weight), self.group)
        return out if self.bias is None else out + self.bias


class SplitEmbedding(nn.Module):
    """An embedding of which each rank holds a run of the vocabulary; gives whole rows on every rank."""

    def __init__(self, whole: nn.Embedding, rule: ShardRule, group: ProcessGroup) -> None:
        super().__init__()
        self.weight = _slice(whole.weight, rule, group)
        self.group = group

    def forward(self, ids_T: Tensor) -> Tensor:
        count = self.weight.shape[0]
        local_T = ids_T - self.group.rank() * count
        elsewhere_T = (local_T < 0) | (local_T >= count)
        rows_TH = F.embedding(local_T.masked_fill(elsewhere_T, 0), self.weight)
        return reduce(rows_TH.masked_fill(elsewhere_T[:, None], 0), self.group)


class _SplitOutput(torch.autograd.Function):
    """F.linear behind `copy` or `gather`, whose messages of the backward pass travel while the weight's gradient is computed.

    Of a gathered input only this rank's rows are kept; the others come again in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: ProcessGroup, sequence: bool
    ) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None)
        ctx.weight, ctx.group, ctx.sequence = weight, group, sequence  # the parameter itself, for its .grad
        return F.linear(gather_rows(x, group) if sequence else x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        (x,) = ctx.saved_tensors
        weight, group = ctx.weight, ctx.group
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        arriving = leaving = d_weight = None
        if wants_weight:
            arriving = start_gather_rows(x, group) if ctx.sequence else Pending(x, None)
        if wants_x:
            addend = gradient.matmul(weight)
            leaving = start_reduce_scatter_rows(addend, group) if ctx.sequence else start_sum(addend, group)
        if arriving is not None and hasattr(weight, "gradient_added"):  # see core.models.layers.linear
            weight.grad.addmm_(gradient.t(), arriving.wait())
            weight.gradient_added()
        elif arriving is not None:
            d_weight = gradient.t().matmul(arriving.wait())
        d_bias = gradient.sum(0) if wants_bias else None
        return None if leaving is None else leaving.wait(), d_weight, d_bias, None, None


def _slice(whole: Tensor, rule: ShardRule, group: ProcessGroup) -> nn.Parameter:
    mine = cut(whole.detach(), rule, tp_size=group.size(), tp_rank=group.rank())
    return nn.Parameter(mine, requires_grad=whole.requires_grad)


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _scatter_after_embedding(model: nn.Module, group: ProcessGroup) -> None:
    """Begin the sequence-parallel part: the first decoder layer of a stage that embeds tokens gets all rows and keeps its own."""
    names = [name for name, _ in model.named_modules()]
    first = next((name for name in names if pattern(f"{name}.") == f"{SEQUENCE_PARALLEL}layers.{{layer}}."), None)
    if first is not None and any(name.endswith("word_embeddings") for name in names):
        model.get_submodule(first).register_forward_pre_hook(lambda _, inputs: (scatter(inputs[0], group), *inputs[1:]))
