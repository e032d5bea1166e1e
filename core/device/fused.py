"""Operations of the reference with a backward pass written by hand: fewer passes over memory and fewer activations kept.

On a CPU these are bound by memory, not by arithmetic. Autograd keeps every intermediate of `silu(gate) * up` or of a norm, and adds up
their gradients in buffers of their own; here only inputs are kept and each gradient is written once. float32; shapes as in base.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class SwiGLU(Function):
    """silu(gate) * up; keeps its input only."""

    @staticmethod
    def forward(ctx: Any, x_2F: Tensor) -> Tensor:
        ctx.save_for_backward(x_2F)
        gate, up = x_2F.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x_2F,) = ctx.saved_tensors
        gate, up = x_2F.chunk(2, dim=-1)
        out = torch.empty_like(x_2F)
        d_gate, d_up = out.chunk(2, dim=-1)
        torch.mul(gradient, F.silu(gate), out=d_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=d_gate)
        return out


class RMSNorm(Function):
    """weight * x / rms(x); keeps its input and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normalised = x * scale
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (gradient * normalised).flatten(0, -2).sum(0)
        if not ctx.needs_input_grad[0]:
            return None, d_weight, None
        d_x = gradient * weight
        along = (d_x * normalised).mean(dim=-1, keepdim=True)
        d_x.addcmul_(normalised, along, value=-1).mul_(scale)
        return d_x, d_weight, None


class Rotary(Function):
    """Rotation of half against half; keeps nothing but the tables, since it is undone by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TD, sin_TD)
        return _rotate(x_TND, cos_TD, sin_TD, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos_TD, sin_TD = ctx.saved_tensors
        return _rotate(gradient, cos_TD, sin_TD, -1), None, None


def _rotate(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor, sign: int) -> Tensor:
    half = x_TND.shape[-1] // 2
    cos, sin = cos_TD[:, None, :half], sin_TD[:, None, :half]  # the tables repeat their first half
    out = torch.empty(x_TND.shape, dtype=x_TND.dtype, device=x_TND.device)
    first, second = x_TND.split(half, dim=-1)
    out_first, out_second = out.split(half, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin, value=sign)
    return out
