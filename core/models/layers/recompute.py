"""Trading compute for memory: which activations the forward pass throws away and the backward pass computes again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RecomputePolicy:
    """Recompute of one tower, with Megatron's names and meaning; `num_layers` counts layers of one pipeline stage.

    none           keep everything
    selective      recompute the attention core of every layer
    full, uniform  units of `num_layers` layers keep only their input
    full, block    the first `num_layers` layers keep only their input, the rest keep everything
    """

    granularity: Literal["none", "selective", "full"] = "none"
    method: Literal["uniform", "block"] = "uniform"
    num_layers: int = 1


@dataclass(frozen=True)
class Recompute:
    """A policy per tower."""

    vision_encoder: RecomputePolicy = RecomputePolicy()
    text_decoder: RecomputePolicy = RecomputePolicy()


def run_layers(layers: Sequence[Layer], x: Tensor, policy: RecomputePolicy) -> Tensor:
    """Apply `layers` to `x` one after the other under a full policy; other policies are the layers' own business."""
    if policy.granularity != "full" or not torch.is_grad_enabled():
        return _chain(layers, x)
    if policy.method == "block":
        for layer in layers[: policy.num_layers]:
            x = recomputed(layer, x)
        return _chain(layers[policy.num_layers :], x)
    for start in range(0, len(layers), policy.num_layers):
        unit = layers[start : start + policy.num_layers]
        x = recomputed(lambda y, unit=unit: _chain(unit, y), x)
    return x


def recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`function(*inputs)`, its inner activations recomputed in the backward pass. Our layers draw no random numbers."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def _chain(layers: Sequence[Layer], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x
