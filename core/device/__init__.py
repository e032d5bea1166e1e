"""`get_accelerator(kind)`: the only way in which the rest of Temper meets a device."""

from __future__ import annotations

from core.device.base import Accelerator

__all__ = ["Accelerator", "get_accelerator"]


def get_accelerator(kind: str, local_rank: int = 0) -> Accelerator:
    """The device of this process.

    Raises ValueError for a kind that does not exist, ImportError where torch_npu or its CANN libraries are missing.
    """
    match kind:
        case "cpu":
            from core.device.cpu import CpuAccelerator

            return CpuAccelerator()
        case "cuda":
            from core.device.cuda import CudaAccelerator

            return CudaAccelerator(local_rank)
        case "npu":
            from core.device.npu import NpuAccelerator

            return NpuAccelerator(local_rank)
        case _:
            raise ValueError(f"unknown device kind {kind!r}; use cpu, cuda or npu")
