"""Where this process stands among the ranks of a job, and the process groups it talks in.

Ranks follow Megatron's default order tp-dp-pp (tp fastest): with pp = 2, dp = 2, tp = 2

                  dp 0        dp 1
        pp 0   rank 0 | 1  rank 2 | 3        the two of a cell hold slices of one stage           (tensor parallel)
        pp 1   rank 4 | 5  rank 6 | 7        the same place in the cells of a row: same weights   (data parallel)
                                             the same place in the cells of a column: one model   (pipeline)

A `Mesh` is a value: it is passed in, never looked up in a module global.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Mesh:
    """Coordinates and groups of one rank. A group of one rank is None, and needs no communication."""

    rank: int = 0
    pp_size: int = 1
    dp_size: int = 1
    tp_size: int = 1
    world_group: ProcessGroup | None = None
    pp_group: ProcessGroup | None = None
    """The ranks that hold this rank's model, in pipeline order."""
    dp_group: ProcessGroup | None = None
    """The ranks that hold the same weights."""
    tp_group: ProcessGroup | None = None
    """The ranks that hold slices of the same stage, and work on the same batches."""
    tied_group: ProcessGroup | None = None
    """The two ranks of this pipeline that hold a copy of a tied embedding; None on all others."""
    is_tied: bool = False
    """Whether stages hold copies of one weight, be it on one rank."""

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.pp_size * self.dp_size * self.tp_size

    @property
    def pp_rank(self) -> int:
        """Place in the pipeline, from 0."""
        return self.rank // (self.dp_size * self.tp_size)

    @property
    def dp_rank(self) -> int:
        """Which data-parallel replica, from 0."""
        return self.dp_rank_of(self.rank)

    @property
    def tp_rank(self) -> int:
        """Which slice of the stage, from 0."""
        return self.rank % self.tp_size

    def dp_rank_of(self, rank: int) -> int:
        """Return which data-parallel replica any rank belongs to."""
        return rank // self.tp_size % self.dp_size

    @property
    def pp_stride(self) -> int:
        """Return how far apart neighbours of a pipeline are in rank."""
        return self.dp_size * self.tp_size

    @property
    def is_last_stage(self) -> bool:
        """Whether the loss is computed here."""
        return self.pp_rank == self.pp_size - 1


def pp_ranks(pp_size: int, dp_size: int, dp_rank: int, *, tp_size: int = 1, tp_rank: int = 0) -> list[int]:
    """Return the ranks of one pipeline, first stage first."""
    return [(pp_rank * dp_size + dp_rank) * tp_size + tp_rank for pp_rank in range(pp_size)]


def dp_ranks(dp_size: int, pp_rank: int, *, tp_size: int = 1, tp_rank: int = 0) -> list[int]:
    """Return the ranks that hold the same slice of the same stage."""
    return [(pp_rank * dp_size + dp_rank) * tp_size + tp_rank for dp_rank in range(dp_size)]


def build_mesh(*, pp_size: int, dp_size: int, tp_size: int = 1, tied_stages: Sequence[int] = ()) -> Mesh:
    """Build this process's mesh; every rank must call it alike, because making a group is a collective call.

    `tied_stages` are the pipeline ranks whose stages hold a copy of one tied weight; fewer than two need no group.
    """
    if pp_size * dp_size * tp_size == 1:
        return Mesh()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    assert world_size == pp_size * dp_size * tp_size, (
        f"{world_size} ranks for pp {pp_size} x dp {dp_size} x tp {tp_size}"
    )
    slices = range(tp_size)
    pipelines = [
        pp_ranks(pp_size, dp_size, dp_rank, tp_size=tp_size, tp_rank=tp_rank)
        for dp_rank in range(dp_size)
        for tp_rank in slices
    ]
    replicas = [
        dp_ranks(dp_size, pp_rank, tp_size=tp_size, tp_rank=tp_rank) for pp_rank in range(pp_size) for tp_rank in slices
    ]
    cells = [list(range(first, first + tp_size)) for first in range(0, world_size, tp_size)]
    tied = [[ranks[stage] for stage in sorted(set(tied_stages))] for ranks in pipelines]
    return Mesh(
        rank=rank,
        pp_size=pp_size,
        dp_size=dp_size,
        tp_size=tp_size,
        world_group=dist.group.WORLD,
        pp_group=_group_of(rank, pipelines),
        dp_group=_group_of(rank, replicas),
        tp_group=_group_of(rank, cells),
        tied_group=_group_of(rank, tied),
        is_tied=len(tied_stages) > 0,
    )


def _group_of(rank: int, partition: list[list[int]]) -> ProcessGroup | None:
    """Make the groups of a partition and return the one that holds `rank`."""
    mine = None
    for ranks in partition:
        if len(ranks) < 2:
            continue
        group = dist.new_group(ranks)
        if rank in ranks:
            mine = group
    return mine
