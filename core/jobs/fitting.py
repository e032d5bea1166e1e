"""Whether a training fits its devices, and what would: memory of each rank and space on disk, from the spec and the config alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, Field

from core.errors import AppError, InvalidSpec
from core.models.config import Config
from core.models.lora import Lora, adapted_layers
from core.models.memory import (
    STATE_BYTES,
    VALUE_BYTES,
    LayerRecompute,
    Workload,
    activation_bytes,
    in_flight,
    training_memory,
)
from core.models.plan import Stage, stages
from core.specs.parallel import TrainingParallelSpec
from core.specs.training import LoraSpec, RecomputeSpec, RecomputeSpecs, TrainingSpec

GIB = 1 << 30
ASSUMED_DEVICE_BYTES = 64 * GIB
"""Of a device that does not tell its memory: an Ascend 910B."""
MOST_SUGGESTIONS = 3
TP_PP = ((1, 2), (2, 1), (1, 4), (2, 2), (4, 1), (1, 8), (2, 4), (4, 2), (8, 1), (4, 4), (8, 2), (8, 4), (8, 8))
"""Splits that are tried, the cheapest first."""


class RankMemory(BaseModel):
    """Peak bytes of a rank by what they are for."""

    pipeline_rank: int
    parameters: int
    trained_parameters: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int = Field(description="The share of one data-parallel rank.")
    activations_bytes: int = Field(description="Of the largest micro-batch, with those the pipeline has in flight.")
    total_bytes: int
    fits: bool = Field(description="Whether a device has room for it.")


def memory_per_rank(spec: TrainingSpec, config: Config, device_bytes: int, *, fused: bool = True) -> list[RankMemory]:
    """Predict the peak of each pipeline rank; every token of the largest micro-batch may be an image's."""
    parallel = spec.parallel
    split = stages(config, parallel)
    return [
        _rank_memory(spec, config, rank, split[rank :: parallel.pp_size], device_bytes, fused)
        for rank in range(parallel.pp_size)
    ]


