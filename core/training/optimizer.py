"""AdamW over flat buffers: parameter groups, float32 master weights, learning-rate schedule, clipping by the global norm.

The trained parameters of a rank lie in two flat buffers, one with weight decay (matrices) and one without (norms, biases: Megatron's
rule), so a step is a few operations on long vectors:

    gradients (sum over the global batch) --scale 1/targets, clip--> AdamW on float32 weights --cast--> bfloat16 weights

In float32 the flat weights are what AdamW updates; in bfloat16 it updates float32 master copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from core.parallel.collectives import sum_over
from core.parallel.data import FlatBuffer
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


@dataclass
class Group:
    """Parameters with one weight decay, in one flat buffer, and AdamW's state of them; all float32 but the buffer's weights."""

    buffer: FlatBuffer
    weight_decay: float
    master: Tensor
    """What AdamW updates: the buffer's own weights, or a float32 copy of bfloat16 ones."""
    exp_avg: Tensor
    exp_avg_sq: Tensor
    slices: Tensor
    """The gradients that no other tensor-parallel rank has: the beginning of the buffer's."""
    addends: Tensor
    """The gradients that are still to be summed over tensor-parallel ranks: the end of the buffer's."""

    @classmethod
    def of(cls, parameters: list[tuple[str, nn.Parameter]], weight_decay: float, held: Mapping[str, Held]) -> Group:
        """Lay the parameters into a flat buffer, with state as before the first update."""
        parameters = sorted(parameters, key=lambda item: held.get(item[0], Held.SLICE))
        buffer = FlatBuffer(parameters)
        starts = [(held.get(slot.name, Held.SLICE), slot.start) for slot in buffer.slots]
        copies, addends = (
            next((start for kind, start in starts if kind >= first), buffer.gradients.numel())
            for first in (Held.COPY, Held.ADDEND)
        )
        weights = buffer.weights
        master = weights if weights.dtype == torch.float32 else weights.float()
        return cls(
            buffer,
            weight_decay,
            master,
            exp_avg=torch.zeros_like(master),
            exp_avg_sq=torch.zeros_like(master),
            slices=buffer.gradients[:copies],
            addends=buffer.gradients[addends:],
        )

    @property
    def has_copy(self) -> bool:
        """Whether the master weights are a copy."""
        return self.master is not self.buffer.weights

    def states(self) -> Iterator[tuple[Kind, Tensor]]:
        """The flat tensors of a checkpoint beside the weights."""
        yield "exp_avg", self.exp_avg
        yield "exp_avg_sq", self.exp_avg_sq
        if self.has_copy:
            yield "master", self.master


