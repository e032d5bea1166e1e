"""Loss, gradients, norm and updated weights of every layout equal those of one process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core.data.loader import LossReduction
from core.models.layers.recompute import Recompute, RecomputePolicy
from core.models.lora import with_adapters
from core.models.plan import Replicate
from core.models.qwen2_5_vl.family import PLAN
from core.parallel.tensor import cut, pattern
from core.specs.training import FreezeSpec
from tests.core.training.tiny import NOTHING_FROZEN, Case, Step, one_step, pack, samples, tiny_config, whole_model
from tests.distributed import run

ALL = tuple(range(8))
HALVES = ((0, 1, 2, 3), (4, 5, 6, 7))
OUTPUT, EMBEDDING = "text_decoder.output_layer.weight", "text_decoder.embedding.word_embeddings.weight"

LAYOUTS = {
    "pp2": Case(llm=(2, 2), vit=(4, 0), micro_batches=(HALVES,)),
    "pp2 uneven": Case(llm=(1, 3), vit=(4, 0), micro_batches=(((0, 1), (2, 3), (4, 5, 6), (7,)),)),
    "pp2 vision | text": Case(llm=(0, 4), vit=(4, 0), micro_batches=(HALVES,)),
    "pp3 vision over stages": Case(llm=(0, 1, 3), vit=(1, 3, 0), micro_batches=(((0,), (1,), (2, 3), (4, 5), (6, 7)),)),
    "dp2": Case(micro_batches=((HALVES[0],), (HALVES[1],))),
    "dp2 uneven, one empty": Case(micro_batches=((tuple(range(7)), ()), ((7,), ()))),
    "pp2 dp2": Case(llm=(2, 2), vit=(4, 0), micro_batches=(((0, 1), (2, 3)), ((4, 5), (6, 7)))),
    "pp2 text only": Case(llm=(0, 4), vit=(4, 0), micro_batches=(HALVES,), with_images=False),
    "pp2 tied": Case(llm=(2, 2), vit=(4, 0), micro_batches=(HALVES,), tied=True),
    "pp3 dp2 tied": Case(llm=(0, 2, 2), vit=(4, 0, 0), micro_batches=(((0, 1), (2, 3)), ((4, 5), (6, 7))), tied=True),
}
TENSOR_LAYOUTS = {
    "tp2": Case(tp=2),
    "tp2 tied, text only": Case(tp=2, tied=True, with_images=False),
    "tp2 dp2, one empty": Case(tp=2, micro_batches=((tuple(range(7)), ()), ((7,), ()))),
    "tp2 pp2 tied": Case(tp=2, llm=(2, 2), vit=(4, 0), micro_batches=(HALVES,), tied=True),
    "tp2 pp2 vision | text": Case(tp=2, llm=(0, 4), vit=(4, 0), micro_batches=(HALVES,)),
    "tp2 pp3 uneven": Case(tp=2, llm=(0, 1, 3), vit=(1, 3, 0), micro_batches=(((0,), (1,), (2, 3), (4, 5), (6, 7)),)),
    "tp2 pp2 dp2 tied": Case(
        tp=2, llm=(1, 3), vit=(4, 0), micro_batches=(((0, 1), (2, 3)), ((4, 5), (6, 7))), tied=True
    ),
}
VIRTUAL_LAYOUTS = {
    "pp2 vpp2": Case(vpp=2, llm=(0, 1, 1, 2), vit=(3, 1, 0, 0), micro_batches=(((0, 1), (2, 3), (4, 5), (6, 7)),)),
    "pp2 vpp2 tied on two ranks": Case(vpp=2, llm=(1, 1, 1, 1), vit=(4, 0, 0, 0), micro_batches=(HALVES,), tied=True),
    "pp2 vpp2 tied on one rank": Case(
        vpp=2, llm=(0, 2, 1, 1), vit=(4, 0, 0, 0), micro_batches=(((0, 1, 2), (3, 4), (5, 6, 7)),), tied=True
    ),
    "pp2 vpp3 dp2": Case(
        vpp=3,
        llm=(0, 0, 1, 1, 1, 1),
        vit=(2, 2, 0, 0, 0, 0),
        micro_batches=(((0, 1), (2, 3), (4,)), ((5,), (6,), (7,))),
    ),
    "pp2 vpp2 tp2 tied on one rank, text only": Case(
        tp=2, vpp=2, llm=(0, 2, 1, 1), vit=(4, 0, 0, 0), micro_batches=(HALVES,), tied=True, with_images=False
    ),
    "pp4 vpp2": Case(
        vpp=2, llm=(0, 0, 0, 0, 1, 1, 1, 1), vit=(1, 1, 1, 1, 0, 0, 0, 0), micro_batches=(tuple((i,) for i in ALL),)
    ),
}
FREEZES = {
    "nothing": NOTHING_FROZEN,
    "vision": FreezeSpec(vision_encoder=True, vision_projector=True, text_decoder=False),
    "encoder": FreezeSpec(vision_encoder=True, vision_projector=False, text_decoder=False),
    "text": FreezeSpec(vision_encoder=False, vision_projector=False, text_decoder=True),
}


def reference(case: Case) -> Step:
    """One process, one micro-batch."""
    rows = tuple(sorted(row for rank in case.micro_batches for part in rank for row in part))
    return one_step(0, replace(case, llm=(4,), vit=(4,), micro_batches=((rows,),), tp=1, vpp=1, recompute=None))


def assert_same(steps: list[Step], expected: Step, *, tied: bool, tp: int = 1) -> None:
    for step in steps:
        assert step.loss == pytest.approx(expected.loss, rel=1e-6)
        assert step.norm == pytest.approx(expected.norm, rel=1e-5)
        for name, gradient in step.gradients.items():
            wanted = own_part(expected.gradients[as_one_process(name, tied)], name, tp, step.tp_rank)
            assert_near(gradient, wanted, 1e-7 * expected.norm, name)
        for name, weight in step.weights.items():
            wanted = own_part(expected.weights[as_one_process(name, tied)], name, tp, step.tp_rank)
            assert_near(weight, wanted, 1e-7, name)
    assert {as_one_process(name, tied) for step in steps for name in step.gradients} == set(expected.gradients)


def own_part(whole: Tensor, name: str, tp: int, tp_rank: int) -> Tensor:
    """What a tensor-parallel rank holds of the whole model's tensor."""
    return cut(whole, with_adapters(PLAN)[pattern(name)], tp_size=tp, tp_rank=tp_rank)


