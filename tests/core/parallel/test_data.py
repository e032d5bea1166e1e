"""Flat buffers and the sum over data-parallel ranks."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.parallel.data import ALIGNMENT, FlatBuffer, all_reduce_rows
from tests.distributed import run


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)).to(dtype)


class TestFlatBuffer:
    def test_parameters_keep_their_values_and_become_aligned_views(self) -> None:
        plain, flat = model(), model()
        buffer = FlatBuffer(flat.named_parameters())
        for (name, before), (_, after) in zip(plain.named_parameters(), flat.named_parameters(), strict=True):
            assert torch.equal(before, after)
            slot = buffer.slot(name)
            assert slot is not None
            assert slot.start % ALIGNMENT == 0
            assert after.data_ptr() == slot.view(buffer.weights).data_ptr()

    def test_float32_gradients_accumulate_in_the_buffer(self) -> None:
        plain, flat = model(), model()
        buffer = FlatBuffer(flat.named_parameters())
        for module in (plain, flat):
            for scale in (1.0, 2.0):
                (module(torch.ones(1, 3)).sum() * scale).backward()
        for name, parameter in plain.named_parameters():
            assert torch.equal(buffer.slot(name).view(buffer.gradients), parameter.grad)  # type: ignore[union-attr]

    def test_bfloat16_gradients_accumulate_in_float32(self) -> None:
        flat = model(torch.bfloat16)
        buffer = FlatBuffer(flat.named_parameters())
        for _ in range(257):  # 257 ones do not fit bfloat16's 8 bits
            flat(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
        assert buffer.gradients.dtype == torch.float32
        assert torch.equal(buffer.slot("1.bias").view(buffer.gradients), torch.full((2,), 257.0))  # type: ignore[union-attr]
        assert all(parameter.grad is None for parameter in flat.parameters())

    def test_a_step_on_the_buffer_changes_the_module(self) -> None:
        flat = model()
        buffer = FlatBuffer(flat.named_parameters())
        buffer.weights.zero_()
        assert not flat(torch.ones(1, 3)).any()

    def test_all_reduce_sums_in_buckets_of_any_size(self) -> None:
        for result in run(_reduced, 2):
            assert torch.equal(result, torch.arange(256.0) * 3)


class TestAllReduceRows:
    def test_every_rank_sees_every_row_and_nan_stays_in_its_row(self) -> None:
        for table in run(_rows, 3):
            assert table[0].tolist() == [0.0, 10.0]
            assert math.isnan(table[1][0])
            assert table[1][1] == 11.0
            assert table[2].tolist() == [2.0, 12.0]

    def test_one_process_needs_no_group(self) -> None:
        table = all_reduce_rows([1.0, 2.0], rank=0, world_size=1, group=None, device=torch.device("cpu"))
        assert table.tolist() == [[1.0, 2.0]]


def _reduced(rank: int) -> Tensor:
    buffer = FlatBuffer([("w", nn.Parameter(torch.zeros(256)))])
    buffer.gradients.copy_(torch.arange(256.0) * (rank + 1))
    buffer.all_reduce(dist.group.WORLD, bucket_bytes=400)
    return buffer.gradients


def _rows(rank: int) -> Tensor:
    row = [math.nan if rank == 1 else float(rank), 10.0 + rank]
    return all_reduce_rows(row, rank=rank, world_size=3, group=dist.group.WORLD, device=torch.device("cpu"))
