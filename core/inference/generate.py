"""Greedy and sampled decoding of many prompts at once: one packed pass over the prompts, then a token for all of them per pass.

Shapes: B sequences, T prompt tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.models.batch import PackedBatch
from core.models.layers.cache import KVCache
from core.models.positions import mrope_positions
from core.models.qwen2_5_vl.model import Qwen2_5_VLStage


@dataclass(frozen=True)
class Prompt:
    """What is to be continued."""

    input_ids: Sequence[int]
    """With the header of the answer at its end."""
    pixel_values_PD: Tensor
    """float32, of all images and videos; [0, D] without any"""
    grid_thw: tuple[tuple[int, int, int], ...] = ()
    seconds_per_grid: tuple[float, ...] = ()
    """See `mrope_positions`."""


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen and when to stop."""

    max_new_tokens: int
    eos_token_ids: frozenset[int]
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with at least this probability."""


def generate(
    model: Qwen2_5_VLStage,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    *,
    generator: torch.Generator | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[list[int]]:
    """New tokens per prompt, without the one that ended it; the prompts share one batch (see `plan_batches`).

    `model` is one stage that holds everything. `generator` (on the host) makes sampling repeatable. Stops early, with
    what there is, once `should_stop` says so.
    """
    with torch.no_grad():  # not inference_mode: cached index tensors are shared with training
        return _Batch(model, prompts, decoding, generator).run(should_stop)


def plan_batches(
    lengths: Sequence[int], patches: Sequence[int], *, max_new_tokens: int, token_budget: int, patch_budget: int
) -> list[list[int]]:
    """Indices of the prompts of each batch: prompts of like length together, as a batch's cache is as long as its longest.

    A batch takes at most `token_budget` cache slots and `patch_budget` patches; one prompt alone may exceed them.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], patches[i]), reverse=True)
    batches: list[list[int]] = []
    slots = used_patches = 0
    for index in order:
        fits = batches and (len(batches[-1]) + 1) * slots <= token_budget
        if not fits or used_patches + patches[index] > patch_budget:
            batches.append([])
            slots, used_patches = lengths[index] + max_new_tokens, 0
        batches[-1].append(index)
        used_patches += patches[index]
    return batches


class _Batch:
    """The sequences that are still growing, and the cache that holds them."""

    def __init__(
        self,
        model: Qwen2_5_VLStage,
        prompts: Sequence[Prompt],
        decoding: Decoding,
        generator: torch.Generator | None,
    ) -> None:
        self.model = model
        self.prompts = prompts
        self.decoding = decoding
        self.generator = generator
        self.device = next(model.parameters()).device
        self.cache = KVCache(
            num_layers=len(model.stage.llm_layers),
            max_new_tokens=decoding.max_new_tokens,
            accelerator=model.accelerator,
        )
        self.growing = list(range(len(prompts)))
        """Prompt of each sequence in the cache; negative once it has ended."""
        self.answers: list[list[int]] = [[] for _ in prompts]

    def run(self, should_stop: Callable[[], bool]) -> list[list[int]]:
        if not self.prompts:
            return []
        hidden_BH, position_B = self._read_prompts()
        for count in range(1, self.decoding.max_new_tokens + 1):
            token_B = self._choose(self.model.logits(hidden_BH))
            self._record(token_B.tolist())
            ended = all(prompt < 0 for prompt in self.growing)
            if ended or count == self.decoding.max_new_tokens or should_stop():
                break
            token_B, position_B = self._drop_ended(token_B, position_B)
            hidden_BH = self._read_tokens(token_B, position_B)
            position_B = position_B + 1
        return self.answers

    def _read_prompts(self) -> tuple[Tensor, Tensor]:
        """Hidden state at the end of each prompt, and the position of its first new token."""
        prompts = self.prompts
        config = self.model.config
        positions = [
            mrope_positions(prompt.input_ids, prompt.grid_thw, config, prompt.seconds_per_grid) for prompt in prompts
        ]
        cu_seqlens = tuple(itertools.accumulate((len(prompt.input_ids) for prompt in prompts), initial=0))
        batch = PackedBatch(
            input_ids_T=torch.tensor([token for prompt in prompts for token in prompt.input_ids]),
            position_ids_3T=torch.cat(positions, dim=1),
            targets_T=torch.full((cu_seqlens[-1],), -100),
            cu_seqlens=cu_seqlens,
            pixel_values_PD=torch.cat([prompt.pixel_values_PD for prompt in prompts]),
            grid_thw=tuple(grid for prompt in prompts for grid in prompt.grid_thw),
            rows=tuple(range(len(prompts))),
        ).to(self.device)
        self.cache.begin_prompts(cu_seqlens)
        hidden_TH = self.model(batch, cache=self.cache)
        ends_B = torch.tensor([end - 1 for end in cu_seqlens[1:]]).to(self.device)
        next_B = torch.stack([position.max() + 1 for position in positions]).to(self.device)
        return hidden_TH[ends_B], next_B

    def _read_tokens(self, token_B: Tensor, position_B: Tensor) -> Tensor:
        """Hidden state after one more token per sequence."""
        count = len(token_B)
        batch = PackedBatch(
            input_ids_T=token_B,
            position_ids_3T=position_B.expand(3, count),
            targets_T=token_B,
            cu_seqlens=tuple(range(count + 1)),
            pixel_values_PD=self.prompts[0].pixel_values_PD[:0].to(self.device),
            grid_thw=(),
            rows=(),
        )
        self.cache.begin_token()
        return self.model(batch, cache=self.cache)

    def _choose(self, logits_BV: Tensor) -> Tensor:
        if self.decoding.temperature == 0:
            return logits_BV.argmax(dim=-1)
        # Drawn on the host, so that a seed gives the same answers on every device.
        probability_BV = torch.softmax(logits_BV.float().cpu() / self.decoding.temperature, dim=-1)
        return sample_top_p(probability_BV, self.decoding.top_p, self.generator).to(self.device)

    def _record(self, tokens: list[int]) -> None:
        for row, (prompt, token) in enumerate(zip(self.growing, tokens, strict=True)):
            if prompt < 0:
                continue
            if token in self.decoding.eos_token_ids:
                self.growing[row] = -1
            else:
                self.answers[prompt].append(token)

    def _drop_ended(self, token_B: Tensor, position_B: Tensor) -> tuple[Tensor, Tensor]:
        """Shrink the batch once half of it has ended; moving the cache more often costs more than it saves."""
        rows = [row for row, prompt in enumerate(self.growing) if prompt >= 0]
        if 2 * len(rows) > len(self.growing):
            return token_B, position_B
        self.growing = [self.growing[row] for row in rows]
        rows_B = torch.tensor(rows).to(self.device)
        self.cache.keep(rows_B)
        return token_B[rows_B], position_B[rows_B]


def sample_top_p(probability_BV: Tensor, top_p: float, generator: torch.Generator | None = None) -> Tensor:
    """Draw a token [B] per row from the likeliest tokens that together have at least `top_p`."""
    if top_p >= 1:
        return torch.multinomial(probability_BV, 1, generator=generator).squeeze(1)
    sorted_BV, token_BV = probability_BV.sort(dim=-1, descending=True)
    before_BV = sorted_BV.cumsum(dim=-1) - sorted_BV
    place_B1 = torch.multinomial(sorted_BV.masked_fill(before_BV >= top_p, 0), 1, generator=generator)
    return token_BV.gather(1, place_B1).squeeze(1)
