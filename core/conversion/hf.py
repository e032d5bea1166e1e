"""Safetensors files: read lazily through a memory map, written tensor by tensor while their SHA-256 is taken."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from core.conversion.apply import ITEM_SIZE, Bytes, Part, same_bytes
from core.conversion.files import HashingWriter, MappedFile, OutTensor
from core.models.adapter import AdapterFolder
from core.models.hf_folder import DTYPE_NAME, INDEX_FILE, HFFolder, TensorEntry
from core.models.mapping import width

_TAG = {name: tag for tag, name in DTYPE_NAME.items()}


class HFWeights:
    """The weights of an inspected folder as a `WeightSource`."""

    def __init__(self, folder: HFFolder | AdapterFolder) -> None:
        self._tensors = folder.tensors
        self._tied_copies = folder.tied_copies
        self._files: dict[Path, MappedFile] = {}
        self._lock = threading.Lock()

    def dtype(self, name: str) -> str:
        """float32, float16 or bfloat16."""
        return DTYPE_NAME[self._tensors[name].dtype]

    def parts(self, name: str, rows: tuple[int, int], columns: tuple[int, int]) -> Iterator[Part]:
        """The rectangle is one piece."""
        item = ITEM_SIZE[self.dtype(name)]
        matrix = self._matrix(self._tensors[name])
        yield Part(name, 0, 0, matrix[rows[0] : rows[1], columns[0] * item : columns[1] * item])

    def release(self) -> None:
        """Free the memory that reading took."""
        for file in list(self._files.values()):
            file.release()

    def from_disk(self) -> None:
        """Have the files read from the disk itself from now on, not from the system's cache."""
        for file in {entry.file for entry in self._tensors.values()}:
            self._mapped(file).drop_cache()

    def differing_copies(self, tied: Mapping[str, str]) -> list[str]:
        """Keys of stored tied weights whose bytes are not those of the weight that they share."""
        return [
            entry.key
            for name, entry in self._tied_copies.items()
            if not same_bytes(self._matrix(entry), self._matrix(self._tensors[tied[name]]))
        ]

    def _matrix(self, entry: TensorEntry) -> Bytes:
        row_bytes = width(entry.shape) * ITEM_SIZE[DTYPE_NAME[entry.dtype]]
        return self._mapped(entry.file).data[entry.start : entry.stop].reshape(entry.shape[0], row_bytes)

    def _mapped(self, file: Path) -> MappedFile:
        with self._lock:
            if file not in self._files:
                self._files[file] = MappedFile(file)
            return self._files[file]


def write_safetensors(path: Path, tensors: Mapping[str, OutTensor]) -> str:
    """Write one file in the order given; return its SHA-256."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, tensor in tensors.items():
        stop = offset + tensor.size_bytes
        header[key] = {"dtype": _TAG[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with HashingWriter.open(path) as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for key, tensor in tensors.items():
            begin = out.position
            for chunk in tensor.chunks():
                out.write(np.ascontiguousarray(chunk).data)
            assert out.position - begin == tensor.size_bytes, f"{key}: wrong number of bytes"
        return out.hexdigest()


def write_index(directory: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """Write `model.safetensors.index.json`."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)}
    with HashingWriter.open(directory / INDEX_FILE) as out:
        out.write((json.dumps(index, indent=2) + "\n").encode())
