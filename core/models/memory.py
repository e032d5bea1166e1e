"""What one rank holds in a training: weights, gradients, optimizer state, activations. Arithmetic on the tables, without torch.

Activations are what autograd keeps between forward and backward, counted from `layers/blocks.py` operation by operation: a linear layer
keeps its input if its weight is trained, a norm and SwiGLU keep theirs, attention keeps query, key, value and output.
`tests/bench/test_memory.py` holds the sum against measured peaks.
"""

from __future__ import annotations

import math
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Literal

from core.models.config import Config
from core.models.lora import Lora
from core.models.mapping import TOWERS, Rename
from core.models.plan import Stage
from core.models.qwen2_5_vl.family import MAPPING, PLAN

VALUE_BYTES = {"bf16": 2, "fp32": 4}
"""Of a weight."""
STATE_BYTES = {"bf16": 12, "fp32": 8}
"""AdamW's state of a trained parameter: two fp32 moments, and beside bf16 weights an fp32 master copy."""
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

    Gradients are accumulated in fp32. Of AdamW's state (STATE_BYTES) each data-parallel rank holds its share (ZeRO-1). With `lora`
    its adapters alone are trained.
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
        "weights_bytes": parameters * VALUE_BYTES[precision],
        "gradients_bytes": trained * 4,
        "optimizer_bytes": math.ceil(trained * STATE_BYTES[precision] / dp_size),
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
class _Tower:
    """A tower as it is trained, and what its layers keep by that."""

    name: str
    frozen: AbstractSet[str]
    """Of all towers."""
    lora: Lora | None
    recompute: LayerRecompute
    size: int
    """Bytes of a value."""
    tp_size: int
    is_plain: bool
    """Plain torch in bfloat16."""

    @property
    def inputs(self) -> AbstractSet[str]:
        """Linear layers that keep their input, for the gradient of their weight or adapter."""
        if self.lora is not None:
            return self.lora.kinds(self.name)
        every = frozenset(("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"))
        return frozenset() if self.name in self.frozen else every

    @property
    def norm(self) -> float:
        """Values per value of its input that a norm keeps: the input, or in plain bfloat16 a float32 copy, and the normalised ones for
        the gradient of its weight."""
        if not self.is_plain:
            return 1.0
        return 2.0 + (self.name not in self.frozen and self.lora is None)

    @property
    def swiglu(self) -> int:
        """Values per value of its width that SwiGLU keeps."""
        return 3 if self.is_plain else 2

    @property
    def low_rank(self) -> int:
        """Values per row that a layer's adapters keep: A x of each."""
        return 0 if self.lora is None else len(self.lora.kinds(self.name)) * self.lora.r


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
    size = VALUE_BYTES[precision]
    is_plain = size < 4 and not work.has_fused_kernels

    def tower(name: str, recompute: LayerRecompute | None) -> _Tower:
        return _Tower(name, frozen, lora, recompute or LayerRecompute(), size, tp_size, is_plain)

    vision = _vision(config, stage, work, tower("vision_encoder", vision_recompute))
    text = _text(config, stage, work, tower("text_decoder", text_recompute))
    batch = work.num_tokens * 5 * 8 + (work.num_patches * config.vision.patch_dim * 4 if stage.has_patch_embed else 0)
    kept = batch + vision.kept + text.kept
    held = work.num_in_flight * kept + _messages(config, stage, work, size, tp_size)
    loss = _loss(config, stage, work, size, tp_size, is_trained="text_decoder" not in frozen and lora is None)
    return math.ceil(max(held - text.kept + vision.working, held + text.working, held + loss))


