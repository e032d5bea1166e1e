"""LoRA adapters between PEFT's folder and MindSpeed-MM's rank files, in any split.

The `hf/` of the checkpoint carries `adapter_config.json` and an index of PEFT's keys, so that the folder comes back as it was. A checkpoint
without them (MindSpeed-MM writes none) is exported with a config made from its weights, for which `lora_alpha` must be given.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from core.conversion.apply import whole_tensor
from core.conversion.files import HashingWriter, make_folder
from core.conversion.hf import HFWeights
from core.conversion.mm import AdapterWeights, write_tracker
from core.conversion.output import AS_IS, Options, Written, rank_files, safetensors_file, verify_weights, write_weights
from core.errors import InvalidModel
from core.models.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    PREFIX,
    AdapterFolder,
    adapter_layouts,
    check_adapter_config,
    check_adapter_shapes,
    inspect_adapter_folder,
    new_adapter_config,
)
from core.models.config import Config
from core.models.hf_folder import read_json
from core.models.mapping import Shape, new_name, old_name
from core.models.mm_folder import MMFolder, inspect_mm_folder
from core.models.plan import Split

KEYS_FILE = "adapter_keys.json"
"""In `hf/`: PEFT's keys, in order."""


def adapter_to_mm(source: AdapterFolder, target: Path, parallel: Split, options: Options = AS_IS) -> Written:
    """Write `release/mp_rank_*/model_optim_rng.pt` and `hf/`."""
    written = _write_mm(HFWeights(source), source.shapes, source.config, target, parallel, options)
    _write_hf_files(target / "hf", source.config_json, source.keys)
    return written


def adapter_reshard(
    source: MMFolder,
    config: Config,
    source_parallel: Split,
    target: Path,
    parallel: Split,
    options: Options = AS_IS,
) -> Written:
    """Write the adapter in another split; `hf/` goes along."""
    weights = _open(source, config, source_parallel, options)
    written = _write_mm(weights, weights.shapes, config, target, parallel, options)
    if source.hf_dir is not None:
        _write_hf_files(target / "hf", *_read_hf_files(source.hf_dir))
    return written


def _write_mm(
    weights: HFWeights | AdapterWeights,
    shapes: dict[str, Shape],
    config: Config,
    target: Path,
    parallel: Split,
    options: Options,
) -> Written:
    written = write_weights(weights, shapes, rank_files(adapter_layouts(config, parallel, shapes)), target, options)
    write_tracker(target)
    verify_weights(
        weights, shapes, lambda: AdapterWeights(inspect_mm_folder(target, parallel), config, parallel), options
    )
    return written


def adapter_to_hf(
    source: MMFolder,
    config: Config,
    source_parallel: Split,
    target: Path,
    options: Options = AS_IS,
    *,
    lora_alpha: float | None = None,
    base_model: str | None = None,
) -> Written:
    """Write a PEFT folder.

    `lora_alpha` and `base_model` (PEFT's `base_model_name_or_path`) are for a checkpoint that does not carry them.
    """
    weights = _open(source, config, source_parallel, options)
    shapes = weights.shapes
    if source.hf_dir is not None and (source.hf_dir / ADAPTER_CONFIG).is_file():
        config_json, keys = _read_hf_files(source.hf_dir)
    else:
        config_json, keys = _new_config(shapes, lora_alpha, base_model), [PREFIX + new_name(name) for name in shapes]
    names = {key: old_name(key.removeprefix(PREFIX)) for key in keys}
    if set(names.values()) != set(shapes):
        raise InvalidModel(f"the keys that {source.path} carries are not those of its weights")
    layouts = {key: whole_tensor(name, shapes[name]) for key, name in names.items()}
    written = write_weights(weights, shapes, [safetensors_file(ADAPTER_FILE, layouts)], target, options)
    _write_json(target / ADAPTER_CONFIG, config_json)
    verify_weights(weights, shapes, lambda: HFWeights(inspect_adapter_folder(target, config)), options)
    return written


def _open(source: MMFolder, config: Config, parallel: Split, options: Options) -> AdapterWeights:
    weights = AdapterWeights(source, config, parallel)
    check_adapter_shapes(config, weights.shapes)
    weights.warn_of_replicas(options.watch)
    return weights


def _new_config(shapes: dict[str, Shape], lora_alpha: float | None, base_model: str | None) -> dict[str, Any]:
    ranks = {shape[0] for name, shape in shapes.items() if name.endswith("lora_A.weight")}
    if lora_alpha is None:
        raise InvalidModel(f"the checkpoint carries no {ADAPTER_CONFIG}; give lora_alpha", hint="it scales the adapter")
    if len(ranks) > 1:
        raise InvalidModel(f"the adapter has ranks {sorted(ranks)}; give the {ADAPTER_CONFIG} that it was made with")
    return new_adapter_config(shapes, r=ranks.pop(), lora_alpha=lora_alpha, base_model=base_model)


def _read_hf_files(folder: Path) -> tuple[dict[str, Any], list[str]]:
    config_json = read_json(folder / ADAPTER_CONFIG)
    check_adapter_config(config_json)
    keys = read_json(folder / KEYS_FILE).get("keys")
    if not isinstance(keys, list):
        raise InvalidModel(f"{folder / KEYS_FILE} has no list of keys")
    return config_json, [str(key) for key in keys]


def _write_hf_files(folder: Path, config_json: dict[str, Any], keys: list[str]) -> None:
    make_folder(folder)
    _write_json(folder / ADAPTER_CONFIG, config_json)
    _write_json(folder / KEYS_FILE, {"keys": keys})


def _write_json(path: Path, value: object) -> None:
    with HashingWriter.open(path) as out:
        out.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
