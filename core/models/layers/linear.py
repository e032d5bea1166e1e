"""Linear layers that add their weight's gradient to where it is accumulated, without a buffer in between.

autograd would compute a weight's gradient into a new buffer of the weight's size and then add that: for a language model's matrices more
memory traffic than anything else in the step. Here the product is accumulated by the matrix multiplication itself
(Megatron's gradient accumulation fusion).

autograd then need not call the weight's hooks; it has a notice of its own instead: where the accumulated gradient has the weight's dtype,
`FlatBuffer` gives the weight a function `gradient_added`, to be called after each addition.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear; the gradient of a weight that has `gradient_added` is added in place."""
    if weight.requires_grad and hasattr(weight, "gradient_added") and torch.is_grad_enabled():
        out: Tensor = _AccumulatingLinear.apply(x, weight, bias)
        return out
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class _AccumulatingLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight  # the parameter itself, for its .grad; a leaf, so this is no cycle
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (x,) = ctx.saved_tensors
        weight = ctx.weight
        gradient_NO, x_NI = gradient.flatten(0, -2), x.flatten(0, -2)
        weight.grad.addmm_(gradient_NO.t(), x_NI)
        weight.gradient_added()
        d_bias = gradient_NO.sum(0) if ctx.needs_input_grad[2] else None
        d_x = gradient.matmul(weight) if ctx.needs_input_grad[0] else None
        return d_x, None, d_bias
