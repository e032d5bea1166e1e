"""Each collective and its transpose: <f(x), y> = <x, f'(y)>, summed over ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from core.parallel.collectives import gather_rows, reduce, reduce_scatter, scatter, send_to_all
from tests.distributed import run

WHOLE = torch.arange(8.0).view(4, 2)


class TestForward:
    def test_values(self) -> None:
        first, second = run(_forward, 2)
        double = WHOLE * 3  # rank 0 has WHOLE, rank 1 has 2 * WHOLE
        for found in (first, second):
            assert torch.equal(found["reduce"], double)
            assert torch.equal(found["send_to_all"], WHOLE)
            assert torch.equal(found["gather_rows"], torch.cat([WHOLE, 2 * WHOLE]))
        assert torch.equal(torch.cat([first["reduce_scatter"], second["reduce_scatter"]]), double)
        assert torch.equal(first["scatter"], WHOLE[:2])
        assert torch.equal(second["scatter"], 2 * WHOLE[2:])


class TestBackward:
    def test_is_the_transpose_where_ranks_have_their_own(self) -> None:
        results = run(_products, 2, reduce_scatter)
        assert sum(a for a, _ in results) == pytest.approx(sum(b for _, b in results))

    def test_the_gradient_of_a_sum_is_that_of_each_addend(self) -> None:
        first, second = run(_gradient, 2, reduce)
        assert torch.equal(first, WHOLE)
        assert torch.equal(second, WHOLE * 2)

    def test_the_gradient_of_own_rows_is_whole_again(self) -> None:
        for gradient in run(_gradient, 2, scatter):
            assert torch.equal(gradient, torch.cat([WHOLE[:2], 2 * WHOLE[:2]]))


class TestEmpty:
    def test_nothing_is_sent_for_a_batch_without_images(self) -> None:
        assert run(_empty, 2) == [[(0, 3)] * 3] * 2


def _group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _forward(rank: int) -> dict[str, Tensor]:
    functions = (reduce, gather_rows, scatter, reduce_scatter, send_to_all)
    return {function.__name__: function(WHOLE * (rank + 1), _group()) for function in functions}


def _products(rank: int, function: object) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(4, 2, generator=generator, requires_grad=True)
    out = function(x, _group())  # type: ignore[operator]
    y = torch.randn(out.shape, generator=generator)
    out.backward(y)
    return float((out * y).sum()), float((x * x.grad).sum())  # type: ignore[operator]


def _gradient(rank: int, function: object) -> Tensor:
    x = torch.zeros(4, 2, requires_grad=True)
    out = function(x * 1, _group())  # type: ignore[operator]
    out.backward((WHOLE * (rank + 1))[: len(out)])
    assert x.grad is not None
    return x.grad


def _empty(rank: int) -> list[tuple[int, ...]]:
    shapes = []
    for function in (reduce, scatter, reduce_scatter):
        x = torch.zeros(0, 3, requires_grad=True)
        function(x * 1, _group()).sum().backward()
        assert x.grad is not None
        shapes.append(tuple(x.grad.shape))
    return shapes