def disk_bytes(spec: TrainingSpec, ranks: Sequence[RankMemory]) -> int:
    """Most space that a training's checkpoints and artifacts take at a time, from the memory of its pipeline ranks.

    While a checkpoint is written, the `keep_last` before it are still there. Artifacts are hard links to the last ones; with
    adapters the checkpoints hold those alone, and the merged model and PEFT's folders are written beside them at the end.
    """
    wanted, tp = spec.checkpoint, spec.parallel.tp_size
    width, states = VALUE_BYTES[spec.precision], STATE_BYTES[spec.precision]
    trained = sum(rank.trained_parameters for rank in ranks) * tp
    everything = sum(rank.parameters for rank in ranks) * tp
    weights = (trained if spec.lora else everything) * width
    each = weights + (trained * states if wanted.save_optim else 0)
    written = -(-spec.train_iters // (wanted.save_interval or spec.train_iters))
    while_training = min(written, wanted.keep_last + 1) * each
    if spec.lora is None:
        return while_training
    published = (everything - trained) * width + min(written, wanted.keep_last) * (each + weights)
    return max(while_training, published)


def suggestions(
    spec: TrainingSpec, config: Config, device_bytes: int, *, hosts: Sequence[int] = (), fused: bool = True
) -> list[str]:
    """Changes of recompute, dp, pp and tp, the cheapest first, with which every rank fits; at most three.

    `hosts`: the devices of each host; what they cannot run is not suggested. Empty = not known, any number of hosts with 8.
    """
    full = RecomputeSpec(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    policies = {
        "": spec.recompute,
        "full recompute of both towers": RecomputeSpecs(vision_encoder=full, text_decoder=full),
    }
    found: list[str] = []
    for told, parallel in _layouts(spec.parallel, config, hosts):
        if "data-parallel" in told and any("data-parallel" in text for text in found):
            continue  # the smallest is enough
        for name, recompute in policies.items():
            if (not told and not name) or name in found:  # the present spec; what is enough without more devices
                continue
            changed = spec.model_copy(update={"parallel": parallel, "recompute": recompute})
            if _fits(changed, config, device_bytes, fused=fused):
                found.append(" with ".join(part for part in (told, name) if part))
                break
        if len(found) == MOST_SUGGESTIONS:
            break
    return found


def _layouts(
    present: TrainingParallelSpec, config: Config, hosts: Sequence[int]
) -> Iterator[tuple[str, TrainingParallelSpec]]:
    """The present layout, more data-parallel ranks, and finer splits, each with what to say, where the hosts can run it."""
    yield "", present
    for factor in (2, 4, 8):  # the optimizer's state is shared by more
        told = f"data-parallel size {factor * present.dp_size}"
        yield from _on_hosts(told, present, {}, factor * present.world_size, hosts)
    depth = config.text.num_hidden_layers
    for tp, pp in TP_PP:
        if pp > depth or tp * pp <= present.tp_size * present.pp_size:
            continue
        llm = [[depth // pp + (1 if rank >= pp - depth % pp else 0) for rank in range(pp)]]
        vit = [[config.vision.depth, *[0] * (pp - 1)]]
        change = {"tp_size": tp, "llm_pp_layers": llm, "vit_pp_layers": vit}
        told = ", ".join(f"{name} {value}" for name, value in change.items())
        yield from _on_hosts(told, present, change, tp * pp, hosts)


def _on_hosts(
    told: str, present: TrainingParallelSpec, change: dict[str, Any], processes: int, hosts: Sequence[int]
) -> Iterator[tuple[str, TrainingParallelSpec]]:
    """Spread a layout of so many processes, at least, over the hosts; nothing where they do not suffice or do not divide so."""
    per_host = max(present.nproc_per_node, min(processes, max(hosts, default=8)))
    wanted = {"nnodes": max(present.nnodes, -(-processes // per_host)), "nproc_per_node": per_host}
    if hosts and sum(devices >= per_host for devices in hosts) < wanted["nnodes"]:
        return
    added = "".join(f"{name} {value}, " for name, value in wanted.items() if value != getattr(present, name))
    try:
        parallel = TrainingParallelSpec.model_validate({**present.model_dump(), **change, **wanted})
    except ValueError:
        return
    yield added + told, parallel


def _fits(spec: TrainingSpec, config: Config, device_bytes: int, *, fused: bool) -> bool:
    """Whether the spec can be run, and every rank then fits."""
    if spec.global_batch_size % spec.parallel.dp_size:
        return False
    try:
        ranks = memory_per_rank(spec, config, device_bytes, fused=fused)
    except AppError:  # this model does not divide so
        return False
    return all(rank.fits for rank in ranks)


def lora_suggestion(spec: TrainingSpec, config: Config, device_bytes: int, *, fused: bool = True) -> list[str]:
    """Adapters in place of whole weights, if every rank then fits as the spec is."""
    if spec.lora is not None or spec.resume_from is not None:
        return []
    lora = LoraSpec(target_modules=("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"))
    ranks = memory_per_rank(spec.model_copy(update={"lora": lora}), config, device_bytes, fused=fused)
    return ["lora on all linear layers, which trains adapters alone"] if all(rank.fits for rank in ranks) else []


def check_recompute(spec: TrainingSpec, config: Config) -> None:
    """Refuse recomputation of more layers than there are. Raises InvalidSpec."""
    layers = {"vision_encoder": config.vision.depth, "text_decoder": config.text.num_hidden_layers}
    for tower, policy in spec.recompute:
        count = policy.recompute_num_layers if policy else None
        if count is not None and count > layers[tower]:
            raise InvalidSpec(
                f"spec.recompute.{tower}.recompute_num_layers is {count}, the model has {layers[tower]} such layers",
                hint=f"use at most {layers[tower]}",
            )


def lora_of(spec: TrainingSpec, config: Config) -> Lora | None:
    """The adapters that a spec asks for. Raises InvalidSpec where `target_modules` and `freeze` do not fit the model."""
    if spec.lora is None:
        return None
    return Lora(tuple(adapted_layers(config, spec.lora.target_modules, _frozen(spec))), spec.lora.r)


def _rank_memory(
    spec: TrainingSpec, config: Config, pp_rank: int, held: Sequence[Stage], device_bytes: int, fused: bool
) -> RankMemory:
    frozen, lora = _frozen(spec), lora_of(spec, config)
    parallel, tokens = spec.parallel, spec.micro_batch_size * spec.seq_length
    estimates = [
        training_memory(
            config,
            stage,
            frozen=frozen,
            precision=spec.precision,
            tp_size=parallel.tp_size,
            dp_size=parallel.dp_size,
            lora=lora,
        )
        for stage in held
    ]
    work = Workload(
        tokens,
        tokens * config.vision.spatial_merge_size**2,
        num_in_flight=in_flight(pp_rank, parallel.pp_size, len(held)),
        has_fused_kernels=fused,
    )
    activations = sum(
        activation_bytes(
            config,
            stage,
            work,
            frozen=frozen,
            precision=spec.precision,
            vision_recompute=_layer_recompute(spec.recompute.vision_encoder),
            text_recompute=_layer_recompute(spec.recompute.text_decoder),
            tp_size=parallel.tp_size,
            lora=lora,
        )
        for stage in held
    )
    sums = {name: sum(estimate[name] for estimate in estimates) for name in estimates[0]}
    total = activations + sum(value for name, value in sums.items() if name.endswith("_bytes"))
    return RankMemory(
        pipeline_rank=pp_rank, **sums, activations_bytes=activations, total_bytes=total, fits=total <= device_bytes
    )


def _frozen(spec: TrainingSpec) -> frozenset[str]:
    return frozenset(tower for tower, is_frozen in spec.freeze if is_frozen)


def _layer_recompute(spec: RecomputeSpec | None) -> LayerRecompute:
    if spec is None:
        return LayerRecompute()
    return LayerRecompute(
        spec.recompute_granularity, spec.recompute_method or "uniform", spec.recompute_num_layers or 1
    )
