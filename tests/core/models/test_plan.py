"""Stages and tensor-parallel limits, and what the refusals say."""

import math
from dataclasses import replace

import pytest

from core.errors import IncompatiblePlan
from core.models.layout import stage_layout
from core.models.mapping import at_layer
from core.models.plan import legal_tp, stages, whole
from core.models.qwen2_5_vl.family import MAPPING, PLAN, SIZES
from core.specs.parallel import ParallelSpec


def split(llm: list[list[int]], vit: list[list[int]], tp: int = 1) -> ParallelSpec:
    return ParallelSpec.model_validate({"tp_size": tp, "llm_pp_layers": llm, "vit_pp_layers": vit})


class RawSplit:
    """A layout that no spec would let through."""

    def __init__(self, llm: list[list[int]], vit: list[list[int]], tp: int = 1) -> None:
        self.tp_size = tp
        self.llm_pp_layers = tuple(map(tuple, llm))
        self.vit_pp_layers = tuple(map(tuple, vit))


class TestCut:
    def test_sizes_are_those_of_the_rank_file(self) -> None:
        config, dims = SIZES["7B"], SIZES["7B"].dims()
        layouts = stage_layout(config, whole(config), tp_size=4, tp_rank=3)
        for rule in MAPPING:
            shape = rule.mm_shape(dims)
            size = math.prod(layouts[at_layer(rule.mm, 0)].shape)
            assert PLAN[rule.mm].cut(shape, 4, 3).size(shape) == size, rule.mm


class TestLegalTp:
    @pytest.mark.parametrize(
        ("size", "legal"), [("3B", [1, 2]), ("7B", [1, 2, 4]), ("32B", [1, 2, 4, 8]), ("72B", [1, 2, 4, 8])]
    )
    def test_published_sizes(self, size: str, legal: list[int]) -> None:
        assert legal_tp(SIZES[size]) == legal

    def test_every_legal_tp_makes_stages(self) -> None:
        for tp in legal_tp(SIZES["72B"]):
            assert stages(SIZES["72B"], split([[80]], [[32]], tp))

    def test_a_vision_ffn_that_does_not_divide_limits_tp(self) -> None:
        config = SIZES["72B"]
        narrow = replace(config, vision=replace(config.vision, intermediate_size=3420))
        assert legal_tp(narrow) == [1, 2, 4]

    def test_an_odd_vocabulary_limits_tp(self) -> None:
        config = SIZES["7B"]
        assert legal_tp(replace(config, text=replace(config.text, vocab_size=1001))) == [1]


class TestStages:
    def test_two_ranks(self) -> None:
        first, second = stages(SIZES["7B"], split([[12, 16]], [[32, 0]]))
        assert (first.vit_layers, first.llm_layers) == (range(32), range(12))
        assert first.has_patch_embed
        assert first.has_projector
        assert first.has_embedding
        assert not first.has_output
        assert (list(second.vit_layers), second.llm_layers) == ([], range(12, 28))
        assert second.has_output
        assert not (second.has_patch_embed)
        assert not (second.has_projector)
        assert not (second.has_embedding)

    def test_chunks_are_major_over_ranks(self) -> None:
        result = stages(SIZES["7B"], split([[0, 4], [12, 12]], [[16, 16], [0, 0]]))
        assert [list(stage.llm_layers)[:1] for stage in result] == [[], [0], [4], [16]]
        assert [stage.index for stage in result] == [0, 1, 2, 3]

    def test_a_vision_tower_over_two_stages_ends_with_the_projector(self) -> None:
        first, second = stages(SIZES["7B"], split([[0, 28]], [[20, 12]]))
        assert first.has_patch_embed
        assert not first.has_projector
        assert not first.has_embedding
        assert second.has_projector
        assert second.has_embedding
        assert second.has_output
        assert not second.has_patch_embed

    def test_one_stage_is_the_whole(self) -> None:
        assert stages(SIZES["3B"], split([[36]], [[32]])) == (whole(SIZES["3B"]),)


class TestRefusals:
    @pytest.mark.parametrize(
        ("llm", "vit", "tp", "message"),
        [
            ([[28]], [[32]], 8, r"tp_size=8 does not divide num_key_value_heads=4 of qwen2_5_vl; use one of 1, 2, 4"),
            ([[28]], [[32]], 3, r"tp_size=3 does not divide num_key_value_heads=4 .* use one of 1, 2, 4"),
            ([[28]], [[32]], 0, r"tp_size=0 is not positive"),
            (
                [[12, 15]],
                [[32, 0]],
                1,
                r"llm_pp_layers=\[\[12, 15\]\] adds up to 27 layers, but num_hidden_layers .* is 28",
            ),
            (
                [[12, 16]],
                [[30, 0]],
                1,
                r"vit_pp_layers=\[\[30, 0\]\] adds up to 30 layers, but vision_config.depth .* is 32",
            ),
            ([[12, 16]], [[31, 1]], 1, r"stage 1 has 1 vision layers after stage 0 .* vision layers must come before"),
            ([[14, 0, 14]], [[32, 0, 0]], 1, r"stage 1 has no layer"),
            ([[0, 28]], [[0, 32]], 1, r"stage 0 has no layer"),
            ([[12, 16]], [[32]], 1, r"have different lengths"),
            ([[12, 16], [0]], [[32, 0], [0]], 1, r"llm_pp_layers|vit_pp_layers.*is not a table"),
            ([[30, -2]], [[32, 0]], 1, r"negative"),
            ([[14], [14]], [[32], [0]], 1, r"virtual chunks but one pipeline rank"),
        ],
    )
    def test_numbers_and_remedy_are_named(
        self, llm: list[list[int]], vit: list[list[int]], tp: int, message: str
    ) -> None:
        with pytest.raises(IncompatiblePlan, match=message):
            stages(SIZES["7B"], RawSplit(llm, vit, tp))
