"""The CPU over gloo: the reference implementation, and what CI runs."""

from __future__ import annotations

import resource
import sys

import torch
from torch import Tensor

from core.device import fused
from core.device.reference import ReferenceOperations


class CpuAccelerator(ReferenceOperations):
    """Plain torch, with backward passes written by hand where a training in float32 gains by them."""

    name = "cpu"
    backend = "gloo"
    static_shapes = False

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.dtype != torch.float32 or weight.dtype != torch.float32:
            return super().rms_norm(x, weight, eps)
        return fused.RMSNorm.apply(x, weight, eps)

    def swiglu(self, x_2F: Tensor) -> Tensor:
        return super().swiglu(x_2F) if x_2F.dtype != torch.float32 else fused.SwiGLU.apply(x_2F)

    def rotary(self, x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        if x_TND.dtype != torch.float32 or cos_TD.dtype != torch.float32:
            return super().rotary(x_TND, cos_TD, sin_TD)
        return fused.Rotary.apply(x_TND, cos_TD, sin_TD)

    def device_name(self) -> str:
        return "cpu"

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def rng_state(self) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor) -> None:
        torch.set_rng_state(state)

    def synchronize(self) -> None:
        pass

    def memory_peak_bytes(self) -> int:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kibibytes

    def reset_memory_peak(self) -> None:
        pass

    def empty_cache(self) -> None:
        pass
