"""MindSpeed-MM's layout written a second time, the slow and obvious way: whole tensors, split, chunked and concatenated.

Nothing is shared with the code under test; what both agree on is the format (keys, permutations, stages, cuts).
"""

from collections.abc import Mapping
from itertools import chain

import numpy as np

from tests.tiny import TinyShape

Weights = Mapping[str, np.ndarray]
PREFIXES = ("image_encoder.encoder.blocks.layers", "text_decoder.decoder.layers")


def rank_files(
    hf: Weights, shape: TinyShape, *, tp: int, llm: list[list[int]], vit: list[list[int]], canonical: bool = False
) -> dict[tuple[int, int], dict[str, dict[str, np.ndarray]]]:
    """(tp rank, pp rank) -> model key -> mm name -> array."""
    pp, vpp = len(llm[0]), len(llm)
    flat_llm, flat_vit = (list(chain.from_iterable(lists)) for lists in (llm, vit))
    files: dict[tuple[int, int], dict[str, dict[str, np.ndarray]]] = {}
    for tp_rank in range(tp):
        for pp_rank in range(pp):
            for chunk in range(vpp):
                stage = chunk * pp + pp_rank
                whole = stage_weights(hf, shape, stage, flat_llm, flat_vit, pp > 1, canonical)
                key = "model" if vpp == 1 else f"model{chunk}"
                part = {name: cut(name, array, tp, tp_rank, gated(name, shape)) for name, array in whole.items()}
                files.setdefault((tp_rank, pp_rank), {})[key] = part
    return files


def stage_weights(
    hf: Weights, shape: TinyShape, stage: int, llm: list[int], vit: list[int], copy_tied: bool, canonical: bool
) -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {}
    vit_stages = [index for index, count in enumerate(vit) if count]
    llm_stages = [index for index, count in enumerate(llm) if count]
    if stage == vit_stages[0]:
        out["image_encoder.encoder.patch_embed.proj.weight"] = hf["visual.patch_embed.proj.weight"]
    for local in range(vit[stage]):
        layer = sum(vit[:stage]) + local
        out |= vision_layer(hf, shape, f"visual.blocks.{layer}", f"{PREFIXES[0]}.{local}", canonical)
    if stage == vit_stages[-1]:
        out |= norm(hf, shape, "visual.merger.ln_q", "image_encoder.projector.layernorm")
        for kind in ("weight", "bias"):
            out[f"image_encoder.projector.encoder.linear_fc1.{kind}"] = hf[f"visual.merger.mlp.0.{kind}"]
            out[f"image_encoder.projector.encoder.linear_fc2.{kind}"] = hf[f"visual.merger.mlp.2.{kind}"]
    if stage == llm_stages[0]:
        out["text_decoder.embedding.word_embeddings.weight"] = hf["model.embed_tokens.weight"]
    for local in range(llm[stage]):
        layer = sum(llm[:stage]) + local
        out |= text_layer(hf, shape, f"model.layers.{layer}", f"{PREFIXES[1]}.{local}", canonical)
    if stage == llm_stages[-1]:
        out["text_decoder.decoder.final_layernorm.weight"] = hf["model.norm.weight"]
        if not shape.tied:
            out["text_decoder.output_layer.weight"] = hf["lm_head.weight"]
        elif copy_tied:
            out["text_decoder.output_layer.weight"] = hf["model.embed_tokens.weight"]
    return out


def vision_layer(hf: Weights, shape: TinyShape, old: str, new: str, canonical: bool) -> dict[str, np.ndarray]:
    out = {
        **norm(hf, shape, f"{old}.norm1", f"{new}.input_layernorm"),
        **norm(hf, shape, f"{old}.norm2", f"{new}.pre_mlp_layernorm"),
    }
    for kind in ("weight", "bias"):
        qkv = hf[f"{old}.attn.qkv.{kind}"]
        if not canonical:
            q, k, v = np.split(qkv, 3)
            heads = [np.split(part, shape.vision_heads) for part in (q, k, v)]
            qkv = np.concatenate([part[head] for head in range(shape.vision_heads) for part in heads])
        out[f"{new}.self_attention.linear_qkv.{kind}"] = qkv
        out[f"{new}.self_attention.linear_proj.{kind}"] = hf[f"{old}.attn.proj.{kind}"]
        if shape.family == "qwen2_vl":
            out |= {f"{new}.mlp.linear_{fc}.{kind}": hf[f"{old}.mlp.{fc}.{kind}"] for fc in ("fc1", "fc2")}
            continue
        gate, up = hf[f"{old}.mlp.gate_proj.{kind}"], hf[f"{old}.mlp.up_proj.{kind}"]
        out |= gate_up(new, kind, gate, up, canonical)
        out[f"{new}.mlp.linear_fc2.{kind}"] = hf[f"{old}.mlp.down_proj.{kind}"]
    return out


def norm(hf: Weights, shape: TinyShape, old: str, new: str) -> dict[str, np.ndarray]:
    kinds = ("weight", "bias") if shape.family == "qwen2_vl" else ("weight",)
    return {f"{new}.{kind}": hf[f"{old}.{kind}"] for kind in kinds}


def text_layer(hf: Weights, shape: TinyShape, old: str, new: str, canonical: bool) -> dict[str, np.ndarray]:
    out = {
        f"{new}.input_layernorm.weight": hf[f"{old}.input_layernorm.weight"],
        f"{new}.pre_mlp_layernorm.weight": hf[f"{old}.post_attention_layernorm.weight"],
        f"{new}.self_attention.linear_proj.weight": hf[f"{old}.self_attn.o_proj.weight"],
        f"{new}.mlp.linear_fc2.weight": hf[f"{old}.mlp.down_proj.weight"],
    }
    for kind in ("weight", "bias"):
        parts = [hf[f"{old}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
        if canonical:
            out |= {f"{new}.self_attention.{part}_proj.{kind}": array for part, array in zip("qkv", parts, strict=True)}
            continue
        groups = [np.split(part, shape.kv_heads) for part in parts]
        qkv = [group[index] for index in range(shape.kv_heads) for group in groups]
        out[f"{new}.self_attention.linear_qkv.{kind}"] = np.concatenate(qkv)
    out |= gate_up(new, "weight", hf[f"{old}.mlp.gate_proj.weight"], hf[f"{old}.mlp.up_proj.weight"], canonical)
    return out


def gate_up(new: str, kind: str, gate: np.ndarray, up: np.ndarray, canonical: bool) -> dict[str, np.ndarray]:
    if canonical:
        return {f"{new}.mlp.gate_proj.{kind}": gate, f"{new}.mlp.up_proj.{kind}": up}
    return {f"{new}.mlp.linear_fc1.{kind}": np.concatenate([gate, up])}


def gated(name: str, shape: TinyShape) -> bool:
    """Whether an MLP has gate and up."""
    return name.startswith("text_decoder") or (shape.family == "qwen2_5_vl" and "projector" not in name)


def cut(name: str, array: np.ndarray, tp: int, rank: int, gated_mlp: bool) -> np.ndarray:
    """What one tensor-parallel rank gets."""
    module, kind = name.rsplit(".", 2)[-2:]
    if module == "linear_fc1" and gated_mlp:
        gate, up = np.split(array, 2)
        return np.concatenate([np.split(gate, tp)[rank], np.split(up, tp)[rank]])
    if module in ("linear_qkv", "linear_fc1", "word_embeddings", "output_layer"):
        return np.split(array, tp)[rank]
    if module in ("linear_proj", "linear_fc2") and kind == "weight":
        return np.split(array, tp, axis=1)[rank]
    return array
