"""What Qwen2-VL and Qwen2.5-VL share: the tables of their weights but for the vision blocks' MLP, and their published sizes (no torch).

The mm names and permutations are MindSpeed-MM's; the tables are checked against an independent re-implementation,
`tests/core/conversion/naive.py`.
"""

from __future__ import annotations

from core.models.config import Config, TextConfig, VisionConfig
from core.models.mapping import FuseGateUp, FuseQKV, InterleaveQKV, Place, Rename, Rule
from core.models.plan import Column, GateUp, GroupedQKV, Plan, Replicate, Row, Vocab

VIT = "visual.blocks.{layer}."
VIT_MM = "image_encoder.encoder.blocks.layers.{layer}."
_LLM = "model.layers.{layer}."
_LLM_MM = "text_decoder.decoder.layers.{layer}."
PROJECTOR_MM = "image_encoder.projector."


def vit(hf: str, mm: str, *shape: str) -> Rename:
    """A weight of a vision block; `shape` names sizes of the vision config."""
    return Rename(VIT + hf, VIT_MM + mm, Place.VIT_LAYER, tuple(f"vision_config.{name}" for name in shape))


def _llm(hf: str, mm: str, *shape: str) -> Rename:
    return Rename(_LLM + hf, _LLM_MM + mm, Place.LLM_LAYER, shape)


def projector(hf: str, mm: str, *shape: str) -> Rename:
    """A weight of the merger, likewise."""
    return Rename(
        "visual.merger." + hf, PROJECTOR_MM + mm, Place.PROJECTOR, tuple(f"vision_config.{name}" for name in shape)
    )


def _text_qkv(kind: str, *tail: str) -> FuseQKV:
    q, k, v = (f"{_LLM}self_attn.{part}_proj.{kind}" for part in "qkv")
    mm = f"{_LLM_MM}self_attention.linear_qkv.{kind}"
    return FuseQKV((q, k, v), mm, Place.LLM_LAYER, "num_attention_heads", "num_key_value_heads", "head_dim", tail)


def _vit_qkv(kind: str, *tail: str) -> InterleaveQKV:
    hf, mm = f"{VIT}attn.qkv.{kind}", f"{VIT_MM}self_attention.linear_qkv.{kind}"
    return InterleaveQKV(hf, mm, Place.VIT_LAYER, "vision_config.num_heads", "vision_config.head_dim", tail)


def gate_up(hf: str, mm: str, place: Place, kind: str, width: str, *tail: str) -> FuseGateUp:
    """The fused inputs of a gated MLP below these names."""
    return FuseGateUp(
        (f"{hf}mlp.gate_proj.{kind}", f"{hf}mlp.up_proj.{kind}"), f"{mm}mlp.linear_fc1.{kind}", place, width, tail
    )


_PATCH_SHAPE = ("hidden_size", "in_channels", "temporal_patch_size", "patch_size", "patch_size")

