"""What one rank holds for the whole of a training: weights, gradients, optimizer state. Arithmetic on the tables."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Literal

from core.models.mapping import Place, Rename
from core.models.plan import Stage
from core.models.qwen2_5_vl.family import MAPPING, PLAN, Config

_TOWER = {
    Place.PATCH_EMBED: "vision_encoder",
    Place.VIT_LAYER: "vision_encoder",
    Place.PROJECTOR: "vision_projector",
    Place.EMBEDDING: "text_decoder",
    Place.LLM_LAYER: "text_decoder",
    Place.OUTPUT: "text_decoder",
}


def stage_parameters(config: Config, stage: Stage, *, tp_size: int = 1) -> dict[str, int]:
    """Parameters that one tensor-parallel rank of the stage holds, by tower (`vision_encoder`, `vision_projector`, `text_decoder`)."""
    dims = config.dims()
    count = dict.fromkeys(("vision_encoder", "vision_projector", "text_decoder"), 0)
    for rule in MAPPING:
        if config.tie_word_embeddings and isinstance(rule, Rename) and rule.tied_to and stage.has_embedding:
            continue  # one stage holds both ends: the output layer is the embedding itself
        held = stage.layers(rule.place) or ()
        shape = rule.mm_shape(dims)
        count[_TOWER[rule.place]] += len(held) * PLAN[rule.mm].cut(shape, tp_size, 0).size(shape)
    return count


def training_memory(
    config: Config, stage: Stage, *, frozen: AbstractSet[str], precision: Literal["bf16", "fp32"], tp_size: int = 1
) -> dict[str, int]:
    """Bytes for weights, gradients and AdamW's state of one rank.

    bf16 keeps an fp32 master copy beside two fp32 moments (12 bytes per trained parameter) and accumulates gradients in
    fp32; fp32 needs no master copy.
    """
    parameters = stage_parameters(config, stage, tp_size=tp_size)
    trained = sum(count for tower, count in parameters.items() if tower not in frozen)
    return {
        "parameters": sum(parameters.values()),
        "weights_bytes": sum(parameters.values()) * (2 if precision == "bf16" else 4),
        "gradients_bytes": trained * 4,
        "optimizer_bytes": trained * (12 if precision == "bf16" else 8),
    }
