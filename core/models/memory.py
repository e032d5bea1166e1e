"""What one rank holds in a training: weights, gradients, optimizer state, activations. Arithmetic on the tables, without torch.

Activations are what autograd keeps between forward and backward, counted from `layers/blocks.py` operation by operation: a linear layer
keeps its input if its weight is trained, a norm and SwiGLU keep theirs, attention keeps query, key, value and output.
`tests/bench/test_memory.py` holds the sum against measured peaks.
"""

from __future__ import annotations

import math
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal

from core.models.config import Config
from core.models.lora import Lora
from core.models.mapping import TOWERS, Rename
from core.models.plan import Stage
from core.models.qwen2_5_vl.family import MAPPING, PLAN

CHUNK_TOKENS = 1024
"""Positions per chunk of the loss (`training/loss.py`)."""


def stage_parameters(config: Config, stage: Stage, *, tp_size: int = 1) -> dict[str, int]:
    """Parameters that one tensor-parallel rank of the stage holds, by tower (`vision_encoder`, `vision_projector`, `text_decoder`)."""
    dims = config.dims()
    count = dict.fromkeys(TOWERS, 0)
    for rule in MAPPING:
        if config.tie_word_embeddings and isinstance(rule, Rename) and rule.tied_to and stage.has_embedding:
            continue  # one stage holds both ends: the output layer is the embedding itself
        held = stage.layers(rule.place) or ()
        shape = rule.mm_shape(dims)
        count[rule.place.tower] += len(held) * PLAN[rule.mm].cut(shape, tp_size, 0).size(shape)
    return count


def training_memory(
    config: Config,
    stage: Stage,
    *,
    frozen: AbstractSet[str],
    precision: Literal["bf16", "fp32"],
    tp_size: int = 1,
    dp_size: int = 1,
    lora: Lora | None = None,
) -> dict[str, int]:
    """Bytes for weights, gradients and AdamW's state of one rank.

    bf16 keeps an fp32 master copy beside two fp32 moments (12 bytes per trained parameter) and accumulates gradients in
    fp32; fp32 needs no master copy. Of these states each data-parallel rank holds its share (ZeRO-1). With `lora` its
    adapters alone are trained.
    """
    by_tower = stage_parameters(config, stage, tp_size=tp_size)
    trained = sum(count for tower, count in by_tower.items() if tower not in frozen)
    parameters = sum(by_tower.values())
    if lora is not None:
        trained = lora.parameters(stage, tp_size=tp_size)
        parameters += trained
    return {
        "parameters": parameters,
        "trained_parameters": trained,
        "weights_bytes": parameters * (2 if precision == "bf16" else 4),
        "gradients_bytes": trained * 4,
        "optimizer_bytes": math.ceil(trained * (12 if precision == "bf16" else 8) / dp_size),
    }


@dataclass(frozen=True)
class LayerRecompute:
    """Recompute of one tower; as `layers.recompute.RecomputePolicy`, which needs torch."""

    granularity: Literal["none", "selective", "full"] = "none"
    method: Literal["uniform", "block"] = "uniform"
    num_layers: int = 1


@dataclass(frozen=True)
class Workload:
    """The largest micro-batch, and how many of them a rank has between forward and backward."""

    num_tokens: int
    num_patches: int
    num_targets: int | None = None
    """None: every token."""
    num_in_flight: int = 1
    is_mixed: bool = True
    """Samples of different lengths: the reference attention joins its outputs in one more tensor."""
    has_fused_kernels: bool = True
    """False where plain torch computes (CPU, CUDA): keys and values are repeated for each query head of their group, and in bfloat16
    norms keep float32 copies and SwiGLU an intermediate."""


@dataclass(frozen=True)
class _Kept:
    """Bytes of a tower's part of a stage for one micro-batch."""

    kept: float
    """Between forward and backward."""
    working: float
    """At most on top of that while one layer is computed."""


def in_flight(rank: int, pp_size: int, vpp_size: int = 1) -> int:
    """Micro-batches of each chunk that a pipeline rank has between forward and backward at most: under 1F1B as many as ranks from it on."""
    if vpp_size == 1:
        return pp_size - rank
    return math.ceil((2 * (pp_size - rank - 1) + (vpp_size - 1) * pp_size + 1) / vpp_size)


