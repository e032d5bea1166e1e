"""Chunked cross entropy equals torch's on the whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from core.training.loss import loss_and_gradient, loss_sum, target_positions
from tests.distributed import run

HIDDEN, VOCAB, TOKENS = 8, 30, 20


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, nn.Linear]:
    torch.manual_seed(0)
    hidden_TH = torch.randn(TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    targets_T = torch.randint(0, VOCAB, (TOKENS,))
    targets_T[::3] = -100
    return hidden_TH, targets_T, nn.Linear(HIDDEN, VOCAB, bias=False).to(dtype)


class TestLossAndGradient:
    @pytest.mark.parametrize("chunk_tokens", [1, 5, 1024])
    def test_equals_cross_entropy_on_the_whole_matrix(self, chunk_tokens: int) -> None:
        hidden_TH, targets_T, head = inputs()
        expected = F.cross_entropy(head(hidden_TH), targets_T, reduction="sum")
        expected.backward()
        assert hidden_TH.grad is not None
        assert head.weight.grad is not None
        weight_gradient, head.weight.grad = head.weight.grad, None
        result = loss_and_gradient(hidden_TH, targets_T, target_positions(targets_T), head, chunk_tokens=chunk_tokens)
        assert result.num_targets == int((targets_T != -100).sum())
        torch.testing.assert_close(result.loss_sum, expected.detach())
        torch.testing.assert_close(result.gradient_TH, hidden_TH.grad)
        torch.testing.assert_close(head.weight.grad, weight_gradient)

    def test_never_makes_logits_of_more_than_a_chunk(self) -> None:
        hidden_TH, targets_T, head = inputs()
        sizes = []

        def logits(hidden_CH: Tensor) -> Tensor:
            sizes.append(hidden_CH.shape[0])
            return head(hidden_CH)  # type: ignore[no-any-return]

        loss_and_gradient(hidden_TH, targets_T, target_positions(targets_T), logits, chunk_tokens=4)
        assert max(sizes) == 4
        assert sum(sizes) == int((targets_T != -100).sum())

    def test_bfloat16_scores_are_summed_in_float32(self) -> None:
        hidden_TH, targets_T, head = inputs(torch.bfloat16)
        result = loss_and_gradient(hidden_TH, targets_T, target_positions(targets_T), head)
        expected = F.cross_entropy(head(hidden_TH).float(), targets_T, reduction="sum")
        assert result.loss_sum.dtype == torch.float32
        torch.testing.assert_close(result.loss_sum, expected.detach())
        assert result.gradient_TH is not None
        assert result.gradient_TH.dtype == torch.bfloat16

    def test_without_targets_the_loss_is_zero_and_nothing_goes_back(self) -> None:
        hidden_TH, _, head = inputs()
        targets_T = torch.full((TOKENS,), -100)
        result = loss_and_gradient(hidden_TH, targets_T, target_positions(targets_T), head)
        assert (result.loss_sum.item(), result.num_targets, result.gradient_TH) == (0.0, 0, None)

    def test_a_frozen_head_gets_no_gradient_but_passes_it_on(self) -> None:
        hidden_TH, targets_T, head = inputs()
        head.requires_grad_(False)
        result = loss_and_gradient(hidden_TH, targets_T, target_positions(targets_T), head)
        assert head.weight.grad is None
        assert result.gradient_TH is not None
        assert result.gradient_TH.any()

    def test_with_frozen_stages_before_only_the_head_learns(self) -> None:
        hidden_TH, targets_T, head = inputs()
        result = loss_and_gradient(hidden_TH.detach(), targets_T, target_positions(targets_T), head)
        assert result.gradient_TH is None
        assert head.weight.grad is not None
        assert head.weight.grad.any()


class TestWeights:
    def test_each_target_counts_by_its_weight(self) -> None:
        hidden_TH, targets_T, head = inputs()
        weights_T = torch.rand(TOKENS)
        expected = (F.cross_entropy(head(hidden_TH), targets_T, reduction="none") * weights_T).sum()
        expected.backward()
        weight_gradient, head.weight.grad = head.weight.grad, None
        result = loss_and_gradient(
            hidden_TH, targets_T, target_positions(targets_T), head, weights_T=weights_T, chunk_tokens=5
        )
        torch.testing.assert_close(result.loss_sum, expected.detach())
        torch.testing.assert_close(result.gradient_TH, hidden_TH.grad)
        torch.testing.assert_close(head.weight.grad, weight_gradient)


class TestLossSum:
    def test_equals_the_training_loss_and_leaves_no_gradient(self) -> None:
        hidden_TH, targets_T, head = inputs()
        loss, num_targets = loss_sum(hidden_TH, targets_T, head, chunk_tokens=3)
        torch.testing.assert_close(loss, F.cross_entropy(head(hidden_TH), targets_T, reduction="sum").detach())
        assert num_targets == int((targets_T != -100).sum())
        assert head.weight.grad is None


class TestSplitVocabulary:
    def test_parts_of_the_vocabulary_give_the_same_loss_and_gradients(self) -> None:
        hidden_TH, targets_T, head = inputs()
        whole = loss_and_gradient(hidden_TH, targets_T, target_positions(targets_T), head)
        first, second = run(_on_half, 2)
        for loss, _, _ in (first, second):
            torch.testing.assert_close(loss, whole.loss_sum)
        torch.testing.assert_close(first[1] + second[1], whole.gradient_TH)
        torch.testing.assert_close(torch.cat([first[2], second[2]]), head.weight.grad)


def _on_half(rank: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    hidden_TH, targets_T, head = inputs()
    part = nn.Linear(HIDDEN, VOCAB // 2, bias=False)
    part.weight.data.copy_(head.weight[rank * VOCAB // 2 : (rank + 1) * VOCAB // 2])
    result = loss_and_gradient(
        hidden_TH, targets_T, target_positions(targets_T), part, chunk_tokens=5, tp_group=dist.group.WORLD
    )
    return result.loss_sum, result.gradient_TH, part.weight.grad
