"""Properties of the plan: what is trained does not depend on how it is split."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.data.plan import StepPlan, check_budget, permute, plan_step, row_at
from core.errors import IncompatiblePlan, InvalidDataset

BUDGET = 64


def plan(lengths: list[int], *, step: int = 0, size: int = 4, dp: int = 1, seed: int = 7, **options: int) -> StepPlan:
    tokens = np.array(lengths, np.int64)
    return plan_step(
        tokens,
        tokens // 2 * 4,
        seed=seed,
        consumed_samples=step * size,
        global_batch_size=size,
        dp_size=dp,
        token_budget=BUDGET,
        **options,
    )


def dealt(plan: StepPlan) -> Counter[int]:
    return Counter(row for rank in plan.micro_batches for micro_batch in rank for row in micro_batch)


row_lengths = st.lists(st.integers(1, BUDGET), min_size=1, max_size=40)


class TestPermute:
    @given(size=st.integers(1, 300), key=st.integers(0, 2**64 - 1))
    def test_visits_every_index_once(self, size: int, key: int) -> None:
        assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))

    def test_is_the_same_on_every_machine(self) -> None:
        assert [row_at(position, 10, seed=42) for position in range(10)] == [4, 3, 2, 9, 7, 6, 1, 8, 5, 0]

    def test_needs_no_table_for_a_huge_set(self) -> None:
        assert 0 <= row_at(10**14 + 3, 10**13, seed=1) < 10**13

    def test_orders_of_epochs_and_seeds_differ(self) -> None:
        def epoch(number: int, seed: int) -> list[int]:
            return [row_at(number * 100 + index, 100, seed) for index in range(100)]

        orders = [epoch(0, 1), epoch(1, 1), epoch(0, 2), list(range(100))]
        assert len({tuple(order) for order in orders}) == 4

    def test_first_places_are_uniform(self) -> None:
        firsts = Counter(row_at(0, 8, seed) for seed in range(4000))
        assert all(400 < firsts[row] < 600 for row in range(8))


class TestPlanStep:
    @given(lengths=row_lengths, size=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
    @settings(max_examples=50)
    def test_trains_each_row_once_per_epoch(self, lengths: list[int], size: int, seed: int) -> None:
        rows = [row for step in range(len(lengths)) for row in plan(lengths, step=step, size=size, seed=seed).rows]
        for epoch in range(size):
            visited = rows[epoch * len(lengths) : (epoch + 1) * len(lengths)]
            assert sorted(visited) == list(range(len(lengths)))

    @given(lengths=row_lengths, size=st.integers(1, 24), step=st.integers(0, 5), dp=st.integers(1, 5))
    def test_deals_the_same_rows_for_any_number_of_ranks(
        self, lengths: list[int], size: int, step: int, dp: int
    ) -> None:
        one, many = plan(lengths, step=step, size=size), plan(lengths, step=step, size=size, dp=dp)
        assert one.rows == many.rows
        assert dealt(one) == dealt(many) == Counter(one.rows)

    @given(
        lengths=row_lengths,
        size=st.integers(1, 24),
        dp=st.integers(1, 5),
        patch_budget=st.integers(2 * BUDGET, 4 * BUDGET),
    )
    def test_no_micro_batch_exceeds_its_budgets(
        self, lengths: list[int], size: int, dp: int, patch_budget: int
    ) -> None:
        planned = plan(lengths, size=size, dp=dp, patch_budget=patch_budget)
        for rank in planned.micro_batches:
            for rows in rank:
                assert sum(lengths[row] for row in rows) <= BUDGET
                assert sum(lengths[row] // 2 * 4 for row in rows) <= patch_budget

    @given(lengths=row_lengths, size=st.integers(1, 24), dp=st.integers(1, 5), least=st.integers(1, 6))
    def test_every_rank_has_as_many_micro_batches(self, lengths: list[int], size: int, dp: int, least: int) -> None:
        planned = plan(lengths, size=size, dp=dp, min_micro_batches=least)
        assert {len(rank) for rank in planned.micro_batches} == {planned.num_micro_batches}
        assert planned.num_micro_batches >= least

    def test_any_step_is_reached_without_the_steps_before(self) -> None:
        assert plan([3] * 10, step=10**9, size=4).first_position == 4 * 10**9

    def test_global_batch_may_be_larger_than_the_data_set(self) -> None:
        assert Counter(plan([5, 6, 7], size=6).rows) == {0: 2, 1: 2, 2: 2}

    def test_ranks_are_balanced_in_cost(self) -> None:
        lengths = np.random.default_rng(0).integers(4, BUDGET // 2, 64).tolist()
        planned = plan(lengths, size=64, dp=4)
        loads = [sum(lengths[row] for rows in rank for row in rows) for rank in planned.micro_batches]
        assert max(loads) < 1.02 * sum(loads) / 4

    def test_images_count_in_the_balance(self) -> None:
        planned = plan_step(
            np.array([64, *[16] * 8]), np.array([640, *[0] * 8]),
            seed=0, consumed_samples=0, global_batch_size=9, dp_size=2, token_budget=64,
        )  # fmt: skip
        of_the_image, other = sorted(len(set(sum(rank, ()))) for rank in planned.micro_batches)
        assert (of_the_image, other) == (3, 6)  # the rank with the image's 64 + 64 gets 32 tokens more, the other 96

    def test_packs_tightly(self) -> None:
        lengths = np.random.default_rng(0).integers(4, BUDGET // 2, 64).tolist()
        planned = plan(lengths, size=64)
        assert planned.num_micro_batches <= sum(lengths) / BUDGET * 1.15

    def test_a_row_longer_than_the_budget_is_named(self) -> None:
        with pytest.raises(InvalidDataset, match="row 0 has 65 tokens, a micro-batch holds 64"):
            plan([65], size=1)

    def test_a_row_with_too_many_patches_is_named(self) -> None:
        with pytest.raises(InvalidDataset, match="row 0 has 128 patches of images and videos, a micro-batch holds 100"):
            plan([64], size=1, patch_budget=100)

    def test_an_empty_data_set_is_refused(self) -> None:
        with pytest.raises(InvalidDataset, match="no training rows"):
            plan([])


class TestCheckBudget:
    def test_names_the_longest_row_and_the_remedy(self) -> None:
        with pytest.raises(IncompatiblePlan, match="row 1 of the data set has 70 tokens") as caught:
            check_budget(np.array([3, 70]), BUDGET)
        assert "at least 70" in (caught.value.hint or "")

    def test_accepts_what_fits(self) -> None:
        check_budget(np.array([3, 64]), BUDGET)
