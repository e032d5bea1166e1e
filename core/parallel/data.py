"""One flat buffer for weights and one for gradients, which data-parallel ranks sum and step in shares (ZeRO-1: Rajbhandari et al. 2020).

Parameters become views into a flat buffer, each aligned to 128 bytes of float32, in the order in which a backward pass completes their
gradients, the last layer's first. Consecutive ones of a kind form a bucket, and each of R ranks has a share of each bucket:

    weights    [ linear_fc2.weight |pad| linear_fc1.weight |pad] [ linear_proj.weight ...     compute dtype
    gradients  [ linear_fc2.weight |pad| linear_fc1.weight |pad] [ linear_proj.weight ...     always float32
    shares     [ rank 0      | rank 1      | rank 2            ] [ rank 0 ...                 equal, whatever lies in them

so that clearing, summing, scaling and stepping are a handful of operations whatever the number of parameters. float32 parameters
accumulate into their view directly; for bfloat16 ones each gradient is added to its float32 view as soon as autograd has finished it.

A bucket's gradients are reduce-scattered while the backward pass of the last micro-batch goes on, as soon as they are complete; when its
share has been stepped, the weights are all-gathered, while the shares after it are stepped. All ranks must start the same operations in
the same order, but one may get gradients that another does not (an empty micro-batch, no images). So the order is fixed: a bucket waits
for those before it, and what the backward pass has left is sent at its end. The reduction is a SUM, and the division happens later on
the whole share: HCCL has no PREMUL_SUM and not always AVG.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from core.device.sending import send
from core.parallel.collectives import Pending, start_gather_in_place, start_reduce_scatter_in_place

ALIGNMENT = 32
"""Elements; 128 bytes of float32, 64 of bfloat16."""
BUCKET_BYTES = 128 << 20
"""Of a bucket's gradients, unless one parameter alone has more: enough for full bandwidth, little enough to be sent early."""

Named = tuple[str, nn.Parameter]


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


@dataclass(frozen=True)
class Part:
    """The elements of one parameter that lie in a share."""

    name: str
    start: int
    """Of the flattened parameter."""
    stop: int
    offset: int
    """Where they begin in the share."""

    def of(self, share: Tensor) -> Tensor:
        """Return these elements, 1-D."""
        return share[self.offset : self.offset + self.stop - self.start]


@dataclass(frozen=True)
class Bucket:
    """A run of whole parameters, and the share of it that is this rank's."""

    slots: tuple[Slot, ...]
    start: int
    stop: int
    share_start: int
    share_stop: int

    def whole(self, flat: Tensor) -> Tensor:
        """Return the bucket's part of a flat buffer."""
        return flat[self.start : self.stop]

    def share(self, flat: Tensor) -> Tensor:
        """Return this rank's share of it."""
        return flat[self.share_start : self.share_stop]

    def parts(self) -> Iterator[Part]:
        """What the share holds of the parameters."""
        for slot in self.slots:
            start, stop = max(slot.start, self.share_start), min(slot.stop, self.share_stop)
            if start < stop:
                yield Part(slot.name, start - slot.start, stop - slot.start, start - self.share_start)


