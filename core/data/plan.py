"""Which rows make a training step, and how they are dealt to ranks: pure functions that every rank computes alike.

    position in the run   0 1 2 3 4 | 5 6 7 8 9 | 10 ...      global batches, across epoch borders
    epoch, index          position // N, position % N
    row                   permute(index, N, key(seed, epoch))  O(1), no table
    global batch          → bins of at most `token_budget` tokens, balanced in cost → micro-batches [dp][m]

The rows of a step depend on (seed, position) alone, never on the number of ranks: a run may go on with another dp.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from core.errors import IncompatiblePlan, InvalidDataset

PATCH_COST = 0.1
"""Cost of one patch relative to one text token: a 0.6 B vision encoder beside a 7 B decoder."""

_MASK = (1 << 64) - 1
_ROUNDS = 6


@dataclass(frozen=True)
class StepPlan:
    """The work of one optimizer step."""

    first_position: int
    """Samples consumed before this step."""
    rows: tuple[int, ...]
    """The global batch in order; a row can appear twice only across an epoch border."""
    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]
    """[dp rank][micro-batch] → rows; as many micro-batches on every rank, some may be empty."""

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches per rank."""
        return len(self.micro_batches[0])


def plan_step(
    lengths: npt.NDArray[np.int64],
    patches: npt.NDArray[np.int64],
    *,
    seed: int,
    consumed_samples: int,
    global_batch_size: int,
    dp_size: int,
    token_budget: int,
    patch_budget: int | None = None,
    min_micro_batches: int = 1,
    patch_cost: float = PATCH_COST,
) -> StepPlan:
    """Plan the step that starts after `consumed_samples` samples of the run.

    `lengths`, `patches`: tokens and patches of every row, [N]. `token_budget`: most tokens per micro-batch
    (micro_batch_size × seq_length). `patch_budget`: most patches per micro-batch; without it the token budget limits
    them, since an image has a token for every merge² patches. `min_micro_batches`: at least so many per rank, to fill a
    pipeline. Raises InvalidDataset for a row that fits no micro-batch.
    """
    if len(lengths) == 0:
        raise InvalidDataset("the data set has no training rows")
    positions = range(consumed_samples, consumed_samples + global_batch_size)
    rows = [row_at(position, len(lengths), seed) for position in positions]
    items = [
        _Item(order, int(lengths[row]), int(patches[row]), float(lengths[row] + patch_cost * patches[row]))
        for order, row in enumerate(rows)
    ]
    for item in items:
        _check_fits(item, rows[item.order], token_budget, patch_budget)
    bins = _pack(items, dp_size, token_budget, patch_budget, min_micro_batches)
    dealt = _deal(bins, dp_size)
    return StepPlan(
        first_position=consumed_samples,
        rows=tuple(rows),
        micro_batches=tuple(tuple(tuple(rows[order] for order in sorted(orders)) for orders in rank) for rank in dealt),
    )


def check_budget(lengths: npt.NDArray[np.int64], token_budget: int) -> None:
    """Refuse, before the first step, a data set with a row longer than a micro-batch. Raises IncompatiblePlan."""
    if len(lengths) and int(lengths.max()) > token_budget:
        row = int(lengths.argmax())
        raise IncompatiblePlan(
            f"row {row} of the data set has {int(lengths[row])} tokens, a micro-batch holds {token_budget}",
            hint=f"use seq_length of at least {int(lengths.max())}, or make the data set with a smaller cutoff_len",
        )


def row_at(position: int, num_rows: int, seed: int) -> int:
    """Row at `position` of the endless run: each epoch visits every row once, in its own order."""
    epoch, index = divmod(position, num_rows)
    return permute(index, num_rows, _mix(_mix(seed + 0x9E3779B97F4A7C15) + epoch))


