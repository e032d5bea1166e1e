"""Moves the rectangles of a layout (`core.models.layout`) from a source of weights into the bytes of a target tensor.

A tensor is seen as a matrix of bytes: rows = dim 0, columns = the rest, so that one code serves every type, fused
projection and tensor-parallel cut. A rectangle that lies in one piece is passed on where it is, without a copy; the others are
gathered chunk by chunk; nothing larger is ever held.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from core.models.layout import Block, TensorLayout
from core.models.mapping import Shape, width

Bytes = npt.NDArray[np.uint8]
CHUNK_BYTES = 4 << 20
DIRECT_BYTES = 256 << 10
"""A smaller piece is gathered with its neighbours: one copy costs less than one more step of hashing and writing."""
RELEASE_BYTES = 32 << 20
"""So much is read at most, by one thread, before the source's pages are let go."""

ITEM_SIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
_INFINITY = {"float32": 0x7F80_0000, "float16": 0x7C00, "bfloat16": 0x7F80}
"""Bits of +Inf; what is larger, sign apart, is NaN."""


@dataclass(frozen=True)
class Part:
    """A rectangle of a tensor, and where its bytes are."""

    name: str
    """HF name of the weight (old form)."""
    row: int
    """Its first row."""
    left: int
    """Its first column, in bytes."""
    data: Bytes
    """[rows, bytes per row], a view of the source."""

    @property
    def stop(self) -> int:
        """The row after its last."""
        return self.row + self.data.shape[0]


class WeightSource(Protocol):
    """Weights that can be read in HF coordinates (old names), whatever layout they lie in."""

    def dtype(self, name: str) -> str:
        """float32, float16 or bfloat16."""

    def parts(self, name: str, rows: tuple[int, int], columns: tuple[int, int]) -> Iterable[Part]:
        """The pieces of a rectangle, counted from its own first row and column. Columns are elements."""

    def release(self) -> None:
        """Free the memory that reading took; parts stay valid."""


