"""The training kind: one process per rank, started by torchrun.

    inputs ──► weights of this rank's stage ─┐
    dataset ─► step loader ──────────────────┴─► Trainer ──► JOB_DIR/checkpoints ──► artifacts

Checkpoints live in the job's folder, so they survive attempts: a new attempt goes on from the newest complete one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.conversion.load import load_stage, load_stage_from_hf
from core.conversion.mm import rank_dir
from core.data.dataset import TokenisedDataset
from core.device import Accelerator, get_accelerator
from core.errors import AppError, IncompatiblePlan, InvalidModel
from core.jobs.resuming import checkpoint_metadata
from core.models.config import Config
from core.models.flops import model_flops, peak_flops
from core.models.hf_folder import read_config
from core.models.layers.recompute import Recompute, RecomputePolicy
from core.models.lora import Lora
from core.models.plan import Stage, stages
from core.models.registry import Family, detect
from core.parallel.mesh import Mesh, build_mesh
from core.runners.context import InputArtifact, RunContext, Stopped
from core.runners.publishing import curves, publish, publish_adapted, publish_curves_if_possible
from core.runners.ranks import errors_of_other_ranks, process_group
from core.settings import Settings
from core.specs.parallel import ParallelSpec
from core.specs.training import RecomputeSpec, RecomputeSpecs, TrainingSpec
from core.training.checkpoint import Checkpoints, Facts, Position
from core.training.feeding import build_loader, check_dataset, largest_batch
from core.training.freeze import ParameterRow, freeze, summary
from core.training.heartbeat import Heartbeat, end_process
from core.training.lora import Adapters
from core.training.optimizer import Optimizer
from core.training.resume import Origin, load_weights
from core.training.tensorboard import TensorBoard
from core.training.together import Together
from core.training.trainer import Outcome, Trainer
from core.training.wiring import Head, build_pipeline, join, shard_chunks

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def run(ctx: RunContext, spec: TrainingSpec) -> None:
    """Train, keep checkpoints, publish them. Raises Stopped after a stop that was asked for."""
    accelerator, settings = get_accelerator(ctx.device, ctx.local_rank), Settings()
    with (
        process_group(ctx, accelerator),
        errors_of_other_ranks(ctx),
        Heartbeat(
            ctx.attempt_dir / "heartbeats",
            ctx.rank,
            fail=partial(_end, ctx),
            tell=partial(ctx.failed, in_place_of_rank_0=True),
            limit_s=settings.stall_limit_s,
        ) as heartbeat,
        curves(ctx),
    ):
        outcome = _train(ctx, spec, accelerator, heartbeat, settings)
    if outcome is Outcome.STOPPED:
        raise Stopped


def _train(
    ctx: RunContext, spec: TrainingSpec, accelerator: Accelerator, heartbeat: Heartbeat, settings: Settings
) -> Outcome:
    family, config_json = find_config(ctx.inputs["model"])
    config = family.parse_config(config_json)
    all_stages = stages(config, spec.parallel)
    mesh = _mesh(ctx, spec, config, all_stages)
    own_stages = all_stages[mesh.pp_rank :: mesh.pp_size]
    accelerator.seed(spec.seed)
    dataset = TokenisedDataset(ctx.inputs["dataset"].path)
    check_dataset(dataset, spec, config)
    checkpoints = Checkpoints(
        ctx.job_dir / "checkpoints",
        mesh,
        rank_folder=Path(rank_dir("release", mesh.tp_rank, mesh.pp_rank, mesh.pp_size)).name,
        keep_last=spec.checkpoint.keep_last,
    )
    given = ctx.inputs.get("resume_from")
    origin = Origin.find(checkpoints, given.path if given else None)
    facts = _new_facts(spec, dataset)
    adapters = Adapters.of(spec, config)
    frozen = frozenset(tower for tower, is_frozen in spec.freeze if is_frozen)

    with Together(mesh):
        if origin is not None:
            facts = origin.resumed(facts, spec, ctx)
        chunks = [_build(family, config, stage, accelerator, spec) for stage in own_stages]
        model = join(chunks)
        table = freeze(model, spec.freeze, all_weights=adapters is not None)
        held = shard_chunks(chunks, family.plan, mesh)
        if adapters is not None:
            more_rows, more_held = adapters.attach(chunks, own_stages, family.plan, mesh)
            table, held = [*table, *more_rows], {**held, **more_held}
        _allocate(model, accelerator, spec)
        weights = [origin.weights(facts, config, own_stages, mesh)] if origin is not None else []
        if origin is None and adapters is not None:
            weights.append(adapters.initial(own_stages, mesh))
        if origin is None or adapters is not None:  # checkpoints of adapters have them alone
            weights.append(_weights(ctx, config, own_stages, mesh))
        load_weights(model, chain.from_iterable(weights))
    optimizer = Optimizer(model, spec.optimizer, mesh, held=held)
    with Together(mesh):
        if origin is not None and origin.loads_optimizer(spec):
            origin.load_optimizer(optimizer, facts, config, own_stages, mesh)
        if origin is not None and origin.loads_rng(spec, facts):
            origin.load_rng(accelerator)
    counts = _tell(ctx, mesh, table)

    targets_only = mesh.tp_group is None and not accelerator.static_shapes
    head = Head(chunks[-1], accelerator.device, mesh, targets_only=targets_only)
    trainer = Trainer(
        spec=spec,
        mesh=mesh,
        accelerator=accelerator,
        model=model,
        pipeline=build_pipeline(chunks, head, mesh, config, all_stages, spec.freeze, accelerator),
        head=head,
        optimizer=optimizer,
        checkpoints=checkpoints,
        facts=facts,
        reporter=ctx,
        flops=model_flops(config, frozen=frozen, lora=None if adapters is None else Lora(adapters.layers, adapters.r)),
        peak_flops=_peak_flops(accelerator, spec, settings),
        heartbeat=heartbeat,
        saved_at=facts.position.iteration if origin is not None else None,
    )
    if origin is None or not origin.is_own:
        trainer.rehearse(largest_batch(dataset, spec, mesh, own_stages[0], config, accelerator))
    with (
        closing(checkpoints),
        _tensorboard(ctx, spec, facts.position) as trainer.tensorboard,
        build_loader(dataset, spec, mesh, own_stages[0], config, accelerator, facts.position) as loader,
    ):
        outcome = trainer.train(loader)
    heartbeat.stop()
    finished = outcome is Outcome.FINISHED
    metadata = {**_metadata(family, config_json, spec), "trained": counts}
    if adapters is not None:
        probe = largest_batch(dataset, spec, mesh, own_stages[0], config, accelerator) if finished else None
        publish_adapted(ctx, spec, trainer, adapters, metadata=metadata, probe=probe)
    elif mesh.rank == 0:
        publish(ctx, checkpoints, finished=finished, metadata=metadata)
    if finished and mesh.rank == 0:  # nothing resumes from here any more; the artifacts hold the same files
        shutil.rmtree(ctx.job_dir / "checkpoints")
    return outcome


def _peak_flops(accelerator: Accelerator, spec: TrainingSpec, settings: Settings) -> float | None:
    if settings.peak_tflops is not None:
        return settings.peak_tflops * 1e12
    return peak_flops(accelerator.device_name(), spec.precision)


def _tensorboard(ctx: RunContext, spec: TrainingSpec, position: Position) -> AbstractContextManager[TensorBoard | None]:
    if not ctx.is_main or not spec.tensorboard:
        return nullcontext()
    return TensorBoard(ctx.job_dir / "tensorboard", attempt=ctx.attempt, next_step=position.iteration + 1)


def _end(ctx: RunContext, error: AppError) -> None:
    """End this process; its main thread waits for something that does not come."""
    ctx.log.error("%s: %s", error.code, error.message)
    publish_curves_if_possible(ctx)
    end_process()


def find_config(source: InputArtifact) -> tuple[Family, dict[str, Any]]:
    """Return the family and `config.json` of a model input of either layout. Raises InvalidModel."""
    config_json = source.metadata.get("config")
    if config_json is None:
        config_json = read_config(source.path if source.kind == "hf_model" else source.path / "hf")
    return detect(config_json), config_json


def _mesh(ctx: RunContext, spec: TrainingSpec, config: Config, all_stages: Sequence[Stage]) -> Mesh:
    parallel = spec.parallel
    if parallel.world_size != ctx.world_size:
        raise IncompatiblePlan(f"the spec asks for {parallel.world_size} processes, {ctx.world_size} were started")
    tied = [stage.index % parallel.pp_size for stage in all_stages if stage.has_embedding or stage.has_output]
    return build_mesh(
        pp_size=parallel.pp_size,
        dp_size=parallel.dp_size,
        tp_size=parallel.tp_size,
        tied_stages=tied if config.tie_word_embeddings else (),
    )


def _new_facts(spec: TrainingSpec, dataset: TokenisedDataset) -> Facts:
    content = hashlib.sha256(dataset.lengths.tobytes() + dataset.num_targets.tobytes())
    return Facts(
        position=Position(),
        layout=spec.parallel.layout.model_dump(mode="json"),
        precision=spec.precision,
        seed=spec.seed,
        dataset=content.hexdigest()[:16],
        has_optimizer=spec.checkpoint.save_optim,
        has_rng=spec.checkpoint.save_rng,
        dp_size=spec.parallel.dp_size,
    )


def _build(family: Family, config: Config, stage: Stage, accelerator: Accelerator, spec: TrainingSpec) -> nn.Module:
    """Make the stage's module, whole and without memory for its weights."""
    with torch.device("meta"):
        model: nn.Module = family.build(config, stage, accelerator=accelerator, recompute=_recompute(spec.recompute))
    return model