def activation_bytes(
    config: Config,
    stage: Stage,
    work: Workload,
    *,
    frozen: AbstractSet[str],
    precision: Literal["bf16", "fp32"],
    vision_recompute: LayerRecompute | None = None,
    text_recompute: LayerRecompute | None = None,
    tp_size: int = 1,
    lora: Lora | None = None,
) -> int:
    """Peak bytes of activations of one rank of a stage, its input batch and the loss's working memory included."""
    size = 2 if precision == "bf16" else 4
    vision = _vision(config, stage, work, frozen, size, vision_recompute or LayerRecompute(), tp_size, lora)
    text = _text(config, stage, work, frozen, size, text_recompute or LayerRecompute(), tp_size, lora)
    batch = work.num_tokens * 5 * 8 + (work.num_patches * config.vision.patch_dim * 4 if stage.has_patch_embed else 0)
    kept = batch + vision.kept + text.kept
    held = work.num_in_flight * kept + _messages(config, stage, work, size, tp_size)
    loss = _loss(config, stage, work, size, tp_size, is_trained="text_decoder" not in frozen and lora is None)
    return math.ceil(max(held - text.kept + vision.working, held + text.working, held + loss))


def _layer(
    *,
    hidden: float,
    query: float,
    key: float,
    ffn: float,
    inputs: AbstractSet[str],
    low: float,
    norm: float,
    swiglu: float,
    expanded: bool,
    joined: bool,
    split: int,
    shared: int,
) -> tuple[float, float, float]:
    """Values per row that a transformer layer keeps: all of it, with selective recompute, and its working memory going back.

    `inputs` are the linear layers that keep theirs, for the gradient of their weight or adapter; `low` is what adapters keep beside,
    `norm` and `swiglu` what those keep relative to their width.
    `hidden` parts are divided by `shared`, those of heads and of the MLP by `split` tensor-parallel ranks.
    """
    # The input of proj is kept anyway.
    linear_inputs = (("linear_qkv" in inputs) + ("linear_fc1" in inputs)) * hidden / shared
    rest = 2 * norm * hidden / shared + linear_inputs + low + (swiglu + ("linear_fc2" in inputs)) * ffn / split
    # The value is a view of what linear_qkv returned, and keeps all of it; repeated ones are tensors of their own.
    with_view = (query + key + (query + 2 * key) + query) / split
    core = (4 + joined) * query / split if expanded else with_view
    gathered = (
        2 * hidden if shared > 1 else 0.0
    )  # a layer's whole input, and its gradient before each rank has its rows of it
    return rest + core, rest + min(with_view, core), 3 * ffn / split + 2 * hidden / shared + gathered


def _tower(
    num_layers: int, hidden: float, layer: tuple[float, float, float], policy: LayerRecompute
) -> tuple[float, float]:
    """Values per row that a tower's layers keep, and their working memory."""
    whole, selective, working = layer
    if num_layers == 0:
        return 0.0, 0.0
    if policy.granularity == "selective":
        return num_layers * selective, working
    if policy.granularity == "full" and policy.method == "block":
        recomputed = min(policy.num_layers, num_layers)
        is_all = recomputed == num_layers
        return recomputed * hidden + (num_layers - recomputed) * whole, working + (whole if is_all else 0)
    if policy.granularity == "full":
        unit = min(policy.num_layers, num_layers)
        return math.ceil(num_layers / unit) * hidden, unit * whole - hidden + working
    return num_layers * whole, working


def _vision(
    config: Config,
    stage: Stage,
    work: Workload,
    frozen: AbstractSet[str],
    size: int,
    policy: LayerRecompute,
    tp_size: int,
    lora: Lora | None,
) -> _Kept:
    if not stage.vit_layers and not stage.has_projector:
        return _Kept(0, 0)
    vision = config.vision
    width, ffn, patches = vision.hidden_size, vision.intermediate_size, work.num_patches
    tables, is_plain = 2 * vision.head_dim * 4, size < 4 and not work.has_fused_kernels
    merged = patches / vision.spatial_merge_size**2
    if "vision_encoder" in frozen:  # nothing is kept, a layer's forward works in it
        kept, working = 0.0, patches * size * (3 * width + 3 * ffn / tp_size)
    else:
        layer = _layer(
            hidden=width,
            query=width,
            key=width,
            ffn=ffn,
            inputs=_kept_inputs("vision_encoder", frozen, lora),
            low=_low_rank("vision_encoder", lora),
            norm=_norm("vision_encoder", frozen, lora, is_plain),
            swiglu=3 if is_plain else 2,
            expanded=False,
            joined=False,
            split=tp_size,
            shared=1,
        )
        per_row, transient = _tower(len(stage.vit_layers), width, layer, policy)
        kept, working = patches * (per_row * size + tables), patches * transient * size
    if stage.has_projector and not {"vision_encoder", "vision_projector"} <= frozen:
        inputs = _kept_inputs("vision_projector", frozen, lora) & {"linear_fc1", "linear_fc2"}
        kept += patches * size * width * (1 + _norm("vision_projector", frozen, lora, is_plain) + len(inputs))
    if stage.has_projector:
        kept += merged * size * vision.out_hidden_size
    return _Kept(kept, working)


