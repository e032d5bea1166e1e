"""Model operations against hand-worked figures, and against what torch counts while it trains the tiny model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, mm_flop

from core.models.config import Config
from core.models.flops import ModelFlops, Work, model_flops, peak_flops, work_of
from core.models.layers.lora import attach
from core.models.lora import Lora, adapted_layers
from core.models.plan import whole
from core.specs.training import FreezeSpec
from core.training.freeze import freeze
from core.training.loss import loss_and_gradient, target_positions
from tests.core.training.tiny import pack, samples, tiny_config, whole_model

VISION = frozenset({"vision_encoder", "vision_projector"})
FREEZES: dict[str, frozenset[str]] = {
    "nothing": frozenset(),
    "vision": VISION,
    "encoder": frozenset({"vision_encoder"}),
    "projector": frozenset({"vision_projector"}),
    "text": frozenset({"text_decoder"}),
    "all but the projector": frozenset({"vision_encoder", "text_decoder"}),
}


def qwen(*, hidden: int, ffn: int, layers: int, heads: int, key_heads: int, vocab: int) -> Config:
    base = tiny_config()
    text = replace(
        base.text, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, vocab_size=vocab,
    )  # fmt: skip
    vision = replace(
        base.vision, depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, window_size=112,
        fullatt_block_indexes=(7, 15, 23, 31), out_hidden_size=hidden,
    )  # fmt: skip
    return replace(base, text=text, vision=vision)


QWEN_7B = qwen(hidden=3584, ffn=18944, layers=28, heads=28, key_heads=4, vocab=152064)
QWEN_3B = qwen(hidden=2048, ffn=11008, layers=36, heads=16, key_heads=2, vocab=151936)


def forward(config: Config) -> ModelFlops:
    """Nothing is trained, so nothing goes back."""
    return model_flops(config, frozen=VISION | {"text_decoder"})


class TestPublishedFigures:
    """Forward operations per token as the sizes give them, in 10^9."""

    @pytest.mark.parametrize(("config", "per_token", "head"), [(QWEN_7B, 14.14, 1.09), (QWEN_3B, 6.17, 0.62)])
    def test_a_token_of_the_language_model(self, config: Config, per_token: float, head: float) -> None:
        flops = forward(config)
        assert flops.of(Work(tokens=1, targets=1)) / 1e9 == pytest.approx(per_token, abs=0.005)
        alone = 2 * config.text.hidden_size * config.text.vocab_size
        assert alone / 1e9 == pytest.approx(head, abs=0.005)

    def test_training_all_is_three_times_the_forward_and_lora_hardly_more_than_two(self) -> None:
        work = Work(tokens=1000, targets=1000, token_pairs=500_500)
        once = forward(QWEN_7B).of(work)
        assert model_flops(QWEN_7B, frozen=VISION).of(work) == pytest.approx(3 * once)
        adapted = model_flops(QWEN_7B, frozen=VISION, lora=lora_on(QWEN_7B, 8, VISION, "linear_qkv", "linear_proj")).of(
            work
        )
        assert 1.95 < adapted / once < 2.05

    @pytest.mark.parametrize(("config", "per_token"), [(QWEN_7B, 2.5), (QWEN_3B, 1.8)])
    def test_causal_attention_of_4096_tokens(self, config: Config, per_token: float) -> None:
        pairs = work_of([4096], [0], [], config.vision).token_pairs
        assert model_flops(config).of(Work(token_pairs=pairs)) / 4096 / 1e9 == pytest.approx(per_token, abs=0.05)

    def test_an_image_token_of_the_vision_tower(self) -> None:
        assert forward(QWEN_7B).of(Work(patches=4)) / 1e9 == pytest.approx(5.14, abs=0.005)


class TestWork:
    def test_windows_are_cut_off_at_the_edges_and_frames_are_apart(self) -> None:
        vision = QWEN_7B.vision  # windows of 8 x 8 patches
        work = work_of([3, 4], [1, 2], [(1, 8, 8), (2, 12, 10)], vision)
        assert (work.tokens, work.targets, work.token_pairs) == (7, 3, 6 + 10)
        assert work.patches == 64 + 2 * 120
        assert work.frame_pairs == 64**2 + 2 * 120**2
        windows = [8 * 8, 4 * 8, 8 * 2, 4 * 2]
        assert work.window_pairs == 64**2 + 2 * sum(patches**2 for patches in windows)


class TestAgainstTorch:
    @pytest.mark.parametrize("frozen", FREEZES.values(), ids=FREEZES)
    def test_training_takes_what_torch_counts(self, frozen: frozenset[str]) -> None:
        assert counted(frozen) == model_flops(tiny_config(), frozen=frozen).of(computed())

    @pytest.mark.parametrize("frozen", [VISION, frozenset()], ids=["vision frozen", "nothing frozen"])
    def test_and_with_adapters(self, frozen: frozenset[str]) -> None:
        lora = lora_on(tiny_config(), 3, frozen, "linear_fc2", "linear_proj")
        assert counted(frozen, lora) == model_flops(tiny_config(), frozen=frozen, lora=lora).of(computed())


def lora_on(config: Config, r: int, frozen: frozenset[str], *kinds: str) -> Lora:
    return Lora(tuple(adapted_layers(config, kinds, frozen)), r)


def computed() -> Work:
    """The work as the CPU does it: causal attention computes all pairs and masks half of them."""
    rows = samples(4)
    lengths = [len(row.input_ids) for row in rows]
    work = work_of(
        lengths, [row.num_targets for row in rows], [grid for row in rows for grid in row.grids], tiny_config().vision
    )
    return replace(work, token_pairs=sum(length**2 for length in lengths))


def counted(frozen: frozenset[str], lora: Lora | None = None) -> int:
    """What torch counts of forward and backward of one micro-batch."""
    config, batch = tiny_config(), pack(samples(4), tiny_config())
    model = whole_model(config)
    freeze(model, FreezeSpec.model_construct(**{f"{name}": name in frozen for name in FreezeSpec.model_fields}))
    if lora is not None:
        model.requires_grad_(False)
        modules, stage = dict(model.named_modules()), whole(config)
        for layer in lora.layers:
            for number in range(len(stage.layers(layer.place))):
                module = modules[layer.name.format(layer=number)]
                attach(module, layer, r=lora.r, scale=1.0)
                module.requires_grad_(False)
                for matrix in (module.lora_A, module.lora_B):
                    matrix.requires_grad_(True)
    positions_N = target_positions(batch.targets_T)
    in_place: dict[Any, Any] = {torch.ops.aten.addmm_: _addmm_flop}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        hidden_NH = model(batch, rows_N=positions_N)
        result = loss_and_gradient(
            hidden_NH, batch.targets_T[positions_N], torch.arange(len(positions_N)), model.logits
        )
        hidden_NH.backward(result.gradient_TH)
    return counter.get_total_flops()


def _addmm_flop(_: Any, a_shape: Any, b_shape: Any, *rest: Any, out_shape: Any = None, **__: Any) -> int:
    return int(mm_flop(a_shape, b_shape))


class TestPeak:
    @pytest.mark.parametrize(
        ("name", "peak"),
        [("Ascend910B3", 354e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H20", 148e12),
         ("NVIDIA H200", 989e12), ("x86_64", None), ("Ascend310P3", None)],
    )  # fmt: skip
    def test_is_known_by_name_or_not_at_all(self, name: str, peak: float | None) -> None:
        assert peak_flops(name, "bf16") == peak
        assert peak_flops(name, "fp32") is None
