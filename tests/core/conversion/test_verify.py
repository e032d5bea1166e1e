"""The proofs see what they must see."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from core.conversion.hf import HFWeights
from core.conversion.verify import check_complete, check_consumed, differing
from core.errors import UnknownWeights
from core.models.hf_folder import HFFolder, inspect_hf_folder
from core.models.layout import Block, TensorLayout, hf_shapes, rank_layouts
from tests.core.conversion.conftest import SHAPE, VIRTUAL, hf_weights
from tests.tiny import tiny_model, write_safetensors

SHAPES = {"a": (4, 6)}


class TestConsumed:
    def test_a_real_layout_uses_everything(self, source: HFFolder) -> None:
        ranks = list(rank_layouts(source.config, VIRTUAL))
        blocks = [b for rank in ranks for chunk in rank.chunks for layout in chunk.values() for b in layout.blocks]
        check_consumed(hf_shapes(source.config), blocks)
        some = next(block for block in blocks if block.source == "visual.blocks.0.attn.qkv.weight")
        with pytest.raises(UnknownWeights, match=r"visual\.blocks\.0\.attn\.qkv\.weight"):
            check_consumed(hf_shapes(source.config), [block for block in blocks if block is not some])

    def test_columns_and_replicas(self) -> None:
        check_consumed(SHAPES, [Block(0, 4, "a", 0, 0, 3), Block(0, 4, "a", 0, 3, 3), Block(9, 4, "a", 0, 3, 3)])

    @pytest.mark.parametrize(
        "blocks",
        [
            [],
            [Block(0, 3, "a", 0, 0, 6)],
            [Block(0, 4, "a", 0, 0, 3)],
            [Block(0, 4, "a", 0, 0, 6), Block(0, 2, "a", 2, 0, 6)],
            [Block(0, 4, "a", 0, 0, 6), Block(0, 1, "b", 0, 0, 1)],
        ],
        ids=["nothing", "a row short", "columns short", "overlap", "unknown"],
    )
    def test_gaps_and_overlaps_are_listed(self, blocks: list[Block]) -> None:
        with pytest.raises(UnknownWeights, match=r"not used exactly once: [ab]"):
            check_consumed(SHAPES, blocks)


class TestComplete:
    def test_gaps_and_overlaps_are_listed(self) -> None:
        first, second = Block(0, 2, "a", 0, 0, 6), Block(2, 2, "a", 2, 0, 6)
        check_complete({"x": TensorLayout((4, 6), (first, second))})
        for blocks in ((first,), (second,), (first, replace(second, row=1))):
            with pytest.raises(UnknownWeights, match="incomplete: x"):
                check_complete({"x": TensorLayout((4, 6), blocks)})


def test_one_changed_value_is_found(tmp_path: Path, source: HFFolder) -> None:
    other = tiny_model(tmp_path / "other", shape=SHAPE)
    weights = dict(hf_weights(source))
    weights["model.norm.weight"] = weights["model.norm.weight"] + np.eye(64, dtype=np.float32)[5] * np.float32(1e-3)
    write_safetensors(other / "model.safetensors", weights)
    found = differing(hf_shapes(source.config), HFWeights(source), HFWeights(inspect_hf_folder(other)))
    assert found == ["model.norm.weight"]
