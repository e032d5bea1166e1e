"""Our Qwen2.5-VL against transformers' on the same weights, and one stage against chains of stages."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core.device.cpu import CpuAccelerator
from core.models.config import Config
from core.models.layers.recompute import Recompute, RecomputePolicy
from core.models.plan import stages, whole
from core.models.qwen2_5_vl.model import Qwen2_5_VLStage, outgoing_shape
from tests.core.models.qwen2_5_vl.reference import (
    Sample,
    hf_inputs,
    hf_model,
    make_sample,
    mm_state,
    our_stage,
    pack,
    tiny_config,
    whole_model,
)

SAMPLES = {
    "text only": [make_sample([11])],
    "one image": [make_sample([3, (8, 8), 5], seed=1)],
    "windows partly filled": [make_sample([2, (12, 22), 4], seed=2)],
    "several images": [make_sample([(4, 6), 2, (18, 10), (2, 2), 7], seed=3)],
    "video": [make_sample([3, (3, 8, 22), 5], seed=8, seconds=0.5)],
    "video and images": [make_sample([(4, 6), 2, (2, 10, 12), (3, 4, 18), 1, (8, 8), 7], seed=9)],
    "packed": [
        make_sample([3, (8, 8), 5], seed=4),
        make_sample([9], seed=5),
        make_sample([(10, 4), 3, (6, 18), 2], seed=6),
        make_sample([1, (8, 8), 5], seed=7),
        make_sample([2, (2, 6, 10), 1, (4, 4), 3], seed=10, seconds=1.0),
    ],
}
PACKED = SAMPLES["packed"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def hf_logits(model, samples: list[Sample]) -> Tensor:
    """Logits of each sample by itself, one after the other."""
    return torch.cat([model(**hf_inputs(sample)).logits[0] for sample in samples])


def loss_of(logits: Tensor, targets_T: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets_T)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_all_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(
            value, theirs[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def hf_gradients(reference, samples: list[Sample], targets_T: Tensor) -> dict[str, Tensor]:
    reference.zero_grad()
    loss_of(hf_logits(reference, samples), targets_T).backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in reference.named_parameters()
    }


class TestEqualsTransformers:
    @pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
    @pytest.mark.parametrize("name", SAMPLES)
    def test_logits_and_gradients_are_equal(self, name: str, tied: bool) -> None:
        config = Config.from_hf(tiny_config(tied=tied))
        reference = hf_model(tiny_config(tied=tied))
        model = whole_model(config, reference)
        batch = pack(SAMPLES[name], config)

        logits = model.logits(model(batch))
        torch.testing.assert_close(logits, hf_logits(reference, SAMPLES[name]), rtol=1e-4, atol=1e-5)

        loss_of(logits, batch.targets_T).backward()
        expected = hf_gradients(reference, SAMPLES[name], batch.targets_T)
        assert_all_close(gradients(model), mm_state(config, whole(config), expected))

    def test_a_long_video_at_positions_of_our_own(self) -> None:
        """Where transformers would count on otherwise after the video (see test_positions): it is told our positions."""
        sample = make_sample([3, (5, 4, 4), 6], seed=11, seconds=3.0)
        config = Config.from_hf(tiny_config())
        reference = hf_model(tiny_config())
        batch = pack([sample], config)
        assert batch.position_ids_3T.max() == 4 + 4 * 6 + 7
        expected = reference(**hf_inputs(sample), position_ids=batch.position_ids_3T[:, None]).logits[0]
        model = whole_model(config, reference)
        torch.testing.assert_close(model.logits(model(batch)), expected, rtol=1e-4, atol=1e-5)

    def test_samples_in_one_row_do_not_see_each_other(self) -> None:
        config = Config.from_hf(tiny_config())
        model = whole_model(config, hf_model(tiny_config()))
        with torch.no_grad():
            together = model(pack(PACKED, config))
            alone = torch.cat([model(pack([sample], config)) for sample in PACKED])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)

    def test_padding_at_the_end_changes_nothing(self) -> None:
        config = Config.from_hf(tiny_config())
        model = whole_model(config, hf_model(tiny_config()))
        padding = Sample([2] * 6, torch.zeros(4 * 6, PACKED[0].pixel_values_PD.shape[1]), ())
        batch = pack([*PACKED, padding], config)
        padded = dataclasses.replace(batch, grid_thw=(*batch.grid_thw, (1, 4, 6)))
        plain = pack(PACKED, config)
        with torch.no_grad():
            torch.testing.assert_close(model(padded)[:-6], model(plain), rtol=1e-5, atol=1e-6)


LAYOUTS = {
    "towers apart": ([[0, 3]], [[4, 0]]),
    "encoder split": ([[0, 1, 2]], [[3, 1, 0]]),
    "shared stage": ([[0, 2, 1]], [[1, 3, 0]]),
    "virtual chunks": ([[0, 1], [1, 1]], [[2, 2], [0, 0]]),
}


def chain(config: Config, layout: str, reference, recompute: Recompute | None = None) -> list[Qwen2_5_VLStage]:
    llm, vit = LAYOUTS[layout]
    parallel = SimpleNamespace(
        tp_size=1,
        llm_pp_layers=tuple(map(tuple, llm)),
        vit_pp_layers=tuple(map(tuple, vit)),
        pp_size=len(llm[0]),
        vpp_size=len(llm),
    )
    return [our_stage(config, stage, reference, recompute=recompute) for stage in stages(config, parallel)]


def run_chain(models: list[Qwen2_5_VLStage], batch) -> Tensor:
    x = None
    for model in models:
        x = model(batch, x)
        assert tuple(x.shape) == outgoing_shape(model.config, model.stage, batch.num_tokens, batch.num_patches)
    return models[-1].logits(x)


class TestStages:
    @pytest.mark.parametrize("samples", [PACKED, SAMPLES["text only"]], ids=["packed", "text only"])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_chain_equals_one_stage(self, layout: str, samples: list[Sample]) -> None:
        config = Config.from_hf(tiny_config())
        reference = hf_model(tiny_config())
        batch = pack(samples, config)
        models = chain(config, layout, reference)
        logits = run_chain(models, batch)
        torch.testing.assert_close(logits, hf_logits(reference, samples), rtol=1e-4, atol=1e-5)

        loss_of(logits, batch.targets_T).backward()
        expected = hf_gradients(reference, samples, batch.targets_T)
        for model in models:
            assert_all_close(gradients(model), mm_state(config, model.stage, expected))

    def test_tied_copies_on_two_stages_share_the_gradient_of_the_one(self) -> None:
        config = Config.from_hf(tiny_config(tied=True))
        reference = hf_model(tiny_config(tied=True))
        batch = pack(PACKED, config)
        models = chain(config, "shared stage", reference)
        loss_of(run_chain(models, batch), batch.targets_T).backward()
        expected = hf_gradients(reference, PACKED, batch.targets_T)["model.language_model.embed_tokens.weight"]
        first = models[1].text_decoder.embedding.word_embeddings.weight.grad
        last = models[2].text_decoder.output_layer.weight.grad
        torch.testing.assert_close(first + last, expected, rtol=1e-4, atol=1e-5)

    def test_text_only_batch_gives_the_encoder_zero_gradients(self) -> None:
        config = Config.from_hf(tiny_config())
        model = whole_model(config, hf_model(tiny_config()))
        model(pack(SAMPLES["text only"], config)).sum().backward()
        for name, parameter in model.image_encoder.named_parameters():
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name

    def test_empty_batch_gives_zero_gradients(self) -> None:
        """A data-parallel rank may have fewer micro-batches to fill than the others."""
        config = Config.from_hf(tiny_config())
        models = chain(config, "shared stage", hf_model(tiny_config()))
        nothing = pack([Sample([], torch.zeros(0, PACKED[0].pixel_values_PD.shape[1]), ())], config)
        empty = dataclasses.replace(nothing, cu_seqlens=(0,), rows=(), input_ids_T=nothing.input_ids_T.long())
        run_chain(models, empty).sum().backward()
        for model in models:
            assert not any(gradient.any() for gradient in gradients(model).values())

    def test_later_stages_need_no_pixels(self) -> None:
        config = Config.from_hf(tiny_config())
        reference = hf_model(tiny_config())
        batch = pack(PACKED, config)
        bare = dataclasses.replace(batch, pixel_values_PD=batch.pixel_values_PD[:0])
        first, *later = chain(config, "encoder split", reference)
        with torch.no_grad():
            x = first(batch)
            for model in later:
                x = model(bare, x)
            logits = later[-1].logits(x)
        torch.testing.assert_close(logits, hf_logits(reference, PACKED), rtol=1e-4, atol=1e-5)


POLICIES = {
    "selective": RecomputePolicy("selective"),
    "uniform": RecomputePolicy("full", "uniform", 2),
    "block": RecomputePolicy("full", "block", 1),
}


class TestRecompute:
    @pytest.mark.parametrize("policy", POLICIES)
    def test_gradients_stay_the_same(self, policy: str) -> None:
        config = Config.from_hf(tiny_config())
        reference = hf_model(tiny_config())
        batch = pack(PACKED, config)
        both = Recompute(POLICIES[policy], POLICIES[policy])
        model, plain = our_stage(config, whole(config), reference, recompute=both), whole_model(config, reference)
        for each in (model, plain):
            loss_of(each.logits(each(batch)), batch.targets_T).backward()
        assert_all_close(gradients(model), gradients(plain))

    @pytest.mark.parametrize("policy", ["uniform", "block"])
    def test_fewer_activations_are_kept(self, policy: str) -> None:
        config = Config.from_hf(tiny_config())
        reference = hf_model(tiny_config())
        batch = pack(PACKED, config)
        both = Recompute(POLICIES[policy], POLICIES[policy])

        def kept_bytes(model: Qwen2_5_VLStage) -> int:
            kept: dict[int, Tensor] = {}

            def note(tensor: Tensor) -> Tensor:
                kept[tensor.untyped_storage().data_ptr()] = tensor
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                model(batch)
            return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

        model = our_stage(config, whole(config), reference, recompute=both)
        assert kept_bytes(model) < kept_bytes(whole_model(config, reference))

    def test_selective_runs_the_attention_core_of_every_layer_again(self) -> None:
        class Counting(CpuAccelerator):
            calls = 0

            def attention_varlen(self, *args, **kwargs) -> Tensor:
                self.calls += 1
                return super().attention_varlen(*args, **kwargs)

        config = Config.from_hf(tiny_config())
        policy = POLICIES["selective"]
        accelerator = Counting()
        model = Qwen2_5_VLStage(config, whole(config), accelerator=accelerator, recompute=Recompute(policy, policy))
        loss = model(pack(PACKED, config)).sum()
        assert accelerator.calls == config.num_vit_layers + config.num_llm_layers
        loss.backward()
        assert accelerator.calls == 2 * (config.num_vit_layers + config.num_llm_layers)
