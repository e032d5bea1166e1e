"""The plain operations against their definitions, written out with masks and loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from core.device import get_accelerator, reference

SEGMENTS = {
    "one": (0, 7),
    "equal windows": (0, 4, 8, 12, 16),
    "mixed, out of order": (0, 5, 8, 13, 14, 17, 22),
    "empty ones between": (0, 0, 3, 3, 9),
}


def masked_attention(q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, cu_seqlens: tuple[int, ...], causal: bool) -> Tensor:
    """The definition: one dense score matrix, minus infinity outside the segment and above the diagonal."""
    repeats = q_TND.shape[1] // k_TGD.shape[1]
    k, v = k_TGD.repeat_interleave(repeats, 1), v_TGD.repeat_interleave(repeats, 1)
    size = q_TND.shape[0]
    segment = torch.bucketize(torch.arange(size), torch.tensor(cu_seqlens[1:]), right=True)
    allowed = segment[:, None] == segment[None, :]
    if causal:
        allowed &= torch.ones(size, size, dtype=torch.bool).tril()
    scores = torch.einsum("tnd,snd->nts", q_TND, k) * q_TND.shape[-1] ** -0.5
    return torch.einsum("nts,snd->tnd", scores.masked_fill(~allowed, float("-inf")).softmax(-1), v)


def random_qkv(size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, heads, 8, generator=generator, requires_grad=True) for heads in (6, 2, 2)]


class TestAttentionVarlen:
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("name", SEGMENTS)
    def test_equals_dense_attention_with_a_mask_and_so_do_its_gradients(self, name: str, causal: bool) -> None:
        qkv = random_qkv(SEGMENTS[name][-1])
        out = reference.attention_varlen(*qkv, SEGMENTS[name], causal=causal)
        expected = masked_attention(*qkv, SEGMENTS[name], causal)
        torch.testing.assert_close(out, expected)
        weights = torch.randn_like(out)
        ours = torch.autograd.grad((out * weights).sum(), qkv)
        theirs = torch.autograd.grad((expected * weights).sum(), qkv)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other)

    def test_no_tokens_give_no_tokens(self) -> None:
        assert reference.attention_varlen(*random_qkv(0), (0,), causal=True).shape == (0, 6, 8)

    def test_segments_of_one_length_share_a_call(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []
        real = torch.nn.functional.scaled_dot_product_attention
        monkeypatch.setattr(
            torch.nn.functional,
            "scaled_dot_product_attention",
            lambda q, *args, **kwargs: calls.append(tuple(q.shape)) or real(q, *args, **kwargs),
        )
        reference.attention_varlen(*random_qkv(64 * 5 + 32), (0, 64, 128, 160, 224, 288, 352), causal=False)
        assert sorted(calls) == [(1, 6, 32, 8), (5, 6, 64, 8)]


class TestAttentionCached:
    def test_equals_attention_over_the_used_slots(self) -> None:
        q_BND, k_BGSD, v_BGSD = torch.randn(3, 6, 8), torch.randn(3, 2, 5, 8), torch.randn(3, 2, 5, 8)
        used_BS = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]).bool()
        out = reference.attention_cached(q_BND, k_BGSD, v_BGSD, used_BS)
        for row in range(3):
            k, v = (x[row, :, used_BS[row]].repeat_interleave(3, 0) for x in (k_BGSD, v_BGSD))
            weights = (torch.einsum("nd,nsd->ns", q_BND[row], k) * 8**-0.5).softmax(-1)
            torch.testing.assert_close(out[row], torch.einsum("ns,nsd->nd", weights, v))


class TestGetAccelerator:
    def test_unknown_kind_is_refused_with_the_known_ones(self) -> None:
        with pytest.raises(ValueError, match="'tpu'; use cpu, cuda or npu"):
            get_accelerator("tpu")

    def test_cpu_restores_its_random_state(self) -> None:
        cpu = get_accelerator("cpu")
        cpu.seed(3)
        state = cpu.rng_state()
        first = torch.rand(4)
        cpu.set_rng_state(state)
        assert torch.equal(torch.rand(4), first)
        assert cpu.memory_peak_bytes() > 1 << 20
