"""Qwen2-VL: what differs from Qwen2.5-VL. Conversion only: there is no `model.py` yet.

The vision blocks have LayerNorm with bias and a plain MLP (fc1, QuickGELU, fc2) where Qwen2.5-VL has RMSNorm and a gated one; every block
sees the whole image. The language model is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from core.models.mapping import Dims, Rule
from core.models.plan import Column, Plan, Replicate, Row, tp_dims
from core.models.qwen2_5_vl import family as qwen2_5_vl
from core.models.qwen2_5_vl.family import VIT_MM, Fields, TextConfig, VisionConfig, projector, vit

NAME = "qwen2_vl"
MODEL_TYPE = "qwen2_vl"


class Config(qwen2_5_vl.Config):
    """The same fields, read from Qwen2-VL's names: `embed_dim` is the tower's width, `hidden_size` that of its output."""

    @classmethod
    def from_hf(cls, config_json: Mapping[str, Any]) -> Config:
        """Parse a `config.json`, flat or nested (`text_config`). Raises InvalidModel naming the field."""
        return _parse(config_json)

    @property
    def family(self) -> str:
        """Name of the family."""
        return NAME

    @property
    def tp_dims(self) -> Dims:
        """Name -> size of everything that tp_size must divide."""
        return tp_dims(PLAN, self.dims())


_GATED_MLP = VIT_MM + "mlp."

MAPPING: tuple[Rule, ...] = (
    *(rule for rule in qwen2_5_vl.MAPPING if not rule.mm.startswith(_GATED_MLP)),
    vit("norm1.bias", "input_layernorm.bias", "hidden_size"),
    vit("norm2.bias", "pre_mlp_layernorm.bias", "hidden_size"),
    vit("mlp.fc1.weight", "mlp.linear_fc1.weight", "intermediate_size", "hidden_size"),
    vit("mlp.fc1.bias", "mlp.linear_fc1.bias", "intermediate_size"),
    vit("mlp.fc2.weight", "mlp.linear_fc2.weight", "hidden_size", "intermediate_size"),
    vit("mlp.fc2.bias", "mlp.linear_fc2.bias", "hidden_size"),
    projector("ln_q.bias", "layernorm.bias", "hidden_size"),
)

PLAN: Plan = {
    **{name: rule for name, rule in qwen2_5_vl.PLAN.items() if not name.startswith(_GATED_MLP)},
    VIT_MM + "input_layernorm.bias": Replicate(),
    VIT_MM + "pre_mlp_layernorm.bias": Replicate(),
    VIT_MM + "mlp.linear_fc1.weight": Row("vision_config.intermediate_size"),
    VIT_MM + "mlp.linear_fc1.bias": Row("vision_config.intermediate_size"),
    VIT_MM + "mlp.linear_fc2.weight": Column("vision_config.intermediate_size"),
    VIT_MM + "mlp.linear_fc2.bias": Replicate(),
    qwen2_5_vl.PROJECTOR_MM + "layernorm.bias": Replicate(),
}


def _parse(config_json: Mapping[str, Any]) -> Config:
    parts = qwen2_5_vl.parse_parts(config_json, model_type=MODEL_TYPE, parse_vision=_parse_vision)
    config = Config(**parts)
    vision = Fields(config_json).object("vision_config")
    if config.vision.hidden_act != "quick_gelu":
        raise vision.refuse("hidden_act", config.vision.hidden_act, "'quick_gelu'")
    if config.vision.hidden_size % config.vision.num_heads:
        raise vision.refuse(
            "embed_dim", config.vision.hidden_size, f"a multiple of num_heads ({config.vision.num_heads})"
        )
    if config.vision.out_hidden_size != config.text.hidden_size:
        wanted = f"the text hidden_size ({config.text.hidden_size})"
        raise vision.refuse("hidden_size", config.vision.out_hidden_size, wanted)
    return config


def _parse_vision(vision: Fields, text: Fields) -> VisionConfig:
    depth = vision.size("depth", default=32)
    embed_dim = vision.size("embed_dim", default=1280)
    return VisionConfig(
        depth=depth,
        hidden_size=embed_dim,
        intermediate_size=embed_dim * vision.size("mlp_ratio", default=4),
        num_heads=vision.size("num_heads", default=16),
        in_channels=vision.size("in_channels", "in_chans", default=3),
        patch_size=vision.size("patch_size", "spatial_patch_size", default=14),
        temporal_patch_size=vision.size("temporal_patch_size", default=2),
        spatial_merge_size=vision.size("spatial_merge_size", default=2),
        window_size=_NO_WINDOW,
        fullatt_block_indexes=tuple(range(depth)),
        out_hidden_size=vision.size("hidden_size", default=text.size("hidden_size")),
        tokens_per_second=1,
        hidden_act=vision.text("hidden_act", default="quick_gelu"),
    )


_NO_WINDOW = 0


def _size(text: tuple[int, int, int, int, int], *, vocab_size: int, tied: bool) -> Config:
    """A published size: text = (layers, hidden, ffn, heads, kv heads)."""
    layers, hidden, ffn, heads, kv_heads = text
    like = qwen2_5_vl.SIZES["7B"]
    vision = replace(
        like.vision,
        intermediate_size=4 * like.vision.hidden_size,
        window_size=_NO_WINDOW,
        fullatt_block_indexes=tuple(range(like.vision.depth)),
        out_hidden_size=hidden,
        tokens_per_second=1,
        hidden_act="quick_gelu",
    )
    return Config(
        text=TextConfig(
            num_hidden_layers=layers,
            hidden_size=hidden,
            intermediate_size=ffn,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=vocab_size,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            mrope_section=(16, 24, 24),
            max_position_embeddings=32768,
        ),
        vision=vision,
        tie_word_embeddings=tied,
        image_token_id=like.image_token_id,
        video_token_id=like.video_token_id,
        vision_start_token_id=like.vision_start_token_id,
        vision_end_token_id=like.vision_end_token_id,
        dtype="bfloat16",
    )


SIZES: dict[str, Config] = {
    "2B": _size((28, 1536, 8960, 12, 2), vocab_size=151936, tied=True),
    "7B": _size((28, 3584, 18944, 28, 4), vocab_size=152064, tied=False),
    "72B": _size((80, 8192, 29568, 64, 8), vocab_size=152064, tied=False),
}
