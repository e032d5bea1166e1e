"""What a folder is and whether it is sound, before it is accepted: headers and names only, no weight is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from core.errors import ForbiddenPath, InvalidDataset, InvalidSpec
from core.models.adapter import ADAPTER_CONFIG, ADAPTER_FILE, read_adapter_config
from core.models.hf_folder import inspect_hf_folder, read_config, read_header
from core.models.mm_folder import inspect_mm_folder
from core.models.registry import detect
from core.storage.manifest import walk_files

Inspection = tuple[str, dict[str, Any], int]
"""Kind, metadata, size in bytes."""


def inspect_folder(path: Path, kind: str | None = None, *, roots: Iterable[Path] = ()) -> Inspection:
    """Check a folder as `kind`, or as what it looks like; raise InvalidModel, InvalidDataset or CorruptCheckpoint.

    A link to a file is followed only within the folder and `roots` (a Hugging Face cache links its snapshots to blobs
    beside them); ForbiddenPath otherwise.
    """
    if not path.is_dir():
        raise InvalidSpec(f"path {str(path)!r} is not a folder")
    _refuse_links_out(path, roots)
    kind = kind or _look(path)
    if kind not in REGISTRABLE:
        raise InvalidSpec(f"kind {kind!r} cannot be registered; use one of {', '.join(REGISTRABLE)}")
    metadata = REGISTRABLE[kind](path)
    return kind, metadata, sum(file.stat().st_size for _, file in walk_files(path))


def _refuse_links_out(path: Path, roots: Iterable[Path]) -> None:
    allowed = [root.expanduser().resolve() for root in (path, *roots)]
    for relative, file in walk_files(path):
        if file.is_symlink() and not any(file.resolve().is_relative_to(root) for root in allowed):
            raise ForbiddenPath(
                f"{relative!r} is a link that leaves the allowed roots", hint="put the file itself there"
            )


def _look(path: Path) -> str:
    if (path / "latest_checkpointed_iteration.txt").exists():
        return "mm_adapter" if (path / "hf" / ADAPTER_CONFIG).exists() else "mm_checkpoint"
    if (path / ADAPTER_CONFIG).exists():
        return "hf_adapter"
    if (path / "config.json").exists():
        return "hf_model"
    return "dataset_source"


def _hf_model(path: Path) -> dict[str, Any]:
    return inspect_hf_folder(path).metadata


def _mm_checkpoint(path: Path) -> dict[str, Any]:
    found = inspect_mm_folder(path)
    metadata: dict[str, Any] = {"iteration": found.iteration, "tp_size": found.tp_size, "pp_size": found.pp_size}
    if found.hf_dir is not None:
        config = read_config(found.hf_dir)
        metadata |= {"family": detect(config).name, "config": config}
    return metadata


def _hf_adapter(path: Path) -> dict[str, Any]:
    """What PEFT says of it; whether it fits its base model is checked where that is known."""
    config = read_adapter_config(path)
    known = {name: config.get(name) for name in ("r", "lora_alpha", "target_modules", "base_model_name_or_path")}
    return known | {"num_tensors": len(read_header(path / ADAPTER_FILE))}


def _mm_adapter(path: Path) -> dict[str, Any]:
    found = inspect_mm_folder(path)
    return {"iteration": found.iteration, "tp_size": found.tp_size, "pp_size": found.pp_size}


def _dataset_source(path: Path) -> dict[str, Any]:
    annotations = sorted(name for name, _ in walk_files(path) if name.endswith((".json", ".jsonl")))
    if not annotations:
        raise InvalidDataset(f"folder {path.name!r} holds no .json or .jsonl file with annotations")
    return {"annotations": annotations[:100]}


REGISTRABLE: dict[str, Callable[[Path], dict[str, Any]]] = {
    "hf_model": _hf_model,
    "mm_checkpoint": _mm_checkpoint,
    "hf_adapter": _hf_adapter,
    "mm_adapter": _mm_adapter,
    "dataset_source": _dataset_source,
}
"""Kinds that a user may register or upload."""
