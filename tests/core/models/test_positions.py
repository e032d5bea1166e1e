"""M-RoPE positions against transformers' `get_rope_index`."""

from __future__ import annotations

import pytest
import torch

from core.errors import InvalidDataset
from core.models.config import Config
from core.models.positions import mrope_positions
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

    @pytest.mark.parametrize("seconds", [1.0, 0.5, 1.0027855153203342, 1.7])
    def test_videos_are_equal_to_transformers(self, seconds: float) -> None:
        """Images and videos mixed; the videos last no longer than they are wide (see the next test)."""
        sample = make_sample([3, (8, 8), 2, (4, 24, 8), 5, (4, 6, 30), (4, 6), 1], seconds=seconds)
        inputs = hf_inputs(sample)
        expected, _ = hf_model(tiny_config()).model.get_rope_index(
            *(inputs[name] for name in ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw")),
            second_per_grid_ts=inputs["second_per_grid_ts"],
        )
        config = Config.from_hf(tiny_config())
        ours = mrope_positions(sample.input_ids, sample.grid_thw, config, sample.seconds_per_grid)
        assert torch.equal(ours, expected[:, 0])

    def test_text_after_a_long_video_begins_after_its_last_moment(self) -> None:
        """Qwen's rule; transformers 5.3 and later begin at 4 + max(h, w) = 6, inside the video."""
        sample = make_sample([3, (5, 4, 4), 2], seconds=1.0)
        config = Config.from_hf(tiny_config())
        positions = mrope_positions(sample.input_ids, sample.grid_thw, config, sample.seconds_per_grid)
        video = positions[:, 4:24].reshape(3, 5, 4)
        assert video[0, :, 0].tolist() == [4, 6, 8, 10, 12]  # 2 positions per second
        assert video[1:, 0].tolist() == [[4, 4, 5, 5], [4, 5, 4, 5]]
        assert positions[:, 24:].tolist() == [[13, 14, 15]] * 3

    def test_text_counts_up_on_all_axes(self) -> None:
        positions = mrope_positions([5, 6, 7], [], Config.from_hf(tiny_config()))
        assert positions.tolist() == [[0, 1, 2]] * 3

    def test_missing_image_tokens_are_refused_with_both_counts(self) -> None:
        with pytest.raises(
            InvalidDataset, match="3 image and video tokens in the text, but its 1 images and videos need 4"
        ):
            mrope_positions([4, IMAGE, IMAGE, IMAGE, 5], [(1, 4, 4)], Config.from_hf(tiny_config()))

    def test_image_tokens_torn_apart_are_refused(self) -> None:
        with pytest.raises(InvalidDataset, match="do not stand together"):
            mrope_positions([IMAGE, IMAGE, 5, IMAGE, IMAGE], [(1, 4, 4)], Config.from_hf(tiny_config()))
