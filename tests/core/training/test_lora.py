"""LoRA on every layout equals one process; adapters merge into the model that they were; PEFT computes the same with them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor

from core.conversion.mm import rank_dir, write_rank_file
from core.models.config import Config
from core.models.layers.linear import Linear
from core.models.layers.lora import attach, is_adapter
from core.models.layers.recompute import Recompute, RecomputePolicy
from core.models.lora import Layer, Lora, adapted_layers
from core.models.mapping import Place
from core.models.plan import Row, whole
from core.models.qwen2_5_vl.family import PLAN
from core.parallel.mesh import Mesh
from core.specs.parallel import ParallelSpec
from core.specs.training import FreezeSpec
from core.training.freeze import freeze
from core.training.lora import Adapters, Merging, adapter_weights, merge_and_compare
from tests.core.models.qwen2_5_vl import reference
from tests.core.models.qwen2_5_vl.reference import hf_inputs, hf_model, make_sample, pack
from tests.core.training.test_equivalence import HALVES, assert_near, assert_same, own_part
from tests.core.training.tiny import Case, Rank, Step, samples
from tests.core.training.tiny import pack as pack_rows
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


@dataclass(frozen=True)
class Tuned:
    """What a rank saw of two steps and of merging."""

    step: Step
    """The second step, in which both matrices have a gradient."""
    merging: Merging
    merged: dict[str, Tensor]
    """All weights afterwards, by the whole model's names."""


def tune(case: Case, folder: Path) -> Tuned:
    """Two steps, a checkpoint in `folder`, and merging."""
    rank = Rank(case)
    rank.step()
    step = rank.step()
    if rank.mesh.dp_rank == 0:
        name = Path(rank_dir("release", rank.mesh.tp_rank, rank.mesh.pp_rank, rank.mesh.pp_size)).name
        write_rank_file(folder / name / "model_optim_rng.pt", adapter_weights(rank.model))
    probe = pack_rows(samples(3), rank.config)
    merging = merge_and_compare(rank.model, rank.pipeline, rank.head, probe)
    merged = {rank.global_name(name): tensor.clone() for name, tensor in rank.model.state_dict().items()}
    return Tuned(step, merging, merged)


