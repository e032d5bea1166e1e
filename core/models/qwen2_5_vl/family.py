"""Qwen2.5-VL: all that is known of it without torch: config, sizes, weight mapping, shard plan.

The mm names and permutations are MindSpeed-MM's; the table below is checked against an independent re-implementation,
`tests/core/conversion/naive.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from core.errors import InvalidModel
from core.models.mapping import Dims, FuseGateUp, FuseQKV, InterleaveQKV, Place, Rename, Rule
from core.models.plan import Column, GateUp, GroupedQKV, Plan, Replicate, Row, Vocab, tp_dims

NAME = "qwen2_5_vl"
MODEL_TYPE = "qwen2_5_vl"


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower; field names as in HF's `vision_config`."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    window_size: int
    fullatt_block_indexes: tuple[int, ...]
    out_hidden_size: int
    tokens_per_second: int
    hidden_act: str

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Values of one flattened patch: channels × frames × height × width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size * self.patch_size

    @property
    def merged_size(self) -> int:
        """Input width of the projector: one merged square of patches."""
        return self.hidden_size * self.spatial_merge_size**2


@dataclass(frozen=True)
class TextConfig:
    """The language model; field names as in HF's `text_config`."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, ...]
    max_position_embeddings: int

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class Config:
    """What is read from `config.json`."""

    text: TextConfig
    vision: VisionConfig
    tie_word_embeddings: bool
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    dtype: str

    @classmethod
    def from_hf(cls, config_json: Mapping[str, Any]) -> Config:
        """Parse a `config.json`, flat or nested (`text_config`). Raises InvalidModel naming the field."""
        return _parse(config_json)

    @property
    def family(self) -> str:
        """Name of the family."""
        return NAME

    @property
    def num_vit_layers(self) -> int:
        """Vision layers."""
        return self.vision.depth

    @property
    def num_llm_layers(self) -> int:
        """Language layers."""
        return self.text.num_hidden_layers

    def dims(self) -> Dims:
        """The sizes that the tables below name; names as in `config.json`."""
        text, vision = self.text, self.vision
        return {
            "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": text.num_key_value_heads,
            "head_dim": text.head_dim,
            "q_size": text.num_attention_heads * text.head_dim,
            "kv_size": text.num_key_value_heads * text.head_dim,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "vocab_size": text.vocab_size,
            "vision_config.num_heads": vision.num_heads,
            "vision_config.head_dim": vision.head_dim,
            "vision_config.hidden_size": vision.hidden_size,
            "vision_config.qkv_size": 3 * vision.hidden_size,
            "vision_config.intermediate_size": vision.intermediate_size,
            "vision_config.in_channels": vision.in_channels,
            "vision_config.temporal_patch_size": vision.temporal_patch_size,
            "vision_config.patch_size": vision.patch_size,
            "vision_config.merged_size": vision.merged_size,
            "vision_config.out_hidden_size": vision.out_hidden_size,
        }

    @property
    def tp_dims(self) -> Dims:
        """Name -> size of everything that tp_size must divide."""
        return tp_dims(PLAN, self.dims())


_VIT = "visual.blocks.{layer}."
VIT_MM = "image_encoder.encoder.blocks.layers.{layer}."
_LLM = "model.layers.{layer}."
_LLM_MM = "text_decoder.decoder.layers.{layer}."
PROJECTOR_MM = "image_encoder.projector."


def vit(hf: str, mm: str, *shape: str) -> Rename:
    """A weight of a vision block; `shape` names sizes of the vision config."""
    return Rename(_VIT + hf, VIT_MM + mm, Place.VIT_LAYER, tuple(f"vision_config.{name}" for name in shape))


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
    hf, mm = f"{_VIT}attn.qkv.{kind}", f"{VIT_MM}self_attention.linear_qkv.{kind}"
    return InterleaveQKV(hf, mm, Place.VIT_LAYER, "vision_config.num_heads", "vision_config.head_dim", tail)


def _gate_up(hf: str, mm: str, place: Place, kind: str, width: str, *tail: str) -> FuseGateUp:
    return FuseGateUp(
        (f"{hf}mlp.gate_proj.{kind}", f"{hf}mlp.up_proj.{kind}"), f"{mm}mlp.linear_fc1.{kind}", place, width, tail
    )


_PATCH_SHAPE = ("hidden_size", "in_channels", "temporal_patch_size", "patch_size", "patch_size")

