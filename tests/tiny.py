"""Tiny Qwen2.5-VL and Qwen2-VL folders with random weights, as transformers would have saved them: for tests and for the demo.

Shapes are written out by hand, so that nothing here depends on the tables that the tests check with it. No network.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
ADDED_TOKENS = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
)

# The template that Qwen publishes with Qwen2.5-VL (Apache-2.0).
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in "
    "messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful "
    "assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ "
    "message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}{% if content['type'] == "
    "'image' or 'image' in content or 'image_url' in content %}{% set image_count.value = image_count.value + 1 "
    "%}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif "
    "%}<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in content %}{% "
    "set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video {{ video_count.value }}: {% endif "
    "%}<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% "
    "endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CORPUS = (
    "You are a helpful assistant. user assistant system",
    "What is in the picture? What colour is the shape? Describe the image in one sentence.",
    "The picture shows a red circle, a green square and a blue triangle on a white background.",
    "How many shapes are there? There are three shapes: one large, two small.",
    "A yellow star is to the left of a black cross. A photo of a dog, a cat, a house, a tree, a car.",
    "图片里有什么？这是一个红色的圆形。",
)


@dataclass(frozen=True)
class TinyShape:
    """Sizes of a tiny model; every default divides by tp 1 and 2."""

    vision_layers: int = 2
    vision_hidden: int = 32
    vision_heads: int = 2
    vision_ffn: int = 48
    text_layers: int = 2
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 96
    window: int = 56
    patch: int = 14
    tied: bool = False
    family: Literal["qwen2_5_vl", "qwen2_vl"] = "qwen2_5_vl"

    @property
    def head_dim(self) -> int:
        """Width of a text attention head."""
        return self.hidden // self.heads

    @property
    def merged(self) -> int:
        """Input width of the projector: 2 × 2 patches."""
        return 4 * self.vision_hidden


def tiny_tokenizer(directory: Path, *, corpus: Iterable[str] = CORPUS, vocab_size: int = 490) -> int:
    """Train a byte-level BPE on `corpus`; write it as a Qwen2 tokenizer with Qwen2.5-VL's special tokens and template.

    Returns the number of ids, special tokens (at the end, in Qwen's order) included; at most `vocab_size` + 22.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ADDED_TOKENS])

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer.model.save(str(directory))  # vocab.json, merges.txt
    added = {
        str(tokenizer.token_to_id(text)): {
            **dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False),
            "content": text,
            "special": text in SPECIAL_TOKENS,
        }
        for text in SPECIAL_TOKENS + ADDED_TOKENS
    }
    _write_json(
        directory / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": added,
            "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 131072,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )
    _write_json(directory / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    return int(tokenizer.get_vocab_size())


def tiny_model(
    directory: Path,
    *,
    shape: TinyShape | None = None,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    num_shards: int = 1,
    index: bool | None = None,
    names: Literal["old", "new"] = "old",
    nested_config: bool = False,
    vocab_size: int | None = None,
    tokenizer: Path | None = None,
    corpus: Iterable[str] = CORPUS,
    max_pixels: int = 64 * 28 * 28,
) -> Path:
    """Write a whole HF folder and return it.

    `num_shards` > 1 makes `model-0000i-of-0000n.safetensors` with an index (`index=True` forces one for a single file);
    `names` are the key names of transformers before ("old") or after ("new") its 4.52 renaming; `nested_config` is
    transformers 5's form of config.json. `tokenizer` is a folder whose files are copied (say, the real Qwen2 one);
    without it one is trained. `vocab_size` is the rows of the embedding: by default the tokenizer's size, rounded up to
    a multiple of 16.
    """
    shape = shape or TinyShape()
    directory.mkdir(parents=True, exist_ok=True)
    num_ids = tiny_tokenizer(directory, corpus=corpus) if tokenizer is None else _copy_tokenizer(tokenizer, directory)
    vocab_size = vocab_size or math.ceil(num_ids / 16) * 16
    if vocab_size < num_ids:
        raise ValueError(f"vocab_size={vocab_size} is less than the tokenizer's {num_ids} ids")
    ids = _token_ids(directory)
    config = tiny_config(shape, vocab_size=vocab_size, ids=ids, dtype=dtype, nested=nested_config)
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", {"eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]]})
    _write_json(directory / "preprocessor_config.json", _preprocessor(shape, max_pixels))

    tensors = {
        (_new(name) if names == "new" else name): array
        for name, array in random_weights(shape, vocab_size=vocab_size, seed=seed)
    }
    write_shards(directory, tensors, dtype=dtype, num_shards=num_shards, index=index)
    return directory


