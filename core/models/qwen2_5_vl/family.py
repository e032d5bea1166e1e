"""Qwen2.5-VL: all that is known of it without torch: how its config is read, sizes, weight mapping, shard plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.models.config import Config, Fields, TextConfig, VisionConfig, parse
from core.models.mapping import FuseGateUp, FuseQKV, InterleaveQKV, Place, Rename, Rule
from core.models.plan import Column, GateUp, Plan, Replicate
from core.models.qwen import SHARED_MAPPING, SHARED_PLAN, VIT, VIT_MM, gate_up, published, vit

NAME = "qwen2_5_vl"

MAPPING: tuple[Rule, ...] = (
    *SHARED_MAPPING,
    gate_up(VIT, VIT_MM, Place.VIT_LAYER, "weight", "vision_config.intermediate_size", "vision_config.hidden_size"),
    gate_up(VIT, VIT_MM, Place.VIT_LAYER, "bias", "vision_config.intermediate_size"),
    vit("mlp.down_proj.weight", "mlp.linear_fc2.weight", "hidden_size", "intermediate_size"),
    vit("mlp.down_proj.bias", "mlp.linear_fc2.bias", "hidden_size"),
)

PLAN: Plan = {
    **SHARED_PLAN,
    VIT_MM + "mlp.linear_fc1.weight": GateUp("vision_config.intermediate_size"),
    VIT_MM + "mlp.linear_fc1.bias": GateUp("vision_config.intermediate_size"),
    VIT_MM + "mlp.linear_fc2.weight": Column("vision_config.intermediate_size"),
    VIT_MM + "mlp.linear_fc2.bias": Replicate(),
}


def _unfused(rule: Rule) -> tuple[Rename, ...]:
    """The canonical form: parts of a fused projection stay apart under HF's names; vision qkv keeps HF's order."""
    match rule:
        case FuseQKV():
            names = [rule.mm.replace("linear_qkv", f"{part}_proj") for part in "qkv"]
            sizes = ("q_size", "kv_size", "kv_size")
            return tuple(
                Rename(hf, mm, rule.place, (size, *rule.tail))
                for hf, mm, size in zip(rule.hf, names, sizes, strict=True)
            )
        case FuseGateUp():
            names = [rule.mm.replace("linear_fc1", f"{part}_proj") for part in ("gate", "up")]
            return tuple(
                Rename(hf, mm, rule.place, (rule.width, *rule.tail)) for hf, mm in zip(rule.hf, names, strict=True)
            )
        case InterleaveQKV():
            return (Rename(rule.hf, rule.mm, rule.place, ("vision_config.qkv_size", *rule.tail)),)
        case Rename():
            return (rule,)


CANONICAL_MAPPING: tuple[Rule, ...] = tuple(unfused for rule in MAPPING for unfused in _unfused(rule))


def parse_config(config_json: Mapping[str, Any]) -> Config:
    """Parse a `config.json`, flat or nested (`text_config`). Raises InvalidModel naming the field."""
    return parse(config_json, NAME, _parse_vision)


def _parse_vision(fields: Fields, text: TextConfig) -> VisionConfig:
    vision = VisionConfig(
        depth=fields.size("depth", default=32),
        hidden_size=fields.size("hidden_size", default=1280),
        intermediate_size=fields.size("intermediate_size", default=3420),
        num_heads=fields.size("num_heads", default=16),
        in_channels=fields.size("in_channels", "in_chans", default=3),
        patch_size=fields.size("patch_size", "spatial_patch_size", default=14),
        temporal_patch_size=fields.size("temporal_patch_size", default=2),
        spatial_merge_size=fields.size("spatial_merge_size", default=2),
        window_size=fields.size("window_size", default=112),
        fullatt_block_indexes=fields.sizes("fullatt_block_indexes"),
        out_hidden_size=fields.size("out_hidden_size", default=text.hidden_size),
        tokens_per_second=fields.size("tokens_per_second", default=4),
        hidden_act=fields.text("hidden_act", default="silu"),
    )
    if vision.hidden_act != "silu":
        raise fields.refuse("hidden_act", vision.hidden_act, "'silu'")
    if vision.hidden_size % vision.num_heads:
        raise fields.refuse("hidden_size", vision.hidden_size, f"a multiple of num_heads ({vision.num_heads})")
    if vision.head_dim % 4:
        raise fields.refuse(
            "num_heads", vision.num_heads, f"such that hidden_size / num_heads ({vision.head_dim}) divides by 4"
        )
    if vision.out_hidden_size != text.hidden_size:
        raise fields.refuse("out_hidden_size", vision.out_hidden_size, f"the text hidden_size ({text.hidden_size})")
    if any(not 0 <= index < vision.depth for index in vision.fullatt_block_indexes):
        wanted = f"layer indices below depth ({vision.depth})"
        raise fields.refuse("fullatt_block_indexes", list(vision.fullatt_block_indexes), wanted)
    if vision.window_size % (vision.patch_size * vision.spatial_merge_size):
        wanted = f"a multiple of patch_size × spatial_merge_size ({vision.patch_size * vision.spatial_merge_size})"
        raise fields.refuse("window_size", vision.window_size, wanted)
    return vision


def _size(
    text: tuple[int, int, int, int, int],
    *,
    vision_ffn: int,
    tokens_per_second: int,
    vocab_size: int,
    tied: bool = False,
) -> Config:
    """A published size: text = (layers, hidden, ffn, heads, kv heads)."""
    vision = VisionConfig(
        depth=32,
        hidden_size=1280,
        intermediate_size=vision_ffn,
        num_heads=16,
        in_channels=3,
        patch_size=14,
        temporal_patch_size=2,
        spatial_merge_size=2,
        window_size=112,
        fullatt_block_indexes=(7, 15, 23, 31),
        out_hidden_size=text[1],
        tokens_per_second=tokens_per_second,
        hidden_act="silu",
    )
    return published(NAME, text, vision, vocab_size=vocab_size, context=128000, tied=tied)


SIZES: dict[str, Config] = {
    "3B": _size((36, 2048, 11008, 16, 2), vision_ffn=3420, tokens_per_second=2, vocab_size=151936, tied=True),
    "7B": _size((28, 3584, 18944, 28, 4), vision_ffn=3420, tokens_per_second=2, vocab_size=152064),
    "32B": _size((64, 5120, 27648, 40, 8), vision_ffn=3456, tokens_per_second=2, vocab_size=152064),
    "72B": _size((80, 8192, 29568, 64, 8), vision_ffn=3456, tokens_per_second=2, vocab_size=152064),
}