def _layer(
    tower: _Tower,
    *,
    hidden: float,
    query: float,
    key: float,
    ffn: float,
    expanded: bool,
    joined: bool,
    shared: int,
) -> tuple[float, float, float]:
    """Values per row that a transformer layer keeps: all of it, with selective recompute, and its working memory going back.

    `hidden` parts are divided by `shared`, those of heads and of the MLP by all tensor-parallel ranks.
    """
    inputs, split = tower.inputs, tower.tp_size
    # The input of proj is kept anyway.
    linear_inputs = (("linear_qkv" in inputs) + ("linear_fc1" in inputs)) * hidden / shared
    mlp = (tower.swiglu + ("linear_fc2" in inputs)) * ffn / split
    rest = 2 * tower.norm * hidden / shared + linear_inputs + tower.low_rank + mlp
    # The value is a view of what linear_qkv returned, and keeps all of it; repeated ones are tensors of their own.
    with_view = (query + key + (query + 2 * key) + query) / split
    core = (4 + joined) * query / split if expanded else with_view
    # A layer's whole input, and its gradient before each rank has its rows of it.
    gathered = 2 * hidden if shared > 1 else 0.0
    return rest + core, rest + min(with_view, core), 3 * ffn / split + 2 * hidden / shared + gathered


def _layers(
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


def _vision(config: Config, stage: Stage, work: Workload, tower: _Tower) -> _Kept:
    if not stage.vit_layers and not stage.has_projector:
        return _Kept(0, 0)
    vision, size = config.vision, tower.size
    width, ffn, patches = vision.hidden_size, vision.intermediate_size, work.num_patches
    tables = 2 * vision.head_dim * 4
    merged = patches / vision.spatial_merge_size**2
    if tower.name in tower.frozen:  # nothing is kept, a layer's forward works in it
        kept, working = 0.0, patches * size * (3 * width + 3 * ffn / tower.tp_size)
    else:
        layer = _layer(tower, hidden=width, query=width, key=width, ffn=ffn, expanded=False, joined=False, shared=1)
        per_row, transient = _layers(len(stage.vit_layers), width, layer, tower.recompute)
        kept, working = patches * (per_row * size + tables), patches * transient * size
    if stage.has_projector and not {"vision_encoder", "vision_projector"} <= tower.frozen:
        projector = replace(tower, name="vision_projector")
        inputs = projector.inputs & {"linear_fc1", "linear_fc2"}
        kept += patches * size * width * (1 + projector.norm + len(inputs))
    if stage.has_projector:
        kept += merged * size * vision.out_hidden_size
    return _Kept(kept, working)


def _text(config: Config, stage: Stage, work: Workload, tower: _Tower) -> _Kept:
    if not stage.llm_layers and not stage.has_embedding and not stage.has_output:
        return _Kept(0, 0)
    text, tokens, size = config.text, work.num_tokens, tower.size
    hidden, inputs, tp_size = text.hidden_size, tower.inputs, tower.tp_size
    layer = _layer(
        tower,
        hidden=hidden,
        query=text.num_attention_heads * text.head_dim,
        key=text.num_key_value_heads * text.head_dim,
        ffn=text.intermediate_size,
        expanded=not work.has_fused_kernels and text.num_attention_heads > text.num_key_value_heads,
        joined=work.is_mixed,
        shared=tp_size,
    )
    per_row, transient = _layers(len(stage.llm_layers), hidden / tp_size, layer, tower.recompute)
    kept = tokens * (per_row * size + 2 * text.head_dim * 4)
    if stage.has_output:
        kept += tokens * (1 + tower.norm) * hidden / tp_size * size
        if tp_size == 1 and not work.has_fused_kernels and stage.llm_layers:
            # The rows that the last layer goes on with.
            kept += (tokens if work.num_targets is None else work.num_targets) * 2 * hidden * size
        if work.num_targets is not None and stage.llm_layers:  # the last layer goes on with target positions only
            spared = (4 + ("linear_fc1" in inputs)) * hidden + (2 + ("linear_fc2" in inputs)) * text.intermediate_size
            is_kept = tower.recompute.granularity in ("none", "selective")
            kept -= (tokens - work.num_targets) * size * (spared if is_kept else 2 * hidden)
    return _Kept(kept, tokens * transient * size)


def _messages(config: Config, stage: Stage, work: Workload, size: int, tp_size: int) -> float:
    """What pipeline stages send: at most the next input, a gradient that is ready and one under way; an output and a gradient to come."""
    in_text = work.num_tokens * config.text.hidden_size / tp_size
    in_vision = work.num_patches * config.vision.hidden_size
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
