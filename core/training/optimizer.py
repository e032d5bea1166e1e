"""AdamW over flat buffers: parameter groups, float32 master weights, learning-rate schedule, clipping by the global norm.

The trained parameters of a rank lie in two flat buffers, one with weight decay (matrices) and one without (norms, biases: Megatron's
rule), so a step is a few operations on long vectors:

    gradients (sum over the global batch) --scale 1/targets, clip--> AdamW on float32 weights --cast--> bfloat16 weights

In float32 the flat weights are what AdamW updates; in bfloat16 it updates float32 master copies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.parallel.data import FlatBuffer
from core.parallel.mesh import Mesh
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


class Optimizer:
    """The trained parameters of this rank, their gradients, and AdamW's state."""

    def __init__(self, model: nn.Module, spec: OptimizerSpec, mesh: Mesh) -> None:
        """Lay the trained parameters of `model` into flat buffers; the model keeps using them as views."""
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        decayed = [(name, parameter) for name, parameter in trained if parameter.ndim > 1]
        plain = [(name, parameter) for name, parameter in trained if parameter.ndim <= 1]
        self.mesh = mesh
        self.clip_grad = spec.clip_grad
        self.buffers = [FlatBuffer(named) for named in (decayed, plain) if named]
        decays = [spec.weight_decay] * bool(decayed) + [0.0] * bool(plain)
        self.masters = [
            buffer.weights if buffer.weights.dtype == torch.float32 else buffer.weights.float()
            for buffer in self.buffers
        ]
        self._adamw: torch.optim.AdamW | None = None
        if self.buffers:
            groups = [
                {"params": [nn.Parameter(master)], "weight_decay": decay}
                for master, decay in zip(self.masters, decays, strict=True)
            ]
            fused = self.masters[0].device.type in ("cpu", "cuda")
            betas = (spec.adam_beta1, spec.adam_beta2)
            self._adamw = torch.optim.AdamW(groups, lr=spec.lr, betas=betas, eps=spec.adam_eps, fused=fused)
            for group, buffer in zip(self._adamw.param_groups, self.buffers, strict=True):
                group["params"][0].grad = buffer.gradients
        self._tied = self._tied_gradient()

    def clear_gradients(self) -> None:
        """Set all gradients to zero, before the first micro-batch of a step."""
        for buffer in self.buffers:
            buffer.clear()

    def reduce_gradients(self) -> None:
        """Sum gradients over data-parallel ranks, and over the two copies of a tied embedding, so that the copies stay equal."""
        for buffer in self.buffers:
            buffer.all_reduce(self.mesh.dp_group)
        if self._tied is not None:
            dist.all_reduce(self._tied, op=dist.ReduceOp.SUM, group=self.mesh.tied_group)

    def squared_norm(self) -> float:
        """Return this rank's share of the squared gradient norm: what other ranks hold too is counted by the first of them.

        Call it after `reduce_gradients`; the sum over all ranks is the squared norm over the whole model, not finite if any
        gradient is not.
        """
        if self.mesh.dp_rank != 0:
            return 0.0
        total = sum((_squared_norm(buffer.gradients) for buffer in self.buffers), start=torch.zeros(()))
        if self._tied is not None and self.mesh.is_last_stage:
            total = total - _squared_norm(self._tied)
        return float(total)

    def step(self, *, learning_rate: float, num_targets: float, squared_norm: float) -> float:
        """Divide by the number of targets, clip, update. `squared_norm` is of the undivided sums. Return the norm before clipping."""
        norm = math.sqrt(max(squared_norm, 0.0)) / num_targets
        scale = 1.0 / num_targets
        if self.clip_grad > 0 and norm > self.clip_grad:
            scale *= self.clip_grad / (norm + 1e-6)
        if self._adamw is None:
            return norm
        for group, buffer in zip(self._adamw.param_groups, self.buffers, strict=True):
            group["lr"] = learning_rate
            buffer.gradients.mul_(scale)
        self._adamw.step()
        for master, buffer in zip(self.masters, self.buffers, strict=True):
            if master is not buffer.weights:
                buffer.weights.copy_(master)
        return norm

    def non_finite_parameters(self) -> list[str]:
        """Return the names of parameters whose gradient holds a NaN or infinity."""
        return [
            slot.name
            for buffer in self.buffers
            for slot in buffer.slots
            if not bool(torch.isfinite(slot.view(buffer.gradients)).all())
        ]

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return AdamW's state by parameter name: `exp_avg`, `exp_avg_sq`, `step`, and `master` where weights are not float32.

        The tensors are views: write them out before the next step.
        """
        state: dict[str, dict[str, Tensor]] = {}
        for buffer, master, flat in zip(self.buffers, self.masters, self._flat_states(), strict=True):
            for slot in buffer.slots:
                entry = {key: slot.view(flat[key]) for key in ("exp_avg", "exp_avg_sq")}
                entry["step"] = flat["step"]
                if master is not buffer.weights:
                    entry["master"] = slot.view(master)
                state[slot.name] = entry
        return state

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take up a state written by `state_dict`; raise KeyError with the name of a parameter that it lacks."""
        for buffer, master, flat in zip(self.buffers, self.masters, self._flat_states(), strict=True):
            for slot in buffer.slots:
                entry = state[slot.name]
                for key in ("exp_avg", "exp_avg_sq"):
                    slot.view(flat[key]).copy_(entry[key])
                flat["step"].copy_(entry["step"])
                if master is not buffer.weights:
                    slot.view(master).copy_(entry["master"])

    def reload_weights(self) -> None:
        """Take the module's weights, changed from outside (a checkpoint), as the new master weights."""
        for master, buffer in zip(self.masters, self.buffers, strict=True):
            if master is not buffer.weights:
                master.copy_(buffer.weights)

    def _flat_states(self) -> list[dict[str, Tensor]]:
        """Return AdamW's state of each flat buffer, making it as AdamW itself would before its first step."""
        states = []
        for group in self._adamw.param_groups if self._adamw is not None else []:
            (parameter,) = group["params"]
            state = self._adamw.state[parameter]  # type: ignore[union-attr]  # groups exist only with an optimizer
            if not state:
                device = parameter.device if group["fused"] else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            states.append(state)
        return states

    def _tied_gradient(self) -> Tensor | None:
        """Return the gradient of this rank's copy of an embedding tied across stages, or None."""
        if self.mesh.tied_group is None:
            return None
        name = OUTPUT if self.mesh.is_last_stage else EMBEDDING
        for buffer in self.buffers:
            slot = buffer.slot(name)
            if slot is not None:
                return slot.view(buffer.gradients)
        return None


def _squared_norm(gradients: Tensor) -> Tensor:
    """Return the squared 2-norm on the host, accumulated in float64 over float32 parts."""
    norms = [torch.linalg.vector_norm(part) for part in gradients.reshape(-1).split(1 << 22)]
    return torch.stack(norms).to("cpu", torch.float64).square().sum()