class Optimizer:
    """The trained parameters of this rank, their gradients, and AdamW's state."""

    def __init__(
        self, model: nn.Module, spec: OptimizerSpec, mesh: Mesh, *, held: Mapping[str, Held] | None = None
    ) -> None:
        """Lay the trained parameters of `model` into flat buffers; the model keeps using them as views.

        `held` is what `shard` returned for the model, if it was cut over tensor-parallel ranks.
        """
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        matrices = [(name, parameter) for name, parameter in trained if parameter.ndim > 1]
        vectors = [(name, parameter) for name, parameter in trained if parameter.ndim <= 1]
        decays = ((matrices, spec.weight_decay), (vectors, 0.0))
        self.mesh = mesh
        self.spec = spec
        self.num_steps = 0
        self.groups = [Group.of(named, decay, held or {}) for named, decay in decays if named]
        self._tied = self._tied_gradients() if mesh.is_tied else {}

    @property
    def buffers(self) -> list[FlatBuffer]:
        """The flat buffers of all groups."""
        return [group.buffer for group in self.groups]

    def clear_gradients(self) -> None:
        """Set all gradients to zero, before the first micro-batch of a step."""
        for buffer in self.buffers:
            buffer.clear()

    def reduce_gradients(self) -> None:
        """Sum gradients over data-parallel ranks, those of replicated weights over tensor-parallel ranks where each has an addend,
        and those of a tied embedding over its two copies: so all copies of a weight stay equal."""
        for group in self.groups:
            group.buffer.all_reduce(self.mesh.dp_group)
            if self.mesh.tp_group is not None:
                sum_over(group.addends, self.mesh.tp_group)
        self._sum_copies()

    def squared_norm(self) -> float:
        """Return this rank's share of the squared gradient norm: what other ranks hold too is counted by the first of them.

        Call it after `reduce_gradients`; the sum over all ranks is the squared norm over the whole model, not finite if any
        gradient is not.
        """
        if self.mesh.dp_rank != 0:
            return 0.0
        is_first = self.mesh.tp_rank == 0
        parts = [group.buffer.gradients if is_first else group.slices for group in self.groups]
        total = sum((_squared_norm(part) for part in parts if part.numel()), start=torch.zeros(()))
        if OUTPUT in self._tied:  # counted where the embedding is
            total = total - _squared_norm(self._tied[OUTPUT])
        return float(total)

    def step(self, *, learning_rate: float, num_targets: float, squared_norm: float) -> float:
        """Divide by the number of targets, clip, update. `squared_norm` is of the undivided sums. Return the norm before clipping."""
        norm = math.sqrt(max(squared_norm, 0.0)) / num_targets
        scale = 1.0 / num_targets
        if self.spec.clip_grad > 0 and norm > self.spec.clip_grad:
            scale *= self.spec.clip_grad / (norm + 1e-6)
        for group in self.groups:
            group.buffer.gradients.mul_(scale)
            self._adamw(group, learning_rate)
            if group.has_copy:
                group.buffer.weights.copy_(group.master)
        self.num_steps += 1
        return norm

    @torch.no_grad()
    def _adamw(self, group: Group, learning_rate: float) -> None:
        """Update the master weights by torch's AdamW (its function: the class would load the compiler, which takes seconds)."""
        spec, is_fused = self.spec, _has_fused_adamw(group.master)
        # It counts this up; on the host where reading it would otherwise wait for the device.
        num_steps = torch.full((), float(self.num_steps), device=group.master.device if is_fused else "cpu")
        adamw(
            [group.master],
            [group.buffer.gradients],
            [group.exp_avg],
            [group.exp_avg_sq],
            [],
            [num_steps],
            fused=is_fused,
            amsgrad=False,
            beta1=spec.adam_beta1,
            beta2=spec.adam_beta2,
            lr=learning_rate,
            weight_decay=group.weight_decay,
            eps=spec.adam_eps,
            maximize=False,
        )

    def non_finite_parameters(self) -> list[str]:
        """Return the names of parameters whose gradient holds a NaN or infinity."""
        return [
            slot.name
            for buffer in self.buffers
            for slot in buffer.slots
            if not bool(torch.isfinite(slot.view(buffer.gradients)).all())
        ]

    def state_dict(self) -> OptimizerState:
        """Return AdamW's state of what this rank steps; the tensors are views: write them out before the next step."""
        if self.mesh.dp_rank != 0:
            return OptimizerState(self.num_steps, {})
        pieces = {
            slot.name: Piece(0, slot.stop - slot.start, {kind: flat[slot.start : slot.stop] for kind, flat in states})
            for group in self.groups
            for states in [list(group.states())]
            for slot in group.buffer.slots
        }
        return OptimizerState(self.num_steps, pieces)

    def load_state(self, num_steps: int, read: Callable[[str, Kind, int, int], Tensor]) -> None:
        """Take up a state of as many steps.

        `read(name, kind, start, stop)` gives elements of a flattened parameter's state, 1-D float32; it raises KeyError with the name
        of a parameter that is not known.
        """
        self.num_steps = num_steps
        for group in self.groups:
            for slot in group.buffer.slots:
                for kind, flat in group.states():
                    flat[slot.start : slot.stop].copy_(read(slot.name, kind, 0, slot.stop - slot.start))

    def _tied_gradients(self) -> dict[str, Tensor]:
        """Return the gradients of this rank's copies of an embedding tied across stages."""
        slots = [(slot, buffer) for buffer in self.buffers for slot in buffer.slots]
        named = {local_name(slot.name): slot.view(buffer.gradients) for slot, buffer in slots}
        return {name: named[name] for name in (EMBEDDING, OUTPUT) if name in named}

    def _sum_copies(self) -> None:
        """Give all copies of a tied embedding the sum of their gradients."""
        if not self._tied:
            return
        total, *others = self._tied.values()
        for other in others:  # virtual stages of one rank
            total.add_(other)
        if self.mesh.tied_group is not None:
            dist.all_reduce(total, op=dist.ReduceOp.SUM, group=self.mesh.tied_group)
        for other in others:
            other.copy_(total)


def _has_fused_adamw(weights: Tensor) -> bool:
    return weights.device.type in ("cpu", "cuda")


def _squared_norm(gradients: Tensor) -> Tensor:
    """Return the squared 2-norm on the host, accumulated in float64 over float32 parts."""
    norms = [torch.linalg.vector_norm(part) for part in gradients.reshape(-1).split(1 << 22)]
    return torch.stack(norms).to("cpu", torch.float64).square().sum()
