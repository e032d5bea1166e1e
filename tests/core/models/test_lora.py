"""Which layers get an adapter, what is refused, and how fused layers become PEFT's modules."""

from __future__ import annotations

import pytest

from core.errors import InvalidSpec
from core.models.lora import Lora, adapted_layers, linear_layers, peft_modules, with_adapters
from core.models.plan import Column, GroupedQKV, Replicate, whole
from core.models.qwen2_5_vl.family import PLAN
from tests.core.training.tiny import tiny_config

CONFIG = tiny_config()
VISION = {"vision_encoder", "vision_projector"}


class TestAdaptedLayers:
    def test_they_are_in_towers_that_are_not_frozen(self) -> None:
        names = {layer.name for layer in adapted_layers(CONFIG, ["linear_qkv", "linear_fc2"], VISION)}
        assert names == {
            "text_decoder.decoder.layers.{layer}.self_attention.linear_qkv",
            "text_decoder.decoder.layers.{layer}.mlp.linear_fc2",
        }
        with_projector = adapted_layers(CONFIG, ["linear_fc2"], {"vision_encoder"})
        assert "image_encoder.projector.encoder.linear_fc2" in {layer.name for layer in with_projector}

    @pytest.mark.parametrize(
        ("names", "frozen", "message"),
        [
            (["gate_proj"], VISION, "gate_proj is no linear layer of qwen2_5_vl; it has linear_fc1, linear_fc2"),
            (["linear_fc1", "linear_qkv"], {"vision_encoder", "text_decoder"}, "linear_qkv is in no tower that is trained"),
            (["linear_qkv"], {"vision_encoder"}, "spec.freeze.vision_projector is false, but none"),
        ],
    )  # fmt: skip
    def test_what_would_have_no_effect_is_refused(self, names: list[str], frozen: set[str], message: str) -> None:
        with pytest.raises(InvalidSpec, match=message):
            adapted_layers(CONFIG, names, frozen)


class TestCuts:
    def test_one_of_the_two_matrices_is_cut_as_its_layer_is(self) -> None:
        plan = with_adapters(PLAN)
        layer = "text_decoder.decoder.layers.{layer}.self_attention."
        assert isinstance(plan[layer + "linear_qkv.lora_A.default.weight"], Replicate)
        assert isinstance(plan[layer + "linear_qkv.lora_B.default.weight"], GroupedQKV)
        assert isinstance(plan[layer + "linear_proj.lora_A.default.weight"], Column)
        assert isinstance(plan[layer + "linear_proj.lora_B.default.weight"], Replicate)
        assert plan.items() >= PLAN.items()

    def test_two_ranks_hold_the_cut_matrix_once_and_the_whole_one_twice(self) -> None:
        layers = tuple(adapted_layers(CONFIG, ["linear_fc2"], VISION))
        half, full = (Lora(layers, 4).parameters(whole(CONFIG), tp_size=tp) for tp in (2, 1))
        text = CONFIG.text
        assert full == text.num_hidden_layers * 4 * (text.intermediate_size + text.hidden_size)
        assert half == text.num_hidden_layers * 4 * (text.intermediate_size // 2 + text.hidden_size)


class TestPeftModules:
    def test_the_rows_of_a_fused_layer_are_dealt_out_completely(self) -> None:
        for layer in linear_layers(CONFIG):
            modules = dict(peft_modules(layer))
            rows = [row for runs in modules.values() for run in runs for row in range(run.row, run.row + run.count)]
            assert sorted(rows) == list(range(layer.shape[0]))
        qkv = next(
            layer for layer in linear_layers(CONFIG) if layer.name.startswith("text") and layer.kind == "linear_qkv"
        )
        assert list(dict(peft_modules(qkv))) == [f"model.layers.{{layer}}.self_attn.{part}_proj" for part in "qkv"]
