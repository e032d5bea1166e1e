"""The NPU's calls, against a stand-in for torch_npu.

The stand-in has the signatures that torch_npu 2.7.1 documents (`torch_npu/_op_plugin_docs.py`), refuses what the documentation
forbids, and computes by definition. It shows that the calls are made as documented; only an NPU can show that they are right.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from core.device import reference
from tests.core.device.test_reference import SEGMENTS, masked_attention, random_qkv


def npu_fusion_attention(
    query,
    key,
    value,
    head_num,
    input_layout,
    pse=None,
    padding_mask=None,
    atten_mask=None,
    scale=1.0,
    keep_prob=1.0,
    pre_tockens=2147483647,
    next_tockens=2147483647,
    inner_precise=0,
    prefix=None,
    actual_seq_qlen=None,
    actual_seq_kvlen=None,
    sparse_mode=0,
    gen_mask_parallel=True,
    sync=False,
    softmax_layout="",
):
    assert input_layout == "TND"
    assert head_num == query.shape[1]
    assert scale == query.shape[-1] ** -0.5
    assert isinstance(actual_seq_qlen, list), "lengths are host-side"
    assert actual_seq_qlen == actual_seq_kvlen
    assert all(isinstance(end, int) for end in actual_seq_qlen)
    assert len(actual_seq_qlen) <= 1024
    assert actual_seq_qlen[-1] == query.shape[0]
    assert all(end > start for start, end in itertools.pairwise([0, *actual_seq_qlen])), "no empty segments"
    if sparse_mode == 3:
        assert atten_mask.dtype is torch.bool
        assert torch.equal(atten_mask, torch.ones(2048, 2048).triu(1).bool())
    else:
        assert sparse_mode == 0
        assert atten_mask is None
    out = masked_attention(query, key, value, (0, *actual_seq_qlen), causal=sparse_mode == 3)
    return out, None, None, None, 0, 0, 0


def npu_rms_norm(self, gamma, epsilon=1e-06):
    assert gamma.dtype == self.dtype
    return reference.rms_norm(self, gamma, epsilon), None


def npu_swiglu(self, dim=-1):
    assert dim == -1
    return reference.swiglu(self)


def npu_rotary_mul(input, r1, r2, rotary_mode="half"):
    assert input.ndim == r1.ndim == r2.ndim == 4
    assert input.dtype == r1.dtype == r2.dtype
    assert r1.shape == (1, input.shape[1], 1, input.shape[3]), "BSND with 1S1D tables"
    first, second = input.chunk(2, dim=-1)
    return r1 * input + r2 * torch.cat((-second, first), dim=-1)


@pytest.fixture
def kernels() -> Iterator:
    stand_in = ModuleType("torch_npu")
    for function in (npu_fusion_attention, npu_rms_norm, npu_swiglu, npu_rotary_mul):
        setattr(stand_in, function.__name__, function)
    had = sys.modules.get("torch_npu")
    sys.modules["torch_npu"] = stand_in
    try:
        yield importlib.reload(importlib.import_module("core.device.npu")).NpuKernels()
    finally:
        sys.modules.pop("core.device.npu", None)
        sys.modules.pop("torch_npu")
        if had is not None:
            sys.modules["torch_npu"] = had


class TestNpuKernels:
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("name", SEGMENTS)
    def test_attention_equals_the_reference(self, kernels, name: str, causal: bool) -> None:
        qkv = random_qkv(SEGMENTS[name][-1])
        out = kernels.attention_varlen(*qkv, SEGMENTS[name], causal=causal)
        torch.testing.assert_close(out, reference.attention_varlen(*qkv, SEGMENTS[name], causal=causal))

    def test_more_windows_than_one_call_takes_are_split(self, kernels) -> None:
        bounds = tuple(range(0, 2 * 1030 + 1, 2))
        qkv = [x.detach() for x in random_qkv(bounds[-1])]
        out = kernels.attention_varlen(*qkv, bounds, causal=False)
        torch.testing.assert_close(out, reference.attention_varlen(*qkv, bounds, causal=False))

    def test_no_tokens_call_no_kernel(self, kernels) -> None:
        assert kernels.attention_varlen(*random_qkv(0), (0,), causal=True).shape == (0, 6, 8)

    def test_pointwise_operations_equal_the_reference(self, kernels) -> None:
        x_TND, table_TD = torch.randn(5, 3, 8), torch.randn(5, 8)
        weight = torch.rand(8)
        assert_same = torch.testing.assert_close
        assert_same(kernels.rms_norm(x_TND, weight, 1e-6), reference.rms_norm(x_TND, weight, 1e-6))
        assert_same(kernels.swiglu(x_TND), reference.swiglu(x_TND))
        rotated: Tensor = kernels.rotary(x_TND, table_TD.cos(), table_TD.sin())
        assert_same(rotated, reference.rotary(x_TND, table_TD.cos(), table_TD.sin()))
