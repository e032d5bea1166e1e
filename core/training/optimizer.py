"""AdamW over a flat buffer: float32 master weights, learning-rate schedule, clipping by the global norm.

The trained parameters of a rank lie in one flat buffer, in buckets with weight decay (matrices) and without (norms, biases: Megatron's
rule), so a step is a few operations on long vectors. Each of the data-parallel ranks steps a share of every bucket (ZeRO-1):

    gradients (sum over the global batch) --scale 1/targets, clip--> AdamW on float32 weights --cast--> bfloat16 weights --> all ranks

In float32 the weights themselves are what AdamW updates; in bfloat16 it updates float32 master copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from core.parallel.collectives import sum_over
from core.parallel.data import BUCKET_BYTES, Bucket, FlatBuffer, Part
from core.parallel.mesh import Mesh
from core.parallel.tensor import Held, local_name
from core.specs.training import OptimizerSpec

EMBEDDING = "text_decoder.embedding.word_embeddings.weight"
OUTPUT = "text_decoder.output_layer.weight"


@dataclass(frozen=True)
class Schedule:
    """Learning rate by iteration, as Megatron's OptimizerParamScheduler computes it for a constant batch size."""

    peak: float
    minimum: float
    style: str
    warmup_iters: float
    decay_iters: int

    def at(self, iteration: int) -> float:
        """Return the rate after `iteration` finished iterations, that is for iteration + 1: the first one of a warm-up has rate 0."""
        if self.warmup_iters > 0 and iteration <= self.warmup_iters:
            return self.peak * iteration / self.warmup_iters
        if self.style == "constant":
            return self.peak
        if iteration > self.decay_iters:
            return self.minimum
        ratio = (iteration - self.warmup_iters) / (self.decay_iters - self.warmup_iters)
        left = 1.0 - ratio if self.style == "linear" else 0.5 * (math.cos(math.pi * ratio) + 1.0)
        return self.minimum + left * (self.peak - self.minimum)


def build_schedule(spec: OptimizerSpec, train_iters: int) -> Schedule:
    """Build the schedule of a run; the decay ends with the last iteration."""
    return Schedule(spec.lr, spec.min_lr, spec.lr_decay_style, spec.lr_warmup_fraction * train_iters, train_iters)


Kind = Literal["exp_avg", "exp_avg_sq", "master"]
"""AdamW's two moments, and the float32 weights where those of the model are bfloat16."""


@dataclass(frozen=True)
class Piece:
    """State of some consecutive elements of a flattened parameter, as this rank holds the parameter."""

    start: int
    stop: int
    tensors: dict[Kind, Tensor]
    """1-D, float32, `stop - start` elements."""


@dataclass(frozen=True)
class OptimizerState:
    """AdamW's state of the pieces of parameters that a rank steps."""

    num_steps: int
    """Updates so far."""
    pieces: dict[str, Piece]
    """By the parameter's name in this rank's module."""


@dataclass(frozen=True)
class Treatment:
    """What parameters of one bucket have in common."""

    weight_decay: float
    held: Held
    copy_of: str | None
    """EMBEDDING or OUTPUT where it is tied across stages: alone in its bucket, so that both copies are divided alike."""


@dataclass
class Share:
    """What this rank steps of a bucket, and AdamW's state of it; all float32 but the weights."""

    bucket: Bucket
    treatment: Treatment
    weights: Tensor
    gradients: Tensor
    master: Tensor
    """What AdamW updates: the weights, or a float32 copy of bfloat16 ones."""
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @classmethod
    def of(cls, bucket: Bucket, buffer: FlatBuffer, treatment: Treatment) -> Share:
        """Make the state before the first update."""
        weights = bucket.share(buffer.weights)
        master = weights if weights.dtype == torch.float32 else weights.float()
        gradients = bucket.share(buffer.gradients)
        return cls(bucket, treatment, weights, gradients, master, torch.zeros_like(master), torch.zeros_like(master))

    @property
    def has_copy(self) -> bool:
        """Whether the master weights are a copy."""
        return self.master is not self.weights

    def states(self) -> Iterator[tuple[Kind, Tensor]]:
        """The tensors of a checkpoint beside the weights."""
        yield "exp_avg", self.exp_avg
        yield "exp_avg_sq", self.exp_avg_sq
        if self.has_copy:
            yield "master", self.master


