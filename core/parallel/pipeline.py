"""Forward and backward of one step's micro-batches through the pipeline: 1F1B (Narayanan et al. 2021, PipeDream-flush), interleaved where
a rank holds several stages (Narayanan et al. 2021, Megatron-LM).

With three stages and four micro-batches (F forward, B backward, number = micro-batch):

    rank 0   F0 F1 F2 .. .. B0 F3 B1 .. B2 .. B3       three under way at most
    rank 1      F0 F1 .. B0 F2 B1 F3 B2 .. B3          two
    rank 2         F0 B0 F1 B1 F2 B2 F3 B3             one

Every rank computes the same `timetable` of all ranks. After each tick the tensors that it made are sent and received in one batch of
operations, so a message is posted on both sides at the same place in the order and none can block another; a receiver waits when it
needs the tensor, not before.

Shapes that cross a boundary are known on both sides from the batch plan, so only the tensors themselves are sent, and nothing is sent
where a tensor is empty (a text-only micro-batch has no image features) or where no gradient is wanted (frozen stages before it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from core.parallel.mesh import Mesh

Batch = TypeVar("Batch")
BatchIn = TypeVar("BatchIn", contravariant=True)
Pass = AbstractContextManager[None]


class StageModule(Protocol[BatchIn]):
    """One pipeline stage's computation."""

    def __call__(self, batch: BatchIn, incoming: Tensor | None = None) -> Tensor:
        """Map what the previous stage sent (None on the first) to what the next one needs."""
        ...


@dataclass(frozen=True)
class Boundary(Generic[Batch]):
    """What crosses between two neighbouring stages."""

    shape: Callable[[Batch], tuple[int, ...]]
    """Shape of the activation of a micro-batch, known on both sides."""
    has_gradient: bool
    """Whether anything before it is trained, so that a gradient flows back."""


@dataclass(frozen=True)
class Action:
    """What a rank does in one tick: the forward or backward pass of a micro-batch through one of its stages."""

    is_forward: bool
    stage: int
    batch: int


@lru_cache(maxsize=64)
def timetable(pp_size: int, vpp_size: int, num_batches: int) -> tuple[tuple[Action | None, ...], ...]:
    """Return what each rank does (None: waits) in each tick, if every action takes one.

    Stage `chunk * pp_size + rank` is on `rank`. A rank goes backward when it can; else forward, while fewer micro-batches are under way
    than it takes for the first one to come back. With several chunks, micro-batches pass through a chunk in groups of `pp_size`.
    """
    groups = [range(first, min(first + pp_size, num_batches)) for first in range(0, num_batches, pp_size)]
    chunks = range(vpp_size)
    forward = [(chunk, batch) for group in groups for chunk in chunks for batch in group]
    backward = [(chunk, batch) for group in groups for chunk in reversed(chunks) for batch in group]
    last = pp_size * vpp_size - 1
    num_forward, num_backward = [0] * pp_size, [0] * pp_size
    done: set[Action] = set()
    ticks = []

    def ready(rank: int) -> Action | None:
        if num_backward[rank] < num_forward[rank]:
            chunk, batch = backward[num_backward[rank]]
            action = Action(False, chunk * pp_size + rank, batch)
            needed = Action(True, last, batch) if action.stage == last else Action(False, action.stage + 1, batch)
            if needed in done:
                return action
        if num_forward[rank] < len(forward) and num_forward[rank] - num_backward[rank] < _most_under_way(rank):
            chunk, batch = forward[num_forward[rank]]
            action = Action(True, chunk * pp_size + rank, batch)
            if action.stage == 0 or Action(True, action.stage - 1, batch) in done:
                return action
        return None

    def _most_under_way(rank: int) -> int:
        until_last = pp_size - 1 - rank
        return until_last + 1 if vpp_size == 1 else 2 * until_last + (vpp_size - 1) * pp_size + 1

    while min(num_backward) < len(backward):
        tick = tuple(ready(rank) for rank in range(pp_size))
        assert any(tick), "every rank waits for another"
        for rank, action in enumerate(tick):
            if action is not None:
                done.add(action)
                num_forward[rank] += action.is_forward
                num_backward[rank] += not action.is_forward
        ticks.append(tick)
    return tuple(ticks)


@dataclass
class Pipeline(Generic[Batch]):
    """One rank's end of the pipeline."""

    mesh: Mesh
    stages: Sequence[StageModule[Batch]]
    """This rank's: stages `pp_rank`, `pp_rank + pp_size`, ... of the model."""
    head: Callable[[Tensor, Batch], Tensor | None]
    """Last stage: takes the stage's output, accumulates the loss and the head's own gradients, returns the gradient of the output."""
    boundaries: Sequence[Boundary[Batch]] = ()
    """Of the whole model: boundary s is between stages s and s + 1."""
    prepare: Callable[[Batch], Batch] = field(default=lambda batch: batch)
    """Done to each micro-batch first, on every stage alike."""
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def run(self, batches: Sequence[Batch], *, last_pass: Callable[[], Pass] = nullcontext) -> None:
        """Accumulate the gradients of all micro-batches of one step.

        The last backward pass through each of this rank's stages is made in a `last_pass()`, the head before it.
        """
        batches = [self.prepare(batch) for batch in batches]
        if self.boundaries:
            _Step(self, batches, last_pass).run()
        else:
            for index, batch in enumerate(batches):
                output = self.stages[0](batch)
                gradient = self.head(output, batch)
                with last_pass() if index == len(batches) - 1 else nullcontext():
                    self.backward(output, gradient)

    def backward(self, output: Tensor, gradient: Tensor | None) -> None:
        """Go back through a stage from the gradient of its output."""
        if gradient is not None and output.requires_grad:
            torch.autograd.backward(output, gradient)


