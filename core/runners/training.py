"""The training kind: one process per rank, started by torchrun.

    inputs ──► weights of this rank's stage ─┐
    dataset ─► step loader ──────────────────┴─► Trainer ──► JOB_DIR/checkpoints ──► artifacts

Checkpoints live in the job's folder, so they survive attempts: a new attempt goes on from the newest complete one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.conversion.convert import copy_model_files
from core.conversion.load import load_stage, load_stage_from_hf
from core.conversion.mm import rank_dir, write_rank_file
from core.data.dataset import TokenisedDataset
from core.data.loader import StepLoader, build_batch
from core.data.plan import StepPlan, plan_step
from core.device import Accelerator, get_accelerator
from core.errors import (
    AppError,
    CorruptCheckpoint,
    IncompatiblePlan,
    InvalidDataset,
    InvalidModel,
    InvalidSpec,
    UnknownWeights,
    UnsupportedOption,
)
from core.models.batch import PackedBatch
from core.models.hf_folder import read_config
from core.models.layers.recompute import Recompute, RecomputePolicy
from core.models.plan import Stage, stages
from core.models.qwen2_5_vl.family import Config
from core.models.registry import Family, detect
from core.parallel.mesh import Mesh, build_mesh
from core.runners.context import InputArtifact, RunContext, Stopped
from core.specs.parallel import ParallelSpec
from core.specs.training import RecomputeSpec, RecomputeSpecs, TrainingSpec
from core.training.checkpoint import FACTS, Checkpoints, Facts, Position, Together, write_tracker
from core.training.checks import largest_micro_batch
from core.training.freeze import ParameterRow, freeze, summary
from core.training.heartbeat import Heartbeat, end_process
from core.training.optimizer import Optimizer
from core.training.trainer import Outcome, Trainer
from core.training.wiring import Head, build_pipeline, join, shard_chunks

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PATCH_HEADROOM = 1.25
"""Static shapes: patches that a micro-batch can hold, relative to what its tokens have on average."""
STALL_LIMIT_S = 1800.0
"""Without progress for so long a training is taken to hang: longer than any phase of a step, a large checkpoint included."""
REHEARSED_STEPS = 200
"""Steps whose micro-batches are looked through for the largest, which runs first."""


def run(ctx: RunContext, spec: TrainingSpec) -> None:
    """Train, keep checkpoints, publish them. Raises Stopped after a stop that was asked for."""
    _refuse_unsupported(spec)
    accelerator = get_accelerator(ctx.device, ctx.local_rank)
    with _process_group(ctx, accelerator), _errors_of_other_ranks(ctx):
        outcome = _train(ctx, spec, accelerator)
    if outcome is Outcome.STOPPED:
        raise Stopped


def _refuse_unsupported(spec: TrainingSpec) -> None:
    """Refuse what this version cannot do, should the submission have let it through."""
    if spec.lora is not None:
        raise UnsupportedOption("lora is not supported yet; leave it out to train all weights that are not frozen")


def _train(ctx: RunContext, spec: TrainingSpec, accelerator: Accelerator) -> Outcome:
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
        write_weights=write_rank_file,
        keep_last=spec.checkpoint.keep_last,
    )
    resume_path = checkpoints.newest() or resume_input(ctx)
    facts = _new_facts(spec, dataset)

    with Together(mesh):
        if resume_path is not None:
            facts = resumed_facts(ctx, resume_path, facts, spec)
        chunks = [_build(family, config, stage, accelerator, spec) for stage in own_stages]
        model = join(chunks)
        table = freeze(model, spec.freeze)
        held = shard_chunks(chunks, family.plan, mesh)
        _allocate(model, accelerator, spec)
        load_weights(
            model,
            _weights(ctx, config, own_stages, mesh) if resume_path is None else checkpoints.load_weights(resume_path),
        )
    optimizer = Optimizer(model, spec.optimizer, mesh, held=held)
    with Together(mesh):
        if resume_path is not None and facts.has_optimizer:
            _restore(checkpoints.load_state(resume_path), optimizer, accelerator)
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
        facts=replace(facts, has_optimizer=spec.checkpoint.save_optim),
        reporter=ctx,
        saved_at=facts.position.iteration if resume_path is not None else None,
    )
    if resume_path is None:
        trainer.rehearse(_largest_batch(dataset, spec, mesh, own_stages[0], config, accelerator))
    with (
        Heartbeat(
            ctx.attempt_dir / "heartbeats", ctx.rank, fail=partial(_end, ctx), limit_s=STALL_LIMIT_S
        ) as heartbeat,
        _loader(dataset, spec, mesh, own_stages[0], config, accelerator, facts.position) as loader,
    ):
        trainer.heartbeat = heartbeat
        outcome = trainer.train(loader)
    if mesh.rank == 0:
        finished = outcome is Outcome.FINISHED
        publish(
            ctx, checkpoints, finished=finished, metadata={**_metadata(family, config_json, spec), "trained": counts}
        )
        if finished:  # nothing resumes from here any more; the artifacts hold the same files
            shutil.rmtree(ctx.job_dir / "checkpoints")
    return outcome


def _end(ctx: RunContext, error: AppError) -> None:
    """Tell the job's error and end this process; its main thread waits for something that does not come."""
    ctx.log.error("%s: %s", error.code, error.message)
    ctx.failed(error)
    end_process()


