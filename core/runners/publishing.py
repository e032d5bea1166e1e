"""A training's kept checkpoints become artifacts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from core.conversion.convert import copy_model_files
from core.runners.context import RunContext
from core.training.checkpoint import Checkpoints, Facts, write_tracker


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