class Findings:
    """What the values of the weights gave cause to warn of. Filled by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._non_finite: set[str] = set()
        self._overflowing: set[str] = set()

    @property
    def non_finite(self) -> list[str]:
        """Weights with a NaN or an infinity."""
        return sorted(self._non_finite)

    @property
    def overflowing(self) -> list[str]:
        """Weights of which the new type made an infinity."""
        return sorted(self._overflowing)

    def look(self, chunk: Bytes, stored: str, parts: list[Part], first_row: int) -> bool:
        """Note the weights in a chunk that are not finite; say whether all are."""
        if all_finite(chunk, stored):
            return True
        last_row = first_row + chunk.shape[0]
        inside = ((part, max(part.row, first_row), min(part.stop, last_row)) for part in parts)
        names = {
            part.name
            for part, start, stop in inside
            if start < stop and not all_finite(part.data[start - part.row : stop - part.row], stored)
        }
        with self._lock:
            self._non_finite |= names
        return False

    def overflowed(self, parts: list[Part]) -> None:
        """Note that finite values became infinite."""
        with self._lock:
            self._overflowing |= {part.name for part in parts}


def whole_tensor(name: str, shape: Shape) -> TensorLayout:
    """The layout of a HF tensor as it is."""
    return TensorLayout(shape, (Block(0, shape[0], name, 0, 0, width(shape)),))


def layout_dtype(layout: TensorLayout, source: WeightSource) -> str | None:
    """The one type of all that makes the tensor; None where they differ."""
    dtypes = {source.dtype(block.source) for block in layout.blocks}
    return dtypes.pop() if len(dtypes) == 1 else None


def chunks(
    layout: TensorLayout, source: WeightSource, *, dtype: str | None = None, findings: Findings | None = None
) -> Iterator[Bytes]:
    """The tensor's bytes from first to last row, cast to `dtype` (round to nearest even) where it is not the source's."""
    stored = layout_dtype(layout, source)
    assert stored is not None, "callers check with layout_dtype"
    wanted = dtype or stored
    row_bytes = width(layout.shape) * ITEM_SIZE[stored]
    unreleased = 0
    for run in _runs(layout_parts(layout, source), row_bytes):
        reach = max(1, max(part.data.strides[0] for part in run) // row_bytes)  # a cut of columns touches whole rows
        for start, stop in row_steps(run[0].row, max(part.stop for part in run), row_bytes):
            chunk = assemble(run, start, stop, row_bytes)
            finite = findings is None or findings.look(chunk, stored, run, start)
            out = cast(chunk, stored, wanted)
            if findings is not None and finite and wanted != stored and not all_finite(out, wanted):
                findings.overflowed(run)
            yield out
            unreleased += reach * chunk.nbytes
            if unreleased >= RELEASE_BYTES:
                source.release()
                unreleased = 0
    if unreleased >= CHUNK_BYTES:
        source.release()


def layout_parts(layout: TensorLayout, source: WeightSource) -> list[Part]:
    """All pieces of a target tensor, by row and column."""
    found = [
        replace(part, row=part.row + block.row)
        for block in layout.blocks
        for part in source.parts(
            block.source,
            (block.source_row, block.source_row + block.rows),
            (block.column, block.column + block.columns),
        )
    ]
    return sorted(found, key=lambda part: (part.row, part.left))


def _runs(parts: list[Part], row_bytes: int) -> Iterator[list[Part]]:
    """Pieces that can be passed on as they are, each alone; what lies between them, together."""
    between: list[Part] = []
    for part in parts:
        if part.data.shape[1] == row_bytes and part.data.size >= DIRECT_BYTES:
            if between:
                yield between
                between = []
            yield [part]
        else:
            between.append(part)
    if between:
        yield between


def row_steps(start: int, stop: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Rows [start, stop) in runs of about CHUNK_BYTES."""
    step = max(1, CHUNK_BYTES // max(1, row_bytes))
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def assemble(parts: list[Part], start: int, stop: int, row_bytes: int) -> Bytes:
    """Rows [start, stop) as contiguous bytes [rows, row_bytes]: a view where one part holds them, else a copy."""
    inside = [part for part in parts if part.row < stop and start < part.stop]
    if len(inside) == 1 and inside[0].data.shape[1] == row_bytes:
        return inside[0].data[start - inside[0].row : stop - inside[0].row]
    out = np.empty((stop - start, row_bytes), np.uint8)
    for part in inside:
        first, last = max(start, part.row), min(stop, part.stop)
        right = part.left + part.data.shape[1]
        out[first - start : last - start, part.left : right] = part.data[first - part.row : last - part.row]
    return out


def all_finite(data: Bytes, dtype: str) -> bool:
    """Whether no value is NaN or infinite. Compares bit patterns: the largest as signed, then as unsigned integers."""
    item = ITEM_SIZE[dtype]
    infinity = _INFINITY[dtype]
    bits = np.ascontiguousarray(data).reshape(-1).view(f"<i{item}")
    negative = 1 << (8 * item - 1)
    return bits.size == 0 or bool(bits.max() < infinity and bits.view(f"<u{item}").max() < negative + infinity)


def cast(data: Bytes, stored: str, wanted: str) -> Bytes:
    """Bytes of `stored` values as bytes of `wanted` values, rounded to nearest even; the same object when nothing changes.

    What is too large becomes infinite; NaN stays NaN.
    """
    if stored == wanted:
        return data
    values = _to_float32(np.ascontiguousarray(data).reshape(-1), stored)
    return _from_float32(values, wanted).view(np.uint8).reshape(data.shape[0], -1)


def _to_float32(flat: Bytes, stored: str) -> npt.NDArray[np.float32]:
    match stored:
        case "float32":
            return flat.view("<f4")
        case "float16":
            return flat.view("<f2").astype("<f4")
        case _:
            return (flat.view("<u2").astype("<u4") << 16).view("<f4")


def _from_float32(values: npt.NDArray[np.float32], wanted: str) -> npt.NDArray:
    match wanted:
        case "float32":
            return values
        case "float16":
            with np.errstate(over="ignore"):
                return values.astype("<f2")
        case _:
            bits = values.view("<u4")
            rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
            return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype("<u2")


def same_bytes(first: Bytes, second: Bytes) -> bool:
    """Whether two byte matrices are equal, without a temporary of their size."""
    if first.shape != second.shape:
        return False
    steps = row_steps(0, first.shape[0], first.shape[1])
    return all(np.array_equal(first[start:stop], second[start:stop]) for start, stop in steps)
