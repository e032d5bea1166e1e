"""Going on from a checkpoint."""

from __future__ import annotations

import pytest
import torch

from core.errors import UnknownWeights
from core.training.resume import load_weights


class TestLoadWeights:
    def test_lists_what_is_missing_left_over_and_misshapen(self) -> None:
        model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        weights = [("0.weight", torch.zeros(2, 3)), ("1.weight", torch.zeros(1, 3)), ("extra", torch.zeros(1))]
        with pytest.raises(UnknownWeights) as caught:
            load_weights(model, weights)
        assert "2 missing: 0.bias, 1.bias" in caught.value.message
        assert "1 not of this model: extra" in caught.value.message
        assert "0.weight [2, 3] instead of [3, 2]" in caught.value.message
