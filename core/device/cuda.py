"""NVIDIA GPUs over NCCL. The operations are the reference ones: torch fuses scaled dot product attention there already."""

from __future__ import annotations

import torch
from torch import Tensor

from core.device import reference


class CudaAccelerator:
    """One GPU of this host."""

    name = "cuda"
    backend = "nccl"
    static_shapes = False

    def __init__(self, local_rank: int = 0) -> None:
        self.device = torch.device("cuda", local_rank)
        torch.cuda.set_device(self.device)

    def attention_varlen(
        self, q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, cu_seqlens: tuple[int, ...], *, causal: bool
    ) -> Tensor:
        return reference.attention_varlen(q_TND, k_TGD, v_TGD, cu_seqlens, causal=causal)

    def attention_cached(self, q_BND: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask_BS: Tensor | None) -> Tensor:
        return reference.attention_cached(q_BND, k_BGSD, v_BGSD, mask_BS)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return reference.rms_norm(x, weight, eps)

    def swiglu(self, x_2F: Tensor) -> Tensor:
        return reference.swiglu(x_2F)

    def rotary(self, x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        return reference.rotary(x_TND, cos_TD, sin_TD)

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
