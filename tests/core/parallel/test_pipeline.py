"""The 1F1B schedule gives the gradients of one process, on a small stand-in whose messages may be empty."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from core.parallel.mesh import build_mesh
from core.parallel.pipeline import Boundary, Pipeline
from tests.distributed import run

WIDTH = 4


@dataclass(frozen=True)
class Sample:
    """`x` enters the first stage, `extra` rows join at the last one, so that the middle message may be empty."""

    x_NW: Tensor
    extra_NW: Tensor


class Part(nn.Module):
    def __init__(self, index: int, num_parts: int) -> None:
        super().__init__()
        torch.manual_seed(index)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.is_first, self.is_last = index == 0, index == num_parts - 1

    def forward(self, batch: Sample, incoming: Tensor | None = None) -> Tensor:
        x = batch.x_NW if self.is_first else incoming
        assert x is not None
        if self.is_last:
            x = torch.cat([x, batch.extra_NW])
        return torch.tanh(self.linear(x))


def samples(count: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(7)
    sizes = [(i * 2) % 5 for i in range(count)]  # the first and every fifth are empty
    return [
        Sample(torch.randn(n, WIDTH, generator=generator), torch.randn(2, WIDTH, generator=generator)) for n in sizes
    ]


def head(output: Tensor, batch: Sample) -> Tensor:
    return 2 * output.detach()  # gradient of sum(output ** 2)


def gradients(rank: int, num_parts: int, count: int, frozen: tuple[int, ...]) -> Tensor | None:
    mesh = build_mesh(pp_size=num_parts, dp_size=1)
    part = Part(rank, num_parts)
    part.requires_grad_(rank not in frozen)
    reached = [any(i not in frozen for i in range(stage)) for stage in range(num_parts + 1)]

    def shape(batch: Sample) -> tuple[int, ...]:
        return tuple(batch.x_NW.shape)

    pipeline = Pipeline(
        mesh,
        part,
        head,
        before=Boundary(shape, reached[rank]) if rank else None,
        after=Boundary(shape, reached[rank + 1]) if rank < num_parts - 1 else None,
    )
    pipeline.run(samples(count))
    return None if rank in frozen else part.linear.weight.grad


def expected(num_parts: int, count: int) -> list[Tensor]:
    parts = [Part(i, num_parts) for i in range(num_parts)]
    for batch in samples(count):
        x: Tensor | None = None
        for part in parts:
            x = part(batch, x)
        assert x is not None
        x.square().sum().backward()
    return [part.linear.weight.grad for part in parts]  # type: ignore[misc]


class TestPipeline:
    @pytest.mark.parametrize(("num_parts", "count"), [(2, 5), (3, 6), (3, 1)])
    def test_gradients_equal_those_of_one_process(self, num_parts: int, count: int) -> None:
        results = run(gradients, num_parts, num_parts, count, ())
        for mine, reference in zip(results, expected(num_parts, count), strict=True):
            torch.testing.assert_close(mine, reference)

    def test_frozen_first_stages_get_no_gradient_sent(self) -> None:
        results = run(gradients, 3, 3, 4, (0, 1))
        assert results[:2] == [None, None]
        torch.testing.assert_close(results[2], expected(3, 4)[2])

    def test_frozen_later_stages_still_pass_the_gradient_on(self) -> None:
        results = run(gradients, 3, 3, 4, (1, 2))
        torch.testing.assert_close(results[0], expected(3, 4)[0])

    def test_one_stage_is_a_plain_loop(self) -> None:
        part = Part(0, 1)
        Pipeline(build_mesh(pp_size=1, dp_size=1), part, head).run(samples(3))
        torch.testing.assert_close(part.linear.weight.grad, expected(1, 3)[0])

    def test_a_stage_output_of_unplanned_shape_is_our_own_mistake(self) -> None:
        with pytest.raises(AssertionError, match="planned"):
            run(_wrong_shape, 2, timeout_s=5)


def _wrong_shape(rank: int) -> None:
    boundary: Boundary[Sample] = Boundary(lambda batch: (9, 9), True)
    mesh = build_mesh(pp_size=2, dp_size=1)
    part = Part(rank, 2)
    Pipeline(mesh, part, head, before=boundary if rank else None, after=None if rank else boundary).run(samples(2))
