"""hf_to_mm, mm_to_hf and reshard of whole models. How the files are checked and written is `core.conversion.output`'s."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from core.conversion.apply import whole_tensor
from core.conversion.files import FILE_MODE, disk_full_named, make_folder
from core.conversion.hf import HFWeights, write_index
from core.conversion.mm import MMWeights, write_tracker
from core.conversion.output import (
    AS_IS,
    Options,
    Written,
    rank_files,
    safetensors_file,
    tensor_bytes,
    verify_weights,
    write_weights,
)
from core.errors import InvalidModel, UnknownWeights
from core.models.config import Config
from core.models.hf_folder import (
    INDEX_FILE,
    SINGLE_FILE,
    HFFolder,
    inspect_hf_folder,
    listed,
    read_header,
    read_index,
)
from core.models.layout import hf_shapes, rank_layouts, tied_names
from core.models.mapping import old_name
from core.models.mm_folder import MMFolder, inspect_mm_folder
from core.models.plan import Split

WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"})
DEFAULT_SHARD_BYTES = 5_000_000_000


def hf_to_mm(
    source: HFFolder, target: Path, parallel: Split, options: Options = AS_IS, *, canonical: bool = False
) -> Written:
    """Write `release/mp_rank_*/model_optim_rng.pt` and `hf/` (all files of the source that are no weights)."""
    weights = HFWeights(source)
    different = weights.differing_copies(tied_names(source.config))
    if different:
        raise InvalidModel(f"{listed(different)} differs from the embedding, but config.json ties them")
    written = _write_mm(weights, source.config, target, parallel, options, source.path, canonical=canonical)
    if not (target / "hf" / INDEX_FILE).exists():  # the index is also what remembers the source's key names
        write_index(target / "hf", source.weight_map, source.total_bytes)
    return written


def reshard(
    source: MMFolder,
    config: Config,
    source_parallel: Split,
    target: Path,
    parallel: Split,
    options: Options = AS_IS,
    *,
    hf_files: Path | None = None,
    canonical: bool = False,
) -> Written:
    """Write the weights of a checkpoint in another split, as a release; optimizer state stays behind.

    `hf/` is copied from `hf_files`, by default from the source's own.
    """
    weights = MMWeights(source, config, source_parallel)
    weights.warn_of_replicas(options.watch)
    return _write_mm(weights, config, target, parallel, options, hf_files or source.hf_dir, canonical=canonical)


def _write_mm(
    weights: MMWeights | HFWeights,
    config: Config,
    target: Path,
    parallel: Split,
    options: Options,
    hf_files: Path | None,
    *,
    canonical: bool,
) -> Written:
    shapes = hf_shapes(config)
    files = rank_files(list(rank_layouts(config, parallel, canonical=canonical)))
    written = write_weights(weights, shapes, files, target, options)
    write_tracker(target)
    if hf_files is not None:
        copy_model_files(hf_files, target / "hf", dtype=options.dtype, allow_roots=options.allow_roots)
    verify_weights(weights, shapes, lambda: MMWeights(inspect_mm_folder(target, parallel), config, parallel), options)
    return written


def mm_to_hf(
    source: MMFolder,
    config: Config,
    source_parallel: Split,
    target: Path,
    options: Options = AS_IS,
    *,
    hf_files: Path,
    max_shard_bytes: int | None = None,
) -> Written:
    """Write a HF folder with config, tokenizer and key names of `hf_files`.

    Tensors go to the files that its index names; without an index, or with `max_shard_bytes`, to files of at most that size.
    """
    weights = MMWeights(source, config, source_parallel)
    weights.warn_of_replicas(options.watch)
    shapes, keys = hf_shapes(config), _keys(hf_files, config)
    stored = dict(_stored_as(keys, config))
    sizes = {key: tensor_bytes(name, shapes[name], weights, options.dtype) for key, name in stored.items()}
    shards = _assign(sizes, None if max_shard_bytes else keys, max_shard_bytes or DEFAULT_SHARD_BYTES)
    files = [
        safetensors_file(shard, {key: whole_tensor(stored[key], shapes[stored[key]]) for key in keys_of_shard})
        for shard, keys_of_shard in shards.items()
    ]
    written = write_weights(weights, shapes, files, target, options)
    if list(shards) != [SINGLE_FILE]:
        write_index(target, {key: shard for shard, inside in shards.items() for key in inside}, written.total_bytes)
    copy_model_files(hf_files, target, dtype=options.dtype, allow_roots=options.allow_roots)
    verify_weights(weights, shapes, lambda: HFWeights(inspect_hf_folder(target)), options)
    return written


def copy_model_files(
    source: Path, target: Path, *, dtype: str | None = None, allow_roots: tuple[Path, ...] = ()
) -> None:
    """Copy every file that holds no weights, byte for byte; with `dtype`, config.json is changed to say so.

    An index goes along only into a folder without weights of its own. Links that lead out of the source and of
    `allow_roots` are refused.
    """
    make_folder(target)
    has_weights = any(target.glob("*.safetensors"))
    for file in sorted(source.rglob("*")):
        relative = file.relative_to(source)
        if file.is_dir() or file.suffix in WEIGHT_SUFFIXES or any(part.startswith(".") for part in relative.parts):
            continue
        if relative.name.endswith(".index.json") and (has_weights or relative.as_posix() != INDEX_FILE):
            continue
        _check_inside(file, (source, *allow_roots))
        make_folder((target / relative).parent)
        with disk_full_named(relative):
            shutil.copyfile(file, target / relative)
        (target / relative).chmod(FILE_MODE)
    if dtype is not None:
        _set_dtype(target / "config.json", dtype)


def _check_inside(file: Path, roots: tuple[Path, ...]) -> None:
    resolved = file.resolve()
    if not any(resolved.is_relative_to(root.resolve()) for root in roots):
        raise InvalidModel(f"{file} is a link that leads out of its folder")


def _set_dtype(config_file: Path, dtype: str) -> None:
    config: dict[str, Any] = json.loads(config_file.read_bytes())
    parts = [config, *(config[name] for name in ("text_config", "vision_config") if isinstance(config.get(name), dict))]
    for part in parts:
        for name in ("dtype", "torch_dtype"):
            if name in part:
                part[name] = dtype
    if "dtype" not in config and "torch_dtype" not in config:
        config["torch_dtype"] = dtype
    config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _keys(hf_files: Path, config: Config) -> dict[str, str] | None:
    """Key -> file name as the HF folder has them: from its index, else from its weights; None when it has neither."""
    keys = read_index(hf_files)
    if keys is None:
        keys = {entry.key: file.name for file in sorted(hf_files.glob("*.safetensors")) for entry in read_header(file)}
    if not keys:
        return None
    names, wanted, tied = {old_name(key) for key in keys}, set(hf_shapes(config)), set(tied_names(config))
    if not wanted <= names <= wanted | tied:
        raise UnknownWeights(
            f"the keys of {hf_files} are not those of the model: {listed(sorted((wanted - names) | (names - wanted - tied)))}"
        )
    return keys


def _stored_as(keys: Mapping[str, str] | None, config: Config) -> Iterator[tuple[str, str]]:
    """(key to write, name of the tensor) for everything that the folder stores."""
    tied = tied_names(config)
    for key in keys if keys is not None else hf_shapes(config):
        name = old_name(key)
        yield key, tied.get(name, name)


def _assign(sizes: Mapping[str, int], keys: Mapping[str, str] | None, max_shard_bytes: int) -> dict[str, list[str]]:
    """File name -> keys, files in order."""
    files: dict[str, list[str]] = {}
    if keys is not None:
        for key, file in keys.items():
            files.setdefault(file, []).append(key)
        return dict(sorted(files.items()))
    shards: list[list[str]] = [[]]
    filled = 0
    for key, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": keys for number, keys in enumerate(shards, start=1)}
