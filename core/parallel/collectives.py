"""Collectives over tensor-parallel ranks as autograd functions: each goes one way forward and its transpose backward.

                      forward                               backward
    copy              nothing                               sum over ranks
    reduce            sum over ranks                        nothing
    gather            all ranks' rows, end to end           sum over ranks, each keeps its rows
    scatter           each keeps its rows                   all ranks' rows, end to end
    reduce_scatter    sum over ranks, each keeps its rows   all ranks' rows, end to end

Rows are dealt out in equal runs. Nothing is sent for an empty tensor: the ranks of a group work on the same batch, so all of them know.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# Later versions of torch rename these two, and warn of the old names.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def copy(x: Tensor, group: ProcessGroup) -> Tensor:
    """Enter a part of the computation in which each rank works on columns of its own."""
    out: Tensor = _Copy.apply(x, group)
    return out


def reduce(x: Tensor, group: ProcessGroup) -> Tensor:
    """Leave such a part: sum what the ranks have. `x` itself becomes the sum."""
    out: Tensor = _Reduce.apply(x, group)
    return out


def gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """Enter such a part from one in which each rank has rows of its own."""
    out: Tensor = _Gather.apply(x, group)
    return out


def reduce_scatter(x: Tensor, group: ProcessGroup) -> Tensor:
    """Leave such a part for one in which each rank has rows of its own."""
    out: Tensor = _ReduceScatter.apply(x, group)
    return out


def scatter(x: Tensor, group: ProcessGroup) -> Tensor:
    """Keep this rank's rows of what all ranks have alike."""
    out: Tensor = _Scatter.apply(x, group)
    return out


def sum_over(x: Tensor, group: ProcessGroup) -> Tensor:
    """Sum over the ranks, in place; `x` must be contiguous."""
    if x.numel():
        dist.all_reduce(x, op=dist.ReduceOp.SUM, group=group)
    return x


def gather_rows(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return all ranks' rows, end to end."""
    out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    if out.numel():
        _ALL_GATHER(out, x.contiguous(), group=group)
    return out


def reduce_scatter_rows(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return this rank's rows of the sum over the ranks."""
    out = x.new_empty(_rows_per_rank(x, group), *x.shape[1:])
    if out.numel():
        _REDUCE_SCATTER(out, x.contiguous(), group=group)
    return out


def own_rows(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return this rank's rows, as a view."""
    count = _rows_per_rank(x, group)
    return x.narrow(0, group.rank() * count, count)


def _rows_per_rank(x: Tensor, group: ProcessGroup) -> int:
    assert x.shape[0] % group.size() == 0, f"{x.shape[0]} rows over {group.size()} ranks: the batch was not padded"
    return x.shape[0] // group.size()


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return sum_over(gradient.clone(memory_format=torch.contiguous_format), ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.mark_dirty(x)
        return sum_over(x, group)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return gather_rows(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter_rows(gradient, ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter_rows(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gather_rows(gradient, ctx.group), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return own_rows(x, group).clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gather_rows(gradient, ctx.group), None