def permute(index: int, size: int, key: int) -> int:
    """Image of `index` under a pseudo-random permutation of range(size) that `key` chooses.

    A balanced Feistel network over the next even number of bits, walked until the value falls into the range (at most
    4 tries on average): constant time and no memory, so that any step of any epoch can be reached at once.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    value = index
    while True:
        left, right = value >> half, value & mask
        for round_number in range(_ROUNDS):
            left, right = right, left ^ (_mix(key + (round_number << 56) + right) & mask)
        value = left << half | right
        if value < size:
            return value


def _mix(value: int) -> int:
    """Steele, Lea and Flood's SplitMix64 finaliser: 64 bits in, 64 well mixed bits out."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


@dataclass(frozen=True)
class _Item:
    order: int
    """Place in the global batch."""
    tokens: int
    patches: int
    cost: float


class _Bin:
    """A micro-batch in the making."""

    def __init__(self) -> None:
        self.orders: list[int] = []
        self.tokens = 0
        self.patches = 0
        self.cost = 0.0

    def fits(self, item: _Item, token_budget: int, patch_budget: int | None) -> bool:
        within_patches = patch_budget is None or self.patches + item.patches <= patch_budget
        return within_patches and self.tokens + item.tokens <= token_budget

    def add(self, item: _Item) -> None:
        self.orders.append(item.order)
        self.tokens += item.tokens
        self.patches += item.patches
        self.cost += item.cost


def _check_fits(item: _Item, row: int, token_budget: int, patch_budget: int | None) -> None:
    if item.tokens > token_budget:
        raise InvalidDataset(
            f"row {row} has {item.tokens} tokens, a micro-batch holds {token_budget}",
            hint=f"use seq_length of at least {item.tokens}, or make the data set with a smaller cutoff_len",
        )
    if patch_budget is not None and item.patches > patch_budget:
        raise InvalidDataset(
            f"row {row} has {item.patches} patches of images and videos, a micro-batch holds {patch_budget}",
            hint="make the data set with a smaller image_max_pixels, video_max_pixels or video_max_frames",
        )


def _pack(
    items: list[_Item], dp_size: int, token_budget: int, patch_budget: int | None, min_micro_batches: int
) -> list[_Bin]:
    """Spread items over the fewest bins (a multiple of dp) that hold them, each as even in cost as it goes.

    Longest first into the cheapest bin with room; if one finds no room, try again with dp more bins. One item per bin
    always works, so this ends.
    """
    fewest = math.ceil(sum(item.tokens for item in items) / token_budget)
    if patch_budget is not None:
        fewest = max(fewest, math.ceil(sum(item.patches for item in items) / patch_budget))
    per_rank = max(min_micro_batches, math.ceil(fewest / dp_size), 1)
    by_cost = sorted(items, key=lambda item: (-item.cost, item.order))
    while True:
        bins = [_Bin() for _ in range(per_rank * dp_size)]
        cheapest = [(0.0, number) for number in range(len(bins))]  # a heap
        if all(_place(item, bins, cheapest, token_budget, patch_budget) for item in by_cost):
            return bins
        per_rank += 1


def _place(
    item: _Item, bins: list[_Bin], cheapest: list[tuple[float, int]], token_budget: int, patch_budget: int | None
) -> bool:
    """Add `item` to the cheapest bin with room; `cheapest` is a heap of (cost, bin number). False if none has room."""
    full = []
    placed = False
    while cheapest and not placed:
        entry = heapq.heappop(cheapest)
        candidate = bins[entry[1]]
        if candidate.fits(item, token_budget, patch_budget):
            candidate.add(item)
            entry = (candidate.cost, entry[1])
            placed = True
        full.append(entry)
    for entry in full:
        heapq.heappush(cheapest, entry)
    return placed


def _deal(bins: list[_Bin], dp_size: int) -> list[list[list[int]]]:
    """Deal bins to ranks, as many to each, dearest first to the rank with the least cost that still takes one."""
    per_rank = len(bins) // dp_size
    ranks: list[list[list[int]]] = [[] for _ in range(dp_size)]
    cost = [0.0] * dp_size
    for dearest in sorted(bins, key=lambda one: (-one.cost, one.orders)):
        rank = min((r for r in range(dp_size) if len(ranks[r]) < per_rank), key=lambda r: (cost[r], r))
        ranks[rank].append(dearest.orders)
        cost[rank] += dearest.cost
    return ranks
