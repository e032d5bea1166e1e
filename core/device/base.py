"""What Temper asks of a device: the one seam behind which torch_npu, CUDA and the CPU reference stand.

Shapes: T tokens of all segments end to end, N query heads, G key/value heads (N a multiple of G), D head size,
B sequences, S cache slots. Lengths that describe a batch (`cu_seqlens`) are host-side tuples: no implementation may
copy from the device to learn them.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Accelerator(Protocol):
    """Device placement, collectives, memory, randomness, and the operations that have a fused kernel on some device."""

    name: str
    """`cpu`, `cuda` or `npu`."""
    device: torch.device
    """Where parameters and batches of this process live."""
    backend: str
    """Name of the torch.distributed backend: `gloo`, `nccl` or `hccl`."""
    static_shapes: bool
    """True where a new tensor shape costs a compilation, so that batches are padded to their budget."""

    def attention_varlen(
        self, q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, cu_seqlens: tuple[int, ...], *, causal: bool
    ) -> Tensor:
        """Attention inside each segment `cu_seqlens[i] : cu_seqlens[i + 1]`, scaled by D ** -0.5. Returns [T, N, D]."""
        ...

    def attention_cached(self, q_BND: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask_BS: Tensor | None) -> Tensor:
        """One new token per sequence against its cache; `mask_BS` is True where a slot is used, None when all are.

        Returns [B, N, D].
        """
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root mean square norm over the last dim, computed in float32, returned in the dtype of `x`."""
        ...

    def swiglu(self, x_2F: Tensor) -> Tensor:
        """silu(gate) * up, where the last dim of `x_2F` is cat(gate, up)."""
        ...

    def rotary(self, x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        """Rotate half against half: x * cos + cat(-x2, x1) * sin, returned in the dtype of `x_TND`."""
        ...

    def device_name(self) -> str:
        """What the maker calls the device, as `NVIDIA H100 80GB HBM3` or `Ascend910B3`."""
        ...

    def seed(self, seed: int) -> None:
        """Seed the generators of the host and of this device."""
        ...

    def rng_state(self) -> Tensor:
        """State of this device's generator, as a uint8 tensor on the host."""
        ...

    def set_rng_state(self, state: Tensor) -> None:
        """Restore what `rng_state` gave."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has done what it was asked."""
        ...

    def memory_peak_bytes(self) -> int:
        """Most bytes held at once since the start or the last `reset_memory_peak` (on the CPU: of the process)."""
        ...

    def reset_memory_peak(self) -> None:
        """Start a new peak measurement; does nothing where the device cannot."""
        ...

    def empty_cache(self) -> None:
        """Give memory that the allocator keeps in reserve back to the device."""
        ...
