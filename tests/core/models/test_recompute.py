"""Which layers the backward pass computes again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from core.models.layers.recompute import RecomputePolicy, run_layers


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (RecomputePolicy(), [1, 1, 1, 1]),
        (RecomputePolicy("selective"), [1, 1, 1, 1]),  # a layer recomputes its own attention
        (RecomputePolicy("full", "uniform", 1), [2, 2, 2, 2]),
        (RecomputePolicy("full", "uniform", 3), [2, 2, 2, 2]),
        (RecomputePolicy("full", "block", 1), [2, 1, 1, 1]),
        (RecomputePolicy("full", "block", 3), [2, 2, 2, 1]),
        (RecomputePolicy("full", "block", 9), [2, 2, 2, 2]),
    ],
)
def test_a_policy_recomputes_its_layers_and_no_others(policy: RecomputePolicy, expected: list[int]) -> None:
    calls = [0] * 4

    def layer(index: int, x: Tensor) -> Tensor:
        calls[index] += 1
        return x.sin()

    x = torch.ones(3, requires_grad=True)
    run_layers([lambda y, index=index: layer(index, y) for index in range(4)], x, policy).sum().backward()
    assert calls == expected
