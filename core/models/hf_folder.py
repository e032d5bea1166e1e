"""What is in a Hugging Face model folder, read from config.json, index and safetensors headers alone (no torch).

    config.json
    model.safetensors                                      one file, or
    model.safetensors.index.json                           {"metadata": {…}, "weight_map": {key: file}} and
    model-00001-of-00005.safetensors …                     (an index-less folder of several files is read too)

A safetensors file is `u64 header length | JSON header {key: {dtype, shape, data_offsets}} | data`.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import InvalidModel, UnknownWeights
from core.models.config import Config
from core.models.layout import hf_shapes, tied_names
from core.models.mapping import Shape, old_name
from core.models.registry import detect

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
ITEM_SIZE = {"F32": 4, "F16": 2, "BF16": 2}
"""Bytes per element of the types that a weight may have."""
DTYPE_NAME = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
MAX_HEADER_BYTES = 100_000_000
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_LISTED = 10


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: bytes `[start, stop)` of `file`."""

    key: str
    file: Path
    dtype: str
    shape: Shape
    start: int
    stop: int


@dataclass(frozen=True)
class HFFolder:
    """A checked folder: its weights are exactly those of its config. `tensors` goes by old names."""

    path: Path
    family: str
    config: Config
    config_json: dict[str, Any]
    tensors: dict[str, TensorEntry]
    tied_copies: dict[str, TensorEntry]
    """Tied weights that are stored all the same; transformers ignores them."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(entry.stop - entry.start for entry in self._entries())

    @property
    def weight_map(self) -> dict[str, str]:
        """Key as it came -> name of the file that holds it."""
        return {entry.key: entry.file.name for entry in self._entries()}

    @property
    def dtypes(self) -> set[str]:
        """Types of the weights: float32, float16, bfloat16."""
        return {DTYPE_NAME[entry.dtype] for entry in self._entries()}

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata of an `hf_model` artifact."""
        return {
            "family": self.family,
            "config": self.config_json,
            "num_tensors": len(self.tensors),
            "total_bytes": self.total_bytes,
            "dtypes": sorted(self.dtypes),
        }

    def _entries(self) -> list[TensorEntry]:
        return [*self.tensors.values(), *self.tied_copies.values()]


def inspect_hf_folder(path: Path) -> HFFolder:
    """Read and check a folder. Raises InvalidModel naming the file and tensor, UnknownWeights listing the weights."""
    config_json = read_config(path)
    family = detect(config_json)
    if "quantization_config" in config_json:
        raise InvalidModel("config.json: quantization_config: quantised weights cannot be trained; use the full ones")
    config = family.parse_config(config_json)
    entries = _unique(entry for file in _weight_files(path) for entry in read_header(file))
    _check_index(path, entries)
    tensors = _by_old_name(entries)
    tied = {name: tensors.pop(name) for name in tied_names(config) if name in tensors}
    shapes = hf_shapes(config)
    _check_names(tensors, shapes)
    _check_shapes(tensors, shapes)
    for name, entry in tied.items():
        _check_shapes({name: entry}, {name: shapes[tied_names(config)[name]]})
    return HFFolder(path, family.name, config, config_json, tensors, tied)


def read_config(path: Path) -> dict[str, Any]:
    """The folder's config.json."""
    if not path.is_dir():
        raise InvalidModel(f"{path} is not a folder")
    file = path / "config.json"
    if not file.is_file():
        raise InvalidModel(f"{path} has no config.json, so it is not a Hugging Face model folder")
    return read_json(file)


def read_index(path: Path) -> dict[str, str] | None:
    """The index's `weight_map`, or None when there is no index."""
    file = path / INDEX_FILE
    if not file.is_file():
        return None
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InvalidModel(f"{INDEX_FILE} has no weight_map of names")
    for name in weight_map.values():
        if Path(name).name != name:
            raise InvalidModel(f"{INDEX_FILE} names {name!r}, which is not a plain file name")
    return weight_map