@dataclass
class _Arriving:
    """A tensor that is being received."""

    tensor: Tensor
    work: dist.Work | None

    def take(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.tensor


@dataclass(frozen=True)
class _Message:
    """What an action makes for another rank: the input of a stage, or the gradient of a stage's output."""

    action: Action
    """What it is needed for."""
    boundary: int


class _Step(Generic[Batch]):
    """The state of one step: what is between its forward and its backward, and what is under way."""

    def __init__(self, pipeline: Pipeline[Batch], batches: Sequence[Batch], last_pass: Callable[[], Pass]) -> None:
        self.pipe = pipeline
        self.batches = batches
        self.last_pass = last_pass
        self.last = len(pipeline.boundaries)
        self.held: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
        """Input and output of a stage for a micro-batch that has still to go backward."""
        self.arriving: dict[Action, _Arriving] = {}
        self.sending: list[tuple[dist.Work, Tensor]] = []
        """Sends of the last exchange: their tensors must live until the other side has them."""

    def run(self) -> None:
        mesh = self.pipe.mesh
        for actions in timetable(mesh.pp_size, len(self.pipe.stages), len(self.batches)):
            mine = actions[mesh.pp_rank]
            made = None
            if mine is not None:
                made = self._forward(mine) if mine.is_forward else self._backward(mine)
            self._exchange(actions, made)
        self._wait_for_sends()

    def _forward(self, action: Action) -> Tensor:
        stage, batch = action.stage, self.batches[action.batch]
        incoming = None
        if stage > 0:
            incoming = self.arriving.pop(action).take().requires_grad_(self.pipe.boundaries[stage - 1].has_gradient)
        output = self.pipe.stages[stage // self.pipe.mesh.pp_size](batch, incoming)
        if stage < self.last:
            planned = tuple(self.pipe.boundaries[stage].shape(batch))
            assert tuple(output.shape) == planned, f"stage output {tuple(output.shape)}, planned {planned}"
        self.held[stage, action.batch] = incoming, output
        return output.detach()

    def _backward(self, action: Action) -> Tensor | None:
        """Return the gradient that the previous stage waits for; what was kept for the backward pass is let go."""
        incoming, output = self.held.pop((action.stage, action.batch))
        if action.stage == self.last:
            gradient = self.pipe.head(output, self.batches[action.batch])
        else:
            arrived = self.arriving.pop(action, None)
            gradient = None if arrived is None else arrived.take()
        is_last = action.batch == len(self.batches) - 1  # of this stage: micro-batches go back in their order
        with self.last_pass() if is_last else nullcontext():
            self.pipe.backward(output, gradient)
        if incoming is None or not incoming.requires_grad:
            return None
        return incoming.grad if incoming.grad is not None else torch.zeros_like(incoming)

    def _exchange(self, actions: Sequence[Action | None], made: Tensor | None) -> None:
        """Send what this rank has made in this tick, and receive what others have made for it, in one batch of operations."""
        mesh, ops, received = self.pipe.mesh, [], []
        for rank, action in enumerate(actions):
            message = None if action is None else self._message(action)
            if message is None:
                continue
            to = message.action.stage % mesh.pp_size
            if rank == mesh.pp_rank:
                assert made is not None, "a message is of what its rank has made"
                if made.numel():
                    ops.append(self._op(dist.isend, made.contiguous(), to))
            elif to == mesh.pp_rank:
                shape = self.pipe.boundaries[message.boundary].shape(self.batches[message.action.batch])
                arriving = _Arriving(torch.empty(shape, dtype=self.pipe.dtype, device=self.pipe.device), None)
                self.arriving[message.action] = arriving
                if arriving.tensor.numel():
                    ops.append(self._op(dist.irecv, arriving.tensor, rank))
                    received.append(arriving)
        self._start(ops, received)

    def _message(self, action: Action) -> _Message | None:
        stage, batch = action.stage, action.batch
        if action.is_forward:
            return _Message(Action(True, stage + 1, batch), stage) if stage < self.last else None
        if stage == 0 or not self.pipe.boundaries[stage - 1].has_gradient:
            return None
        return _Message(Action(False, stage - 1, batch), stage - 1)

    def _start(self, ops: list[dist.P2POp], received: list[_Arriving]) -> None:
        """Start sends and receives together; wait for the sends of the exchange before."""
        works = dist.batch_isend_irecv(ops) if ops else []
        if len(works) != len(ops):  # a coalescing backend returns one handle for all
            works = works * len(ops)
        self._wait_for_sends()
        incoming = iter(received)
        for op, work in zip(ops, works, strict=True):
            if op.op is dist.irecv:
                next(incoming).work = work
            else:
                self.sending.append((work, op.tensor))

    def _wait_for_sends(self) -> None:
        for work, _ in self.sending:
            work.wait()
        self.sending.clear()

    def _op(self, kind: Callable[..., dist.Work | None], tensor: Tensor, pp_rank: int) -> dist.P2POp:
        mesh = self.pipe.mesh
        peer = mesh.rank + (pp_rank - mesh.pp_rank) * mesh.pp_stride
        return dist.P2POp(kind, tensor, peer, mesh.pp_group)
