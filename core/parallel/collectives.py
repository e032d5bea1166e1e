"""Collectives over tensor-parallel ranks. As autograd functions each goes one way forward and its transpose backward:

                      forward                               backward
    reduce            sum over ranks                        nothing
    reduce_scatter    sum over ranks, each keeps its rows   all ranks' rows, end to end
    scatter           each keeps its rows                   all ranks' rows, end to end

(The other two, nothing with a sum backward and all rows with a sum of rows backward, are a part of `tensor.SplitOutputLinear`, which has
something to compute meanwhile.) Rows are dealt out in equal runs. Nothing is sent for an empty tensor: the ranks of a group work on the
same batch, so all of them know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# Later versions of torch rename these two, and warn of the old names.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def reduce(x: Tensor, group: ProcessGroup) -> Tensor:
    """Leave a part of the computation in which each rank has columns of its own: sum. `x` itself becomes the sum."""
    out: Tensor = _Reduce.apply(x, group)
    return out


def reduce_scatter(x: Tensor, group: ProcessGroup) -> Tensor:
    """Leave such a part for one in which each rank has rows of its own: sum, keep them."""
    out: Tensor = _ReduceScatter.apply(x, group)
    return out


def scatter(x: Tensor, group: ProcessGroup) -> Tensor:
    """Keep this rank's rows of what all ranks have alike."""
    out: Tensor = _Scatter.apply(x, group)
    return out


@dataclass(frozen=True)
class Pending:
    """A tensor that a collective is filling."""

    tensor: Tensor
    work: dist.Work | None

    def wait(self) -> Tensor:
        """Return the tensor once it is there."""
        if self.work is not None:
            self.work.wait()
        return self.tensor


def start_sum(x: Tensor, group: ProcessGroup) -> Pending:
    """Begin to sum over the ranks, in place; `x` must be contiguous."""
    return Pending(x, dist.all_reduce(x, op=dist.ReduceOp.SUM, group=group, async_op=True) if x.numel() else None)


def start_gather_rows(x: Tensor, group: ProcessGroup) -> Pending:
    """Begin to collect all ranks' rows, end to end."""
    out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    return Pending(out, _ALL_GATHER(out, x.contiguous(), group=group, async_op=True) if out.numel() else None)


def start_reduce_scatter_rows(x: Tensor, group: ProcessGroup) -> Pending:
    """Begin to collect this rank's rows of the sum over the ranks."""
    out = x.new_empty(_rows_per_rank(x, group), *x.shape[1:])
    return Pending(out, _REDUCE_SCATTER(out, x.contiguous(), group=group, async_op=True) if out.numel() else None)


def start_reduce_scatter_in_place(x: Tensor, group: ProcessGroup) -> Pending:
    """Begin to sum over the ranks what each needs its own rows of: those become the sum, the others have no meaning any more."""
    own = own_rows(x, group)
    return Pending(own, _REDUCE_SCATTER(own, x, group=group, async_op=True) if own.numel() else None)


def start_gather_in_place(x: Tensor, group: ProcessGroup) -> Pending:
    """Begin to fill in all other ranks' rows around this rank's own."""
    return Pending(x, _ALL_GATHER(x, own_rows(x, group), group=group, async_op=True) if x.numel() else None)


def sum_over(x: Tensor, group: ProcessGroup) -> Tensor:
    """Sum over the ranks, in place; `x` must be contiguous."""
    return start_sum(x, group).wait()


def send_to_all(x: Tensor, group: ProcessGroup) -> Tensor:
    """Overwrite `x` with what the group's first rank has, in place; `x` must be contiguous."""
    if x.numel():
        dist.broadcast(x, src=dist.get_global_rank(group, 0), group=group)
    return x


def gather_rows(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return all ranks' rows, end to end."""
    return start_gather_rows(x, group).wait()


def reduce_scatter_rows(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return this rank's rows of the sum over the ranks."""
    return start_reduce_scatter_rows(x, group).wait()


def own_rows(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return this rank's rows, as a view."""
    count = _rows_per_rank(x, group)
    return x.narrow(0, group.rank() * count, count)


def _rows_per_rank(x: Tensor, group: ProcessGroup) -> int:
    assert x.shape[0] % group.size() == 0, f"{x.shape[0]} rows over {group.size()} ranks: not padded"
    return x.shape[0] // group.size()


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.mark_dirty(x)
        return sum_over(x, group)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


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