def find_config(source: InputArtifact) -> tuple[Family, dict[str, Any]]:
    """Return the family and `config.json` of a model input of either layout. Raises InvalidModel."""
    config_json = source.metadata.get("config")
    if config_json is None:
        config_json = read_config(source.path if source.kind == "hf_model" else source.path / "hf")
    return detect(config_json), config_json


def check_dataset(dataset: TokenisedDataset, spec: TrainingSpec, config: Config) -> None:
    """Refuse a data set that cannot be trained as the spec says, before anything is loaded."""
    if len(dataset) == 0:
        raise InvalidDataset("the data set has no training rows")
    too_long = int((dataset.lengths > spec.seq_length).sum())
    if too_long:
        longest = int(dataset.lengths.max())
        raise InvalidSpec(
            f"seq_length is {spec.seq_length}, but {too_long} of {len(dataset)} rows are longer (longest: {longest} tokens)",
            hint=f"set seq_length to {longest} or more, or make the data set with cutoff_len {spec.seq_length}",
        )
    if dataset.meta.vocab_size > config.text.vocab_size or dataset.meta.image_token_id != config.image_token_id:
        raise InvalidDataset(
            f"the data set's tokenizer (ids below {dataset.meta.vocab_size}, image token {dataset.meta.image_token_id}) is not the "
            f"model's (vocabulary {config.text.vocab_size}, image token {config.image_token_id})",
            hint="make the data set again with this model's folder as tokenizer",
        )


