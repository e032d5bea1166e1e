"""The CPU over gloo: the reference implementation, and what CI runs."""

from __future__ import annotations

import resource
import sys

import torch
from torch import Tensor

from core.device.reference import ReferenceOperations


class CpuAccelerator(ReferenceOperations):
    """Every operation in plain torch."""

    name = "cpu"
    backend = "gloo"
    static_shapes = False

    def __init__(self) -> None:
        self.device = torch.device("cpu")

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