MAPPING: tuple[Rule, ...] = (
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
    _gate_up(_VIT, VIT_MM, Place.VIT_LAYER, "weight", "vision_config.intermediate_size", "vision_config.hidden_size"),
    _gate_up(_VIT, VIT_MM, Place.VIT_LAYER, "bias", "vision_config.intermediate_size"),
    vit("mlp.down_proj.weight", "mlp.linear_fc2.weight", "hidden_size", "intermediate_size"),
    vit("mlp.down_proj.bias", "mlp.linear_fc2.bias", "hidden_size"),
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
    _gate_up(_LLM, _LLM_MM, Place.LLM_LAYER, "weight", "intermediate_size", "hidden_size"),
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

PLAN: Plan = {
    "image_encoder.encoder.patch_embed.proj.weight": Replicate(),
    VIT_MM + "input_layernorm.weight": Replicate(),
    VIT_MM + "pre_mlp_layernorm.weight": Replicate(),
    VIT_MM + "self_attention.linear_qkv.weight": GroupedQKV("vision_config.num_heads"),
    VIT_MM + "self_attention.linear_qkv.bias": GroupedQKV("vision_config.num_heads"),
    VIT_MM + "self_attention.linear_proj.weight": Column("vision_config.num_heads"),
    VIT_MM + "self_attention.linear_proj.bias": Replicate(),
    VIT_MM + "mlp.linear_fc1.weight": GateUp("vision_config.intermediate_size"),
    VIT_MM + "mlp.linear_fc1.bias": GateUp("vision_config.intermediate_size"),
    VIT_MM + "mlp.linear_fc2.weight": Column("vision_config.intermediate_size"),
    VIT_MM + "mlp.linear_fc2.bias": Replicate(),
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


def _size(text: tuple[int, int, int, int, int], vision: tuple[int, int], *, vocab_size: int, tied: bool) -> Config:
    """A published size: text = (layers, hidden, ffn, heads, kv heads), vision = (ffn, tokens per second)."""
    layers, hidden, ffn, heads, kv_heads = text
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
            max_position_embeddings=128000,
        ),
        vision=VisionConfig(
            depth=32,
            hidden_size=1280,
            intermediate_size=vision[0],
            num_heads=16,
            in_channels=3,
            patch_size=14,
            temporal_patch_size=2,
            spatial_merge_size=2,
            window_size=112,
            fullatt_block_indexes=(7, 15, 23, 31),
            out_hidden_size=hidden,
            tokens_per_second=vision[1],
            hidden_act="silu",
        ),
        tie_word_embeddings=tied,
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        dtype="bfloat16",
    )


SIZES: dict[str, Config] = {
    "3B": _size((36, 2048, 11008, 16, 2), (3420, 2), vocab_size=151936, tied=True),
    "7B": _size((28, 3584, 18944, 28, 4), (3420, 2), vocab_size=152064, tied=False),
    "32B": _size((64, 5120, 27648, 40, 8), (3456, 2), vocab_size=152064, tied=False),
    "72B": _size((80, 8192, 29568, 64, 8), (3456, 2), vocab_size=152064, tied=False),
}


