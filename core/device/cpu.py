"""The CPU over gloo: the reference implementation, and what CI runs."""

from __future__ import annotations

import resource
import sys

import torch
from torch import Tensor

from core.device import reference


class CpuAccelerator:
    """Every operation in plain torch."""

    name = "cpu"
    backend = "gloo"
    static_shapes = False

    def __init__(self) -> None:
        self.device = torch.device("cpu")

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