SHARED_MAPPING: tuple[Rule, ...] = (
    Rename(
        "visual.patch_embed.proj.weight",
        "image_encoder.encoder.patch_embed.proj.weight",
        Place.PATCH_EMBED,
        tuple(f"vision_config.{name}" for name in _PATCH_SHAPE),
    ),
    vit("norm1.weight", "input_layernorm.weight", "hidden_size"),
    vit("norm2.weight", "pre_mlp_layernorm.weight", "hidden_size"),
    _vit_qkv("weight", "vision_config.hidden_size"),
    _vit_qkv("bias"),
    vit("attn.proj.weight", "self_attention.linear_proj.weight", "hidden_size", "hidden_size"),
    vit("attn.proj.bias", "self_attention.linear_proj.bias", "hidden_size"),
    projector("ln_q.weight", "layernorm.weight", "hidden_size"),
    projector("mlp.0.weight", "encoder.linear_fc1.weight", "merged_size", "merged_size"),
    projector("mlp.0.bias", "encoder.linear_fc1.bias", "merged_size"),
    projector("mlp.2.weight", "encoder.linear_fc2.weight", "out_hidden_size", "merged_size"),
    projector("mlp.2.bias", "encoder.linear_fc2.bias", "out_hidden_size"),
    Rename(
        "model.embed_tokens.weight",
        "text_decoder.embedding.word_embeddings.weight",
        Place.EMBEDDING,
        ("vocab_size", "hidden_size"),
    ),
    _llm("input_layernorm.weight", "input_layernorm.weight", "hidden_size"),
    _llm("post_attention_layernorm.weight", "pre_mlp_layernorm.weight", "hidden_size"),
    _text_qkv("weight", "hidden_size"),
    _text_qkv("bias"),
    _llm("self_attn.o_proj.weight", "self_attention.linear_proj.weight", "hidden_size", "q_size"),
    gate_up(_LLM, _LLM_MM, Place.LLM_LAYER, "weight", "intermediate_size", "hidden_size"),
    _llm("mlp.down_proj.weight", "mlp.linear_fc2.weight", "hidden_size", "intermediate_size"),
    Rename("model.norm.weight", "text_decoder.decoder.final_layernorm.weight", Place.OUTPUT, ("hidden_size",)),
    Rename(
        "lm_head.weight",
        "text_decoder.output_layer.weight",
        Place.OUTPUT,
        ("vocab_size", "hidden_size"),
        tied_to="model.embed_tokens.weight",
    ),
)

SHARED_PLAN: Plan = {
    "image_encoder.encoder.patch_embed.proj.weight": Replicate(),
    VIT_MM + "input_layernorm.weight": Replicate(),
    VIT_MM + "pre_mlp_layernorm.weight": Replicate(),
    VIT_MM + "self_attention.linear_qkv.weight": GroupedQKV("vision_config.num_heads"),
    VIT_MM + "self_attention.linear_qkv.bias": GroupedQKV("vision_config.num_heads"),
    VIT_MM + "self_attention.linear_proj.weight": Column("vision_config.num_heads"),
    VIT_MM + "self_attention.linear_proj.bias": Replicate(),
    PROJECTOR_MM + "layernorm.weight": Replicate(),
    PROJECTOR_MM + "encoder.linear_fc1.weight": Row("vision_config.merged_size"),
    PROJECTOR_MM + "encoder.linear_fc1.bias": Row("vision_config.merged_size"),
    PROJECTOR_MM + "encoder.linear_fc2.weight": Column("vision_config.merged_size"),
    PROJECTOR_MM + "encoder.linear_fc2.bias": Replicate(),
    "text_decoder.embedding.word_embeddings.weight": Vocab(),
    _LLM_MM + "input_layernorm.weight": Replicate(),
    _LLM_MM + "pre_mlp_layernorm.weight": Replicate(),
    _LLM_MM + "self_attention.linear_qkv.weight": GroupedQKV("num_key_value_heads"),
    _LLM_MM + "self_attention.linear_qkv.bias": GroupedQKV("num_key_value_heads"),
    _LLM_MM + "self_attention.linear_proj.weight": Column("num_attention_heads"),
    _LLM_MM + "mlp.linear_fc1.weight": GateUp("intermediate_size"),
    _LLM_MM + "mlp.linear_fc2.weight": Column("intermediate_size"),
    "text_decoder.decoder.final_layernorm.weight": Replicate(),
    "text_decoder.output_layer.weight": Vocab(),
}


def published(
    family: str,
    text: tuple[int, int, int, int, int],
    vision: VisionConfig,
    *,
    vocab_size: int,
    context: int,
    tied: bool,
) -> Config:
    """A published size: text = (layers, hidden, ffn, heads, kv heads), context = positions."""
    layers, hidden, ffn, heads, kv_heads = text
    return Config(
        family=family,
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
            max_position_embeddings=context,
        ),
        vision=vision,
        tie_word_embeddings=tied,
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        dtype="bfloat16",
    )