def as_one_process(name: str, tied: bool) -> str:
    """In one process the output matrix of a tied model is the embedding."""
    return EMBEDDING if tied and name == OUTPUT else name


def assert_near(found: Tensor, wanted: Tensor, tolerance: float, name: str) -> None:
    """1e-5 of the tensor's norm, and some tolerance for gradients that are zero but for rounding (a key's bias)."""
    error = (found - wanted).norm().item()
    assert error <= 1e-5 * wanted.norm().item() + tolerance, f"{name}: off by {error:.2e} of {wanted.norm().item():.2e}"


class TestLayouts:
    @pytest.mark.parametrize("name", LAYOUTS)
    def test_a_layout_equals_one_process(self, name: str) -> None:
        case = LAYOUTS[name]
        assert_same(run(one_step, case.world_size, case), reference(case), tied=case.tied)

    @pytest.mark.parametrize("name", FREEZES)
    def test_frozen_towers_equal_one_process_on_a_pipeline(self, name: str) -> None:
        case = replace(LAYOUTS["pp2 vision | text"], frozen=FREEZES[name])
        assert_same(run(one_step, 2, case), reference(case), tied=False)

    def test_clipping_uses_the_norm_of_the_whole_model(self) -> None:
        case = replace(LAYOUTS["pp2 tied"], clip_grad=0.05)
        expected = reference(case)
        assert expected.norm > 0.05
        assert_same(run(one_step, 2, case), expected, tied=True)

    def test_the_copies_of_a_tied_embedding_stay_equal_bit_for_bit(self) -> None:
        case = LAYOUTS["pp3 dp2 tied"]
        steps = run(one_step, case.world_size, case)
        assert torch.equal(steps[2].weights[EMBEDDING], steps[4].weights[OUTPUT])


class TestTensorLayouts:
    @pytest.mark.parametrize("name", TENSOR_LAYOUTS)
    def test_a_layout_equals_one_process(self, name: str) -> None:
        case = TENSOR_LAYOUTS[name]
        assert_same(run(one_step, case.world_size, case), reference(case), tied=case.tied, tp=2)

    @pytest.mark.parametrize("name", FREEZES)
    def test_frozen_towers_equal_one_process(self, name: str) -> None:
        case = replace(TENSOR_LAYOUTS["tp2"], frozen=FREEZES[name])
        assert_same(run(one_step, 2, case), reference(case), tied=False, tp=2)

    @pytest.mark.parametrize("policy", [RecomputePolicy("full", "uniform", 2), RecomputePolicy("selective")])
    def test_recompute_equals_one_process(self, policy: RecomputePolicy) -> None:
        case = replace(TENSOR_LAYOUTS["tp2 pp2 tied"], recompute=Recompute(policy, policy), clip_grad=0.05)
        assert_same(run(one_step, 4, case), reference(case), tied=True, tp=2)

    def test_what_ranks_share_stays_equal_bit_for_bit(self) -> None:
        first, second = run(one_step, 2, TENSOR_LAYOUTS["tp2"])
        shared = [name for name in first.weights if isinstance(PLAN[pattern(name)], Replicate)]
        assert shared
        assert all(torch.equal(first.weights[name], second.weights[name]) for name in shared)


