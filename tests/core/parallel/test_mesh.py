"""Coordinates and groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from core.parallel.mesh import Mesh, build_mesh, dp_ranks, pp_ranks
from tests.distributed import RankFailed, run


class TestOrderOfRanks:
    def test_data_parallel_ranks_are_neighbours_as_in_megatron(self) -> None:
        assert [pp_ranks(2, 3, dp_rank) for dp_rank in range(3)] == [[0, 3], [1, 4], [2, 5]]
        assert [dp_ranks(3, pp_rank) for pp_rank in range(2)] == [[0, 1, 2], [3, 4, 5]]

    def test_coordinates_invert_the_rank(self) -> None:
        for rank in range(6):
            mesh = Mesh(rank=rank, pp_size=2, dp_size=3)
            assert pp_ranks(2, 3, mesh.dp_rank)[mesh.pp_rank] == rank
            assert mesh.is_last_stage == (rank >= 3)
            assert dp_ranks(3, mesh.pp_rank)[mesh.dp_rank] == rank

    def test_tensor_parallel_ranks_are_the_nearest_neighbours(self) -> None:
        assert pp_ranks(2, 2, 1, tp_size=2, tp_rank=1) == [3, 7]
        assert dp_ranks(2, 1, tp_size=2, tp_rank=0) == [4, 6]
        for rank in range(8):
            mesh = Mesh(rank=rank, pp_size=2, dp_size=2, tp_size=2)
            at = (mesh.pp_rank * 2 + mesh.dp_rank) * 2 + mesh.tp_rank
            assert at == rank
            assert pp_ranks(2, 2, mesh.dp_rank, tp_size=2, tp_rank=mesh.tp_rank)[mesh.pp_rank] == rank
            assert dp_ranks(2, mesh.pp_rank, tp_size=2, tp_rank=mesh.tp_rank)[mesh.dp_rank] == rank


class TestGroups:
    def test_one_process_needs_no_group(self) -> None:
        mesh = build_mesh(pp_size=1, dp_size=1)
        assert mesh.world_group is mesh.pp_group is mesh.dp_group is mesh.tp_group is mesh.tied_group is None

    def test_each_group_sums_over_its_own_ranks(self) -> None:
        results = run(_sums, 4)
        assert [result["pp"] for result in results] == [2.0, 4.0, 2.0, 4.0]
        assert [result["dp"] for result in results] == [1.0, 1.0, 5.0, 5.0]
        assert [result["tied"] for result in results] == [2.0, 4.0, 2.0, 4.0]

    def test_each_group_is_of_the_same_slice_but_that_of_slices(self) -> None:
        results = run(_sums, 8, 2)
        assert [result["tp"] for result in results] == [1.0, 1.0, 5.0, 5.0, 9.0, 9.0, 13.0, 13.0]
        assert [result["dp"] for result in results] == [2.0, 4.0, 2.0, 4.0, 10.0, 12.0, 10.0, 12.0]
        assert [result["pp"] for result in results] == [4.0, 6.0, 8.0, 10.0, 4.0, 6.0, 8.0, 10.0]
        assert [result["tied"] for result in results] == [result["pp"] for result in results]

    def test_ranks_outside_the_tied_stages_get_no_tied_group(self) -> None:
        assert run(_tied_outside, 3) == [True, False, True]


class TestRun:
    def test_an_error_comes_back_with_its_rank(self) -> None:
        with pytest.raises(RankFailed, match=r"(?s)rank 1: .*ValueError: no luck on 1"):
            run(_fails_on_one, 2)


def _sums(rank: int, tp_size: int = 1) -> dict[str, float]:
    mesh = build_mesh(pp_size=2, dp_size=2, tp_size=tp_size, tied_stages=(0, 1))
    groups = {"pp": mesh.pp_group, "dp": mesh.dp_group, "tied": mesh.tied_group, "tp": mesh.tp_group}
    sums = {}
    for name, group in groups.items():
        value = torch.tensor(float(rank))
        if group is not None:
            dist.all_reduce(value, group=group)
        sums[name] = value.item()
    return sums


def _tied_outside(rank: int) -> bool:
    return build_mesh(pp_size=3, dp_size=1, tied_stages=(0, 2)).tied_group is not None


def _fails_on_one(rank: int) -> Any:
    if rank == 1:
        raise ValueError(f"no luck on {rank}")
    return rank
