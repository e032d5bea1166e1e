"""LoRA on every layout equals one process; adapters merge into the model that they were; PEFT computes the same with them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from core.models.layers.recompute import Recompute, RecomputePolicy
from core.specs.training import FreezeSpec
from tests.core.training.test_equivalence import HALVES, assert_same
from tests.core.training.tiny import Case, Rank, Step
from tests.distributed import run

TEXT = FreezeSpec()
ENCODER = FreezeSpec(vision_encoder=False, vision_projector=True)
ALL_TOWERS = FreezeSpec(vision_encoder=False, vision_projector=False)
ALL = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
FULL = Recompute(RecomputePolicy("full", "uniform", 2), RecomputePolicy("full", "uniform", 1))
QUARTERS = (((0, 1), (2, 3)), ((4, 5), (6, 7)))

LAYOUTS = {
    "tp2 pp2, all towers": Case(
        tp=2, llm=(2, 2), vit=(4, 0), micro_batches=(HALVES,), frozen=ALL_TOWERS, lora=ALL, clip_grad=0.05
    ),
    "tp2 dp2, text, recompute": Case(tp=2, micro_batches=QUARTERS, frozen=TEXT, lora=ALL, recompute=FULL),
    "pp2 dp2 tied, vision | text": Case(
        llm=(0, 4), vit=(4, 0), micro_batches=QUARTERS, tied=True, frozen=ENCODER, lora=("linear_qkv", "linear_proj")
    ),
    "pp2 vpp2 tp2, text": Case(
        tp=2, vpp=2, llm=(0, 1, 1, 2), vit=(3, 1, 0, 0), micro_batches=(((0, 1), (2, 3), (4, 5), (6, 7)),),
        frozen=TEXT, lora=ALL,
    ),
    "pp4, text": Case(
        llm=(0, 0, 2, 2), vit=(2, 2, 0, 0), micro_batches=(((0, 1), (2, 3), (4, 5), (6, 7)),),
        frozen=TEXT, lora=("linear_fc2",),
    ),
}  # fmt: skip


def two_steps(case: Case) -> Step:
    """The second step, in which both matrices have a gradient."""
    rank = Rank(case)
    rank.step()
    return rank.step()


def all_layouts(rank: int) -> dict[str, Step]:
    return {name: two_steps(case) for name, case in LAYOUTS.items()}


@pytest.fixture(scope="module")
def steps() -> list[dict[str, Step]]:
    """Of each rank, by layout: one group of processes for all of them."""
    return run(all_layouts, 4)


class TestLayouts:
    @pytest.mark.parametrize("name", LAYOUTS)
    def test_a_layout_equals_one_process(self, steps: list[dict[str, Step]], name: str) -> None:
        case = LAYOUTS[name]
        one = replace(case, llm=(4,), vit=(4,), micro_batches=((tuple(range(8)),),), tp=1, vpp=1, recompute=None)
        expected = two_steps(one)
        assert_same([step[name] for step in steps], expected, tied=case.tied, tp=case.tp)
        assert all(".lora_" in trained for trained in expected.gradients)
        assert all(gradient.any() for gradient in expected.gradients.values())
