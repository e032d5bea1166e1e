"""The accelerator operations in plain torch: what every fused kernel must equal, and what runs where there is none.

Shapes as in base.py; n segments of equal length L are computed in one call as [n, heads, L, D].
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_varlen(
    q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, cu_seqlens: tuple[int, ...], *, causal: bool
) -> Tensor:
    """Attention per segment; segments of one length share a call (the 64-patch windows of an image, say)."""
    order, runs = _segment_runs(cu_seqlens)
    if not runs:
        return q_TND
    if order is not None:
        order_T = order[0].to(q_TND.device)
        q_TND, k_TGD, v_TGD = q_TND[order_T], k_TGD[order_T], v_TGD[order_T]
    outputs = [
        _attention_equal(
            q_TND[start : start + count * length],
            k_TGD[start : start + count * length],
            v_TGD[start : start + count * length],
            count=count,
            causal=causal,
        )
        for start, count, length in runs
    ]
    out_TND = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return out_TND if order is None else out_TND[order[1].to(out_TND.device)]


def attention_cached(q_BND: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask_BS: Tensor | None) -> Tensor:
    """One query per sequence: the query heads of a group become the query rows, so keys and values are not repeated."""
    batch, num_heads, head_dim = q_BND.shape
    groups = k_BGSD.shape[1]
    q_BGRD = q_BND.reshape(batch, groups, num_heads // groups, head_dim)
    mask = None if mask_BS is None else mask_BS[:, None, None, :]
    out_BGRD = F.scaled_dot_product_attention(q_BGRD, k_BGSD, v_BGSD, attn_mask=mask)
    return out_BGRD.reshape(batch, num_heads, head_dim)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As in transformers: normalised in float32, cast, then scaled."""
    x_float = x.float()
    normalised = x_float * torch.rsqrt(x_float.square().mean(-1, keepdim=True) + eps)
    return weight.to(x.dtype) * normalised.to(x.dtype)


def swiglu(x_2F: Tensor) -> Tensor:
    gate, up = x_2F.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotary(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Computed in the wider of the two dtypes: float32 tables rotate a bfloat16 `x_TND` in float32."""
    cos_T1D, sin_T1D = cos_TD.unsqueeze(1), sin_TD.unsqueeze(1)
    first, second = x_TND.chunk(2, dim=-1)
    return (x_TND * cos_T1D + torch.cat((-second, first), dim=-1) * sin_T1D).to(x_TND.dtype)


def _attention_equal(q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, *, count: int, causal: bool) -> Tensor:
    """`count` segments of equal length, one after the other."""
    repeats = q_TND.shape[1] // k_TGD.shape[1]
    if repeats > 1:
        k_TGD, v_TGD = k_TGD.repeat_interleave(repeats, dim=1), v_TGD.repeat_interleave(repeats, dim=1)
    q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q_TND, k_TGD, v_TGD))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return out.transpose(1, 2).flatten(0, 1)


@lru_cache(maxsize=256)
def _segment_runs(
    cu_seqlens: tuple[int, ...],
) -> tuple[tuple[Tensor, Tensor] | None, tuple[tuple[int, int, int], ...]]:
    """Segments grouped by length: token order and its inverse (None: they lie so already), runs (start, count, length)."""
    lengths = [end - start for start, end in itertools.pairwise(cu_seqlens)]
    segments = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: lengths[i])
    runs: list[tuple[int, int, int]] = []
    start = 0
    for i in segments:
        if runs and runs[-1][2] == lengths[i]:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, lengths[i])
        else:
            runs.append((start, 1, lengths[i]))
        start += lengths[i]
    if segments == sorted(segments):
        return None, tuple(runs)
    order = torch.cat([torch.arange(cu_seqlens[i], cu_seqlens[i + 1]) for i in segments])
    return (order, torch.argsort(order)), tuple(runs)


class ReferenceOperations:
    """The operations of an accelerator that has no kernels of its own for them."""

    def attention_varlen(
        self, q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, cu_seqlens: tuple[int, ...], *, causal: bool
    ) -> Tensor:
        return attention_varlen(q_TND, k_TGD, v_TGD, cu_seqlens, causal=causal)

    def attention_cached(self, q_BND: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask_BS: Tensor | None) -> Tensor:
        return attention_cached(q_BND, k_BGSD, v_BGSD, mask_BS)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps)

    def swiglu(self, x_2F: Tensor) -> Tensor:
        return swiglu(x_2F)

    def rotary(self, x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        return rotary(x_TND, cos_TD, sin_TD)