class Optimizer:
    """The trained parameters of this rank, their gradients, and AdamW's state of its shares of them."""

    def __init__(
        self,
        model: nn.Module,
        spec: OptimizerSpec,
        mesh: Mesh,
        *,
        held: Mapping[str, Held] | None = None,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        """Lay the trained parameters of `model` into a flat buffer; the model keeps using them as views.

        `held` is what `shard` returned for the model, if it was cut over tensor-parallel ranks.
        """
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        treatments = {
            name: Treatment(
                spec.weight_decay if parameter.ndim > 1 else 0.0,
                (held or {}).get(name, Held.SLICE),
                local_name(name) if mesh.is_tied and local_name(name) in (EMBEDDING, OUTPUT) else None,
            )
            for name, parameter in trained
        }
        self.mesh = mesh
        self.spec = spec
        self.num_steps = 0
        self.buffer = FlatBuffer(
            trained,
            group=mesh.dp_group,
            apart=treatments.__getitem__,
            early={name for name, _ in trained if local_name(name) == OUTPUT},
            bucket_bytes=bucket_bytes,
        )
        self.shares = [
            Share.of(bucket, self.buffer, treatments[bucket.slots[0].name]) for bucket in self.buffer.buckets
        ]

    def clear_gradients(self) -> None:
        """Set all gradients to zero, before the first micro-batch of a step."""
        self.buffer.clear()

    def last_pass(self) -> AbstractContextManager[None]:
        """A backward pass after which its parameters get no more gradients in this step: begin to sum those that it completes."""
        return self.buffer.last_pass()

    def reduce_gradients(self) -> None:
        """Sum gradients over data-parallel ranks, those of replicated weights over tensor-parallel ranks where each has an addend,
        and those of a tied embedding over its two copies: so all copies of a weight stay equal."""
        self.buffer.reduce()
        for share in self.shares:
            if share.treatment.held is Held.ADDEND and self.mesh.tp_group is not None:
                sum_over(share.gradients, self.mesh.tp_group)
        self._sum_copies()

    def squared_norm(self) -> float:
        """Return this rank's part of the squared gradient norm: of its shares, but what other ranks hold too is counted by the first of
        them.

        Call it after `reduce_gradients`; the sum over all ranks is the squared norm over the whole model, not finite if any
        gradient is not.
        """
        counted = [
            share.gradients
            for share in self.shares
            if (share.treatment.held is Held.SLICE or self.mesh.tp_rank == 0)
            and share.treatment.copy_of != OUTPUT  # counted where the embedding is
        ]
        return _squared_norm(counted)

    def step(self, *, learning_rate: float, num_targets: float, squared_norm: float) -> float:
        """Divide by the number of targets (or the sum of their weights), clip, update. Return the norm before clipping.

        `squared_norm` is of the undivided sums.
        """
        norm = math.sqrt(max(squared_norm, 0.0)) / num_targets
        scale = 1.0 / num_targets
        if self.spec.clip_grad > 0 and norm > self.spec.clip_grad:
            scale *= self.spec.clip_grad / (norm + 1e-6)
        gathered = []
        for share in self.shares:
            share.gradients.mul_(scale)
            self._adamw(share, learning_rate)
            if share.has_copy:
                share.weights.copy_(share.master)
            # Goes on while the next shares are updated.
            gathered.append(self.buffer.start_gather(self.buffer.weights, share.bucket))
        for pending in gathered:
            pending.wait()
        self.num_steps += 1
        return norm

    @torch.no_grad()
    def _adamw(self, share: Share, learning_rate: float) -> None:
        """Update the master weights by torch's AdamW (its function: the class would load the compiler, which takes seconds)."""
        spec, is_fused = self.spec, _has_fused_adamw(share.master)
        # It counts this up; on the host where reading it would otherwise wait for the device.
        num_steps = torch.full((), float(self.num_steps), device=share.master.device if is_fused else "cpu")
        adamw(
            [share.master],
            [share.gradients],
            [share.exp_avg],
            [share.exp_avg_sq],
            [],
            [num_steps],
            fused=is_fused,
            amsgrad=False,
            beta1=spec.adam_beta1,
            beta2=spec.adam_beta2,
            lr=learning_rate,
            weight_decay=share.treatment.weight_decay,
            eps=spec.adam_eps,
            maximize=False,
        )

    def parts(self) -> Iterator[tuple[Part, Share]]:
        """What this rank steps of each parameter, and the share that it lies in."""
        return ((part, share) for share in self.shares for part in share.bucket.parts())

    def non_finite_parameters(self) -> list[str]:
        """Return the names of parameters whose gradient holds a NaN or infinity in this rank's share."""
        return [part.name for part, share in self.parts() if not bool(torch.isfinite(part.of(share.gradients)).all())]

    def state_dict(self) -> OptimizerState:
        """Return AdamW's state of what this rank steps; the tensors are views: write them out before the next step."""
        pieces = {
            part.name: Piece(part.start, part.stop, {kind: part.of(state) for kind, state in share.states()})
            for part, share in self.parts()
        }
        return OptimizerState(self.num_steps, pieces)

    def load_state(self, num_steps: int, read: Callable[[str, Kind, int, int], Tensor]) -> None:
        """Take up a state of as many steps.

        `read(name, kind, start, stop)` gives elements of a flattened parameter's state, 1-D float32; it raises KeyError with the name
        of a parameter that is not known.
        """
        self.num_steps = num_steps
        for part, share in self.parts():
            for kind, state in share.states():
                part.of(state).copy_(read(part.name, kind, part.start, part.stop))

    def _sum_copies(self) -> None:
        """Give all copies of a tied embedding the sum of their gradients."""
        copies = [share.gradients for share in self.shares if share.treatment.copy_of is not None]
        if not copies:
            return
        total, *others = copies
        for other in others:  # virtual stages of one rank
            total.add_(other)
        if self.mesh.tied_group is not None:
            dist.all_reduce(total, op=dist.ReduceOp.SUM, group=self.mesh.tied_group)
        for other in others:
            other.copy_(total)


def _has_fused_adamw(weights: Tensor) -> bool:
    return weights.device.type in ("cpu", "cuda")


def _squared_norm(gradients: list[Tensor]) -> float:
    """Return the squared 2-norm of all together, accumulated in float64 over float32 parts; waits for the device once."""
    norms = [torch.linalg.vector_norm(part) for tensor in gradients for part in tensor.split(1 << 22)]
    return float(torch.stack(norms).cpu().double().square().sum()) if norms else 0.0
