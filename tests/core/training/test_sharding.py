"""Data parallelism whose ranks step shares (ZeRO-1) and send gradients while the backward pass goes on: what one process computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch

from core.models.layers.recompute import Recompute, RecomputePolicy
from core.parallel.data import ALIGNMENT
from core.specs.training import FreezeSpec
from tests.core.training.test_equivalence import ALL, FREEZES, assert_same
from tests.core.training.tiny import Case, Rank, Step
from tests.distributed import run

# Rows 1, 4 and 7 have no image.
MIXED = (((1, 4), (7,)), ((0, 2, 3), ()), ((), ()), ((5,), (6,)))
PAIR = (((0, 1, 2), (4,)), ((3,), (5, 6), (7,)))
FULL = Recompute(RecomputePolicy("full", "uniform", 2), RecomputePolicy("full", "uniform", 1))
LONE_IMAGES = FreezeSpec(vision_encoder=False, vision_projector=False, text_decoder=True)

ON_FOUR = {
    "dp4, ranks with text only and with nothing": Case(micro_batches=MIXED, tied=True),
    "dp4, vision alone is trained": Case(micro_batches=MIXED, frozen=LONE_IMAGES, clip_grad=0.05),
    "tp2 dp2 tied": Case(tp=2, micro_batches=PAIR, tied=True, clip_grad=0.05),
    "tp2 dp2, recompute": Case(tp=2, micro_batches=PAIR, recompute=FULL),
    "pp2 dp2 tied": Case(llm=(2, 2), vit=(4, 0), micro_batches=PAIR, tied=True, clip_grad=0.05),
    "pp2 dp2, one rank with nothing": Case(llm=(1, 3), vit=(4, 0), micro_batches=((ALL,), ((),))),
    "pp2 vpp2 dp2 tied on two ranks": Case(vpp=2, llm=(1, 1, 1, 1), vit=(4, 0, 0, 0), micro_batches=PAIR, tied=True),
    "pp2 vpp2 dp2 tied on one rank": Case(vpp=2, llm=(0, 2, 1, 1), vit=(4, 0, 0, 0), micro_batches=PAIR, tied=True),
    **{
        f"pp2 dp2, frozen: {name}": Case(llm=(0, 4), vit=(4, 0), micro_batches=PAIR, frozen=frozen)
        for name, frozen in FREEZES.items()
    },
}
ON_EIGHT = {
    "dp8": Case(micro_batches=tuple(((row,),) for row in ALL), tied=True),
    "tp2 dp4": Case(tp=2, micro_batches=MIXED, clip_grad=0.05),
    "tp2 pp2 dp2 tied": Case(tp=2, llm=(2, 2), vit=(4, 0), micro_batches=PAIR, tied=True),
    "pp2 vpp2 tp2 dp2 tied on two ranks": Case(
        tp=2, vpp=2, llm=(1, 1, 1, 1), vit=(4, 0, 0, 0), micro_batches=PAIR, tied=True, clip_grad=0.05
    ),
}
BFLOAT16 = Case(micro_batches=(((0, 1, 2, 3),), ((4, 5, 6, 7),)), tied=True, dtype=torch.bfloat16)
NUM_STEPS = 3


@dataclass(frozen=True)
class Seen:
    """What a rank has after some steps."""

    step: Step
    num_state: int
    """Elements of each of AdamW's tensors."""
    num_trained: int
    """Elements of the trained parameters that the rank computes with."""
    num_buckets: int
    sent: list[list[int]]
    """Of each step: buckets on their way, noted whenever the gradient of a norm or bias was there."""