def tune_all(rank: int, folder: Path) -> dict[str, Tuned]:
    return {name: tune(case, folder / name) for name, case in LAYOUTS.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def tuned(folder: Path) -> list[dict[str, Tuned]]:
    """Of each rank, by layout: one group of processes for all of them."""
    return run(tune_all, 4, folder, timeout_s=240)  # five layouts, each with groups of its own


class TestLayouts:
    @pytest.mark.parametrize("name", LAYOUTS)
    def test_a_layout_trains_and_merges_as_one_process_does(
        self, tuned: list[dict[str, Tuned]], folder: Path, tmp_path: Path, name: str
    ) -> None:
        case = LAYOUTS[name]
        one = replace(case, llm=(4,), vit=(4,), micro_batches=((tuple(range(8)),),), tp=1, vpp=1, recompute=None)
        expected = tune(one, tmp_path)
        found = [rank[name] for rank in tuned]
        assert_same([rank.step for rank in found], expected.step, tied=case.tied, tp=case.tp)
        assert all(map(is_adapter, expected.step.gradients))
        assert all(gradient.any() for gradient in expected.step.gradients.values())

        for rank in found:
            assert 0 < rank.merging.max_logit_difference < 1e-5 * rank.merging.max_logit
            assert not any(map(is_adapter, rank.merged))
            for weight, tensor in rank.merged.items():
                if weight in expected.merged:  # a tied output layer is one process's embedding
                    wanted = own_part(expected.merged[weight], weight, case.tp, rank.step.tp_rank)
                    assert_near(tensor, wanted, 1e-6, weight)

        adapters = Rank(one).adapters
        whole_tensors = adapters.peft_tensors(tmp_path, one.layout)
        joined = adapters.peft_tensors(folder / name, case.layout)
        assert joined.keys() == whole_tensors.keys()
        for key, tensor in joined.items():
            assert_near(tensor, whole_tensors[key], 1e-6, key)


SAMPLES = [make_sample([3, (8, 8), 5], seed=4), make_sample([9], seed=5), make_sample([(10, 4), 3, (6, 18), 2], seed=6)]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT asks transformers 5 for it
class TestEqualsPEFT:
    @pytest.mark.parametrize("frozen", [TEXT, ALL_TOWERS], ids=["text", "all towers"])
    def test_logits_and_gradients_of_adapters_are_equal(self, tmp_path: Path, frozen: FreezeSpec) -> None:
        torch.set_num_threads(1)
        config = Config.from_hf(reference.tiny_config())
        theirs = hf_model(reference.tiny_config())
        ours = reference.whole_model(config, theirs)
        freeze(ours, frozen, all_weights=True)
        layers = adapted_layers(config, ALL, {tower for tower, is_frozen in frozen if is_frozen})
        adapters, stage = Adapters(config, tuple(layers), r=4, alpha=6, seed=1), whole(config)
        adapters.attach([ours], [stage], PLAN, Mesh())
        parameters = {name: p for name, p in ours.named_parameters() if is_adapter(name)}
        values = torch.Generator().manual_seed(0)
        for parameter in parameters.values():
            parameter.data.copy_(torch.randn(parameter.shape, generator=values) * 0.1)

        one = ParallelSpec(llm_pp_layers=((3,),), vit_pp_layers=((4,),))
        write_rank_file(tmp_path / "mp_rank_00" / "model_optim_rng.pt", parameters)
        adapters.write_peft(tmp_path, one, tmp_path, base_model=None)
        adapted = peft.PeftModel.from_pretrained(theirs, tmp_path, is_trainable=True)

        batch = pack(SAMPLES, config)
        logits = ours.logits(ours(batch))
        wanted = torch.cat([adapted(**hf_inputs(sample)).logits[0] for sample in SAMPLES])
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
        for some in (logits, wanted):
            torch.nn.functional.cross_entropy(some, batch.targets_T).backward()

        gradients = {name: parameter.grad for name, parameter in parameters.items()}
        assert all(gradient is not None and gradient.any() for gradient in gradients.values())
        write_rank_file(tmp_path / "gradients" / "mp_rank_00" / "model_optim_rng.pt", gradients)
        dealt = adapters.peft_tensors(tmp_path / "gradients", one)
        found = {
            name.replace(".default", ""): parameter.grad
            for name, parameter in adapted.named_parameters()
            if parameter.requires_grad
        }
        assert dealt.keys() == found.keys()
        for name, gradient in dealt.items():
            theirs_of = found[name] if "lora_B" in name else sum_of_shared(found, name)
            torch.testing.assert_close(
                gradient, theirs_of, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )


def sum_of_shared(found: dict[str, Tensor], name: str) -> Tensor:
    """Our fused layer's A is that of q, k and v (gate and up) alike, so its gradient is the sum of theirs."""
    for shared in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        for one in shared:
            if f".{one}." in name:
                return torch.stack([found[name.replace(one, other)] for other in shared]).sum(0)
    return found[name]


class TestMemory:
    def test_backward_keeps_a_layers_input_and_r_values_per_row(self) -> None:
        layer, described = Linear(6, 8), Layer("layer", Place.LLM_LAYER, (8, 6), Row("x"), ())
        layer.requires_grad_(False)
        attach(layer, described, r=2, scale=1.5)
        kept = []

        def pack(tensor: Tensor) -> Tensor:
            if not any(tensor.data_ptr() == parameter.data_ptr() for parameter in layer.parameters()):
                kept.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(torch.randn(5, 6, requires_grad=True)).sum().backward()
        assert sorted(kept) == [(5, 2), (5, 6)]
        assert layer.weight.grad is None

    def test_parameters_counted_without_torch_are_those_of_the_model(self) -> None:
        rank = Rank(Case(frozen=ALL_TOWERS, lora=ALL))
        counted = Lora(rank.adapters.layers, rank.adapters.r).parameters(whole(rank.config))
        assert counted == sum(p.numel() for p in rank.model.parameters() if p.requires_grad)
