"""The whole road as job specs: convert, prepare data, train, evaluate, export; chained by reference, submitted at once."""

from collections.abc import Mapping
from typing import Any

from api.client import Client, Job

LAYERS = {"llm_pp_layers": [[2, 2]], "vit_pp_layers": [[4, 0]]}
STATIONS = ("convert", "dataset", "train", "evaluate", "export")


def digits_road(model: str, source: str, *, train_iters: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Kind and spec of each station for the digits; `{"job": "$name"}` stands for the job of an earlier station."""
    return {
        "convert": (
            "conversion",
            {"operation": "hf_to_mm", "source": {"artifact": model}, "parallel": {"tp_size": 1, **LAYERS}},
        ),
        "dataset": (
            "dataset",
            {
                "source": {"artifact": source}, "annotations": "digits.json", "media_root": ".", "format": "llava",
                "tokenizer": {"artifact": model}, "cutoff_len": 64, "validation_fraction": 0.2,
            },
        ),
        "train": (
            "training",
            {
                "model": {"job": "$convert"}, "dataset": {"job": "$dataset"},
                "parallel": {"nnodes": 1, "nproc_per_node": 2, "tp_size": 1, **LAYERS},
                "train_iters": train_iters, "global_batch_size": 32, "micro_batch_size": 8, "seq_length": 64,
                "optimizer": {"lr": 2e-3, "lr_decay_style": "cosine", "lr_warmup_fraction": 0.1, "adam_beta2": 0.99},
                "freeze": {"vision_encoder": False, "vision_projector": False, "text_decoder": False},
                "checkpoint": {"save_interval": max(train_iters // 2, 1)}, "precision": "fp32",
            },
        ),
        "evaluate": (
            "evaluation",
            {
                "model": {"job": "$train"}, "base": {"job": "$convert"}, "dataset": {"job": "$dataset"},
                "generation": {"max_new_tokens": 4}, "metrics": ["exact_match"],
            },
        ),
        "export": ("conversion", {"operation": "mm_to_hf", "source": {"job": "$train"}}),
    }  # fmt: skip


def photos_road(
    model: str, source: str, *, annotations: str, train_iters: int
) -> dict[str, tuple[str, dict[str, Any]]]:
    """The same road for photos with captions, in LLaVA-Instruct's form."""
    road = digits_road(model, source, train_iters=train_iters)
    budget = {"cutoff_len": 512, "image_max_pixels": 50176, "annotations": annotations, "validation_fraction": 0.25}
    training = {"global_batch_size": 8, "micro_batch_size": 2, "seq_length": 512}
    road["dataset"] = ("dataset", {**road["dataset"][1], **budget})
    road["train"] = ("training", {**road["train"][1], **training})
    return road


def submit_road(
    client: Client, road: Mapping[str, tuple[str, dict[str, Any]]], *, made: Mapping[str, str] | None = None
) -> dict[str, Job]:
    """Submit every station but those that were `made` before (station -> job id); the new jobs by station."""
    ids, jobs = dict(made or {}), {}
    for station, (kind, spec) in road.items():
        if station not in ids:
            jobs[station] = client.submit(kind, _with_ids(spec, ids), name=station)
            ids[station] = jobs[station].id
    return jobs


def _with_ids(spec: Mapping[str, Any], ids: Mapping[str, str]) -> dict[str, Any]:
    resolved = dict(spec)
    for field, value in spec.items():
        if isinstance(value, dict) and str(value.get("job", "")).startswith("$"):
            resolved[field] = {**value, "job": ids[value["job"][1:]]}
    return resolved