def _allocate(model: nn.Module, accelerator: Accelerator, spec: TrainingSpec) -> None:
    """Give the module memory for its weights, which are still to be loaded."""
    assert not list(model.buffers()), "buffers would be left without values"
    model.to(DTYPES[spec.precision]).to_empty(device=accelerator.device)


def _recompute(specs: RecomputeSpecs) -> Recompute:
    return Recompute(_policy(specs.vision_encoder), _policy(specs.text_decoder))


def _policy(spec: RecomputeSpec | None) -> RecomputePolicy:
    if spec is None:
        return RecomputePolicy()
    return RecomputePolicy(
        spec.recompute_granularity, spec.recompute_method or "uniform", spec.recompute_num_layers or 1
    )


def _weights(ctx: RunContext, config: Config, own_stages: Sequence[Stage], mesh: Mesh) -> Iterator[tuple[str, Tensor]]:
    """Read this rank's slices of its stages' weights from the model input, whatever its layout."""
    source, tp = ctx.inputs["model"], (mesh.tp_size, mesh.tp_rank)
    recorded = source.metadata.get("parallel")
    if source.kind != "hf_model" and recorded is None:
        raise InvalidModel(
            f"{source.path} does not record its layout", hint="convert it (reshard) with source_parallel first"
        )
    for index, stage in enumerate(own_stages):
        prefix = f"model{index}." if len(own_stages) > 1 else ""
        if source.kind == "hf_model":
            weights = load_stage_from_hf(source.path, config, stage, tp=tp)
        else:
            weights = load_stage(source.path, ParallelSpec.model_validate(recorded), config, stage, tp=tp)
        yield from ((prefix + name, tensor) for name, tensor in weights)


def _tell(ctx: RunContext, mesh: Mesh, table: Sequence[ParameterRow]) -> dict[str, dict[str, int]]:
    """Log what is trained, and keep the table of all parameters of all stages with the attempt; return its sums."""
    gathered = Together(mesh).gather(list(table) if mesh.dp_rank == mesh.tp_rank == 0 else [])
    rows = [row for part in gathered for row in part]
    for tower, counts in summary(rows).items():
        ctx.log.info("%s: %d parameters trained, %d frozen", tower, counts["trained"], counts["frozen"])
    if mesh.rank == 0:
        stages_of = [
            {"pp_rank": rank // mesh.pp_stride, "parameters": [asdict(row) for row in part]}
            for rank, part in enumerate(gathered)
            if part
        ]
        path = ctx.attempt_dir / "parameters.json"
        path.write_text(json.dumps({"summary": summary(rows), "stages": stages_of}, indent=1), encoding="utf-8")
    return summary(rows)


def _metadata(family: Family, config_json: dict[str, Any], spec: TrainingSpec) -> dict[str, Any]:
    return {
        "family": family.name,
        "config": config_json,
        "canonical": False,
        **checkpoint_metadata(spec),
    }
