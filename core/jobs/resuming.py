"""Whether a training can go on from a checkpoint, as far as its spec and the checkpoint's metadata tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from core.errors import IncompatiblePlan, InvalidSpec, UnsupportedOption
from core.models.registry import detect
from core.specs.training import TrainingSpec

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def checkpoint_metadata(spec: TrainingSpec) -> dict[str, Any]:
    """What the checkpoints of a training tell of themselves and depends on its spec alone."""
    return {
        "parallel": spec.parallel.layout.model_dump(mode="json"),
        "dtype": DTYPES[spec.precision],
        "optimizer_state": spec.checkpoint.save_optim,
    }


def check_resume(spec: TrainingSpec, checkpoint: Mapping[str, Any], model: Mapping[str, Any]) -> list[str]:
    """Refuse what cannot go on, given the metadata of `resume_from` and `model`; return warnings. What is not known is let through."""
    if spec.lora is not None:
        raise UnsupportedOption(
            "spec.resume_from: a LoRA training cannot go on from another job's checkpoint; its own attempts resume by themselves",
            hint="give the other job's merged checkpoint as model, without resume_from",
        )
    if checkpoint.get("lora"):
        raise InvalidSpec(
            "spec.resume_from: the merged checkpoint of a LoRA training has no state to resume from; give it as model"
        )
    iteration = checkpoint.get("iteration")
    if iteration is None:
        raise InvalidSpec("spec.resume_from: not a training checkpoint (it has no iteration); give it as model instead")
    if iteration >= spec.train_iters:
        raise InvalidSpec(
            f"spec.resume_from is at iteration {iteration} already, train_iters is {spec.train_iters}",
            hint="train_iters counts from the beginning of the first training, not from the resume",
        )
    if checkpoint.get("dtype") not in (None, DTYPES[spec.precision]):
        raise IncompatiblePlan(
            f"spec.precision is {spec.precision}, but spec.resume_from was trained in {checkpoint['dtype']}",
            hint="use the same, or give the checkpoint as model to start a new training from its weights",
        )
    if checkpoint.get("config") and model.get("config") and not _same_model(checkpoint["config"], model["config"]):
        raise IncompatiblePlan("spec.resume_from and spec.model are different models: their config.json differ")
    if not spec.checkpoint.load_optim or checkpoint.get("optimizer_state") is False:
        return [
            "goes on without optimizer state: AdamW's moments start from zero; the learning rate follows from the iteration"
        ]
    return []


def _same_model(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    configs = [detect(config_json).parse_config(config_json) for config_json in (first, second)]
    return replace(configs[0], dtype="") == replace(configs[1], dtype="")
