"""LoRA adapters on linear layers: W x + scale * B (A x), with W frozen (Hu et al. 2021).

The layer itself stays as it is, under its name; A and B become its children `lora_A.default` and `lora_B.default`, and a forward hook
adds their product to its output in place. So B A is never formed, and of a frozen layer the backward pass needs no more than its input
(for A) and A x, `r` values per row (for B). With tensor parallelism A or B is cut as the layer is, and what travels for the adapter has
`r` values per row: see `core.models.lora.adapter_cuts`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.hooks import RemovableHandle

from core.models.layers.linear import Linear
from core.models.lora import Layer
from core.models.plan import Replicate
from core.parallel.tensor import split_linear

NAME = "default"
"""Of the adapter; PEFT could hold several of a model."""


@dataclass(frozen=True)
class _Attached:
    """What `detach` must undo and `merge` must know."""

    scale: float
    hook: RemovableHandle


def attach(
    layer: nn.Module,
    described: Layer,
    *,
    r: int,
    scale: float,
    group: ProcessGroup | None = None,
    sequence: bool = False,
) -> None:
    """Give a linear layer an adapter whose values are still to be loaded; `layer` may be one that `shard` has cut over `group`."""
    base = layer.weight
    assert isinstance(base, Tensor)
    matrices: list[nn.Module] = []
    for (rows, columns), rule in zip(described.adapter_shapes(r), described.adapter_cuts, strict=True):
        whole = Linear(columns, rows, bias=False, device=base.device, dtype=base.dtype)
        is_cut = group is not None and not isinstance(rule, Replicate)
        matrices.append(split_linear(whole, rule, group, sequence=sequence) if is_cut and group is not None else whole)
    layer.lora_A, layer.lora_B = (nn.ModuleDict({NAME: matrix}) for matrix in matrices)
    hook = layer.register_forward_hook(partial(_add_update, scale=scale))
    layer.adapter = _Attached(scale, hook)  # type: ignore[assignment]  # no module, and none of state_dict's business


def adapted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every layer that has an adapter, with its name."""
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "adapter"))


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter's matrix."""
    return ".lora_A." in name or ".lora_B." in name


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add every adapter to its layer's weight, in float32 and rounded once, and take it away.

    Exact on tensor-parallel slices: a slice of B A is the product of what the rank holds of both.
    """
    for _, layer in list(adapted(model)):
        attached: Any = layer.adapter
        weight, first, second = layer.weight, _matrix(layer, "lora_A"), _matrix(layer, "lora_B")
        assert isinstance(weight, Tensor)
        weight.copy_(torch.addmm(weight.float(), second.float(), first.float(), alpha=attached.scale))
        attached.hook.remove()
        del layer.lora_A, layer.lora_B, layer.adapter


def _add_update(layer: nn.Module, inputs: tuple[Any, ...], out: Tensor, *, scale: float) -> Tensor:
    low = layer.lora_A[NAME](inputs[0])  # type: ignore[index, operator]
    up = layer.lora_B[NAME]  # type: ignore[index]
    if isinstance(up, Linear):
        return out.addmm_(low, up.weight.t(), alpha=scale)
    return out.add_(up(low), alpha=scale)  # type: ignore[operator]


def _matrix(layer: nn.Module, name: str) -> Tensor:
    weight = getattr(layer, name)[NAME].weight
    assert isinstance(weight, Tensor)
    return weight
