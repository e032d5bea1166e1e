"""How mm weights are cut over tensor-parallel ranks and dealt to pipeline stages: data without tensors.

A family has one table `PLAN: mm name pattern -> shard rule` (`family.py`). The converter splits with it, the training
layers load with it, and the API refuses an impossible split at submission with it.

    Replicate     every rank holds all of it
    Row           dim 0 in tp equal parts
    Column        dim 1 in tp equal parts
    Vocab         Row, over the vocabulary
    GroupedQKV    Row, over whole attention groups
    GateUp        gate and up each in tp equal parts; a rank holds its part of gate above its part of up
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from core.errors import IncompatiblePlan
from core.models.mapping import Dims, Place, Shape


@dataclass(frozen=True)
class Cut:
    """What one rank holds of an mm tensor: row ranges in order, and one range of dim 1 (None = all)."""

    rows: tuple[tuple[int, int], ...]
    columns: tuple[int, int] | None = None

    def size(self, shape: Shape) -> int:
        """Elements that it keeps of a tensor of this shape."""
        first, last = self.columns or (0, shape[1] if len(shape) > 1 else 1)
        rows = sum(stop - start for start, stop in self.rows)
        return rows * (last - first) * math.prod(shape[2:])


@dataclass(frozen=True)
class Replicate:
    """Every rank holds all of it."""

    dim: str | None = None

    def cut(self, shape: Shape, tp_size: int, tp_rank: int) -> Cut:  # noqa: ARG002 - every rule is called alike
        """All rows."""
        return Cut(((0, shape[0]),))


@dataclass(frozen=True)
class Row:
    """Dim 0 in tp equal parts; `dim` names the size that tp must divide."""

    dim: str

    def cut(self, shape: Shape, tp_size: int, tp_rank: int) -> Cut:
        """One run of rows."""
        part = shape[0] // tp_size
        return Cut(((tp_rank * part, (tp_rank + 1) * part),))


@dataclass(frozen=True)
class Vocab(Row):
    """Dim 0 is the vocabulary. Never padded: MindSpeed-MM converts with `--make-vocab-size-divisible-by 1`."""

    dim: str = "vocab_size"


@dataclass(frozen=True)
class GroupedQKV(Row):
    """Dim 0 holds q_g k_g v_g per attention group; a rank gets whole groups."""


@dataclass(frozen=True)
class GateUp:
    """Dim 0 holds gate above up, `dim` rows each; a rank gets its part of both."""

    dim: str

    def cut(self, shape: Shape, tp_size: int, tp_rank: int) -> Cut:
        """Two runs of rows."""
        half = shape[0] // 2
        part = half // tp_size
        return Cut(tuple((base + tp_rank * part, base + (tp_rank + 1) * part) for base in (0, half)))


@dataclass(frozen=True)
class Column:
    """Dim 1 of a matrix in tp equal parts."""

    dim: str

    def cut(self, shape: Shape, tp_size: int, tp_rank: int) -> Cut:
        """All rows, one run of columns."""
        part = shape[1] // tp_size
        return Cut(((0, shape[0]),), (tp_rank * part, (tp_rank + 1) * part))


ShardRule = Replicate | Row | Vocab | GroupedQKV | GateUp | Column
Plan = Mapping[str, ShardRule]


class SplitConfig(Protocol):
    """What splitting needs to know of a model; every family's `Config` has it."""

    @property
    def family(self) -> str:
        """Name of the family, for messages."""

    @property
    def num_vit_layers(self) -> int:
        """Vision layers."""

    @property
    def num_llm_layers(self) -> int:
        """Language layers."""

    @property
    def tp_dims(self) -> Dims:
        """Name -> size of everything that tp_size must divide, most restrictive names first."""


class Split(Protocol):
    """The fields of `ParallelSpec` that are used here."""

    @property
    def tp_size(self) -> int:
        """Tensor-parallel ranks."""

    @property
    def llm_pp_layers(self) -> tuple[tuple[int, ...], ...]:
        """Language layers per stage: outer = virtual chunk, inner = pipeline rank."""

    @property
    def vit_pp_layers(self) -> tuple[tuple[int, ...], ...]:
        """Vision layers per stage, likewise."""


@dataclass(frozen=True)
class Stage:
    """Pipeline stage `index` = chunk * pp_size + rank. Layer ranges are global; a rank file counts layers from 0."""

    index: int
    vit_layers: range
    llm_layers: range
    has_patch_embed: bool
    has_projector: bool
    has_embedding: bool
    has_output: bool

    def layers(self, place: Place) -> range:
        """Global layers that the stage holds of a layered place; of the other places one, number 0, or none."""
        match place:
            case Place.VIT_LAYER:
                return self.vit_layers
            case Place.LLM_LAYER:
                return self.llm_layers
            case Place.PATCH_EMBED:
                return range(int(self.has_patch_embed))
            case Place.PROJECTOR:
                return range(int(self.has_projector))
            case Place.EMBEDDING:
                return range(int(self.has_embedding))
            case Place.OUTPUT:
                return range(int(self.has_output))