class Fields:
    """Reads typed values out of one JSON object and names the field in every refusal."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self.values, self.prefix = values, prefix

    def _get(self, names: tuple[str, ...], default: object) -> object:
        for name in names:
            if self.values.get(name) is not None:
                return self.values[name]
        if default is None:
            raise InvalidModel(f"config.json has no {self.prefix}{names[0]}")
        return default

    def refuse(self, name: str, value: object, wanted: str) -> InvalidModel:
        """The error that names the field."""
        return InvalidModel(f"config.json: {self.prefix}{name} is {value!r}, but must be {wanted}")

    def size(self, *names: str, default: int | None = None) -> int:
        """A positive integer; the first of `names` that is there."""
        value = self._get(names, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.refuse(names[0], value, "a positive integer")
        return value

    def token(self, name: str, default: int) -> int:
        value = self._get((name,), default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.refuse(name, value, "a token id")
        return value

    def real(self, name: str, default: float | None = None) -> float:
        value = self._get((name,), default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
            raise self.refuse(name, value, "a positive number")
        return float(value)

    def text(self, *names: str, default: str | None = None) -> str:
        value = self._get(names, default)
        if not isinstance(value, str):
            raise self.refuse(names[0], value, "a string")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self._get((name,), default)
        if not isinstance(value, bool):
            raise self.refuse(name, value, "true or false")
        return value

    def sizes(self, name: str) -> tuple[int, ...]:
        value = self._get((name,), None)
        if not isinstance(value, list) or not all(
            isinstance(item, int) and not isinstance(item, bool) for item in value
        ):
            raise self.refuse(name, value, "a list of integers")
        return tuple(value)

    def object(self, *names: str) -> Fields:
        """A nested object; empty when absent."""
        for name in names:
            value = self.values.get(name)
            if isinstance(value, Mapping):
                return Fields(value, f"{self.prefix}{name}.")
            if value is not None:
                raise self.refuse(name, value, "an object")
        return Fields({}, f"{self.prefix}{names[0]}.")


def _parse(config_json: Mapping[str, Any]) -> Config:
    config = Config(**parse_parts(config_json, model_type=MODEL_TYPE, parse_vision=_parse_vision))
    _check_vision(Fields(config_json).object("vision_config"), config)
    return config


class ConfigParts(TypedDict):
    """The arguments of `Config`."""

    text: TextConfig
    vision: VisionConfig
    tie_word_embeddings: bool
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    dtype: str


def parse_parts(
    config_json: Mapping[str, Any], *, model_type: str, parse_vision: Callable[[Fields, Fields], VisionConfig]
) -> ConfigParts:
    """What Qwen2-VL and Qwen2.5-VL name alike; `parse_vision` gets the vision tower's fields and the language model's."""
    top = Fields(config_json)
    if config_json.get("model_type") != model_type:
        raise top.refuse("model_type", config_json.get("model_type"), repr(model_type))
    nested = top.object("text_config")
    text = nested if nested.values else top
    tied = top if "tie_word_embeddings" in config_json else nested
    return ConfigParts(
        text=parse_text(text),
        vision=parse_vision(top.object("vision_config"), text),
        tie_word_embeddings=tied.flag("tie_word_embeddings", False),
        image_token_id=top.token("image_token_id", 151655),
        video_token_id=top.token("video_token_id", 151656),
        vision_start_token_id=top.token("vision_start_token_id", 151652),
        vision_end_token_id=top.token("vision_end_token_id", 151653),
        dtype=top.text("dtype", "torch_dtype", default=text.text("dtype", "torch_dtype", default="float32")),
    )


def parse_text(text: Fields) -> TextConfig:
    """The language model's part."""
    heads = text.size("num_attention_heads")
    rope = text.object("rope_parameters", "rope_scaling")
    config = TextConfig(
        num_hidden_layers=text.size("num_hidden_layers"),
        hidden_size=text.size("hidden_size"),
        intermediate_size=text.size("intermediate_size"),
        num_attention_heads=heads,
        num_key_value_heads=text.size("num_key_value_heads", default=heads),
        vocab_size=text.size("vocab_size"),
        rms_norm_eps=text.real("rms_norm_eps", 1e-6),
        rope_theta=rope.real("rope_theta") if "rope_theta" in rope.values else text.real("rope_theta", 1e6),
        mrope_section=rope.sizes("mrope_section"),
        max_position_embeddings=text.size("max_position_embeddings", default=32768),
    )
    if text.text("hidden_act", default="silu") != "silu":
        raise text.refuse("hidden_act", text.values["hidden_act"], "'silu'")
    if text.flag("use_sliding_window", False):
        raise text.refuse("use_sliding_window", True, "false: sliding-window attention is not supported")
    if config.hidden_size % heads:
        raise text.refuse("hidden_size", config.hidden_size, f"a multiple of num_attention_heads ({heads})")
    if heads % config.num_key_value_heads:
        raise text.refuse(
            "num_key_value_heads", config.num_key_value_heads, f"a divisor of num_attention_heads ({heads})"
        )
    if 2 * sum(config.mrope_section) != config.head_dim or len(config.mrope_section) != 3:
        wanted = f"three numbers that add up to half the head width ({config.head_dim} / 2)"
        raise rope.refuse("mrope_section", list(config.mrope_section), wanted)
    return config


def _parse_vision(vision: Fields, text: Fields) -> VisionConfig:
    return VisionConfig(
        depth=vision.size("depth", default=32),
        hidden_size=vision.size("hidden_size", default=1280),
        intermediate_size=vision.size("intermediate_size", default=3420),
        num_heads=vision.size("num_heads", default=16),
        in_channels=vision.size("in_channels", "in_chans", default=3),
        patch_size=vision.size("patch_size", "spatial_patch_size", default=14),
        temporal_patch_size=vision.size("temporal_patch_size", default=2),
        spatial_merge_size=vision.size("spatial_merge_size", default=2),
        window_size=vision.size("window_size", default=112),
        fullatt_block_indexes=vision.sizes("fullatt_block_indexes"),
        out_hidden_size=vision.size("out_hidden_size", default=text.size("hidden_size")),
        tokens_per_second=vision.size("tokens_per_second", default=4),
        hidden_act=vision.text("hidden_act", default="silu"),
    )


def _check_vision(fields: Fields, config: Config) -> None:
    vision = config.vision
    if vision.hidden_act != "silu":
        raise fields.refuse("hidden_act", vision.hidden_act, "'silu'")
    if vision.hidden_size % vision.num_heads:
        raise fields.refuse("hidden_size", vision.hidden_size, f"a multiple of num_heads ({vision.num_heads})")
    if vision.head_dim % 4:
        raise fields.refuse(
            "num_heads", vision.num_heads, f"such that hidden_size / num_heads ({vision.head_dim}) divides by 4"
        )
    if vision.out_hidden_size != config.text.hidden_size:
        raise fields.refuse(
            "out_hidden_size", vision.out_hidden_size, f"the text hidden_size ({config.text.hidden_size})"
        )
    if any(not 0 <= index < vision.depth for index in vision.fullatt_block_indexes):
        wanted = f"layer indices below depth ({vision.depth})"
        raise fields.refuse("fullatt_block_indexes", list(vision.fullatt_block_indexes), wanted)
    if vision.window_size % (vision.patch_size * vision.spatial_merge_size):
        wanted = f"a multiple of patch_size × spatial_merge_size ({vision.patch_size * vision.spatial_merge_size})"
        raise fields.refuse("window_size", vision.window_size, wanted)
