"""The 1F1B schedule gives the gradients of one process, on a small stand-in whose messages may be empty."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from core.parallel.mesh import build_mesh
from core.parallel.pipeline import Action, Boundary, Pipeline, timetable
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


def shape(batch: Sample) -> tuple[int, ...]:
    return tuple(batch.x_NW.shape)


def gradients(rank: int, num_parts: int, count: int, frozen: tuple[int, ...], vpp_size: int = 1) -> list[Tensor | None]:
    pp_size = num_parts // vpp_size
    mesh = build_mesh(pp_size=pp_size, dp_size=1)
    own = range(rank, num_parts, pp_size)
    parts = [Part(index, num_parts).requires_grad_(index not in frozen) for index in own]
    reached = [any(i not in frozen for i in range(stage)) for stage in range(1, num_parts)]
    Pipeline(mesh, parts, head, boundaries=[Boundary(shape, has_gradient) for has_gradient in reached]).run(
        samples(count)
    )
    return [None if index in frozen else part.linear.weight.grad for index, part in zip(own, parts, strict=True)]


def expected(num_parts: int, count: int) -> list[Tensor]:
    parts = [Part(i, num_parts) for i in range(num_parts)]
    for batch in samples(count):
        x: Tensor | None = None
        for part in parts:
            x = part(batch, x)
        assert x is not None
        x.square().sum().backward()
    return [part.linear.weight.grad for part in parts]  # type: ignore[misc]


class TestTimetable:
    def test_is_the_one_of_the_drawing(self) -> None:
        table = timetable(3, 1, 4)
        assert [drawn(table, rank) for rank in range(3)] == [
            "F0 F1 F2 .. .. B0 F3 B1 .. B2 .. B3",
            ".. F0 F1 .. B0 F2 B1 F3 B2 .. B3 ..",
            ".. .. F0 B0 F1 B1 F2 B2 F3 B3 .. ..",
        ]

    @pytest.mark.parametrize("pp_size", [1, 2, 3, 4])
    def test_everything_is_done_once_after_what_it_needs(self, pp_size: int) -> None:
        for vpp_size, count in itertools.product((1, 2, 3), range(10)):
            last, seen = pp_size * vpp_size - 1, set()
            for tick in timetable(pp_size, vpp_size, count):
                for rank, action in enumerate(tick):
                    if action is not None:
                        assert action.stage % pp_size == rank
                        assert action not in seen
                        assert needs(action, last) <= seen
                seen |= {action for action in tick if action is not None}
            assert len(seen) == 2 * (last + 1) * count

    def test_a_rank_waits_less_with_more_chunks(self) -> None:
        idle = [
            sum(action is None for tick in timetable(4, vpp_size, 8) for action in tick) / vpp_size
            for vpp_size in (1, 2, 4)
        ]
        assert idle == sorted(idle, reverse=True)
        assert idle[1] < 0.7 * idle[0]

    def test_no_more_is_under_way_than_it_takes(self) -> None:
        for pp_size, count in itertools.product((2, 3, 4), (1, 5, 12)):
            for rank in range(pp_size):
                under_way, most = 0, 0
                for tick in timetable(pp_size, 1, count):
                    action = tick[rank]
                    under_way += 0 if action is None else 1 if action.is_forward else -1
                    most = max(most, under_way)
                assert most <= pp_size - rank


class TestPipeline:
    @pytest.mark.parametrize(("num_parts", "count"), [(2, 5), (3, 6), (3, 1)])
    def test_gradients_equal_those_of_one_process(self, num_parts: int, count: int) -> None:
        self.assert_equal(run(gradients, num_parts, num_parts, count, ()), expected(num_parts, count))

    @pytest.mark.parametrize(("pp_size", "vpp_size", "count"), [(2, 2, 5), (2, 3, 1), (3, 2, 6)])
    def test_interleaved_stages_equal_one_process(self, pp_size: int, vpp_size: int, count: int) -> None:
        num_parts = pp_size * vpp_size
        self.assert_equal(run(gradients, pp_size, num_parts, count, (), vpp_size), expected(num_parts, count))

    def assert_equal(self, results: list[list[Tensor]], references: list[Tensor]) -> None:
        for index, reference in enumerate(references):
            torch.testing.assert_close(results[index % len(results)][index // len(results)], reference)

    def test_frozen_first_stages_get_no_gradient_sent(self) -> None:
        results = run(gradients, 3, 3, 4, (0, 1))
        assert results[:2] == [[None], [None]]
        torch.testing.assert_close(results[2][0], expected(3, 4)[2])

    def test_frozen_later_stages_still_pass_the_gradient_on(self) -> None:
        results = run(gradients, 3, 3, 4, (1, 2))
        torch.testing.assert_close(results[0][0], expected(3, 4)[0])

    def test_one_stage_is_a_plain_loop(self) -> None:
        part = Part(0, 1)
        Pipeline(build_mesh(pp_size=1, dp_size=1), [part], head).run(samples(3))
        torch.testing.assert_close(part.linear.weight.grad, expected(1, 3)[0])

    def test_a_stage_output_of_unplanned_shape_is_our_own_mistake(self) -> None:
        with pytest.raises(AssertionError, match="planned"):
            run(_wrong_shape, 2)


def drawn(table: tuple[tuple[Action | None, ...], ...], rank: int) -> str:
    actions = [tick[rank] for tick in table]
    return " ".join(".." if a is None else f"{'F' if a.is_forward else 'B'}{a.batch}" for a in actions)


def needs(action: Action, last: int) -> set[Action]:
    """What must have been done in an earlier tick."""
    before = Action(True, action.stage - 1, action.batch)
    if action.is_forward:
        return {before} if action.stage else set()
    after = Action(False, action.stage + 1, action.batch)
    return {Action(True, action.stage, action.batch)} | ({after} if action.stage < last else set())


def _wrong_shape(rank: int) -> None:
    boundary: Boundary[Sample] = Boundary(lambda batch: (9, 9), True)
    mesh = build_mesh(pp_size=2, dp_size=1)
    Pipeline(mesh, [Part(rank, 2)], head, boundaries=[boundary]).run(samples(2))