def several_steps(case: Case) -> Seen:
    rank = Rank(case)
    optimizer, sent = rank.optimizer, []
    for parameter in rank.model.parameters():
        if parameter.requires_grad and parameter.ndim == 1:
            parameter.register_post_accumulate_grad_hook(lambda _: sent[-1].append(len(optimizer.buffer.under_way)))
    for _ in range(NUM_STEPS):
        sent.append([])
        step = rank.step()
    trained = [parameter.numel() for parameter in rank.model.parameters() if parameter.requires_grad]
    return Seen(
        step,
        sum(piece.tensors["exp_avg"].numel() for piece in optimizer.state_dict().pieces.values()),
        sum(trained),
        len(optimizer.buffer.buckets),
        sent,
    )


def each(rank: int, cases: Mapping[str, Case]) -> dict[str, Seen]:
    return {name: several_steps(case) for name, case in cases.items()}


@pytest.fixture(scope="module")
def four() -> list[dict[str, Seen]]:
    """Of each of four ranks, by layout: one group of processes for all of them."""
    return run(each, 4, ON_FOUR)


@pytest.fixture(scope="module")
def eight() -> list[dict[str, Seen]]:
    return run(each, 8, ON_EIGHT)


def one_process(case: Case) -> Seen:
    return several_steps(replace(case, llm=(4,), vit=(4,), micro_batches=((ALL,),), tp=1, vpp=1, recompute=None))


class TestLayouts:
    @pytest.mark.parametrize("name", ON_FOUR)
    def test_steps_on_four_ranks_equal_those_of_one(self, four: list[dict[str, Seen]], name: str) -> None:
        case = ON_FOUR[name]
        assert_same([seen[name].step for seen in four], one_process(case).step, tied=case.tied, tp=case.tp)

    @pytest.mark.parametrize("name", ON_EIGHT)
    def test_steps_on_eight_ranks_equal_those_of_one(self, eight: list[dict[str, Seen]], name: str) -> None:
        case = ON_EIGHT[name]
        assert_same([seen[name].step for seen in eight], one_process(case).step, tied=case.tied, tp=case.tp)

    def test_bfloat16_with_master_weights_in_shares_equals_one_process_bit_for_bit(self) -> None:
        """Two addends have one sum, whatever their order."""
        whole = several_steps(
            replace(BFLOAT16, micro_batches=((*BFLOAT16.micro_batches[0], *BFLOAT16.micro_batches[1]),))
        )
        for seen in run(each, 2, {"bf16": BFLOAT16}):
            assert all(
                torch.equal(weight, whole.step.weights[name]) for name, weight in seen["bf16"].step.weights.items()
            )


class TestShares:
    @pytest.mark.parametrize("name", ["dp4, ranks with text only and with nothing", "tp2 dp2 tied", "pp2 dp2 tied"])
    def test_the_ranks_of_a_group_hold_every_state_once(self, four: list[dict[str, Seen]], name: str) -> None:
        case = ON_FOUR[name]
        held = [seen[name] for seen in four]
        padding = 2 * ALIGNMENT * held[0].num_buckets * len(case.micro_batches)
        assert sum(seen.num_state for seen in held) == sum(seen.num_trained for seen in held) // len(case.micro_batches)
        assert all(seen.num_state <= seen.num_trained // len(case.micro_batches) + padding for seen in held)


class TestOverlap:
    def test_buckets_are_sent_while_the_backward_pass_goes_on(self, four: list[dict[str, Seen]]) -> None:
        for seen in four:
            for name in ("pp2 vpp2 dp2 tied on two ranks", "tp2 dp2 tied"):
                for sent in seen[name].sent:
                    assert sent == sorted(sent)
                    assert any(0 < count < seen[name].num_buckets for count in sent)

    def test_nothing_is_sent_before_the_last_micro_batch(self, four: list[dict[str, Seen]]) -> None:
        name = "dp4, ranks with text only and with nothing"
        text, images, nothing, both = (seen[name].sent[0] for seen in four)
        assert nothing == []
        half = len(both) // 2  # of two micro-batches that give the same gradients
        assert not any(both[:half])
        assert all(any(sent) for sent in (both[half:], images, text))