def whole(config: SplitConfig) -> Stage:
    """The one stage that holds the whole model."""
    return Stage(0, range(config.num_vit_layers), range(config.num_llm_layers), True, True, True, True)


def stages(config: SplitConfig, parallel: Split) -> tuple[Stage, ...]:
    """The stages in order (chunk-major). Raises IncompatiblePlan with the numbers and what would work."""
    check_tp(config, parallel.tp_size)
    _check_lists(config, parallel)
    vit = [count for chunk in parallel.vit_pp_layers for count in chunk]
    llm = [count for chunk in parallel.llm_pp_layers for count in chunk]
    _check_order(vit, llm)
    holds_vit = [index for index, count in enumerate(vit) if count]
    holds_llm = [index for index, count in enumerate(llm) if count]
    return tuple(
        Stage(
            index=index,
            vit_layers=range(sum(vit[:index]), sum(vit[: index + 1])),
            llm_layers=range(sum(llm[:index]), sum(llm[: index + 1])),
            has_patch_embed=index == holds_vit[0],
            has_projector=index == holds_vit[-1],
            has_embedding=index == holds_llm[0],
            has_output=index == holds_llm[-1],
        )
        for index in range(len(vit))
    )


def tp_dims(plan: Plan, dims: Dims) -> dict[str, int]:
    """Every size that some rule of the plan cuts, smallest first."""
    names = {rule.dim for rule in plan.values() if rule.dim is not None}
    return {name: dims[name] for name in sorted(names, key=lambda name: (dims[name], name))}


def legal_tp(config: SplitConfig) -> list[int]:
    """Every tp_size that divides all that it must."""
    sizes = list(config.tp_dims.values())
    return [tp for tp in range(1, min(sizes) + 1) if all(size % tp == 0 for size in sizes)]


def check_tp(config: SplitConfig, tp_size: int) -> None:
    """Raise IncompatiblePlan when tp_size does not divide everything that it must."""
    legal = ", ".join(map(str, legal_tp(config)))
    if tp_size < 1:
        raise IncompatiblePlan(f"tp_size={tp_size} is not positive; use one of {legal}")
    for name, size in config.tp_dims.items():
        if size % tp_size:
            raise IncompatiblePlan(
                f"tp_size={tp_size} does not divide {name}={size} of {config.family}; use one of {legal}"
            )


def _lists(parallel: Split) -> Iterator[tuple[str, tuple[tuple[int, ...], ...]]]:
    yield "vit_pp_layers", parallel.vit_pp_layers
    yield "llm_pp_layers", parallel.llm_pp_layers


def _show(value: tuple[tuple[int, ...], ...]) -> str:
    return str([list(chunk) for chunk in value])


def _check_lists(config: SplitConfig, parallel: Split) -> None:
    shapes = {name: [len(chunk) for chunk in value] for name, value in _lists(parallel)}
    for name, value in _lists(parallel):
        if not value or not all(shapes[name]) or len(set(shapes[name])) != 1:
            raise IncompatiblePlan(
                f"{name}={_show(value)} is not a table; give one list per virtual chunk, each with one number per "
                "pipeline rank"
            )
        if min(min(chunk) for chunk in value) < 0:
            raise IncompatiblePlan(f"{name}={_show(value)} has a negative layer count")
    if shapes["vit_pp_layers"] != shapes["llm_pp_layers"]:
        vit, llm = _show(parallel.vit_pp_layers), _show(parallel.llm_pp_layers)
        raise IncompatiblePlan(
            f"vit_pp_layers={vit} and llm_pp_layers={llm} have different lengths; both need one number per "
            "virtual chunk and pipeline rank, 0 where a tower has no layer"
        )
    if len(parallel.llm_pp_layers) > 1 and shapes["llm_pp_layers"][0] == 1:
        raise IncompatiblePlan(
            f"llm_pp_layers={_show(parallel.llm_pp_layers)} has virtual chunks but one pipeline rank; "
            "use one chunk, or two pipeline ranks or more"
        )
    wanted = {
        "vit_pp_layers": ("vision_config.depth", config.num_vit_layers),
        "llm_pp_layers": ("num_hidden_layers", config.num_llm_layers),
    }
    for name, value in _lists(parallel):
        size_name, size = wanted[name]
        total = sum(map(sum, value))
        if total != size:
            raise IncompatiblePlan(
                f"{name}={_show(value)} adds up to {total} layers, but {size_name} of {config.family} is {size}"
            )


def _check_order(vit: list[int], llm: list[int]) -> None:
    for index, (num_vit, num_llm) in enumerate(zip(vit, llm, strict=True)):
        if num_vit + num_llm == 0:
            raise IncompatiblePlan(
                f"stage {index} has no layer in vit_pp_layers or llm_pp_layers (stages in order: vision {vit}, "
                f"language {llm}); give each stage a layer or use fewer pipeline ranks"
            )
        if num_vit and any(llm[:index]):
            first = next(i for i, count in enumerate(llm) if count)
            raise IncompatiblePlan(
                f"stage {index} has {num_vit} vision layers after stage {first} already has language layers "
                f"(stages in order: vision {vit}, language {llm}); all vision layers must come before any "
                "language layer"
            )