class TestVirtualLayouts:
    @pytest.mark.parametrize("name", VIRTUAL_LAYOUTS)
    def test_a_layout_equals_one_process(self, name: str) -> None:
        case = VIRTUAL_LAYOUTS[name]
        assert_same(run(one_step, case.world_size, case), reference(case), tied=case.tied, tp=case.tp)

    @pytest.mark.parametrize("name", FREEZES)
    def test_frozen_towers_equal_one_process(self, name: str) -> None:
        case = replace(VIRTUAL_LAYOUTS["pp2 vpp2"], frozen=FREEZES[name], clip_grad=0.05)
        assert_same(run(one_step, 2, case), reference(case), tied=False)


class TestAccumulation:
    def test_one_of_eight_equals_eight_of_one_equals_two_ranks_of_four(self) -> None:
        whole = one_step(0, Case(micro_batches=((ALL,),)))
        singles = one_step(0, Case(micro_batches=(tuple((row,) for row in ALL),)))
        two_ranks = run(
            one_step, 2, Case(micro_batches=(tuple((row,) for row in HALVES[0]), tuple((row,) for row in HALVES[1])))
        )
        for step in (singles, *two_ranks):
            assert step.loss == pytest.approx(whole.loss, rel=1e-6)
            for name, gradient in step.gradients.items():
                torch.testing.assert_close(gradient, whole.gradients[name], rtol=1e-5, atol=1e-6)


class TestLossReduction:
    """Weights are of the global batch: how it is cut changes nothing."""

    def test_every_cut_equals_the_formula_in_one_process(self) -> None:
        ranks = run(reduced, 2)
        for reduction, power in REDUCTIONS.items():
            loss, gradients = by_formula(power)
            singles = Case(micro_batches=(tuple((row,) for row in ALL),), loss_reduction=reduction)
            whole = replace(singles, micro_batches=((ALL,),))
            self.assert_equal([one_step(0, whole), one_step(0, singles)], loss, gradients)
            self.assert_equal([rank[reduction][0] for rank in ranks], loss, gradients)
            self.assert_equal([rank[reduction][1] for rank in ranks], loss, gradients, tp=2)

    def assert_equal(self, steps: list[Step], loss: float, gradients: dict[str, Tensor], *, tp: int = 1) -> None:
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
        for step in steps:
            assert step.loss == pytest.approx(loss, rel=1e-6)
            for name, gradient in step.gradients.items():
                assert_near(gradient, own_part(gradients[name], name, tp, step.tp_rank), 1e-7 * norm, name)

    def test_they_differ_from_one_another(self) -> None:
        assert len({round(by_formula(power)[0], 4) for power in REDUCTIONS.values()}) == 3


REDUCTIONS: dict[LossReduction, float] = {"token": 0.0, "sample": -1.0, "square": -0.5}
"""A target's weight is its sample's number of targets to this power."""


def reduced(_: int) -> dict[LossReduction, tuple[Step, Step]]:
    """Two ranks, data parallel with four micro-batches each and tensor parallel with two, under every reduction."""
    halves = (tuple((row,) for row in HALVES[0]), tuple((row,) for row in HALVES[1]))
    return {
        reduction: (
            one_step(0, Case(micro_batches=halves, loss_reduction=reduction)),
            one_step(0, Case(micro_batches=(HALVES,), tp=2, loss_reduction=reduction)),
        )
        for reduction in REDUCTIONS
    }


def by_formula(power: float) -> tuple[float, dict[str, Tensor]]:
    """The weighted mean over the samples' cross entropies, and autograd's gradients of it."""
    config = tiny_config()
    model = whole_model(config)
    total, divisor = torch.zeros(()), 0.0
    for sample in samples(len(ALL)):
        batch = pack([sample], config)
        losses_T = F.cross_entropy(model.logits(model(batch)), batch.targets_T, reduction="none")
        total = total + losses_T.sum() * sample.num_targets**power
        divisor += sample.num_targets * sample.num_targets**power
    (total / divisor).backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return total.item() / divisor, gradients
