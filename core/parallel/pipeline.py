"""Forward and backward of one step's micro-batches through the pipeline: 1F1B (Narayanan et al. 2021, PipeDream-flush).

With three stages and four micro-batches (F forward, B backward, number = micro-batch):

    stage 0   F0 F1 F2 .. .. B0 F3 B1 .. B2 .. B3       warm-up of 2, steady, cool-down of 2
    stage 1      F0 F1 .. B0 F2 B1 F3 B2 .. B3          warm-up of 1
    stage 2         F0 B0 F1 B1 F2 B2 F3 B3             none

Shapes that cross a boundary are known on both sides from the batch plan, so only the tensors themselves are sent, and nothing is sent
where a tensor is empty (a text-only micro-batch has no image features) or where no gradient is wanted (frozen stages before it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from core.parallel.mesh import Mesh

Batch = TypeVar("Batch")
BatchIn = TypeVar("BatchIn", contravariant=True)


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


@dataclass
class Pipeline(Generic[Batch]):
    """One rank's end of the pipeline. `before` is None on the first stage, `after` on the last."""

    mesh: Mesh
    stage: StageModule[Batch]
    head: Callable[[Tensor, Batch], Tensor | None]
    """Last stage: takes the stage's output, accumulates the loss and the head's own gradients, returns the gradient of the output."""
    before: Boundary[Batch] | None = None
    after: Boundary[Batch] | None = None
    prepare: Callable[[Batch], Batch] = field(default=lambda batch: batch)
    """Done to each micro-batch first, on every stage alike."""
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def run(self, batches: Sequence[Batch]) -> None:
        """Accumulate the gradients of all micro-batches of one step."""
        batches = [self.prepare(batch) for batch in batches]
        if self.before is None and self.after is None:
            for batch in batches:
                self.backward(self.stage(batch), batch, None)
        else:
            _OneFOneB(self, batches).run()

    def backward(self, output: Tensor, batch: Batch, gradient: Tensor | None) -> None:
        """Go back through the stage from the gradient that came in, or on the last stage from the head's."""
        if self.after is None:
            gradient = self.head(output, batch)
        if gradient is not None and output.requires_grad:
            torch.autograd.backward(output, gradient)


class _OneFOneB(Generic[Batch]):
    """The state of one step: queues of what is between its forward and its backward, and sends still under way."""

    def __init__(self, pipeline: Pipeline[Batch], batches: Sequence[Batch]) -> None:
        self.pipe = pipeline
        self.batches = batches
        self.inputs: list[Tensor | None] = []
        self.outputs: list[Tensor] = []
        self.gradient: Tensor | None = None
        """What the next stage sent back for the micro-batch that goes backward next."""
        self.sending: list[tuple[dist.Work, Tensor]] = []
        """Sends of the last exchange: their tensors must live until the other side has them."""

    def run(self) -> None:
        mesh, count = self.pipe.mesh, len(self.batches)
        num_warmup = min(mesh.pp_size - 1 - mesh.pp_rank, count)
        num_steady = count - num_warmup

        for i in range(num_warmup):
            self._exchange(receive_forward=i)
            self._forward(i)
            self._exchange(send_forward=i)

        if num_steady:
            self._exchange(receive_forward=num_warmup)
        for i in range(num_steady):
            last = i == num_steady - 1
            self._forward(num_warmup + i)
            self._exchange(send_forward=num_warmup + i, receive_backward=i)
            gradient = self._backward(i)
            self._exchange(send_backward=(i, gradient), receive_forward=None if last else num_warmup + i + 1)

        for i in range(num_steady, count):
            self._exchange(receive_backward=i)
            gradient = self._backward(i)
            self._exchange(send_backward=(i, gradient))

        self._wait_for_sends()

    def _forward(self, i: int) -> None:
        self.outputs.append(self.pipe.stage(self.batches[i], self.inputs[i]))

    def _backward(self, i: int) -> Tensor | None:
        """Return the gradient that the previous stage waits for; what was kept for the backward pass is let go."""
        incoming, output = self.inputs[i], self.outputs[i]
        self.inputs[i], self.outputs[i] = None, _NOTHING
        self.pipe.backward(output, self.batches[i], self.gradient)
        self.gradient = None
        if incoming is None or not incoming.requires_grad:
            return None
        return incoming.grad if incoming.grad is not None else torch.zeros_like(incoming)

    def _exchange(
        self,
        *,
        send_forward: int | None = None,
        receive_forward: int | None = None,
        send_backward: tuple[int, Tensor | None] | None = None,
        receive_backward: int | None = None,
    ) -> None:
        """Talk with one neighbour in one batch of operations, so that a send and a receive cannot block each other."""
        before, after, ops = self.pipe.before, self.pipe.after, []
        received = None
        if send_forward is not None and after is not None:
            output = self.outputs[send_forward].detach().contiguous()
            expected = after.shape(self.batches[send_forward])
            assert tuple(output.shape) == tuple(expected), (
                f"stage output {tuple(output.shape)}, planned {tuple(expected)}"
            )
            ops += self._op(dist.isend, output, +1)
        if receive_backward is not None and after is not None and after.has_gradient:
            received = torch.empty_like(self.outputs[receive_backward], memory_format=torch.contiguous_format)
            ops += self._op(dist.irecv, received, +1)
        if send_backward is not None and send_backward[1] is not None:
            ops += self._op(dist.isend, send_backward[1].contiguous(), -1)
        if receive_forward is not None:
            if before is not None:
                received = torch.empty(
                    before.shape(self.batches[receive_forward]), dtype=self.pipe.dtype, device=self.pipe.device
                )
                ops += self._op(dist.irecv, received, -1)
            self.inputs.append(received)

        self._communicate(ops)
        if receive_forward is not None and before is not None and received is not None:
            received.requires_grad_(before.has_gradient)
        if receive_backward is not None:
            self.gradient = received

    def _communicate(self, ops: list[dist.P2POp]) -> None:
        """Start sends and receives together; wait for the receives, and for the sends of the exchange before."""
        works = dist.batch_isend_irecv(ops) if ops else []
        if len(works) != len(ops):  # a coalescing backend returns one handle for all
            works = works * len(ops)
        self._wait_for_sends()
        for op, work in zip(ops, works, strict=True):
            if op.op is dist.irecv:
                work.wait()
            else:
                self.sending.append((work, op.tensor))

    def _wait_for_sends(self) -> None:
        for work, _ in self.sending:
            work.wait()
        self.sending.clear()

    def _op(self, kind: Callable[..., dist.Work | None], tensor: Tensor, step: int) -> list[dist.P2POp]:
        if tensor.numel() == 0:
            return []
        mesh = self.pipe.mesh
        peer = mesh.rank + step * mesh.pp_stride
        return [dist.P2POp(kind, tensor, peer, mesh.pp_group)]


_NOTHING = torch.empty(0)
