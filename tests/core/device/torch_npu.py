"""A stand-in for torch_npu: the signatures that version 2.7.1 documents (`torch_npu/_op_plugin_docs.py`).

It refuses what the documentation forbids, and computes by definition.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from core.device import reference
from tests.core.device.test_reference import masked_attention


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


FUNCTIONS: tuple[Callable[..., Any], ...] = (npu_fusion_attention, npu_rms_norm, npu_swiglu, npu_rotary_mul)


@contextmanager
def imported(functions: dict[str, Callable[..., Any]] | None = None) -> Iterator[ModuleType]:
    """`core.device.npu` over the stand-in, or over others of its functions."""
    stand_in = ModuleType("torch_npu")
    for function in FUNCTIONS:
        setattr(stand_in, function.__name__, (functions or {}).get(function.__name__, function))
    had = sys.modules.get("torch_npu")
    sys.modules["torch_npu"] = stand_in
    try:
        yield importlib.reload(importlib.import_module("core.device.npu"))
    finally:
        sys.modules.pop("core.device.npu", None)
        sys.modules.pop("torch_npu")
        if had is not None:
            sys.modules["torch_npu"] = had
