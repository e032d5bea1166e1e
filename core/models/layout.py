"""Which rectangle of which HF tensor makes each tensor of a rank file: mapping and shard plan, worked out to integers.

Everything that moves weights uses these rectangles, in either direction:

    hf_to_mm   copy rectangles HF -> mm            load_stage   the same into a stage of tp 1
    mm_to_hf   the same rectangles mm -> HF        reshard      mm -> (HF coordinates) -> mm

HF tensors go by their old names here (`core.models.mapping.old_name`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from core.errors import IncompatiblePlan
from core.models.config import Config
from core.models.mapping import Dims, Rename, Rule, Shape, at_layer, width
from core.models.plan import Cut, Replicate, ShardRule, Split, Stage, stages, whole
from core.models.registry import get_family


@dataclass(frozen=True)
class Block:
    """A rectangle: all columns of mm rows `[row, row + rows)` = columns `[column, column + columns)` of the HF tensor
    `source`, rows from `source_row` on. Columns count elements of the flattened dims after the first."""

    row: int
    rows: int
    source: str
    source_row: int
    column: int
    columns: int


@dataclass(frozen=True)
class TensorLayout:
    """One tensor of a rank file; the blocks cover its rows in order."""

    shape: Shape
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class RankLayout:
    """One rank file: mm name -> layout, for each virtual chunk."""

    tp_rank: int
    pp_rank: int
    chunks: tuple[dict[str, TensorLayout], ...]


def hf_shapes(config: Config) -> dict[str, Shape]:
    """Every weight of a HF folder of this config (old names). Tied embeddings store no head."""
    shapes: dict[str, Shape] = {}
    family, dims = get_family(config.family), config.dims()
    for rule in family.mapping:
        if _tied(rule, config):
            continue
        for layer in whole(config).layers(rule.place):
            shapes |= {at_layer(name, layer): shape for name, shape in rule.hf_shapes(dims).items()}
    return shapes


def tied_names(config: Config) -> dict[str, str]:
    """HF name that is not stored -> the name whose tensor it shares."""
    rules = get_family(config.family).mapping
    return {
        rule.hf: rule.tied_to for rule in rules if isinstance(rule, Rename) and rule.tied_to and _tied(rule, config)
    }


def rank_layouts(config: Config, parallel: Split, *, canonical: bool = False) -> Iterator[RankLayout]:
    """Every rank file of a checkpoint, by pipeline rank. Raises IncompatiblePlan for an impossible split."""
    all_stages = stages(config, parallel)
    pp_size = len(parallel.llm_pp_layers[0])
    check_canonical(config.family, parallel, canonical=canonical)
    for pp_rank in range(pp_size):
        for tp_rank in range(parallel.tp_size):
            chunks = tuple(
                stage_layout(
                    config,
                    stage,
                    tp_size=parallel.tp_size,
                    tp_rank=tp_rank,
                    canonical=canonical,
                    tied_copy=pp_size > 1,
                )
                for stage in all_stages[pp_rank::pp_size]
            )
            yield RankLayout(tp_rank=tp_rank, pp_rank=pp_rank, chunks=chunks)


def check_canonical(family: str, parallel: Split, *, canonical: bool) -> None:
    """MindSpeed-MM's converter and its canonical model disagree about the vision qkv at tp > 1; we do neither."""
    if canonical and get_family(family).canonical_mapping is None:
        raise IncompatiblePlan(f"there are no canonical checkpoints of {family}; leave canonical out")
    if canonical and parallel.tp_size > 1:
        raise IncompatiblePlan(f"canonical checkpoints have tp_size=1 only, not {parallel.tp_size}")


def stage_layout(
    config: Config,
    stage: Stage,
    *,
    tp_size: int = 1,
    tp_rank: int = 0,
    canonical: bool = False,
    tied_copy: bool | None = None,
) -> dict[str, TensorLayout]:
    """mm name -> layout of one stage on one tensor-parallel rank; layers are counted from 0 in the stage.

    `tied_copy` says whether a tied output layer is stored beside the embedding: MindSpeed-MM does so iff it has
    more than one pipeline rank; the default is what a stage needs by itself (a copy where the embedding is elsewhere).
    """
    family, dims = get_family(config.family), config.dims()
    if tied_copy is None:
        tied_copy = not stage.has_embedding
    layouts: dict[str, TensorLayout] = {}
    for rule in (family.canonical_mapping or ()) if canonical else family.mapping:
        if _tied(rule, config) and not tied_copy:
            continue
        shard = Replicate() if canonical else family.plan[rule.mm]
        for local, layer in enumerate(stage.layers(rule.place)):
            layouts[at_layer(rule.mm, local)] = _cut(rule, shard, dims, tp_size, tp_rank, layer, config)
    return layouts


def _tied(rule: Rule, config: Config) -> bool:
    return isinstance(rule, Rename) and rule.tied_to is not None and config.tie_word_embeddings


def _cut(
    rule: Rule, shard: ShardRule, dims: Dims, tp_size: int, tp_rank: int, layer: int, config: Config
) -> TensorLayout:
    full = rule.mm_shape(dims)
    cut = shard.cut(full, tp_size, tp_rank)
    column, stop = cut.columns or (0, width(full))
    tied_to = rule.tied_to if isinstance(rule, Rename) and _tied(rule, config) else None
    blocks = tuple(
        Block(row, count, tied_to or at_layer(source, layer), source_row, column, stop - column)
        for row, source, source_row, count in _runs(rule, dims, cut)
    )
    rows = sum(block.rows for block in blocks)
    return TensorLayout((rows, stop - column, *full[2:]) if cut.columns else (rows, *full[1:]), blocks)


def _runs(rule: Rule, dims: Dims, cut: Cut) -> Iterator[tuple[int, str, int, int]]:
    """(local row, HF name pattern, HF row, count) of what a cut keeps."""
    local = 0
    for start, stop in cut.rows:
        for rows in rule.rows(dims):
            first, last = max(start, rows.row), min(stop, rows.row + rows.count)
            if first < last:
                yield local, rows.source, rows.source_row + first - rows.row, last - first
                local += last - first
