"""AdamW's state of a checkpoint, read by name and range whatever layout and number of data-parallel ranks wrote it.

A rank folder (`mp_rank_TT_PPP`) holds the state of one slice of one stage, in as many files as there were data-parallel ranks, each with
pieces of flattened parameters. At another layout a parameter is put together from rectangles (`core.models.layout`), as weights are:

    wanted slice ──► rectangles of the whole model's tensors ──► rectangles of the slices that were saved ──► pieces in files
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from core.conversion.mm import rank_dir
from core.errors import CorruptCheckpoint
from core.models.config import Config
from core.models.layout import Block, TensorLayout, stage_layout
from core.models.mapping import width
from core.models.plan import Stage, stages
from core.parallel.mesh import Mesh
from core.specs.parallel import ParallelSpec
from core.training.contents import OPTIMIZER_FILES, load_optimizer
from core.training.optimizer import Kind, Piece


class RankState:
    """The state in one rank folder, its data-parallel ranks' pieces put together. Raises CorruptCheckpoint."""

    def __init__(self, folder: Path) -> None:
        states = [load_optimizer(path) for path in sorted(folder.glob(OPTIMIZER_FILES))]
        counts = {state.num_steps for state in states}
        if len(counts) != 1:
            raise CorruptCheckpoint(f"{folder} has optimizer state of {sorted(counts) or 'no'} steps")
        self.num_steps = counts.pop()
        self._pieces: dict[str, list[Piece]] = defaultdict(list)
        for state in states:
            for name, piece in state.pieces.items():
                self._pieces[name].append(piece)

    def read(self, name: str, kind: Kind, start: int, stop: int) -> Tensor:
        """Return elements `start` to `stop` of a flattened parameter's state. Raises KeyError(name) if nothing is saved of it."""
        if name not in self._pieces:
            raise KeyError(name)
        inside = [
            (max(start, piece.start), min(stop, piece.stop), piece)
            for piece in self._pieces[name]
            if piece.start < stop and start < piece.stop
        ]
        if sum(last - first for first, last, _ in inside) != stop - start:
            raise CorruptCheckpoint(f"the pieces of {name}'s {kind} do not make up elements {start} to {stop}")
        found = [
            piece.tensors[kind][first - piece.start : last - piece.start]
            for first, last, piece in sorted(inside, key=lambda item: item[0])
        ]
        return found[0] if len(found) == 1 else torch.cat(found) if found else torch.empty(0)


@dataclass(frozen=True)
class _Held:
    """A rectangle of the model's tensors, and the saved parameter that holds it."""

    block: Block
    folder: Path
    name: str
    columns: int
    """Of the saved parameter."""


class RecutState:
    """The state of this rank's parameters, from a checkpoint of another layout."""

    def __init__(
        self, path: Path, layout: ParallelSpec, config: Config, own_stages: Sequence[Stage], mesh: Mesh
    ) -> None:
        """`path` is the iteration's folder, and `layout` how it was cut."""
        self._targets = {
            prefix + name: target
            for prefix, stage in _prefixed(own_stages)
            for name, target in stage_layout(config, stage, tp_size=mesh.tp_size, tp_rank=mesh.tp_rank).items()
        }
        self._held: dict[str, list[_Held]] = defaultdict(list)
        self._opened: dict[Path, RankState] = {}
        self._last: tuple[str, Kind, Tensor] | None = None
        seen: set[tuple[str, int, int]] = set()
        for pp_rank in range(layout.pp_size):
            for tp_rank in range(layout.tp_size):
                folder = path / Path(rank_dir("release", tp_rank, pp_rank, layout.pp_size)).name
                for prefix, stage in _prefixed(stages(config, layout)[pp_rank :: layout.pp_size]):
                    for name, saved in stage_layout(config, stage, tp_size=layout.tp_size, tp_rank=tp_rank).items():
                        for block in saved.blocks:
                            key = (block.source, block.source_row, block.column)
                            if key not in seen:  # of copies, the first
                                seen.add(key)
                                self._held[block.source].append(_Held(block, folder, prefix + name, width(saved.shape)))

    @property
    def num_steps(self) -> int:
        """Updates so far; the same in all files."""
        return self._state(next(iter(self._held.values()))[0].folder).num_steps

    def read(self, name: str, kind: Kind, start: int, stop: int) -> Tensor:
        """Return elements `start` to `stop` of a flattened parameter's state. Raises KeyError(name) if nothing is saved of it."""
        if self._last is None or self._last[:2] != (name, kind):
            self._last = name, kind, self._recut(name, kind, self._targets[name])
        return self._last[2].view(-1)[start:stop]

    def _recut(self, name: str, kind: Kind, target: TensorLayout) -> Tensor:
        """Put a whole parameter's state together, [rows, columns]."""
        out = torch.empty(target.shape[0], width(target.shape))
        wanted: dict[tuple[Path, str], list[tuple[Block, _Held]]] = defaultdict(list)
        for block in target.blocks:
            for held in self._held[block.source]:
                wanted[held.folder, held.name].append((block, held))
        num_filled = 0
        for (folder, saved_name), pairs in wanted.items():
            copies = [(held, *rectangle) for block, held in pairs if (rectangle := _overlap(block, held.block))]
            if not copies:
                continue
            columns = copies[0][0].columns
            first = min(rows.start for _, _, _, rows, _ in copies)
            last = max(rows.stop for _, _, _, rows, _ in copies)
            try:
                saved = self._state(folder).read(saved_name, kind, first * columns, last * columns).view(-1, columns)
            except KeyError:
                raise KeyError(name) from None
            for _, to_rows, to_columns, from_rows, from_columns in copies:
                part = saved[from_rows.start - first : from_rows.stop - first, from_columns]
                out[to_rows, to_columns] = part
                num_filled += part.numel()
        assert num_filled == out.numel(), f"{name}: {num_filled} of {out.numel()} elements: layouts cover every tensor"
        return out

    def _state(self, folder: Path) -> RankState:
        if folder not in self._opened:
            self._opened[folder] = RankState(folder)
        return self._opened[folder]


def _prefixed(own: Sequence[Stage]) -> list[tuple[str, Stage]]:
    """Return a rank's stages, each with what its parameters' names begin with."""
    return [(f"model{index}." if len(own) > 1 else "", stage) for index, stage in enumerate(own)]


def _overlap(to: Block, of: Block) -> tuple[slice, slice, slice, slice] | None:
    """Return rows and columns in the target, then in the saved tensor, of what two rectangles of one tensor share."""
    top, bottom = max(to.source_row, of.source_row), min(to.source_row + to.rows, of.source_row + of.rows)
    left, right = max(to.column, of.column), min(to.column + to.columns, of.column + of.columns)
    if top >= bottom or left >= right:
        return None

    def inside(block: Block) -> tuple[slice, slice]:
        row, column = top - block.source_row + block.row, left - block.column
        return slice(row, row + bottom - top), slice(column, column + right - left)

    return (*inside(to), *inside(of))
