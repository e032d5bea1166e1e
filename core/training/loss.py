"""Cross entropy over target positions only, in chunks, without ever holding the whole logits matrix.

N target positions, H hidden, V vocabulary, C positions per chunk. At V = 152k the float32 logits of 8k positions take 5 GB, and autograd
would hold them three times. Here the loss is the end of the graph, so each chunk's gradient is known as soon as its logits are:

    for each chunk:  logits_CV -> loss, d logits_CV -> d hidden_CH (kept), d weight (added to the parameter's gradient) -> forget

Losses are sums; the division by the global batch's number of targets comes once, after gradients have been summed over ranks. So neither
accumulation over micro-batches nor uneven ranks can change the weight of a token. Where targets do not count alike (`loss_reduction`),
each has a weight that its sample alone decides, and the divisor is the sum of the global batch's weights.

With tensor parallelism each of R ranks holds V / R columns of the logits; of each chunk the ranks tell each other two numbers per position,
the logarithm of their part of the softmax's denominator and the target's logit if it is theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from core.parallel.collectives import gather_rows

IGNORE = -100
CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class HeadResult:
    """Loss of one micro-batch, and the gradient to go on with."""

    loss_sum: Tensor
    """Sum of cross entropies over targets, weighted where there are weights; float32 scalar on the device."""
    num_targets: int
    gradient_TH: Tensor | None
    """d loss_sum / d hidden; None when nothing before the head is trained or nothing is a target.

    With tensor parallelism this rank's addend of it, from its part of the vocabulary."""


def target_positions(targets_T: Tensor) -> Tensor:
    """Return the positions that have a target; call it on host tensors, where it costs no device synchronisation."""
    return (targets_T != IGNORE).nonzero().squeeze(1)


def loss_and_gradient(
    hidden_TH: Tensor,
    targets_T: Tensor,
    positions_N: Tensor,
    logits: Callable[[Tensor], Tensor],
    *,
    weights_T: Tensor | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    tp_group: ProcessGroup | None = None,
) -> HeadResult:
    """Compute the loss sum, add the head's own gradients to its parameters, and return the gradient of `hidden_TH`.

    `logits` maps [C, H] to [C, V]; its trained parameters receive their gradients here. Softmax and sums are float32 whatever the dtype.
    `weights_T` (float32) multiply each target's loss; without them all count alike. With a `tp_group`, `logits` gives this rank's columns,
    and all its ranks have the same `hidden_TH`.
    """
    num_targets = positions_N.numel()
    loss_sum = torch.zeros((), dtype=torch.float32, device=hidden_TH.device)
    if num_targets == 0:
        return HeadResult(loss_sum, 0, None)
    wants_gradient = hidden_TH.requires_grad
    gradient_TH = torch.zeros_like(hidden_TH, requires_grad=False) if wants_gradient else None
    detached_TH = hidden_TH.detach()
    for positions_C in positions_N.split(chunk_tokens):
        hidden_CH = detached_TH.index_select(0, positions_C).requires_grad_(wants_gradient)
        logits_CV = logits(hidden_CH)
        with torch.no_grad():
            targets_C = targets_T.index_select(0, positions_C)
            if tp_group is None:
                loss_C, gradient_CV = _cross_entropy(logits_CV.float(), targets_C)
            else:
                loss_C, gradient_CV = _split_cross_entropy(logits_CV.float(), targets_C, tp_group)
            if weights_T is not None:
                weights_C = weights_T.index_select(0, positions_C)
                loss_C, gradient_CV = loss_C * weights_C, gradient_CV.mul_(weights_C[:, None])
            loss_sum += loss_C.sum()
        if logits_CV.requires_grad:
            logits_CV.backward(gradient_CV.to(logits_CV.dtype))
        if gradient_TH is not None:
            assert hidden_CH.grad is not None
            gradient_TH.index_copy_(0, positions_C, hidden_CH.grad)
    return HeadResult(loss_sum, num_targets, gradient_TH)


def loss_sum(
    hidden_TH: Tensor, targets_T: Tensor, logits: Callable[[Tensor], Tensor], *, chunk_tokens: int = CHUNK_TOKENS
) -> tuple[Tensor, int]:
    """Return the sum of cross entropies and the number of targets, without gradients (evaluation)."""
    with torch.no_grad():
        result = loss_and_gradient(
            hidden_TH.detach(), targets_T, target_positions(targets_T), logits, chunk_tokens=chunk_tokens
        )
    return result.loss_sum, result.num_targets


def _cross_entropy(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return -log softmax at each target, and its gradient softmax - onehot."""
    log_total_C1 = torch.logsumexp(logits_CV, dim=1, keepdim=True)
    targets_C1 = targets_C.unsqueeze(1)
    loss_C = (log_total_C1 - logits_CV.gather(1, targets_C1)).squeeze(1)
    gradient_CV = (logits_CV - log_total_C1).exp_()
    ones_C1 = torch.ones_like(log_total_C1)
    return loss_C, gradient_CV.scatter_add_(1, targets_C1, -ones_C1)


def _split_cross_entropy(logits_CV: Tensor, targets_C: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Return the same from this rank's columns; the loss is the same on all ranks, the gradient is of these columns."""
    count = logits_CV.shape[1]
    local_C = targets_C - group.rank() * count
    is_mine_C = (local_C >= 0) & (local_C < count)
    local_C1 = local_C.clamp(0, count - 1).unsqueeze(1)
    log_total_C = torch.logsumexp(logits_CV, dim=1)
    at_target_C = torch.where(is_mine_C, logits_CV.gather(1, local_C1).squeeze(1), 0.0)
    log_totals_RC, at_target_RC = gather_rows(torch.stack([log_total_C, at_target_C])[None], group).unbind(1)
    log_total_C = torch.logsumexp(log_totals_RC, dim=0)
    loss_C = log_total_C - at_target_RC.sum(0)
    gradient_CV = (logits_CV - log_total_C[:, None]).exp_()
    return loss_C, gradient_CV.scatter_add_(1, local_C1, -is_mine_C[:, None].to(gradient_CV.dtype))
