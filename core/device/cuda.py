"""NVIDIA GPUs over NCCL. The operations are the reference ones: torch fuses scaled dot product attention there already."""

from __future__ import annotations

import torch
from torch import Tensor

from core.device.reference import ReferenceOperations


class CudaAccelerator(ReferenceOperations):
    """One GPU of this host."""

    name = "cuda"
    backend = "nccl"
    static_shapes = False

    def __init__(self, local_rank: int = 0) -> None:
        self.device = torch.device("cuda", local_rank)
        torch.cuda.set_device(self.device)

    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device)

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)
        torch.cuda.manual_seed(seed)

    def rng_state(self) -> Tensor:
        return torch.cuda.get_rng_state(self.device)

    def set_rng_state(self, state: Tensor) -> None:
        torch.cuda.set_rng_state(state, self.device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def memory_peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def reset_memory_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()
