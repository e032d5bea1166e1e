"""hf_to_mm, mm_to_hf and reshard: plan everything, check the plan, then stream tensor by tensor into the files.

A target folder is empty or absent before, or is a journal's (`core.conversion.journal`), and then what that has finished stays.
After a failure a target's contents mean nothing. No tensor is ever held whole: a chunk of rows goes from the source's memory map to the
target file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from core.conversion.apply import Bytes, Findings, WeightSource, chunks, layout_dtype, whole_tensor
from core.conversion.files import FILE_MODE, OutTensor, disk_full_named, make_folder
from core.conversion.hf import HFWeights, write_index, write_safetensors
from core.conversion.journal import Journal
from core.conversion.mm import MMWeights, rank_tree, write_tracker
from core.conversion.pt import write_pt
from core.conversion.verify import check_complete, check_consumed, check_equal
from core.conversion.writing import OutFile, Quiet, SharedWatch, Watch, write_files
from core.errors import Conflict, InvalidModel, UnknownWeights
from core.models.hf_folder import (
    INDEX_FILE,
    SINGLE_FILE,
    HFFolder,
    inspect_hf_folder,
    listed,
    read_header,
    read_index,
)
from core.models.layout import RankLayout, TensorLayout, hf_shapes, rank_layouts, tied_names
from core.models.mapping import Shape, old_name
from core.models.mm_folder import RANK_FILE, MMFolder, inspect_mm_folder, rank_dir
from core.models.plan import Split
from core.models.qwen2_5_vl.family import Config

WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"})
DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Written:
    """What a conversion wrote."""

    num_tensors: int
    total_bytes: int
    dtypes: list[str]
    digests: dict[str, str] = field(repr=False)
    """Path below the target -> SHA-256, of the weight files."""


def hf_to_mm(
    source: HFFolder,
    target: Path,
    parallel: Split,
    *,
    canonical: bool = False,
    dtype: str | None = None,
    allow_roots: tuple[Path, ...] = (),
    verify: bool = False,
    watch: Watch | None = None,
    journal: Journal | None = None,
) -> Written:
    """Write `release/mp_rank_*/model_optim_rng.pt` and `hf/` (all files of the source that are no weights).

    `verify` reads the output back and compares every weight with its source.
    """
    weights = HFWeights(source)
    different = weights.differing_copies(tied_names(source.config))
    if different:
        raise InvalidModel(f"{listed(different)} differs from the embedding, but config.json ties them")
    require_empty(target, journal)
    output = _model_output(source.config, parallel, canonical=canonical, dtype=dtype, verify=verify)
    written = write_mm(weights, output, target, SharedWatch(watch or Quiet()), journal)
    copy_model_files(source.path, target / "hf", dtype=dtype, allow_roots=allow_roots)
    if not (target / "hf" / INDEX_FILE).exists():  # the index is also what remembers the source's key names
        write_index(target / "hf", source.weight_map, source.total_bytes)
    return written


def reshard(
    source: MMFolder,
    config: Config,
    source_parallel: Split,
    target: Path,
    parallel: Split,
    *,
    hf_files: Path | None = None,
    canonical: bool = False,
    dtype: str | None = None,
    allow_roots: tuple[Path, ...] = (),
    verify: bool = False,
    watch: Watch | None = None,
    journal: Journal | None = None,
) -> Written:
    """Write the weights of a checkpoint in another split, as a release; optimizer state stays behind.

    `hf/` is copied from `hf_files`, by default from the source's own.
    """
    shared = SharedWatch(watch or Quiet())
    weights = _open_mm(source, config, source_parallel, shared)
    require_empty(target, journal)
    output = _model_output(config, parallel, canonical=canonical, dtype=dtype, verify=verify)
    written = write_mm(weights, output, target, shared, journal)
    hf_files = hf_files or source.hf_dir
    if hf_files is not None:
        copy_model_files(hf_files, target / "hf", dtype=dtype, allow_roots=allow_roots)
    return written


def mm_to_hf(
    source: MMFolder,
    config: Config,
    source_parallel: Split,
    target: Path,
    *,
    hf_files: Path,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    allow_roots: tuple[Path, ...] = (),
    verify: bool = False,
    watch: Watch | None = None,
    journal: Journal | None = None,
) -> Written:
    """Write a HF folder with config, tokenizer and key names of `hf_files`.

    Tensors go to the files that its index names; without an index, or with `max_shard_bytes`, to files of at most that size.
    """
    shared = SharedWatch(watch or Quiet())
    weights = _open_mm(source, config, source_parallel, shared)
    shapes = hf_shapes(config)
    check_consumed(shapes, weights.blocks())
    keys = _keys(hf_files, config)
    stored = dict(_stored_as(keys, config))
    sizes = {key: tensor_bytes(whole_tensor(name, shapes[name]), weights, dtype, key) for key, name in stored.items()}
    files = _assign(sizes, None if max_shard_bytes else keys, max_shard_bytes or DEFAULT_SHARD_BYTES)
    require_empty(target, journal)
    outputs = []
    for file, names in files.items():
        layouts = {key: whole_tensor(stored[key], shapes[stored[key]]) for key in names}
        findings = Findings()
        tensors = out_tensors(layouts, weights, dtype, shared, findings)
        size_bytes = sum(sizes[key] for key in names)
        outputs.append(OutFile(file, size_bytes, partial(write_safetensors, tensors=tensors), findings))
    make_folder(target)
    digests = write_all(target, outputs, shared, journal, to_verify=sum(sizes.values()) if verify else 0)
    if list(files) != [SINGLE_FILE]:
        write_index(target, {key: file for file, names in files.items() for key in names}, sum(sizes.values()))
    copy_model_files(hf_files, target, dtype=dtype, allow_roots=allow_roots)
    if verify:
        check_equal(shapes, weights, HFWeights(inspect_hf_folder(target)), shared)
    dtypes = {dtype or weights.dtype(name) for name in stored.values()}
    return Written(len(stored), sum(sizes.values()), sorted(dtypes), digests)


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


def _open_mm(source: MMFolder, config: Config, parallel: Split, watch: SharedWatch) -> MMWeights:
    weights = MMWeights(source, config, parallel)
    weights.warn_of_replicas(watch)
    return weights


@dataclass(frozen=True)
class MMOutput:
    """What is to be written."""

    shapes: Mapping[str, Shape]
    """HF name -> shape of everything that must go in."""
    ranks: list[RankLayout]
    pp_size: int
    dtype: str | None
    reopen: Callable[[Path], MMWeights] | None
    """Opens what was written, to verify it; None: it is not."""


def _model_output(config: Config, parallel: Split, *, canonical: bool, dtype: str | None, verify: bool) -> MMOutput:
    return MMOutput(
        shapes=hf_shapes(config),
        ranks=list(rank_layouts(config, parallel, canonical=canonical)),
        pp_size=len(parallel.llm_pp_layers[0]),
        dtype=dtype,
        reopen=(lambda path: MMWeights(inspect_mm_folder(path, parallel), config, parallel)) if verify else None,
    )


def write_mm(
    weights: WeightSource, output: MMOutput, target: Path, watch: SharedWatch, journal: Journal | None
) -> Written:
    """Check the plan, write the rank files and the tracker, and verify them where that is asked for."""
    all_layouts = [layouts for rank in output.ranks for layouts in rank.chunks]
    for layouts in all_layouts:
        check_complete(layouts)
    blocks = (block for layouts in all_layouts for tensor in layouts.values() for block in tensor.blocks)
    check_consumed(output.shapes, blocks)
    files, tensors = [], []
    for rank in output.ranks:
        findings = Findings()
        chunks = tuple(out_tensors(layouts, weights, output.dtype, watch, findings) for layouts in rank.chunks)
        tensors += (inside := [tensor for chunk in chunks for tensor in chunk.values()])
        path = f"{rank_dir('release', rank.tp_rank, rank.pp_rank, output.pp_size)}/{RANK_FILE}"
        size_bytes = sum(tensor.size_bytes for tensor in inside)
        files.append(OutFile(path, size_bytes, partial(write_pt, tree=rank_tree(chunks)), findings))
    sizes = [
        tensor_bytes(whole_tensor(name, shape), weights, output.dtype, name) for name, shape in output.shapes.items()
    ]
    digests = write_all(target, files, watch, journal, to_verify=sum(sizes) if output.reopen else 0)
    write_tracker(target)
    if output.reopen:
        check_equal(output.shapes, weights, output.reopen(target), watch)
    return Written(
        num_tensors=len(tensors),
        total_bytes=sum(tensor.size_bytes for tensor in tensors),
        dtypes=sorted({tensor.dtype for tensor in tensors}),
        digests=digests,
    )


def write_all(
    target: Path, files: list[OutFile], watch: SharedWatch, journal: Journal | None, *, to_verify: int
) -> dict[str, str]:
    """Tell the watch what is to come, and write."""
    total = sum(file.size_bytes for file in files)
    to_write = sum(file.size_bytes for file in files if journal is None or file.path not in journal.finished)
    watch.begin(total + to_verify, to_write=to_write)
    return write_files(target, files, watch, journal)


def out_tensors(
    layouts: Mapping[str, TensorLayout],
    weights: WeightSource,
    dtype: str | None,
    watch: SharedWatch,
    findings: Findings,
) -> dict[str, OutTensor]:
    """The tensors as they will be asked for their bytes. Raises InvalidModel where parts differ in type and no `dtype` is given."""
    return {name: _out(layout, weights, dtype, watch, findings, name) for name, layout in layouts.items()}


def _out(
    layout: TensorLayout, weights: WeightSource, dtype: str | None, watch: SharedWatch, findings: Findings, name: str
) -> OutTensor:
    stored = _stored_dtype(layout, weights, name)

    def stream() -> Iterator[Bytes]:
        for chunk in chunks(layout, weights, dtype=dtype, findings=findings):
            yield chunk
            watch.advance(chunk.nbytes)

    return OutTensor(dtype or stored, layout.shape, stream)


def _stored_dtype(layout: TensorLayout, weights: WeightSource, name: str) -> str:
    stored = layout_dtype(layout, weights)
    if stored is None:
        parts = ", ".join(f"{source} {weights.dtype(source)}" for source in {block.source for block in layout.blocks})
        raise InvalidModel(f"{name} would be made of weights of different types: {parts}", hint="give dtype")
    return stored


def tensor_bytes(layout: TensorLayout, weights: WeightSource, dtype: str | None, name: str) -> int:
    """Size that it will have."""
    return OutTensor(dtype or _stored_dtype(layout, weights, name), layout.shape, list).size_bytes


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


def require_empty(target: Path, journal: Journal | None) -> None:
    """Refuse a folder with files in it, unless they are a journal's."""
    if journal is None and target.exists() and any(target.iterdir()):
        raise Conflict(f"{target} is not empty; stale rank files would be taken for part of the checkpoint")
