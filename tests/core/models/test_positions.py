"""M-RoPE positions against transformers' `get_rope_index`."""

from __future__ import annotations

import pytest
import torch

from core.errors import InvalidDataset
from core.models.positions import mrope_positions
from core.models.qwen2_5_vl.family import Config
from tests.core.models.qwen2_5_vl.reference import IMAGE, hf_inputs, hf_model, make_sample, tiny_config


class TestMropePositions:
    @pytest.mark.parametrize(
        "parts",
        [[3, (8, 8), 5], [(4, 6), 2, (18, 10), (2, 2), 7], [1, (2, 30)]],
        ids=["one image", "many", "at the end"],
    )
    def test_equal_to_transformers(self, parts: list) -> None:
        sample = make_sample(parts)
        inputs = hf_inputs(sample)
        expected, _ = hf_model(tiny_config()).model.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
        )
        ours = mrope_positions(sample.input_ids, sample.grid_thw, Config.from_hf(tiny_config()))
        assert torch.equal(ours, expected[:, 0])

    def test_text_counts_up_on_all_axes(self) -> None:
        positions = mrope_positions([5, 6, 7], [], Config.from_hf(tiny_config()))
        assert positions.tolist() == [[0, 1, 2]] * 3

    def test_missing_image_tokens_are_refused_with_both_counts(self) -> None:
        with pytest.raises(InvalidDataset, match="3 image tokens in the text, but its 1 images need 4"):
            mrope_positions([4, IMAGE, IMAGE, IMAGE, 5], [(1, 4, 4)], Config.from_hf(tiny_config()))

    def test_image_tokens_torn_apart_are_refused(self) -> None:
        with pytest.raises(InvalidDataset, match="do not stand together"):
            mrope_positions([IMAGE, IMAGE, 5, IMAGE, IMAGE], [(1, 4, 4)], Config.from_hf(tiny_config()))
