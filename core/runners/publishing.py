"""A training's kept checkpoints become artifacts, and its curves however it ends."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core.conversion.convert import copy_model_files
from core.conversion.mm import write_rank_file
from core.models.batch import PackedBatch
from core.models.mm_folder import RANK_FILE, iteration_dir
from core.runners.context import RunContext
from core.specs.training import TrainingSpec
from core.storage.local import fsync
from core.training.checkpoint import Checkpoints, Facts, write_tracker
from core.training.lora import Adapters, merge_and_compare
from core.training.together import Together
from core.training.trainer import Trainer


def publish(ctx: RunContext, checkpoints: Checkpoints, *, finished: bool, metadata: dict[str, Any]) -> None:
    """Make an artifact of every kept checkpoint; the last one of a finished training is `checkpoint`, the main output."""
    kept = checkpoints.kept()
    for path in kept:
        facts = Facts.read(path)
        iteration = facts.position.iteration
        is_final = finished and path == kept[-1]
        with ctx.new_artifact("checkpoint" if is_final else f"checkpoint-{iteration:07d}", "mm_checkpoint") as writer:
            shutil.copytree(path, writer.path / path.name, copy_function=_link_or_copy)
            write_tracker(writer.path, iteration)
            _copy_model_files(ctx, writer.path / "hf")
            digests = {f"{path.name}/{name}": digest for name, digest in facts.digests.items()}
            writer.commit({**metadata, "iteration": iteration}, digests=digests)


@contextmanager
def curves(ctx: RunContext) -> Iterator[None]:
    """Publish the TensorBoard files at the end, also of a training that fails: then above all one looks at its loss."""
    try:
        yield
    except Exception:
        publish_curves_if_possible(ctx)
        raise
    publish_curves(ctx)


def publish_curves_if_possible(ctx: RunContext) -> None:
    """The same on the way out of an error, which is what has to be told."""
    try:
        publish_curves(ctx)
    except Exception as error:  # noqa: BLE001  whatever the disk does now
        ctx.log.warning("the TensorBoard files are not published: %s", error)


def publish_curves(ctx: RunContext) -> None:
    """Make an artifact of the TensorBoard files of all attempts as they are now, where there are any (rank 0)."""
    folder = ctx.job_dir / "tensorboard"
    if not ctx.is_main or not folder.is_dir():
        return
    with ctx.new_artifact("tensorboard", "report") as writer:
        shutil.copytree(folder, writer.path, dirs_exist_ok=True)
        writer.commit({})


def publish_adapted(
    ctx: RunContext,
    spec: TrainingSpec,
    trainer: Trainer,
    adapters: Adapters,
    *,
    metadata: dict[str, Any],
    probe: PackedBatch | None,
) -> None:
    """Make PEFT's folder of every kept checkpoint of a LoRA training, and of a finished one (which has a `probe`) a merged checkpoint,
    the main output; all ranks together. Afterwards the model has no adapters."""
    assert spec.lora is not None, "adapters are of a training that asks for them"
    told = spec.lora.model_dump(mode="json")
    if probe is not None:
        merging = merge_and_compare(trainer.model, trainer.pipeline, trainer.head, probe)
        told |= asdict(merging)
        ctx.log.info(
            "merged in float32: max |Δlogit| %.3g between base + adapter and the merged weights (largest logit %.3g, %d positions)",
            merging.max_logit_difference,
            merging.max_logit,
            merging.num_positions,
        )
    if trainer.mesh.rank == 0:
        _publish_adapters(ctx, spec, trainer.checkpoints, adapters, told, metadata, finished=probe is not None)
    if probe is not None:
        _publish_merged(ctx, trainer, {**metadata, "lora": told})


def _publish_adapters(
    ctx: RunContext,
    spec: TrainingSpec,
    checkpoints: Checkpoints,
    adapters: Adapters,
    told: dict[str, Any],
    metadata: dict[str, Any],
    *,
    finished: bool,
) -> None:
    kept = checkpoints.kept()
    base_model = metadata["config"].get("_name_or_path") or None
    for path in kept:
        iteration, is_final = Facts.read(path).position.iteration, finished and path == kept[-1]
        with ctx.new_artifact("adapter" if is_final else f"adapter-{iteration:07d}", "hf_adapter") as writer:
            num_tensors = adapters.write_peft(path, spec.parallel.layout, writer.path, base_model=base_model)
            facts = told if is_final else {name: told[name] for name in ("r", "alpha", "target_modules")}
            more = {"lora_alpha": told["alpha"], "base_model_name_or_path": base_model, "num_tensors": num_tensors}
            writer.commit({**facts, **more, "family": metadata["family"], "iteration": iteration})


def _publish_merged(ctx: RunContext, trainer: Trainer, metadata: dict[str, Any]) -> None:
    """Every rank writes its file into rank 0's artifact."""
    mesh, iteration = trainer.mesh, trainer.facts.position.iteration
    name = f"{iteration_dir(iteration)}/{trainer.checkpoints.rank_folder}/{RANK_FILE}"
    with ctx.new_artifact("checkpoint", "mm_checkpoint") if mesh.rank == 0 else nullcontext() as writer:
        with Together(mesh) as step:
            target = step.gather(None if writer is None else writer.path)[0]
        with Together(mesh):
            digests = {}
            if mesh.dp_rank == 0:
                digests[name] = write_rank_file(target / name, trainer.model.state_dict(), iteration=iteration)
                fsync(target / name)
        told = Together(mesh).gather(digests)
        if writer is not None:
            write_tracker(writer.path, iteration)
            _copy_model_files(ctx, writer.path / "hf")
            everyone = {name: digest for part in told for name, digest in part.items()}
            writer.commit({**metadata, "iteration": iteration}, digests=everyone)


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
