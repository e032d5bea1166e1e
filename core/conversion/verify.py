"""Proofs about a conversion: that nothing is lost or written twice, and that what was written equals its source."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

from core.conversion.apply import (
    ITEM_SIZE,
    RELEASE_BYTES,
    WeightSource,
    assemble,
    cast,
    layout_dtype,
    layout_parts,
    row_steps,
    whole_tensor,
)
from core.conversion.hf import HFWeights
from core.conversion.mm import MMWeights
from core.conversion.writing import Quiet, SharedWatch, in_threads
from core.errors import AppError, CorruptCheckpoint, UnknownWeights
from core.models.hf_folder import listed
from core.models.layout import Block, TensorLayout
from core.models.mapping import Shape, width


class VerificationFailed(AppError):
    """What was read back is not what was written."""

    code, status = "verification_failed", 500


def check_complete(layouts: Mapping[str, TensorLayout]) -> None:
    """Every row of every target tensor comes from exactly one block."""
    broken = [name for name, layout in layouts.items() if not _tiles(_row_ranges(layout), layout.shape[0])]
    if broken:
        raise UnknownWeights(f"these weights would be incomplete: {listed(broken)}")


def check_consumed(shapes: Mapping[str, Shape], blocks: Iterable[Block]) -> None:
    """Every value of every HF tensor is used, and no two different rectangles overlap. Equal rectangles are replicas."""
    rectangles: dict[str, set[tuple[int, int, int, int]]] = defaultdict(set)
    for block in blocks:
        rectangles[block.source].add((block.column, block.columns, block.source_row, block.rows))
    unknown = sorted(set(rectangles) - set(shapes))
    unused = [name for name, shape in shapes.items() if not _covered(rectangles[name], shape)]
    if unknown or unused:
        raise UnknownWeights(f"not used exactly once: {listed([*unused, *unknown])}")


def _row_ranges(layout: TensorLayout) -> list[tuple[int, int]]:
    return [(block.row, block.rows) for block in layout.blocks]


def _covered(rectangles: set[tuple[int, int, int, int]], shape: Shape) -> bool:
    columns = {(column, count) for column, count, _, _ in rectangles}
    return _tiles(columns, width(shape)) and all(
        _tiles([(row, rows) for column, count, row, rows in rectangles if (column, count) == band], shape[0])
        for band in columns
    )


def _tiles(ranges: Iterable[tuple[int, int]], size: int) -> bool:
    """True when the (start, count) ranges follow one another from 0 to size."""
    position = 0
    for start, count in sorted(ranges):
        if start != position:
            return False
        position += count
    return position == size


def check_equal(
    shapes: Mapping[str, Shape], first: WeightSource, second: MMWeights | HFWeights, watch: SharedWatch
) -> None:
    """Raise VerificationFailed unless `second`, just written, has every weight of `first` (cast to its type), and equal replicas."""
    second.from_disk()
    try:
        different = second.differing_replicas() if isinstance(second, MMWeights) else ([], [])
        names = [*different[0], *different[1], *differing(shapes, first, second, watch)]
    except CorruptCheckpoint as error:
        raise VerificationFailed(f"what was written is not what was read: {error.message}", hint=_HINT) from error
    if names:
        raise VerificationFailed(f"what was written is not what was read: {listed(names)}", hint=_HINT)


_HINT = "is the disk sound?"


def differing(
    shapes: Mapping[str, Shape], first: WeightSource, second: WeightSource, watch: SharedWatch | None = None
) -> list[str]:
    """HF names whose values differ between two sources, after casting the first to the second's type."""
    watch = watch or SharedWatch(Quiet())
    equal = in_threads(
        lambda name: (name, _equal(whole_tensor(name, shapes[name]), first, second, watch)), list(shapes), watch
    )
    found = {name for name, same in equal if not same}
    return [name for name in shapes if name in found]


def _equal(layout: TensorLayout, first: WeightSource, second: WeightSource, watch: SharedWatch) -> bool:
    stored, wanted = layout_dtype(layout, first), layout_dtype(layout, second)
    assert stored is not None, "one weight has one type"
    assert wanted is not None, "one weight has one type"
    columns, unreleased = width(layout.shape), 0
    mine, other = layout_parts(layout, first), layout_parts(layout, second)
    for start, stop in row_steps(0, layout.shape[0], 4 * columns):
        wants = assemble(mine, start, stop, columns * ITEM_SIZE[stored])
        found = assemble(other, start, stop, columns * ITEM_SIZE[wanted])
        if not np.array_equal(cast(wants, stored, wanted), found):
            return False
        watch.advance(found.nbytes)
        unreleased += found.nbytes
        if unreleased >= RELEASE_BYTES or stop == layout.shape[0]:
            first.release()
            second.release()
            unreleased = 0
    return True
