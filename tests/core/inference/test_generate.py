"""Decoding against transformers' `generate` on the same weights."""

from __future__ import annotations

import pytest
import torch

from core.inference.generate import Decoding, Prompt, generate, plan_batches, sample_top_p
from core.models.config import Config
from tests.core.models.qwen2_5_vl.reference import (
    Sample,
    hf_inputs,
    hf_model,
    make_sample,
    tiny_config,
    whole_model,
)

SAMPLES = [
    make_sample([3, (8, 8), 5], seed=1),
    make_sample([9], seed=2),
    make_sample([(10, 4), 3, (6, 18), 2], seed=3),
    make_sample([1], seed=4),
    make_sample([4, (2, 2), 30], seed=5),
]
NEW_TOKENS = 12


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def reference():
    return hf_model(tiny_config(), seed=11)


@pytest.fixture(scope="module")
def model(reference):
    return whole_model(Config.from_hf(tiny_config()), reference)


def as_prompt(sample: Sample) -> Prompt:
    return Prompt(sample.input_ids, sample.pixel_values_PD, sample.grid_thw)


def hf_answer(reference, sample: Sample, eos: int | None) -> list[int]:
    with torch.no_grad():
        out = reference.generate(
            **hf_inputs(sample), do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=eos, pad_token_id=2
        )
    answer = out[0, len(sample.input_ids) :].tolist()
    return answer[: answer.index(eos)] if eos in answer else answer


class TestGreedy:
    def test_equals_transformers_for_prompts_of_many_lengths_in_one_batch(self, reference, model) -> None:
        decoding = Decoding(NEW_TOKENS, frozenset())
        answers = generate(model, [as_prompt(sample) for sample in SAMPLES], decoding)
        assert answers == [hf_answer(reference, sample, None) for sample in SAMPLES]
        assert len({tuple(answer) for answer in answers}) == len(SAMPLES), "the prompts matter"

    def test_stops_at_the_end_token_and_leaves_it_out(self, reference, model) -> None:
        free = generate(model, [as_prompt(sample) for sample in SAMPLES], Decoding(NEW_TOKENS, frozenset()))
        eos = free[0][3]
        answers = generate(model, [as_prompt(sample) for sample in SAMPLES], Decoding(NEW_TOKENS, frozenset({eos})))
        assert answers == [hf_answer(reference, sample, eos) for sample in SAMPLES]

    def test_sequences_that_outlive_most_others_go_on_undisturbed(self, model) -> None:
        prompts = [as_prompt(sample) for sample in SAMPLES]
        free = generate(model, prompts, Decoding(NEW_TOKENS, frozenset()))
        eos = frozenset(answer[1] for answer in free[:4])
        expected = [
            answer[: next((i for i, token in enumerate(answer) if token in eos), len(answer))] for answer in free
        ]
        assert generate(model, prompts, Decoding(NEW_TOKENS, eos)) == expected

    def test_no_prompts_give_no_answers(self, model) -> None:
        assert generate(model, [], Decoding(4, frozenset())) == []

    def test_stops_when_told_to(self, model) -> None:
        answers = generate(model, [as_prompt(SAMPLES[1])], Decoding(9, frozenset()), should_stop=lambda: True)
        assert len(answers[0]) == 1


class TestSampling:
    def test_a_seed_repeats_and_another_differs(self, model) -> None:
        def draw(seed: int) -> list[list[int]]:
            generator = torch.Generator().manual_seed(seed)
            decoding = Decoding(NEW_TOKENS, frozenset(), temperature=1.5)
            return generate(model, [as_prompt(sample) for sample in SAMPLES], decoding, generator=generator)

        assert draw(1) == draw(1)
        assert draw(1) != draw(2)

    def test_tiny_top_p_is_greedy(self, model) -> None:
        prompts = [as_prompt(sample) for sample in SAMPLES]
        sampled = generate(model, prompts, Decoding(NEW_TOKENS, frozenset(), temperature=1.0, top_p=1e-6))
        assert sampled == generate(model, prompts, Decoding(NEW_TOKENS, frozenset()))

    def test_top_p_draws_only_from_the_smallest_sufficient_set(self) -> None:
        probability = torch.tensor([0.1, 0.5, 0.05, 0.35]).expand(2000, 4)
        drawn = sample_top_p(probability, 0.8, torch.Generator().manual_seed(0))
        assert set(drawn.tolist()) == {1, 3}
        assert (drawn == 1).float().mean().item() == pytest.approx(0.5 / 0.85, abs=0.05)


class TestPlanBatches:
    def test_every_prompt_once_and_budgets_kept(self) -> None:
        lengths = [5, 90, 6, 7, 40, 5, 41]
        patches = [0, 64, 16, 16, 0, 16, 16]
        batches = plan_batches(lengths, patches, max_new_tokens=10, token_budget=110, patch_budget=40)
        assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
        for batch in batches:
            slots = len(batch) * (max(lengths[i] for i in batch) + 10)
            assert len(batch) == 1 or slots <= 110
            assert len(batch) == 1 or sum(patches[i] for i in batch) <= 40
        assert len(batches) < len(lengths)
