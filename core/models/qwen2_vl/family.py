"""Qwen2-VL: all that is known of it without torch. It is only converted: there is no `model.py`.

The vision blocks have LayerNorm with bias and a plain MLP (fc1, QuickGELU, fc2) where Qwen2.5-VL has RMSNorm and a gated one; every block
sees the whole image. The language model is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.models.config import Config, Fields, TextConfig, VisionConfig, parse
from core.models.mapping import Rule
from core.models.plan import Column, Plan, Replicate, Row
from core.models.qwen import PROJECTOR_MM, SHARED_MAPPING, SHARED_PLAN, VIT_MM, projector, published, vit

NAME = "qwen2_vl"
_NO_WINDOW = 0

MAPPING: tuple[Rule, ...] = (
    *SHARED_MAPPING,
    vit("norm1.bias", "input_layernorm.bias", "hidden_size"),
    vit("norm2.bias", "pre_mlp_layernorm.bias", "hidden_size"),
    vit("mlp.fc1.weight", "mlp.linear_fc1.weight", "intermediate_size", "hidden_size"),
    vit("mlp.fc1.bias", "mlp.linear_fc1.bias", "intermediate_size"),
    vit("mlp.fc2.weight", "mlp.linear_fc2.weight", "hidden_size", "intermediate_size"),
    vit("mlp.fc2.bias", "mlp.linear_fc2.bias", "hidden_size"),
    projector("ln_q.bias", "layernorm.bias", "hidden_size"),
)

PLAN: Plan = {
    **SHARED_PLAN,
    VIT_MM + "input_layernorm.bias": Replicate(),
    VIT_MM + "pre_mlp_layernorm.bias": Replicate(),
    VIT_MM + "mlp.linear_fc1.weight": Row("vision_config.intermediate_size"),
    VIT_MM + "mlp.linear_fc1.bias": Row("vision_config.intermediate_size"),
    VIT_MM + "mlp.linear_fc2.weight": Column("vision_config.intermediate_size"),
    VIT_MM + "mlp.linear_fc2.bias": Replicate(),
    PROJECTOR_MM + "layernorm.bias": Replicate(),
}


def parse_config(config_json: Mapping[str, Any]) -> Config:
    """Parse a `config.json`: `embed_dim` is the tower's width, `hidden_size` that of its output. Raises InvalidModel naming the field."""
    return parse(config_json, NAME, _parse_vision)


def _parse_vision(fields: Fields, text: TextConfig) -> VisionConfig:
    depth = fields.size("depth", default=32)
    embed_dim = fields.size("embed_dim", default=1280)
    vision = VisionConfig(
        depth=depth,
        hidden_size=embed_dim,
        intermediate_size=embed_dim * fields.size("mlp_ratio", default=4),
        num_heads=fields.size("num_heads", default=16),
        in_channels=fields.size("in_channels", "in_chans", default=3),
        patch_size=fields.size("patch_size", "spatial_patch_size", default=14),
        temporal_patch_size=fields.size("temporal_patch_size", default=2),
        spatial_merge_size=fields.size("spatial_merge_size", default=2),
        window_size=_NO_WINDOW,
        fullatt_block_indexes=tuple(range(depth)),
        out_hidden_size=fields.size("hidden_size", default=text.hidden_size),
        tokens_per_second=1,
        hidden_act=fields.text("hidden_act", default="quick_gelu"),
    )
    if vision.hidden_act != "quick_gelu":
        raise fields.refuse("hidden_act", vision.hidden_act, "'quick_gelu'")
    if vision.hidden_size % vision.num_heads:
        raise fields.refuse("embed_dim", vision.hidden_size, f"a multiple of num_heads ({vision.num_heads})")
    if vision.out_hidden_size != text.hidden_size:
        raise fields.refuse("hidden_size", vision.out_hidden_size, f"the text hidden_size ({text.hidden_size})")
    return vision


def _size(text: tuple[int, int, int, int, int], *, vocab_size: int, tied: bool = False) -> Config:
    """A published size: text = (layers, hidden, ffn, heads, kv heads)."""
    vision = VisionConfig(
        depth=32,
        hidden_size=1280,
        intermediate_size=5120,
        num_heads=16,
        in_channels=3,
        patch_size=14,
        temporal_patch_size=2,
        spatial_merge_size=2,
        window_size=_NO_WINDOW,
        fullatt_block_indexes=tuple(range(32)),
        out_hidden_size=text[1],
        tokens_per_second=1,
        hidden_act="quick_gelu",
    )
    return published(NAME, text, vision, vocab_size=vocab_size, context=32768, tied=tied)


SIZES: dict[str, Config] = {
    "2B": _size((28, 1536, 8960, 12, 2), vocab_size=151936, tied=True),
    "7B": _size((28, 3584, 18944, 28, 4), vocab_size=152064),
    "72B": _size((80, 8192, 29568, 64, 8), vocab_size=152064),
}