def _text(
    config: Config,
    stage: Stage,
    work: Workload,
    frozen: AbstractSet[str],
    size: int,
    policy: LayerRecompute,
    tp_size: int,
    lora: Lora | None,
) -> _Kept:
    if not stage.llm_layers and not stage.has_embedding and not stage.has_output:
        return _Kept(0, 0)
    text, tokens = config.text, work.num_tokens
    hidden, inputs = text.hidden_size, _kept_inputs("text_decoder", frozen, lora)
    is_plain = size < 4 and not work.has_fused_kernels
    norm = _norm("text_decoder", frozen, lora, is_plain)
    layer = _layer(
        hidden=hidden,
        query=text.num_attention_heads * text.head_dim,
        key=text.num_key_value_heads * text.head_dim,
        ffn=text.intermediate_size,
        inputs=inputs,
        low=_low_rank("text_decoder", lora),
        norm=norm,
        swiglu=3 if is_plain else 2,
        expanded=not work.has_fused_kernels and text.num_attention_heads > text.num_key_value_heads,
        joined=work.is_mixed,
        split=tp_size,
        shared=tp_size,
    )
    per_row, transient = _tower(len(stage.llm_layers), hidden / tp_size, layer, policy)
    kept = tokens * (per_row * size + 2 * text.head_dim * 4)
    if stage.has_output:
        kept += tokens * (1 + norm) * hidden / tp_size * size
        if (
            tp_size == 1 and not work.has_fused_kernels and stage.llm_layers
        ):  # the rows that the last layer goes on with
            kept += (tokens if work.num_targets is None else work.num_targets) * 2 * hidden * size
        if work.num_targets is not None and stage.llm_layers:  # the last layer goes on with target positions only
            spared = (4 + ("linear_fc1" in inputs)) * hidden + (2 + ("linear_fc2" in inputs)) * text.intermediate_size
            is_kept = policy.granularity in ("none", "selective")
            kept -= (tokens - work.num_targets) * size * (spared if is_kept else 2 * hidden)
    return _Kept(kept, tokens * transient * size)


def _kept_inputs(tower: str, frozen: AbstractSet[str], lora: Lora | None) -> AbstractSet[str]:
    """Linear layers of a tower that keep their input."""
    if lora is not None:
        return lora.kinds(tower)
    return frozenset() if tower in frozen else frozenset(("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"))


def _norm(tower: str, frozen: AbstractSet[str], lora: Lora | None, is_plain: bool) -> float:
    """Values per value of its input that a norm keeps: the input, or in plain bfloat16 a float32 copy, and the normalised ones for the
    gradient of its weight."""
    if not is_plain:
        return 1.0
    return 2.0 + (tower not in frozen and lora is None)


def _low_rank(tower: str, lora: Lora | None) -> float:
    """Values per row that a layer's adapters keep: A x of each."""
    return 0.0 if lora is None else len(lora.kinds(tower)) * lora.r


def _messages(config: Config, stage: Stage, work: Workload, size: int, tp_size: int) -> float:
    """What pipeline stages send: at most the next input, a gradient that is ready and one under way; an output and a gradient to come."""
    in_text, in_vision = (
        work.num_tokens * config.text.hidden_size / tp_size,
        work.num_patches * config.vision.hidden_size,
    )
    incoming = 0.0 if stage.index == 0 else in_vision if stage.vit_layers else in_text
    outgoing = 0.0 if stage.has_output else in_text if stage.llm_layers else in_vision
    return (3 * incoming + 2 * outgoing) * size


def _loss(config: Config, stage: Stage, work: Workload, size: int, tp_size: int, *, is_trained: bool) -> float:
    """Working memory of one chunk: logits in float32 with two more of their size, and the gradient of hidden states; in bfloat16 that of
    the output matrix, before it is added to the float32 one."""
    if not stage.has_output:
        return 0.0
    targets = work.num_tokens if work.num_targets is None else work.num_targets
    logits = min(targets, CHUNK_TOKENS) * config.text.vocab_size / tp_size
    matrix = config.text.vocab_size * config.text.hidden_size / tp_size * size if is_trained and size < 4 else 0
    gathered = work.num_tokens * config.text.hidden_size * size if tp_size > 1 else 0
    return (
        matrix + gathered + logits * (3 * 4 + (2 * size if size < 4 else 0)) + targets * config.text.hidden_size * size
    )
