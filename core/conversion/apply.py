"""Moves the rectangles of a layout (`core.models.layout`) from a source of weights into the bytes of a target tensor.

A tensor is seen as a matrix of bytes: rows = dim 0, columns = the rest, so that one code serves every type, fused
projection and tensor-parallel cut. Work goes in chunks of rows; nothing larger is ever held.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from core.models.layout import Block, TensorLayout
from core.models.mapping import Shape, width

Bytes = npt.NDArray[np.uint8]
CHUNK_BYTES = 16 << 20
RELEASE_BYTES = 128 << 20
"""So much is read at most before the source's pages are let go."""

TORCH_DTYPE = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ITEM_SIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


class WeightSource(Protocol):
    """Weights that can be read in HF coordinates (old names), whatever layout they lie in."""

    def dtype(self, name: str) -> str:
        """float32, float16 or bfloat16."""

    def view(self, name: str, rows: tuple[int, int], columns: tuple[int, int]) -> Bytes | None:
        """The rectangle as bytes [rows, columns × item size] without a copy, if it lies in one piece; else None."""

    def read(self, name: str, rows: tuple[int, int], columns: tuple[int, int], out: Bytes) -> None:
        """Copy the rectangle into `out` [rows, columns × item size]."""

    def release(self) -> None:
        """Free the memory that reading took; views that were handed out stay valid."""


def whole_tensor(name: str, shape: Shape) -> TensorLayout:
    """The layout of a HF tensor as it is."""
    return TensorLayout(shape, (Block(0, shape[0], name, 0, 0, width(shape)),))


def layout_dtype(layout: TensorLayout, source: WeightSource) -> str | None:
    """The one type of all that makes the tensor; None where they differ."""
    dtypes = {source.dtype(block.source) for block in layout.blocks}
    return dtypes.pop() if len(dtypes) == 1 else None


def chunks(layout: TensorLayout, source: WeightSource, *, dtype: str | None = None) -> Iterator[Bytes]:
    """The tensor's bytes from first to last row, cast to `dtype` (round to nearest even) where it is not the source's."""
    stored = layout_dtype(layout, source)
    assert stored is not None, "callers check with layout_dtype"
    columns = layout.blocks[0].columns
    row_bytes = columns * ITEM_SIZE[stored]
    step = max(1, CHUNK_BYTES // (4 * columns))  # rows per chunk do not depend on the type
    unreleased = 0
    for start in range(0, layout.shape[0], step):
        stop = min(start + step, layout.shape[0])
        yield cast(_rows(layout, source, start, stop, row_bytes), stored, dtype or stored)
        unreleased += (stop - start) * row_bytes
        if unreleased >= RELEASE_BYTES or (stop == layout.shape[0] and unreleased >= CHUNK_BYTES):
            source.release()
            unreleased = 0


def _rows(layout: TensorLayout, source: WeightSource, start: int, stop: int, row_bytes: int) -> Bytes:
    """Rows [start, stop) of the target as bytes [rows, row_bytes]."""
    parts = [part for part in (_within(block, start, stop) for block in layout.blocks) if part.rows > 0]
    if len(parts) == 1:
        view = source.view(*_rectangle(parts[0]))
        if view is not None:
            return view
    out = np.empty((stop - start, row_bytes), np.uint8)
    for part in parts:
        source.read(*_rectangle(part), out[part.row - start : part.row - start + part.rows])
    return out


def _within(block: Block, start: int, stop: int) -> Block:
    """The part of a block that lies in target rows [start, stop); without rows if none does."""
    first, last = max(start, block.row), min(stop, block.row + block.rows)
    source_row = block.source_row + first - block.row
    return Block(first, max(0, last - first), block.source, source_row, block.column, block.columns)


def _rectangle(block: Block) -> tuple[str, tuple[int, int], tuple[int, int]]:
    rows = (block.source_row, block.source_row + block.rows)
    return block.source, rows, (block.column, block.column + block.columns)


def cast(data: Bytes, stored: str, wanted: str) -> Bytes:
    """Bytes of `stored` values as bytes of `wanted` values; the same object when nothing changes."""
    if stored == wanted:
        return data
    values = torch.from_numpy(np.ascontiguousarray(data).copy()).view(TORCH_DTYPE[stored])
    converted: Bytes = values.to(TORCH_DTYPE[wanted]).view(torch.uint8).numpy()
    return converted


def same_bytes(first: Bytes, second: Bytes) -> bool:
    """Whether two byte matrices are equal, without a temporary of their size."""
    if first.shape != second.shape:
        return False
    step = max(1, CHUNK_BYTES // max(1, first.shape[1]))
    return all(
        np.array_equal(first[row : row + step], second[row : row + step]) for row in range(0, first.shape[0], step)
    )


def to_tensor(layout: TensorLayout, source: WeightSource) -> torch.Tensor:
    """The whole tensor, in memory of its own."""
    stored = layout_dtype(layout, source)
    assert stored is not None, "callers check with layout_dtype"
    out = torch.empty(layout.shape, dtype=TORCH_DTYPE[stored])
    matrix: Bytes = out.view(-1).view(torch.uint8).numpy()
    position = 0
    for chunk in chunks(layout, source):
        matrix[position : position + chunk.size] = chunk.reshape(-1)
        position += chunk.size
    assert position == matrix.size, "layouts cover every row"
    return out