def tiny_config(
    shape: TinyShape, *, vocab_size: int, ids: Mapping[str, int], dtype: str = "float32", nested: bool = False
) -> dict[str, Any]:
    """`config.json`, flat as Qwen published it, or nested as transformers 5 writes it."""
    half = shape.head_dim // 2
    side = 3 * half // 8
    section = [half - 2 * side, side, side]
    text = {
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.ffn,
        "max_position_embeddings": 32768,
        "max_window_layers": shape.text_layers,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.text_layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-6,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocab_size,
    }
    if nested:
        text["rope_parameters"] = {"mrope_section": section, "rope_theta": 1e6, "rope_type": "default"}
    else:
        text |= {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": section}}
    vision = _vision_config(shape, nested)
    vision["in_channels" if nested else "in_chans"] = 3
    return {
        "architectures": [ARCHITECTURES[shape.family]],
        **({"text_config": {"model_type": f"{shape.family}_text", **text}} if nested else text),
        "model_type": shape.family,
        "tie_word_embeddings": shape.tied,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_config": vision,
        "dtype" if nested else "torch_dtype": dtype,
    }


ARCHITECTURES = {
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
}


def _vision_config(shape: TinyShape, nested: bool) -> dict[str, Any]:
    common = {
        "depth": shape.vision_layers,
        "model_type": shape.family + "_vision" * nested,
        "num_heads": shape.vision_heads,
        "patch_size": shape.patch,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    if shape.family == "qwen2_vl":
        return common | {
            "embed_dim": shape.vision_hidden,
            "hidden_act": "quick_gelu",
            "hidden_size": shape.hidden,
            "mlp_ratio": shape.vision_ffn // shape.vision_hidden,
        }
    return common | {
        "fullatt_block_indexes": [shape.vision_layers - 1],
        "hidden_act": "silu",
        "hidden_size": shape.vision_hidden,
        "intermediate_size": shape.vision_ffn,
        "out_hidden_size": shape.hidden,
        "tokens_per_second": 2,
        "window_size": shape.window,
    }


def weight_shapes(shape: TinyShape, *, vocab_size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every weight of the model under its old name, in HF's own order."""
    width, merged, hidden = shape.vision_hidden, shape.merged, shape.hidden
    yield "visual.patch_embed.proj.weight", (width, 3, 2, shape.patch, shape.patch)
    for layer in range(shape.vision_layers):
        block = f"visual.blocks.{layer}."
        yield from _norm(block + "norm1", shape)
        yield from _norm(block + "norm2", shape)
        yield from _linear(block + "attn.qkv", 3 * width, width)
        yield from _linear(block + "attn.proj", width, width)
        if shape.family == "qwen2_vl":
            yield from _linear(block + "mlp.fc1", shape.vision_ffn, width)
            yield from _linear(block + "mlp.fc2", width, shape.vision_ffn)
        else:
            yield from _linear(block + "mlp.gate_proj", shape.vision_ffn, width)
            yield from _linear(block + "mlp.up_proj", shape.vision_ffn, width)
            yield from _linear(block + "mlp.down_proj", width, shape.vision_ffn)
    yield from _norm("visual.merger.ln_q", shape)
    yield from _linear("visual.merger.mlp.0", merged, merged)
    yield from _linear("visual.merger.mlp.2", hidden, merged)
    yield "model.embed_tokens.weight", (vocab_size, hidden)
    for layer in range(shape.text_layers):
        block = f"model.layers.{layer}."
        yield from _linear(block + "self_attn.q_proj", hidden, hidden)
        yield from _linear(block + "self_attn.k_proj", shape.kv_heads * shape.head_dim, hidden)
        yield from _linear(block + "self_attn.v_proj", shape.kv_heads * shape.head_dim, hidden)
        yield block + "self_attn.o_proj.weight", (hidden, hidden)
        yield block + "mlp.gate_proj.weight", (shape.ffn, hidden)
        yield block + "mlp.up_proj.weight", (shape.ffn, hidden)
        yield block + "mlp.down_proj.weight", (hidden, shape.ffn)
        yield block + "input_layernorm.weight", (hidden,)
        yield block + "post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not shape.tied:
        yield "lm_head.weight", (vocab_size, hidden)


def random_weights(shape: TinyShape, *, vocab_size: int, seed: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    """Seeded float32 weights: norms near 1, biases near 0, matrices scaled by their inputs."""
    generator = np.random.default_rng(seed)
    for name, size in weight_shapes(shape, vocab_size=vocab_size):
        noise = generator.standard_normal(size, dtype=np.float32)
        if name.endswith("weight") and ("norm" in name or "ln_q" in name):
            yield name, 1 + np.float32(0.1) * noise
        elif len(size) == 1 or "embed_tokens" in name or "lm_head" in name:
            yield name, np.float32(0.05) * noise
        else:
            yield name, noise / np.float32(math.sqrt(math.prod(size[1:])))


def write_shards(
    directory: Path, tensors: Mapping[str, np.ndarray], *, dtype: str, num_shards: int = 1, index: bool | None = None
) -> None:
    """Deal the tensors in order to `num_shards` safetensors files; an index for several, or where `index` says so."""
    names = list(tensors)
    weight_map = {}
    for shard in range(num_shards):
        file = "model.safetensors" if num_shards == 1 else f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = names[len(names) * shard // num_shards : len(names) * (shard + 1) // num_shards]
        weight_map |= dict.fromkeys(part, file)
        write_safetensors(directory / file, {name: tensors[name] for name in part}, dtype=dtype)
    if index or (index is None and num_shards > 1):
        total = sum(array.size for array in tensors.values()) * (4 if dtype == "float32" else 2)
        _write_json(
            directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], *, dtype: str = "float32") -> None:
    """One safetensors file; float32 values are rounded to nearest even for the 16-bit types."""
    tag = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs, offset = [], 0
    for name, array in tensors.items():
        blob = _encode(array, dtype)
        header[name] = {"dtype": tag, "shape": list(array.shape), "data_offsets": [offset, offset + len(blob)]}
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def _encode(array: np.ndarray, dtype: str) -> bytes:
    if dtype == "float32":
        return array.astype("<f4").tobytes()
    if dtype == "float16":
        return array.astype("<f2").tobytes()
    bits = array.astype("<f4").view("<u4").astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def _norm(name: str, shape: TinyShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """RMSNorm; in Qwen2-VL LayerNorm, which has a bias."""
    yield name + ".weight", (shape.vision_hidden,)
    if shape.family == "qwen2_vl":
        yield name + ".bias", (shape.vision_hidden,)


def _linear(name: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield name + ".weight", (rows, columns)
    yield name + ".bias", (rows,)


def _new(name: str) -> str:
    for old, new in (("visual.", "model.visual."), ("model.", "model.language_model.")):
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def _copy_tokenizer(source: Path, directory: Path) -> int:
    for file in source.iterdir():
        if file.is_file() and file.suffix in (".json", ".txt") and file.name != "config.json":
            shutil.copyfile(file, directory / file.name)
    tokenizer = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    ids = [*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"])]
    return int(max(ids)) + 1


def _token_ids(directory: Path) -> dict[str, int]:
    tokenizer = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    return {token["content"]: token["id"] for token in tokenizer["added_tokens"]}


def _preprocessor(shape: TinyShape, max_pixels: int) -> dict[str, Any]:
    return {
        "min_pixels": 4 * 28 * 28,
        "max_pixels": max_pixels,
        "patch_size": shape.patch,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor" if shape.family == "qwen2_5_vl" else "Qwen2VLProcessor",
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
