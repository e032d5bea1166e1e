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


class TestBuckets:
    def test_they_follow_the_backward_pass_and_hold_whole_parameters_of_a_kind(self) -> None:
        named = [(f"{i}.{kind}", nn.Parameter(torch.ones(size))) for i in range(3) for kind, size in SIZES.items()]
        names, shares = zip(*run(_laid_out, 2, named), strict=True)
        assert names[0] == names[1]
        assert names[0] == [
            ("2.small", "2.weight"),
            ("1.small", "1.weight"),
            ("0.small", "0.weight"),
            ("2.bias", "1.bias", "0.bias"),
        ]
        for start, stop in shares[0] + shares[1]:
            assert start % ALIGNMENT == stop % ALIGNMENT == 0

    def test_each_rank_gets_the_sum_of_its_shares_and_all_get_what_it_makes_of_them(self) -> None:
        total = sum(rank + 1 for rank in range(3))
        for parts, gathered in run(_reduced, 3):
            assert all(torch.equal(part, torch.full_like(part, total)) for part in parts)
            assert torch.equal(gathered, torch.full((3, 50), 10.0 * total))

    def test_a_gradient_that_comes_too_late_is_an_error(self) -> None:
        assert run(_too_late, 2) == ["b got a gradient after its bucket was sent"] * 2


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


SIZES = {"bias": 3, "weight": 100, "small": 28}


def _laid_out(rank: int, named: list[tuple[str, nn.Parameter]]) -> tuple[list[tuple[str, ...]], list[tuple[int, int]]]:
    buffer = FlatBuffer(
        named, group=dist.group.WORLD, apart=lambda name: name.endswith("bias"), bucket_bytes=4 * (128 + 32)
    )
    return (
        [tuple(slot.name for slot in bucket.slots) for bucket in buffer.buckets],
        [(bucket.share_start, bucket.share_stop) for bucket in buffer.buckets],
    )


def _three() -> tuple[FlatBuffer, dict[str, nn.Parameter]]:
    parameters = {name: nn.Parameter(torch.zeros(50)) for name in "abc"}
    return FlatBuffer(parameters.items(), group=dist.group.WORLD, bucket_bytes=256), parameters


def _reduced(rank: int) -> tuple[list[Tensor], Tensor]:
    """Gradients come on rank 0 in the order of the buckets (c, b, a), on rank 1 in the opposite one, on rank 2 before the last pass."""
    buffer, parameters = _three()
    sent = [len(buffer.under_way)]

    def backward(name: str) -> None:
        (parameters[name] * (rank + 1)).sum().backward()
        sent.append(len(buffer.under_way))

    if rank == 2:
        for name in "abc":
            backward(name)
        assert sent == [0, 0, 0, 0]
    with buffer.last_pass():
        if rank == 0:
            for name in "cba":
                backward(name)
            assert sent == [0, 1, 2, 3]
        if rank == 1:
            for name in "abc":
                backward(name)
            assert sent == [0, 0, 0, 3]
    buffer.reduce()
    parts = [part.of(bucket.share(buffer.gradients)).clone() for bucket in buffer.buckets for part in bucket.parts()]
    for bucket in buffer.buckets:
        bucket.share(buffer.weights).copy_(10 * bucket.share(buffer.gradients))
        buffer.start_gather(buffer.weights, bucket).wait()
    assert buffer.under_way == []
    return parts, torch.stack([parameter.detach() for parameter in parameters.values()])


def _too_late(rank: int) -> str:
    buffer, parameters = _three()
    with buffer.last_pass():
        for name in "cb":
            parameters[name].sum().backward()
        try:
            parameters["b"].gradient_added()  # type: ignore[attr-defined]  # as a linear layer does
        except AssertionError as error:
            told = str(error)
    buffer.reduce()
    return told


def _rows(rank: int) -> Tensor:
    row = [math.nan if rank == 1 else float(rank), 10.0 + rank]
    return all_reduce_rows(row, rank=rank, world_size=3, group=dist.group.WORLD, device=torch.device("cpu"))
