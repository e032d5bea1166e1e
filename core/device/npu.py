"""Ascend NPUs over HCCL: the only file that imports torch_npu.

Simulated only: no NPU was at hand. The calls follow the signatures and limits documented in torch_npu 2.7.1
(`torch_npu/_op_plugin_docs.py`); the tests run them against a stand-in with those signatures (`tests/core/device/torch_npu.py`), alone and
in whole training steps on a simulated device.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch
import torch_npu
from torch import Tensor

from core.device import reference

MAX_SEGMENTS = 1024
"""Most entries of `actual_seq_qlen` in one call of the fused attention; more windows than that take several calls."""
CAUSAL_MASK_SIZE = 2048
"""Side of the compressed mask that sparse modes 2 to 4 expect, whatever the sequence length."""
RIGHT_DOWN_CAUSAL = 3


class NpuKernels:
    """The fused operations, apart from any device handle."""

    def attention_varlen(
        self, q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, cu_seqlens: tuple[int, ...], *, causal: bool
    ) -> Tensor:
        # Empty segments are left out: the kernel's handling of them is documented for some cases only.
        ends = [end for start, end in itertools.pairwise(cu_seqlens) if end > start]
        if not ends:
            return q_TND
        outputs: list[Tensor] = []
        start = 0
        for first in range(0, len(ends), MAX_SEGMENTS):
            part = ends[first : first + MAX_SEGMENTS]
            rows = slice(start, part[-1])
            outputs.append(_fused(q_TND[rows], k_TGD[rows], v_TGD[rows], [end - start for end in part], causal=causal))
            start = part[-1]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def attention_cached(self, q_BND: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask_BS: Tensor | None) -> Tensor:
        # npu_fusion_attention is for training only; torch_npu maps SDPA to the inference kernel.
        return reference.attention_cached(q_BND, k_BGSD, v_BGSD, mask_BS)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return torch_npu.npu_rms_norm(x, weight.to(x.dtype), epsilon=eps)[0]

    def swiglu(self, x_2F: Tensor) -> Tensor:
        return torch_npu.npu_swiglu(x_2F, dim=-1)

    def rotary(self, x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        cos_1T1D, sin_1T1D = (table[None, :, None, :].to(x_TND.dtype) for table in (cos_TD, sin_TD))
        return torch_npu.npu_rotary_mul(x_TND.unsqueeze(0).contiguous(), cos_1T1D, sin_1T1D).squeeze(0)


class NpuAccelerator(NpuKernels):
    """One NPU of this host (after `ASCEND_RT_VISIBLE_DEVICES`)."""

    name = "npu"
    backend = "hccl"
    static_shapes = True

    def __init__(self, local_rank: int = 0) -> None:
        self.device = torch.device("npu", local_rank)
        torch_npu.npu.set_device(self.device)
        torch_npu.npu.set_compile_mode(jit_compile=False)  # prebuilt kernels: no compilation per shape
        torch_npu.npu.config.allow_internal_format = False

    def device_name(self) -> str:
        return str(torch_npu.npu.get_device_name(self.device))

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)
        torch_npu.npu.manual_seed(seed)

    def rng_state(self) -> Tensor:
        return torch_npu.npu.get_rng_state(self.device)

    def set_rng_state(self, state: Tensor) -> None:
        torch_npu.npu.set_rng_state(state, self.device)

    def synchronize(self) -> None:
        torch_npu.npu.synchronize(self.device)

    def memory_peak_bytes(self) -> int:
        return int(torch_npu.npu.max_memory_allocated(self.device))

    def reset_memory_peak(self) -> None:
        torch_npu.npu.reset_peak_memory_stats(self.device)

    def empty_cache(self) -> None:
        torch_npu.npu.empty_cache()


def _fused(q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, ends: list[int], *, causal: bool) -> Tensor:
    """One call of the fused kernel; `ends` are cumulative lengths without the leading 0, on the host."""
    return torch_npu.npu_fusion_attention(
        q_TND,
        k_TGD,
        v_TGD,
        head_num=q_TND.shape[1],
        input_layout="TND",
        atten_mask=_compressed_causal_mask(q_TND.device) if causal else None,
        scale=q_TND.shape[-1] ** -0.5,
        keep_prob=1.0,
        actual_seq_qlen=ends,
        actual_seq_kvlen=ends,
        sparse_mode=RIGHT_DOWN_CAUSAL if causal else 0,
    )[0]


@lru_cache(maxsize=8)
def _compressed_causal_mask(device: torch.device) -> Tensor:
    """True above the diagonal: what must not be seen. 4 MiB, whatever the sequence length."""
    return torch.ones(CAUSAL_MASK_SIZE, CAUSAL_MASK_SIZE, dtype=torch.bool, device=device).triu(1)
