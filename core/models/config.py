"""What a model is, read from `config.json`: the fields that all families have, and how they are read (no torch).

The families (`<family>/family.py`) differ in the vision tower, which each reads itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from core.errors import InvalidModel
from core.models.mapping import Dims
from core.models.plan import tp_dims


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
    """What is read from `config.json`, of any family."""

    family: str
    """Name of the family."""
    text: TextConfig
    vision: VisionConfig
    tie_word_embeddings: bool
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    dtype: str

    @staticmethod
    def from_hf(config_json: Mapping[str, Any]) -> Config:
        """Parse a `config.json`, flat or nested (`text_config`). Raises InvalidModel naming the field."""
        from core.models.registry import detect  # which knows the families, which are made of this file

        return detect(config_json).parse_config(config_json)

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
        from core.models.registry import get_family

        return tp_dims(get_family(self.family).plan, self.dims())


def parse(
    config_json: Mapping[str, Any],
    family: str,
    parse_vision: Callable[[Fields, TextConfig], VisionConfig],
) -> Config:
    """Read what all families name alike; `parse_vision` reads the vision tower, for which it gets the language model too.

    `family` is also the `model_type`. Raises InvalidModel naming the field.
    """
    top = Fields(config_json)
    if config_json.get("model_type") != family:
        raise top.refuse("model_type", config_json.get("model_type"), repr(family))
    nested = top.object("text_config")
    fields = nested if nested.values else top
    text = _parse_text(fields)
    tied = top if "tie_word_embeddings" in config_json else nested
    return Config(
        family=family,
        text=text,
        vision=parse_vision(top.object("vision_config"), text),
        tie_word_embeddings=tied.flag("tie_word_embeddings", False),
        image_token_id=top.token("image_token_id", 151655),
        video_token_id=top.token("video_token_id", 151656),
        vision_start_token_id=top.token("vision_start_token_id", 151652),
        vision_end_token_id=top.token("vision_end_token_id", 151653),
        dtype=top.text("dtype", "torch_dtype", default=fields.text("dtype", "torch_dtype", default="float32")),
    )


def _parse_text(text: Fields) -> TextConfig:
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
