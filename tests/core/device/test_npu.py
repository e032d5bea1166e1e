"""The NPU's calls, against a stand-in for torch_npu: that they are made as documented; only an NPU can show that they are right."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from core.device import reference
from tests.core.device import torch_npu
from tests.core.device.test_reference import SEGMENTS, random_qkv


@pytest.fixture
def kernels() -> Iterator:
    with torch_npu.imported() as npu:
        yield npu.NpuKernels()


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
