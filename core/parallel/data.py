"""One flat buffer for weights and one for gradients, and the sum of gradients over data-parallel ranks.

Parameters become views into a flat buffer, each aligned to 128 bytes of float32:

    weights    [ linear_qkv.weight |pad| linear_proj.weight |pad| ... ]     compute dtype
    gradients  [ linear_qkv.weight |pad| linear_proj.weight |pad| ... ]     always float32

so that clearing, reducing, scaling and stepping are a handful of operations whatever the number of parameters. float32 parameters
accumulate into their view directly; for bfloat16 ones each gradient is added to its float32 view as soon as autograd has finished it.
The reduction is a SUM, and the division happens later on the whole buffer: HCCL has no PREMUL_SUM and not always AVG.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

ALIGNMENT = 32
"""Elements; 128 bytes of float32, 64 of bfloat16."""
BUCKET_BYTES = 256 << 20
"""Size of one all-reduce: large enough for full bandwidth, small enough for the backend's staging buffers."""


@dataclass(frozen=True)
class Slot:
    """Where one parameter lies in the flat buffers."""

    name: str
    shape: torch.Size
    start: int
    stop: int

    def view(self, flat: Tensor) -> Tensor:
        """Return this parameter's part of a flat buffer, in its shape."""
        return flat[self.start : self.stop].view(self.shape)


class FlatBuffer:
    """The trained parameters of one rank, laid end to end, with their float32 gradients."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Move the parameters into the flat buffer; they stay the module's own parameters, as views of it."""
        named = list(parameters)
        kinds = {(parameter.dtype, parameter.device) for _, parameter in named}
        assert len(kinds) <= 1, f"parameters of one buffer must share dtype and device, got {kinds}"
        dtype, device = next(iter(kinds), (torch.float32, torch.device("cpu")))
        self.slots: list[Slot] = []
        end = 0
        for name, parameter in named:
            self.slots.append(Slot(name, parameter.shape, end, end + parameter.numel()))
            end += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        self.weights = torch.zeros(end, dtype=dtype, device=device)
        self.gradients = torch.zeros(end, dtype=torch.float32, device=device)
        for slot, (_, parameter) in zip(self.slots, named, strict=True):
            self._adopt(slot, parameter)

    def _adopt(self, slot: Slot, parameter: nn.Parameter) -> None:
        view, gradient = slot.view(self.weights), slot.view(self.gradients)
        view.copy_(parameter.detach())
        parameter.data = view
        if parameter.dtype == torch.float32:
            parameter.grad = gradient
            parameter.accumulates = True  # type: ignore[attr-defined]  # see core.models.layers.linear
            return

        def accumulate(finished: Tensor) -> None:
            assert finished.grad is not None
            gradient.add_(finished.grad)
            finished.grad = None

        parameter.register_post_accumulate_grad_hook(accumulate)

    def slot(self, name: str) -> Slot | None:
        """Return where a parameter lies; None if it is not trained here."""
        return next((slot for slot in self.slots if slot.name == name), None)

    def clear(self) -> None:
        """Set all gradients to zero."""
        self.gradients.zero_()

    def all_reduce(self, group: ProcessGroup | None, *, bucket_bytes: int = BUCKET_BYTES) -> None:
        """Sum the gradients over a group, in place."""
        if group is None:
            return
        works = [
            dist.all_reduce(bucket, op=dist.ReduceOp.SUM, group=group, async_op=True)
            for bucket in self.gradients.split(bucket_bytes // self.gradients.element_size())
        ]
        for work in works:
            work.wait()


def all_reduce_rows(
    row: list[float], *, rank: int, world_size: int, group: ProcessGroup | None, device: torch.device
) -> Tensor:
    """Give every rank everybody's few numbers, as a [world, n] table on the host, in one all-reduce.

    Each rank fills its own row of a zero table and the tables are summed: a NaN or infinity stays in the row of the rank that had it.
    """
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    if group is None:
        return torch.tensor([row], dtype=torch.float64)
    table = torch.zeros(world_size, len(row), dtype=dtype, device=device)
    table[rank] = torch.tensor(row, dtype=dtype, device=device)
    dist.all_reduce(table, op=dist.ReduceOp.SUM, group=group)
    return table.to("cpu", torch.float64)
