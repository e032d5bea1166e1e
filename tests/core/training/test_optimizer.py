"""Schedule, groups, clipping and master weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from core.parallel.mesh import Mesh, build_mesh
from core.specs.training import OptimizerSpec
from core.training.optimizer import Kind, Optimizer, OptimizerState, Piece, Schedule, build_schedule
from tests.distributed import run


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).to(dtype)


def backward(module: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    generator = torch.Generator().manual_seed(1)
    module(torch.randn(5, 3, generator=generator).to(dtype)).square().sum().backward()


class TestSchedule:
    # Values of Megatron-LM's OptimizerParamScheduler.get_lr, worked out by hand from its formulas.
    @pytest.mark.parametrize(
        ("style", "iteration", "expected"),
        [
            ("cosine", 0, 0.0),
            ("cosine", 5, 0.5),
            ("cosine", 10, 1.0),
            ("cosine", 55, 0.1 + 0.9 * 0.5),
            ("cosine", 100, 0.1),
            ("cosine", 101, 0.1),
            ("cosine", 40, 0.1 + 0.9 * 0.5 * (math.cos(math.pi / 3) + 1)),
            ("linear", 55, 0.1 + 0.9 * 0.5),
            ("linear", 28, 0.1 + 0.9 * 0.8),
            ("constant", 5, 0.5),
            ("constant", 99, 1.0),
        ],
    )
    def test_known_values(self, style: str, iteration: int, expected: float) -> None:
        schedule = Schedule(peak=1.0, minimum=0.1, style=style, warmup_iters=10, decay_iters=100)
        assert schedule.at(iteration) == pytest.approx(expected)

    def test_without_warm_up_it_starts_at_the_peak(self) -> None:
        schedule = build_schedule(OptimizerSpec(lr=1e-3, lr_warmup_fraction=0), 10)
        assert schedule.at(0) == 1e-3

    def test_the_fraction_is_of_all_iterations(self) -> None:
        schedule = build_schedule(OptimizerSpec(lr=1e-3, lr_warmup_fraction=0.25), 8)
        assert [schedule.at(i) for i in range(3)] == [0.0, 5e-4, 1e-3]


class TestOptimizer:
    def test_equals_torch_adamw_with_clipping(self) -> None:
        # With AdamW's usual epsilon an update hardly depends on the gradient's scale: a wrong factor would not show.
        spec = OptimizerSpec(weight_decay=0.1, clip_grad=0.5, adam_eps=0.1)
        ours, theirs = model(), model()
        optimizer = Optimizer(ours, spec, Mesh())
        groups = [
            {"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ]
        reference = torch.optim.AdamW(groups, lr=1e-2, eps=0.1)
        for _ in range(3):
            optimizer.clear_gradients()
            backward(ours)
            norm = optimizer.step(learning_rate=1e-2, num_targets=2, squared_norm=optimizer.squared_norm())
            reference.zero_grad()
            backward(theirs)
            for parameter in theirs.parameters():
                assert parameter.grad is not None
                parameter.grad /= 2
            expected = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
            reference.step()
            assert norm == pytest.approx(expected.item(), rel=1e-5)
            for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)

    def test_bfloat16_weights_follow_float32_masters(self) -> None:
        module = model(torch.bfloat16)
        optimizer = Optimizer(module, OptimizerSpec(), Mesh())
        start = [share.master.clone() for share in optimizer.shares]
        for _ in range(20):
            optimizer.clear_gradients()
            backward(module, torch.bfloat16)
            optimizer.step(learning_rate=1e-5, num_targets=1, squared_norm=optimizer.squared_norm())
        for before, share in zip(start, optimizer.shares, strict=True):
            assert share.master.dtype == torch.float32
            assert not torch.equal(before, share.master)  # far too little for one bfloat16 step of a weight near 0.5
            assert torch.equal(share.weights, share.master.bfloat16())

    def test_frozen_parameters_have_neither_gradient_nor_state(self) -> None:
        module = model()
        module[0].requires_grad_(False)  # type: ignore[index]
        optimizer = Optimizer(module, OptimizerSpec(), Mesh())
        backward(module)
        assert module[0].weight.grad is None  # type: ignore[index]
        assert not any(name.startswith("0.") for name in optimizer.state_dict().pieces)

    def test_a_fully_frozen_stage_steps_without_parameters(self) -> None:
        module = model().requires_grad_(False)
        optimizer = Optimizer(module, OptimizerSpec(), Mesh())
        optimizer.clear_gradients()
        optimizer.reduce_gradients()
        assert optimizer.squared_norm() == 0.0
        assert optimizer.step(learning_rate=1.0, num_targets=1, squared_norm=4.0) == 2.0
        assert optimizer.state_dict().pieces == {}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_state_goes_from_one_optimizer_to_another_exactly(self, dtype: torch.dtype) -> None:
        first, second = model(dtype), model(dtype)
        one, two = (Optimizer(module, OptimizerSpec(), Mesh()) for module in (first, second))

        def step(module: nn.Module, optimizer: Optimizer) -> None:
            optimizer.clear_gradients()
            backward(module, dtype)
            optimizer.step(learning_rate=1e-2, num_targets=1, squared_norm=optimizer.squared_norm())

        step(first, one)
        second.load_state_dict(first.state_dict())
        state = one.state_dict()
        two.load_state(state.num_steps, lambda name, kind, start, stop: state.pieces[name].tensors[kind][start:stop])
        step(first, one)
        step(second, two)
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))

    def test_a_gradient_that_is_not_finite_shows_in_the_norm_and_by_name(self) -> None:
        module = model()
        optimizer = Optimizer(module, OptimizerSpec(), Mesh())
        backward(module)
        module[2].weight.grad[0, 0] = math.inf  # type: ignore[index]
        assert not math.isfinite(optimizer.squared_norm())
        assert optimizer.non_finite_parameters() == ["2.weight"]


class TestShares:
    def test_a_state_of_two_ranks_goes_to_three_and_to_one(self) -> None:
        """Read by element, wherever those lie."""
        pieces = [state.pieces for state in run(_state, 2)]

        read = reader(pieces)
        module = model()
        alone = Optimizer(module, OptimizerSpec(), Mesh())
        stepped(module, alone)
        for name, piece in alone.state_dict().pieces.items():
            assert all(torch.equal(read(name, kind, 0, piece.stop), state) for kind, state in piece.tensors.items())
        expected = stepped(module, alone)
        for found in run(_resumed, 3, pieces):
            assert all(torch.equal(weight, expected[name]) for name, weight in found.items())

    def test_the_rank_that_steps_a_bad_gradient_names_it_and_every_rank_knows(self) -> None:
        (mine, first), (others, second) = run(_overflowing, 2)
        assert sorted(mine + others) == ["0.weight"]
        assert not math.isfinite(first + second)


def stepped(module: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    optimizer.clear_gradients()
    with optimizer.last_pass():
        if optimizer.mesh.dp_rank == 0:  # the others had nothing to do
            backward(module)
    optimizer.reduce_gradients()
    optimizer.step(learning_rate=1e-2, num_targets=1, squared_norm=0.0)
    return {name: weight.detach().clone() for name, weight in module.named_parameters()}


def reader(pieces: list[dict[str, Piece]]) -> Callable[[str, Kind, int, int], Tensor]:
    """What `load_state` takes, from the pieces of several ranks."""

    def read(name: str, kind: Kind, start: int, stop: int) -> Tensor:
        whole = torch.full((stop,), math.nan)
        for piece in (part[name] for part in pieces if name in part):
            end = min(piece.stop, stop)
            whole[piece.start : end] = piece.tensors[kind][: max(end - piece.start, 0)]
        return whole[start:]

    return read


def _optimizer(module: nn.Module, dp_size: int) -> Optimizer:
    return Optimizer(module, OptimizerSpec(), build_mesh(pp_size=1, dp_size=dp_size), bucket_bytes=256)


def _state(rank: int) -> OptimizerState:
    module = model()
    optimizer = _optimizer(module, 2)
    stepped(module, optimizer)
    return optimizer.state_dict()


def _resumed(rank: int, pieces: list[dict[str, Piece]]) -> dict[str, Tensor]:
    """The second step."""
    module = model()
    alone = Optimizer(module, OptimizerSpec(), Mesh())
    stepped(module, alone)  # for the weights
    optimizer = _optimizer(module, 3)

    optimizer.load_state(1, reader(pieces))
    return stepped(module, optimizer)


def _overflowing(rank: int) -> tuple[list[str], float]:
    module = model()
    optimizer = _optimizer(module, 2)
    if rank == 1:
        optimizer.buffer.slot("0.weight").view(optimizer.buffer.gradients)[0, 0] = math.inf  # type: ignore[union-attr]
    optimizer.reduce_gradients()
    return optimizer.non_finite_parameters(), optimizer.squared_norm()
