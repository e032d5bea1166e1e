"""What must hold before and after the first step: it fits, frozen weights stay as they are, trained ones move."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from core.data.plan import PATCH_COST, StepPlan
from core.device.failing import is_out_of_memory
from core.errors import AppError
from core.training.optimizer import Optimizer

Rows = npt.NDArray[np.int64]
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PART = 1 << 24
"""Elements."""


class WrongParametersTrained(AppError):
    """The first step changed a frozen parameter, or none of the trained ones."""

    code = "wrong_parameters_trained"
    status = 500


class OutOfMemory(AppError):
    """A micro-batch does not fit the device."""

    code = "out_of_memory"
    status = 507


@contextmanager
def out_of_memory_told(what: str) -> Iterator[None]:
    """Name what did not fit the device. Raises OutOfMemory."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"{what} does not fit the device: {error}",
            hint="use recompute, a smaller micro_batch_size × seq_length, or more tp or pp",
        ) from error


def checksums(tensors: Iterable[Tensor]) -> list[int]:
    """Sum of each tensor's bits, in one copy from the device: two tensors of different sums differ."""
    return _values([_sum_of_bits(tensor) for tensor in tensors])


@dataclass(frozen=True)
class FirstStep:
    """The state of this rank's parameters before their first update."""

    frozen: dict[str, int]
    trained: dict[str, int]

    @classmethod
    def before(cls, model: nn.Module, optimizer: Optimizer) -> FirstStep:
        """Note the parameters."""
        return cls(_frozen(model), _trained(optimizer))

    def check(self, model: nn.Module, optimizer: Optimizer) -> tuple[int, int]:
        """Return how many trained parameters had a gradient, and how many of them moved. Raises WrongParametersTrained.

        Of trained ones each data-parallel rank looks at what it steps itself, in float32: a small step can be lost in bfloat16
        weights. One without a gradient may stand still, as an encoder does in a step without images.
        """
        changed = [name for name, value in _frozen(model).items() if value != self.frozen[name]]
        if changed:
            raise WrongParametersTrained(
                f"the first step changed {len(changed)} frozen parameters: {', '.join(changed[:8])}"
            )
        now = _trained(optimizer)
        parts = list(optimizer.parts())
        has_gradient = _values([part.of(share.gradients).any() for part, share in parts])
        with_gradient = [part.name for (part, _), found in zip(parts, has_gradient, strict=True) if found]
        num_moved = sum(now[name] != self.trained[name] for name in with_gradient)
        if with_gradient and not num_moved:
            raise WrongParametersTrained(
                f"the first step moved none of {len(with_gradient)} trained parameters with a gradient"
            )
        return len(with_gradient), num_moved


def largest_micro_batch(plans: list[StepPlan], lengths: Rows, patches: Rows) -> tuple[int, ...]:
    """Return the rows of the dearest micro-batch of any rank in these steps; `lengths`, `patches` of all rows, [N]."""
    parts = {part for plan in plans for rank in plan.micro_batches for part in rank}
    return max(parts, key=lambda part: (sum(int(lengths[row]) + PATCH_COST * int(patches[row]) for row in part), part))


def _frozen(model: nn.Module) -> dict[str, int]:
    return _checksums((name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad)


def _trained(optimizer: Optimizer) -> dict[str, int]:
    return _checksums((part.name, part.of(share.master)) for part, share in optimizer.parts())


def _checksums(named: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    named = list(named)
    return dict(zip((name for name, _ in named), checksums(tensor for _, tensor in named), strict=True))


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """Part by part: to be summed as int64, a tensor is first copied as such."""
    bits = tensor.detach().contiguous().view(-1).view(_BITS[tensor.element_size()])
    return torch.stack([part.sum(dtype=torch.int64) for part in bits.split(_PART)]).sum()


def _values(scalars: list[Tensor]) -> list[int]:
    return torch.stack(scalars).tolist() if scalars else []
