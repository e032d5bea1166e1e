"""The layers that both towers are made of, with MindSpeed-MM's parameter names.

Shapes: T tokens or patches, H hidden, N query heads, G groups (= key/value heads), R = N / G, D head size.
Head counts are read off the weights, so a tensor-parallel shard of a layer is the same code.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from core.device.base import Accelerator
from core.models.layers.cache import KVCache
from core.models.layers.linear import Linear
from core.models.layers.recompute import recomputed


class AttentionContext(NamedTuple):
    """What the attention of one layer needs beside its input."""

    cos_TD: Tensor
    sin_TD: Tensor
    cu_seqlens: tuple[int, ...]
    causal: bool
    recompute_core: bool = False
    """recompute the attention core in the backward pass (selective recompute)"""
    cache: KVCache | None = None
    layer: int = 0
    """index in `cache`"""
    rows_N: Tensor | None = None
    """rows to go on with after attention, where nothing asks for the others (None: all)"""


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, accelerator: Accelerator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.accelerator = accelerator

    def forward(self, x: Tensor) -> Tensor:
        return self.accelerator.rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query self-attention over packed segments.

    Rows of `linear_qkv`: for each group its R query heads, then its key head, then its value head. With R = 1, as in the
    vision encoder, that is q0, k0, v0, q1, ...
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_groups: int,
        qkv_bias: bool,
        proj_bias: bool,
        accelerator: Accelerator,
    ) -> None:
        super().__init__()
        self.head_dim = hidden_size // num_heads
        self.heads_per_group = num_heads // num_groups
        self.linear_qkv = Linear(hidden_size, (num_heads + 2 * num_groups) * self.head_dim, bias=qkv_bias)
        self.linear_proj = Linear(num_heads * self.head_dim, hidden_size, bias=proj_bias)
        self.accelerator = accelerator

    def forward(self, x_TH: Tensor, context: AttentionContext) -> Tensor:
        per_group = self.heads_per_group
        qkv_TGRD = self.linear_qkv(x_TH).unflatten(-1, (-1, per_group + 2, self.head_dim))
        q_TND = qkv_TGRD[:, :, :per_group].flatten(1, 2)
        k_TGD, v_TGD = qkv_TGRD[:, :, per_group], qkv_TGRD[:, :, per_group + 1]
        q_TND = self.accelerator.rotary(q_TND, context.cos_TD, context.sin_TD)
        k_TGD = self.accelerator.rotary(k_TGD, context.cos_TD, context.sin_TD)
        out_TH = self._core(q_TND, k_TGD, v_TGD, context).flatten(1)
        return self.linear_proj(out_TH if context.rows_N is None else out_TH.index_select(0, context.rows_N))

    def _core(self, q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, context: AttentionContext) -> Tensor:
        if context.cache is not None:
            return context.cache.attend(context.layer, q_TND, k_TGD, v_TGD, context.cu_seqlens)

        def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.accelerator.attention_varlen(q, k, v, context.cu_seqlens, causal=context.causal)

        return recomputed(core, q_TND, k_TGD, v_TGD) if context.recompute_core else core(q_TND, k_TGD, v_TGD)


class GatedMLP(nn.Module):
    """SwiGLU; rows of `linear_fc1` are cat(gate, up)."""

    def __init__(self, hidden_size: int, ffn_size: int, *, bias: bool, accelerator: Accelerator) -> None:
        super().__init__()
        self.linear_fc1 = Linear(hidden_size, 2 * ffn_size, bias=bias)
        self.linear_fc2 = Linear(ffn_size, hidden_size, bias=bias)
        self.accelerator = accelerator

    def forward(self, x_TH: Tensor) -> Tensor:
        return self.linear_fc2(self.accelerator.swiglu(self.linear_fc1(x_TH)))


class TransformerLayer(nn.Module):
    """Pre-norm attention and MLP, each with its residual. The same in both towers but for sizes and biases."""

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_groups: int,
        ffn_size: int,
        eps: float,
        proj_bias: bool,
        mlp_bias: bool,
        accelerator: Accelerator,
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(hidden_size, eps, accelerator)
        self.self_attention = Attention(
            hidden_size,
            num_heads=num_heads,
            num_groups=num_groups,
            qkv_bias=True,
            proj_bias=proj_bias,
            accelerator=accelerator,
        )
        self.pre_mlp_layernorm = RMSNorm(hidden_size, eps, accelerator)
        self.mlp = GatedMLP(hidden_size, ffn_size, bias=mlp_bias, accelerator=accelerator)

    def forward(self, x_TH: Tensor, context: AttentionContext) -> Tensor:
        attended_TH = self.self_attention(self.input_layernorm(x_TH), context)
        if context.rows_N is not None:
            x_TH = x_TH.index_select(0, context.rows_N)
        x_TH = x_TH + attended_TH
        return x_TH + self.mlp(self.pre_mlp_layernorm(x_TH))
