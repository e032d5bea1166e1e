"""The first step's checks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from core.data.plan import StepPlan
from core.specs.training import FreezeSpec
from core.training.checks import FirstStep, WrongParametersTrained, checksums, largest_micro_batch
from tests.core.training.tiny import Case, Rank

FROZEN = Case(frozen=FreezeSpec())


class TestFirstStep:
    def test_a_right_step_passes_and_counts(self) -> None:
        rank = Rank(FROZEN)
        before = FirstStep.before(rank.model, rank.optimizer)
        rank.step()
        num_trained, num_moved = before.check(rank.model, rank.optimizer)
        assert num_trained == num_moved > 0

    def test_a_changed_frozen_parameter_is_named(self) -> None:
        rank = Rank(FROZEN)
        before = FirstStep.before(rank.model, rank.optimizer)
        rank.step()
        name, parameter = next((n, p) for n, p in rank.model.named_parameters() if not p.requires_grad)
        with torch.no_grad():
            parameter.view(-1)[0] += 1e-3
        with pytest.raises(WrongParametersTrained, match=name):
            before.check(rank.model, rank.optimizer)

    def test_standing_still_is_an_error(self) -> None:
        rank = Rank(FROZEN)
        rank.step()  # leaves its gradients
        before = FirstStep.before(rank.model, rank.optimizer)
        with pytest.raises(WrongParametersTrained, match="moved none"):
            before.check(rank.model, rank.optimizer)


class TestChecksum:
    def test_one_bit_changes_it(self) -> None:
        tensor = torch.ones(8, dtype=torch.bfloat16)
        before = checksums([tensor])
        tensor.view(torch.int16)[3] ^= 1
        assert checksums([tensor]) != before


class TestLargestMicroBatch:
    def test_images_count(self) -> None:
        plan = StepPlan(0, (0, 1, 2), (((0, 1), (2,)),))
        lengths = np.array([10, 10, 15])
        assert largest_micro_batch([plan], lengths, np.array([0, 0, 0])) == (0, 1)
        assert largest_micro_batch([plan], lengths, np.array([0, 0, 400])) == (2,)