def read_header(file: Path) -> list[TensorEntry]:
    """The tensors of one safetensors file, in its own order. Raises InvalidModel for a truncated or malformed file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0] if size >= 8 else -1
        if not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
            raise InvalidModel(f"{file.name} is truncated or not a safetensors file ({size} bytes)")
        text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=lambda pairs: _no_duplicates(pairs, file))
    except ValueError as error:
        raise InvalidModel(f"{file.name}: its safetensors header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise InvalidModel(f"{file.name}: its safetensors header is not an object")
    header.pop("__metadata__", None)
    entries = [_entry(key, value, file, 8 + length) for key, value in header.items()]
    end = max((entry.stop for entry in entries), default=8 + length)
    if end > size:
        last = max(entries, key=lambda entry: entry.stop)
        raise InvalidModel(f"{file.name} is truncated: {last.key} ends at byte {end}, but the file has {size}")
    return entries


def read_json(file: Path) -> dict[str, Any]:
    """A file that holds one JSON object. Raises InvalidModel."""
    try:
        value = json.loads(file.read_bytes())
    except ValueError as error:
        raise InvalidModel(f"{file.name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidModel(f"{file.name} is not a JSON object")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]], file: Path) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = [key for key, _ in pairs if key in seen or seen.add(key)]  # type: ignore[func-returns-value]
        raise InvalidModel(f"{file.name} has {', '.join(twice[:_LISTED])} twice")
    return values


def _entry(key: str, value: object, file: Path, data_start: int) -> TensorEntry:
    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(stop)]}:
            pass
        case _:
            raise InvalidModel(f"{file.name}: {key} has a malformed header entry")
    if dtype not in ITEM_SIZE:
        raise InvalidModel(f"{file.name}: {key} has type {dtype}; supported: {', '.join(sorted(ITEM_SIZE))}")
    if not all(isinstance(size, int) and size >= 0 for size in shape) or start < 0:
        raise InvalidModel(f"{file.name}: {key} has a malformed header entry")
    wanted = math.prod(shape) * ITEM_SIZE[dtype]
    if stop - start != wanted:
        raise InvalidModel(f"{file.name}: {key} of shape {shape} {dtype} needs {wanted} bytes, but has {stop - start}")
    return TensorEntry(key, file, dtype, tuple(shape), data_start + start, data_start + stop)


def _weight_files(path: Path) -> list[Path]:
    weight_map = read_index(path)
    if weight_map is not None:
        names = sorted(set(weight_map.values()))
    elif (path / SINGLE_FILE).is_file():
        names = [SINGLE_FILE]
    else:
        names = sorted(file.name for file in path.glob("*.safetensors"))
        names = _with_siblings(names)
    if not names:
        raise InvalidModel(f"{path} has no safetensors files; weights in other formats are not read")
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise InvalidModel(f"{path} lacks {', '.join(missing)}")
    return [path / name for name in names]


def _with_siblings(names: list[str]) -> list[str]:
    """Without an index, `model-00001-of-00003` still tells that there are three."""
    complete = set(names)
    for name in names:
        if found := _SHARD.fullmatch(name):
            total = int(found[3])
            complete |= {f"{found[1]}-{number:05d}-of-{found[3]}.safetensors" for number in range(1, total + 1)}
    return sorted(complete)


def _unique(entries: Iterable[TensorEntry]) -> dict[str, TensorEntry]:
    unique: dict[str, TensorEntry] = {}
    for entry in entries:
        if entry.key in unique:
            raise InvalidModel(f"{entry.key} is in both {unique[entry.key].file.name} and {entry.file.name}")
        unique[entry.key] = entry
    return unique


def _check_index(path: Path, entries: Mapping[str, TensorEntry]) -> None:
    for key, file in (read_index(path) or {}).items():
        if key not in entries:
            raise InvalidModel(f"{INDEX_FILE} places {key} in {file}, which does not have it")
        if entries[key].file.name != file:
            raise InvalidModel(f"{INDEX_FILE} places {key} in {file}, but it is in {entries[key].file.name}")


def _by_old_name(entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    for key, entry in entries.items():
        name = old_name(key)
        if name in tensors:
            raise InvalidModel(
                f"{tensors[name].key} and {key} are the old and the new name of one weight; both are there"
            )
        tensors[name] = entry
    return tensors


def _check_names(tensors: Mapping[str, TensorEntry], shapes: Mapping[str, Shape]) -> None:
    unknown = [entry.key for name, entry in tensors.items() if name not in shapes]
    missing = [name for name in shapes if name not in tensors]
    if unknown or missing:
        parts = [f"{len(missing)} weights are missing: {listed(missing)}"] if missing else []
        parts += [f"{len(unknown)} weights match no rule: {listed(unknown)}"] if unknown else []
        raise UnknownWeights("; ".join(parts), hint="do the weights belong to this config.json?")


def _check_shapes(tensors: Mapping[str, TensorEntry], shapes: Mapping[str, Shape]) -> None:
    for name, entry in tensors.items():
        if entry.shape != shapes[name]:
            raise InvalidModel(
                f"{entry.file.name}: {entry.key} has shape {list(entry.shape)}, "
                f"but config.json makes it {list(shapes[name])}"
            )


def listed(names: Iterable[str]) -> str:
    """The first ten names and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