def load_weights(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copy weights into the model. Raises UnknownWeights listing those that are missing, left over, or of another shape."""
    missing = dict(model.named_parameters())
    left_over, misshapen = [], []
    for name, tensor in weights:
        parameter = missing.pop(name, None)
        if parameter is None:
            left_over.append(name)
        elif parameter.shape != tensor.shape:
            misshapen.append(f"{name} {list(tensor.shape)} instead of {list(parameter.shape)}")
        else:
            parameter.data.copy_(tensor)
    problems = (("missing", sorted(missing)), ("not of this model", left_over), ("of another shape", misshapen))
    if any(names for _, names in problems):
        told = "; ".join(f"{len(names)} {what}: {_shortened(names)}" for what, names in problems if names)
        raise UnknownWeights(
            f"the weights do not fit the model: {told}", hint="was the checkpoint made with this config?"
        )


def resume_input(ctx: RunContext) -> Path | None:
    """Return the iteration folder of the checkpoint that `resume_from` names, or None."""
    given = ctx.inputs.get("resume_from")
    if given is None:
        return None
    kept = sorted(path.parent for path in given.path.glob(f"iter_*/{FACTS}"))
    if not kept:
        raise CorruptCheckpoint(
            f"resume_from ({given.path.name}) is not a training checkpoint of Temper: no iter_*/{FACTS} in it",
            hint="give it as `model` to start a new training from its weights",
        )
    return kept[-1]


def resumed_facts(ctx: RunContext, path: Path, now: Facts, spec: TrainingSpec) -> Facts:
    """Check that this job can go on from a checkpoint, and return this job's facts at the checkpoint's position."""
    then = Facts.read(path)
    if then.layout != now.layout or then.precision != now.precision:
        raise IncompatiblePlan(
            f"the checkpoint has layout {then.layout} and precision {then.precision}, the job {now.layout} and {now.precision}",
            hint="use the same, or give the checkpoint as `model` to start a new training from its weights",
        )
    own = path.parent == ctx.job_dir / "checkpoints"
    if not own and then.position.iteration >= spec.train_iters:
        raise InvalidSpec(
            f"the checkpoint is at iteration {then.position.iteration} already, train_iters is {spec.train_iters}"
        )
    if (then.dataset, then.seed) != (now.dataset, now.seed):
        ctx.warn("other_data", "the data set or seed is not the checkpoint's: samples may be repeated or left out")
    if not then.has_optimizer:
        ctx.warn("no_optimizer_state", "the checkpoint has no optimizer state: AdamW's moments start from zero")
    ctx.log.info("resuming from %s at iteration %d", path.name, then.position.iteration)
    return replace(now, position=then.position, has_optimizer=then.has_optimizer)


def publish(ctx: RunContext, checkpoints: Checkpoints, *, finished: bool, metadata: dict[str, Any]) -> None:
    """Make an artifact of every kept checkpoint; the last one of a finished training is `checkpoint`, the main output."""
    kept = checkpoints.kept()
    for path in kept:
        facts = Facts.read(path)
        iteration = facts.position.iteration
        is_final = finished and path == kept[-1]
        writer = ctx.new_artifact("checkpoint" if is_final else f"checkpoint-{iteration:07d}", "mm_checkpoint")
        try:
            shutil.copytree(path, writer.path / path.name, copy_function=_link_or_copy)
            write_tracker(writer.path, iteration)
            _copy_model_files(ctx, writer.path / "hf")
            digests = {f"{path.name}/{name}": digest for name, digest in facts.digests.items()}
            writer.commit({**metadata, "iteration": iteration}, digests=digests)
        except BaseException:
            writer.abort()
            raise


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


def _restore(state: dict[str, Any], optimizer: Optimizer, accelerator: Accelerator) -> None:
    try:
        optimizer.load_state_dict(state["optimizer"])
    except KeyError as error:
        raise IncompatiblePlan(
            f"the checkpoint has no optimizer state for {error}",
            hint="use the freeze settings of the checkpoint's training",
        ) from error
    torch.set_rng_state(state["rng"]["host"].clone())
    accelerator.set_rng_state(state["rng"]["device"].clone())


def _loader(
    dataset: TokenisedDataset,
    spec: TrainingSpec,
    mesh: Mesh,
    stage: Stage,
    config: Config,
    accelerator: Accelerator,
    position: Position,
) -> StepLoader:
    token_budget = spec.micro_batch_size * spec.seq_length
    patch_budget = _patch_budget(dataset, token_budget, config) if accelerator.static_shapes else None

    def plan(consumed_samples: int) -> StepPlan:
        return plan_step(
            dataset.lengths,
            dataset.patches,
            seed=spec.seed,
            consumed_samples=consumed_samples,
            global_batch_size=spec.global_batch_size,
            dp_size=mesh.dp_size,
            token_budget=token_budget,
            patch_budget=patch_budget,
            min_micro_batches=mesh.pp_size,
        )

    return StepLoader(
        dataset,
        config,
        plan,
        consumed_samples=position.consumed_samples,
        dp_rank=mesh.dp_rank,
        with_pixels=stage.has_patch_embed,
        pad_to_tokens=token_budget if accelerator.static_shapes else None,
        pad_to_patches=patch_budget,
    )


def _largest_batch(
    dataset: TokenisedDataset, spec: TrainingSpec, mesh: Mesh, stage: Stage, config: Config, accelerator: Accelerator
) -> PackedBatch:
    """Build the dearest micro-batch of the first steps (an epoch of them, at most REHEARSED_STEPS)."""
    token_budget = spec.micro_batch_size * spec.seq_length
    patch_budget = _patch_budget(dataset, token_budget, config) if accelerator.static_shapes else None
    num_steps = min(spec.train_iters, REHEARSED_STEPS, math.ceil(len(dataset) / spec.global_batch_size))
    plans = [
        plan_step(
            dataset.lengths,
            dataset.patches,
            seed=spec.seed,
            consumed_samples=index * spec.global_batch_size,
            global_batch_size=spec.global_batch_size,
            dp_size=mesh.dp_size,
            token_budget=token_budget,
            patch_budget=patch_budget,
            min_micro_batches=mesh.pp_size,
        )
        for index in range(num_steps)
    ]
    return build_batch(
        [dataset.row(row) for row in largest_micro_batch(plans, dataset.lengths, dataset.patches)],
        config,
        processing=dataset.meta.image_processing,
        with_pixels=stage.has_patch_embed,
        pad_to_tokens=token_budget if accelerator.static_shapes else None,
        pad_to_patches=patch_budget,
        pad_token_id=dataset.meta.pad_token_id,
    )


def _patch_budget(dataset: TokenisedDataset, token_budget: int, config: Config) -> int:
    """Return patches per micro-batch for static shapes: what its tokens have on average and some room, but any one row must fit."""
    unit = config.vision.spatial_merge_size**2
    average = token_budget * float(dataset.patches.sum()) / float(dataset.lengths.sum())
    wanted = max(int(dataset.patches.max()), math.ceil(PATCH_HEADROOM * average))
    return math.ceil(wanted / unit) * unit


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
        "parallel": spec.parallel.layout.model_dump(mode="json"),
        "canonical": False,
        "dtype": str(DTYPES[spec.precision]).removeprefix("torch."),
    }


def _copy_model_files(ctx: RunContext, target: Path) -> None:
    """Copy config, tokenizer and processor files of the model input, so that the checkpoint can be exported by itself."""
    source = ctx.inputs["model"]
    folder = source.path if source.kind == "hf_model" else source.path / "hf"
    if folder.is_dir():
        copy_model_files(folder, target, allow_roots=ctx.allow_roots)


def _link_or_copy(source: str, target: str) -> None:
    """Make a hard link where the file system can: the file is never written again, only unlinked."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@contextmanager
def _process_group(ctx: RunContext, accelerator: Accelerator) -> Iterator[None]:
    """Join torchrun's process group for the time of the training; one process needs none."""
    if ctx.world_size == 1:
        yield
        return
    dist.init_process_group(accelerator.backend)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _errors_of_other_ranks(ctx: RunContext, *, patience_s: float = 5.0) -> Iterator[None]:
    """Have rank 0 fail with the cause, not with the broken connection that another rank's failure looks like from there."""
    folder = ctx.attempt_dir / "errors"
    try:
        yield
    except Exception as error:
        told = error if isinstance(error, AppError) else None
        if ctx.is_main and told is None:
            raise _first_told(folder, time.monotonic() + patience_s) or error from error
        if not ctx.is_main:
            folder.mkdir(exist_ok=True)
            values = (
                (told.code, told.message, told.hint)
                if told
                else (AppError.code, f"{type(error).__name__}: {error}", None)
            )
            temporary = folder / f".rank_{ctx.rank}.tmp"
            temporary.write_text(json.dumps([ctx.rank, time.time(), *values]), encoding="utf-8")
            temporary.rename(folder / f"rank_{ctx.rank}.json")
        raise


def _first_told(folder: Path, deadline: float) -> AppError | None:
    """Wait for the error of another rank; return that of the one that failed first."""
    while time.monotonic() < deadline:
        found = [json.loads(path.read_bytes()) for path in folder.glob("rank_*.json")]
        if found:
            rank, _, code, message, hint = min(found, key=lambda item: item[1])
            return AppError(f"rank {rank}: {message}", code=code, hint=hint)
        time.sleep(0.1)
    return None


def _shortened(names: Sequence[str], limit: int = 10) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