class FlatBuffer:
    """The trained parameters of one rank, laid end to end, with their float32 gradients."""

    def __init__(
        self,
        parameters: Iterable[Named],
        *,
        group: ProcessGroup | None = None,
        apart: Callable[[str], Hashable] = lambda _: None,
        early: Container[str] = (),
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        """Move the parameters into the flat buffer; they stay the module's own parameters, as views of it.

        `parameters` come in the order of their use, `group` are the ranks that have the same ones. Only parameters for which
        `apart` gives the same share a bucket. The gradients of `early` ones are complete before the last backward pass begins.
        """
        named = list(parameters)
        kinds = {(parameter.dtype, parameter.device) for _, parameter in named}
        assert len(kinds) <= 1, f"parameters of one buffer must share dtype and device, got {kinds}"
        dtype, device = next(iter(kinds), (torch.float32, torch.device("cpu")))
        self.group = group
        self.early = early
        self.buckets: list[Bucket] = []
        runs = _runs(named, apart, None if group is None else bucket_bytes // 4)
        for run in runs:
            self.buckets.append(_bucket(run, self.buckets[-1].stop if self.buckets else 0, group))
        end = self.buckets[-1].stop if self.buckets else 0
        self.weights = torch.zeros(end, dtype=dtype, device=device)
        self.gradients = torch.zeros(end, dtype=torch.float32, device=device)
        for index, (bucket, run) in enumerate(zip(self.buckets, runs, strict=True)):
            for slot, (_, parameter) in zip(bucket.slots, run, strict=True):
                self._adopt(slot, parameter, index)
        self.under_way: list[Pending] = []
        """Reductions of the first buckets, in order."""
        self._await_all()
        if group is not None and self.buckets:
            # The first message makes ranks wait for each other: here, and not amid a backward pass.
            dist.all_reduce(torch.zeros(1, device=device), group=group)

    def _adopt(self, slot: Slot, parameter: nn.Parameter, index: int) -> None:
        added = partial(self._added, index, slot.name)
        view, gradient = slot.view(self.weights), slot.view(self.gradients)
        view.copy_(parameter.detach())
        parameter.data = view
        if parameter.dtype == torch.float32:
            parameter.grad = gradient
            parameter.gradient_added = added  # type: ignore[attr-defined]  # see core.models.layers.linear
            if self.group is not None:
                parameter.register_post_accumulate_grad_hook(lambda _: self._complete(index, slot.name))
            return

        def accumulate(finished: Tensor) -> None:
            assert finished.grad is not None
            gradient.add_(finished.grad)
            finished.grad = None
            added()

        parameter.register_post_accumulate_grad_hook(accumulate)

    @property
    def slots(self) -> list[Slot]:
        """Where all parameters lie."""
        return [slot for bucket in self.buckets for slot in bucket.slots]

    def slot(self, name: str) -> Slot | None:
        """Return where a parameter lies; None if it is not trained here."""
        return next((slot for slot in self.slots if slot.name == name), None)

    def clear(self) -> None:
        """Set all gradients to zero."""
        self.gradients.zero_()

    @contextmanager
    def last_pass(self) -> Iterator[None]:
        """A backward pass after which its parameters get no more gradients in this step: send what it completes.

        The pass may give each of them one gradient.
        """
        self._is_last = self.group is not None
        try:
            self._start_complete()
            yield
        finally:
            self._is_last = False

    def reduce(self) -> None:
        """Sum the gradients over the group: this rank's shares become sums, and other shares have no meaning any more."""
        if self.group is None:
            return
        while len(self.under_way) < len(self.buckets):
            self._start_next()
        for pending in self.under_way:
            pending.wait()
        self._await_all()

    def start_gather(self, flat: Tensor, bucket: Bucket) -> Pending:
        """Begin to give all ranks all shares of a bucket of a flat buffer; this rank's must be ready to be sent."""
        whole = bucket.whole(flat)
        return Pending(whole, None) if self.group is None else start_gather_in_place(whole, self.group)

    def _await_all(self) -> None:
        """As before a step: nothing under way, all gradients to come."""
        self.under_way = []
        self._is_last = False
        self._missing = [{slot.name for slot in bucket.slots if slot.name not in self.early} for bucket in self.buckets]

    def _added(self, index: int, name: str) -> None:
        """Note that a backward pass has added to a parameter's gradient."""
        assert len(self.under_way) <= index, f"{name} got a gradient after its bucket was sent"
        self._complete(index, name)

    def _complete(self, index: int, name: str) -> None:
        """Note that a backward pass has done with a parameter.

        Of a gradient added in place some versions of torch tell a second time, and on an accelerator from another thread.
        """
        if self._is_last and name in self._missing[index]:
            self._missing[index].remove(name)
            self._start_complete()

    def _start_complete(self) -> None:
        while self._is_last and len(self.under_way) < len(self.buckets) and not self._missing[len(self.under_way)]:
            self._start_next()

    def _start_next(self) -> None:
        assert self.group is not None, "one rank has nobody to send to"
        bucket = self.buckets[len(self.under_way)]
        self.under_way.append(start_reduce_scatter_in_place(bucket.whole(self.gradients), self.group))


def _runs(named: list[Named], apart: Callable[[str], Hashable], limit: int | None) -> list[list[Named]]:
    """Deal parameters, in the order of their use, into buckets of at most `limit` elements, in the order in which those are complete."""
    open_runs: dict[Hashable, list[Named]] = {}
    runs: list[list[Named]] = []
    for name, parameter in reversed(named):
        kind = apart(name)
        run = open_runs.get(kind)
        if run is None or (limit is not None and sum(_padded(p.numel()) for _, p in (*run, (name, parameter))) > limit):
            run = open_runs[kind] = []
            runs.append(run)
        run.append((name, parameter))
    place = {name: index for index, (name, _) in enumerate(reversed(named))}
    return sorted(runs, key=lambda run: place[run[-1][0]])


def _bucket(run: list[Named], start: int, group: ProcessGroup | None) -> Bucket:
    """Lay a bucket's parameters end to end from `start` on."""
    slots, end = [], start
    for name, parameter in run:
        slots.append(Slot(name, parameter.shape, end, end + parameter.numel()))
        end += _padded(parameter.numel())
    num_ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    share = _padded(-(-(end - start) // num_ranks))
    return Bucket(tuple(slots), start, start + num_ranks * share, start + rank * share, start + (rank + 1) * share)


def _padded(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def all_reduce_rows(
    row: list[float], *, rank: int, world_size: int, group: ProcessGroup | None, device: torch.device
) -> Tensor:
    """Give every rank everybody's few numbers, as a [world, n] table on the host, in one all-reduce.

    Each rank fills its own row of a zero table and the tables are summed: a NaN or infinity stays in the row of the rank that had it.
    """
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    if group is None:
        return torch.tensor([row], dtype=torch.float64)
    table = torch.zeros(world_size, len(row), dtype=dtype)
    table[rank] = torch.tensor(row, dtype=dtype)
    table = send(table, device)
    dist.all_reduce(table, op=dist.ReduceOp.SUM, group=group)
    return table.cpu().double()
