"""`.pt` files: the zip that `torch.save` writes, read without running anything in it, and written without holding it.

    archive/data.pkl     pickle of the tree; a tensor is (storage key, offset, shape, stride)
    archive/data/<key>   raw little-endian bytes of one storage, 64-byte aligned
    archive/byteorder  archive/version

Reading admits tensors, plain containers and `argparse.Namespace`. Objects of Megatron, MindSpeed and NumPy, which a
trainer leaves beside the weights, become inert placeholders. Any other global is refused by name.
"""

from __future__ import annotations

import argparse
import collections
import io
import itertools
import pickle
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from core.conversion.apply import ITEM_SIZE, RELEASE_BYTES, Bytes
from core.conversion.files import HashingWriter, MappedFile, OutTensor
from core.errors import CorruptCheckpoint
from core.models.mapping import Shape

if TYPE_CHECKING:
    import torch

_STORAGE = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}
_STORAGE_DTYPE = {
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_BYTES_PER_ITEM = ITEM_SIZE | {"float64": 8, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1}
_DTYPES = frozenset({*_BYTES_PER_ITEM, "complex64", "complex128"})
_INERT_PACKAGES = frozenset({"megatron", "mindspeed", "mindspeed_mm", "numpy"})
_MAX_PICKLE_BYTES = 256 << 20
_ALIGNMENT = 64
_LOCAL_HEADER = 30


class Record:
    """An entry of the zip. Its CRC-32 is compared when its bytes are wanted for the first time, all of them at once."""

    def __init__(self, path: Path, info: zipfile.ZipInfo, data: Bytes, release: Callable[[], None]) -> None:
        self.data = data
        self._where, self._crc, self._release = f"{path}: {info.filename}", info.CRC, release
        self._lock = threading.Lock()
        self._checked = info.CRC == 0  # torch.save writes 0 after `torch.serialization.set_crc32_options(False)`

    def check(self) -> None:
        """Raise CorruptCheckpoint when a byte is not what was written."""
        with self._lock:
            if self._checked:
                return
            found = 0
            for start in range(0, self.data.size, RELEASE_BYTES):
                found = zlib.crc32(self.data[start : start + RELEASE_BYTES].data, found)
                self._release()
            if found != self._crc:
                raise CorruptCheckpoint(
                    f"{self._where} is damaged: its CRC-32 is {found:08x}, but {self._crc:08x} was written",
                    hint="copy the file again from where it was made",
                )
            self._checked = True


@dataclass(frozen=True)
class PtTensor:
    """A tensor of a file: its values stay on disk until they are read."""

    dtype: str
    """As torch names it, without the `torch.`."""
    shape: Shape
    data: Bytes
    """Flat bytes, memory-mapped."""
    record: Record
    """Where they lie."""

    @property
    def matrix(self) -> Bytes:
        """Bytes as [dim 0, the rest]."""
        return self.data.reshape(self.shape[0], -1) if self.shape and self.shape[0] else self.data.reshape(0, 0)


class PtFile:
    """An open file: `tree` has `PtTensor` for tensors. Raises CorruptCheckpoint naming the file."""

    def __init__(self, path: Path) -> None:
        entries = _read_directory(path)
        self._mapped = MappedFile(path)
        records = {
            name: Record(path, info, _stored(self._mapped.data, info, path), self._mapped.release)
            for name, info in entries.items()
        }
        (pickle_name,) = (name for name in records if name.endswith("/data.pkl"))
        prefix = pickle_name.removesuffix("data.pkl")
        order = records.get(f"{prefix}byteorder")
        if order is not None and order.data.tobytes() != b"little":
            raise CorruptCheckpoint(f"{path} was written by a big-endian machine")
        data = f"{prefix}data/"
        storages = {name.removeprefix(data): record for name, record in records.items() if name.startswith(data)}
        records[pickle_name].check()
        self.tree = _unpickle(records[pickle_name].data.tobytes(), storages, path)
        self.release()  # of reading the headers

    def release(self) -> None:
        """Free the memory that reading took."""
        self._mapped.release()

    def drop_cache(self) -> None:
        """Have the file read from the disk itself from now on."""
        self._mapped.drop_cache()


def read_pt(path: Path) -> Any:
    """The tree of a file."""
    return PtFile(path).tree


def _read_directory(path: Path) -> dict[str, zipfile.ZipInfo]:
    """All entries by name."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, EOFError) as error:
        raise CorruptCheckpoint(f"{path} is truncated or not a torch.save file: {error}") from error
    pickles = [info for name, info in entries.items() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CorruptCheckpoint(f"{path} is a zip, but not one that torch.save wrote")
    if pickles[0].file_size > _MAX_PICKLE_BYTES:
        raise CorruptCheckpoint(f"{path}: data.pkl is larger than {_MAX_PICKLE_BYTES} bytes")
    return entries


def _unpickle(pickled: bytes, storages: Mapping[str, Record], path: Path) -> Any:
    try:
        return _Unpickler(io.BytesIO(pickled), storages=storages, path=path).load()
    except CorruptCheckpoint:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise CorruptCheckpoint(f"{path}: data.pkl is damaged: {type(error).__name__}: {error}") from error


def _stored(mapped: Bytes, info: zipfile.ZipInfo, path: Path) -> Bytes:
    """The bytes of a stored zip entry."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise CorruptCheckpoint(f"{path}: {info.filename} is compressed; torch.save stores")
    header = mapped[info.header_offset : info.header_offset + _LOCAL_HEADER].tobytes()
    if header[:4] != b"PK\x03\x04":
        raise CorruptCheckpoint(f"{path}: {info.filename} is not where the zip directory says")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    start = info.header_offset + _LOCAL_HEADER + name_length + extra_length
    if start + info.file_size > mapped.size:
        raise CorruptCheckpoint(f"{path} is truncated: {info.filename} ends after the file")
    return mapped[start : start + info.file_size]


class _Inert:
    """Stands for an object that nobody here needs; takes whatever a pickle does to it and does nothing."""

    def __new__(cls, *_: object, **__: object) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass

    def __setitem__(self, _: object, __: object) -> None:
        pass

    def append(self, _: object) -> None:
        """Drop it."""

    def extend(self, _: object) -> None:
        """Drop them."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, *, storages: Mapping[str, Record], path: Path) -> None:
        super().__init__(stream)
        self._storages, self._path = storages, path

    def find_class(self, module: str, name: str) -> Any:
        known = _known_global(module, name)
        if known is None:
            raise CorruptCheckpoint(
                f"{self._path} wants to load {module}.{name}, which is refused: only tensors, plain containers and "
                "argparse.Namespace are read",
                code="unsafe_checkpoint",
                hint="torch.load with weights_only=False would run it; get the checkpoint from someone you trust",
            )
        return known

    def persistent_load(self, pid: Any) -> tuple[str, Record]:
        """A storage: its type and where its bytes are."""
        match pid:
            case ("storage", str(dtype), str(key), _, _) if key in self._storages:
                return dtype, self._storages[key]
        raise CorruptCheckpoint(f"{self._path}: data.pkl refers to a storage that is not there")


def _known_global(module: str, name: str) -> Any:
    allowed: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("argparse", "Namespace"): argparse.Namespace,
        ("torch", "Size"): tuple,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        ("_codecs", "encode"): _Inert,  # how NumPy's pickles spell bytes
    }
    if (module, name) in allowed:
        return allowed[module, name]
    if module == "torch" and name in _STORAGE_DTYPE:
        return _STORAGE_DTYPE[name]
    if module == "torch" and name in _DTYPES:
        return f"torch.{name}"
    if module.split(".")[0] in _INERT_PACKAGES:
        return _Inert
    return None


def _rebuild_tensor(
    storage: tuple[str, Record], offset: int, shape: Shape, stride: Shape, _grad: object, _hooks: object, *_: object
) -> PtTensor:
    dtype, record = storage
    item = _BYTES_PER_ITEM[dtype]
    wanted, span = 1, []
    for size in reversed(shape):
        span.append(wanted)
        wanted *= size
    expected = tuple(reversed(span))
    if any(size > 1 and got != want for size, got, want in zip(shape, stride, expected, strict=True)):
        raise CorruptCheckpoint(
            f"a tensor of shape {list(shape)} has stride {list(stride)}; only contiguous ones are read"
        )
    count = wanted if shape else 1
    if offset < 0 or (offset + count) * item > record.data.size:
        raise CorruptCheckpoint(
            f"a tensor of shape {list(shape)} reaches beyond its storage of {record.data.size} bytes"
        )
    return PtTensor(dtype, tuple(shape), record.data[offset * item : (offset + count) * item], record)


def _rebuild_parameter(data: PtTensor, _grad: object, _hooks: object) -> PtTensor:
    return data


def write_pt(path: Path, tree: Mapping[str, Any]) -> str:
    """Write a tree whose leaves are `OutTensor`, numbers and strings; return the file's SHA-256.

    `torch.load(weights_only=True)` reads it. Tensors are asked for their bytes in order, one chunk at a time.
    """
    emitter = _Emitter()
    pickled = emitter.dump(dict(tree))
    with HashingWriter.open(path) as out:
        with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:  # type: ignore[call-overload]
            _add(archive, out, "archive/data.pkl", pickled)
            _add(archive, out, "archive/byteorder", b"little")
            for key, tensor in enumerate(emitter.tensors):
                _add_tensor(archive, out, f"archive/data/{key}", tensor)
            _add(archive, out, "archive/version", b"3\n")
        return out.hexdigest()


def from_torch(tensor: torch.Tensor) -> OutTensor:
    """A tensor in memory, to be written; it goes to the host when its turn comes."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in ITEM_SIZE:
        raise TypeError(f"weights are {', '.join(ITEM_SIZE)}, not {dtype}")

    def chunks() -> list[Bytes]:
        import torch

        flat = tensor.detach().cpu().contiguous().view(-1)
        return [flat.view(torch.uint8).numpy()]

    return OutTensor(dtype, tuple(tensor.shape), chunks)


_MARK, _REBUILD = b"(", b"ctorch._utils\n_rebuild_tensor_v2\n"


class _Emitter:
    """Writes the pickle (protocol 2) that torch.save would, without torch: dictionaries, numbers, strings, OutTensors."""

    def __init__(self) -> None:
        self.tensors: list[OutTensor] = []
        """In the order of their storage keys."""

    def dump(self, tree: Mapping[str, Any]) -> bytes:
        """The whole of data.pkl."""
        return b"\x80\x02" + self._value(tree) + b"."

    def _value(self, value: object) -> bytes:
        match value:
            case OutTensor():
                return self._tensor(value)
            case bool() | None:
                return {True: b"\x88", False: b"\x89", None: b"N"}[value]
            case int():
                return _int(value)
            case float():
                return b"G" + struct.pack(">d", value)
            case str():
                text = value.encode()
                return b"X" + struct.pack("<I", len(text)) + text
            case dict():
                items = b"".join(self._value(key) + self._value(item) for key, item in value.items())
                return b"}" + _MARK + items + b"u"
        raise TypeError(f"{type(value).__name__} is not written to a .pt file")

    def _tensor(self, tensor: OutTensor) -> bytes:
        """_rebuild_tensor_v2(storage, offset, shape, stride, requires_grad, OrderedDict())"""
        key = str(len(self.tensors))
        self.tensors.append(tensor)
        count = tensor.size_bytes // ITEM_SIZE[tensor.dtype]
        storage_type = f"ctorch\n{_STORAGE[tensor.dtype]}\n".encode()
        text = self._value
        storage = _MARK + text("storage") + storage_type + text(key) + text("cpu") + _int(count) + b"tQ"
        strides = itertools.accumulate(reversed(tensor.shape[1:]), lambda a, b: a * b, initial=1)
        stride = tuple(strides)[::-1] if tensor.shape else ()
        hooks = b"ccollections\nOrderedDict\n)R"
        return _REBUILD + _MARK + storage + _int(0) + _ints(tensor.shape) + _ints(stride) + b"\x89" + hooks + b"tR"


def _int(value: int) -> bytes:
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _ints(values: Shape) -> bytes:
    return _MARK + b"".join(map(_int, values)) + b"t"


def _entry(out: HashingWriter, name: str, size: int) -> zipfile.ZipInfo:
    """A stored entry whose data begins at a multiple of 64, padded as torch pads (extra field "FB")."""
    info = zipfile.ZipInfo(name)
    info.file_size = size
    info.external_attr = 0o640 << 16
    zip64 = 20 if size * 1.05 > zipfile.ZIP64_LIMIT else 0
    start = out.position + _LOCAL_HEADER + len(name) + zip64 + 4
    padding = -start % _ALIGNMENT
    info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    return info


def _add(archive: zipfile.ZipFile, out: HashingWriter, name: str, data: bytes) -> None:
    with archive.open(_entry(out, name, len(data)), "w") as entry:
        entry.write(data)


def _add_tensor(archive: zipfile.ZipFile, out: HashingWriter, name: str, tensor: OutTensor) -> None:
    written = 0
    with archive.open(_entry(out, name, tensor.size_bytes), "w") as entry:
        for chunk in tensor.chunks():
            written += entry.write(np.ascontiguousarray(chunk).reshape(-1).data)
    assert written == tensor.size_bytes, f"{name}: wrong number of bytes"
