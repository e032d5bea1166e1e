"""Freezing by tower, and what the plan knows of it."""

from __future__ import annotations

import pytest

from core.models.plan import stages
from core.specs.parallel import ParallelSpec
from core.specs.training import FreezeSpec
from core.training.freeze import freeze, gradient_reaches, summary, tower_of, trains
from tests.core.training.tiny import stage_model, tiny_config, whole_model

VISION = FreezeSpec(vision_encoder=True, vision_projector=True, text_decoder=False)
PROJECTOR_ONLY = FreezeSpec(vision_encoder=True, vision_projector=False, text_decoder=True)


def layout(llm: tuple[int, ...], vit: tuple[int, ...]) -> ParallelSpec:
    return ParallelSpec(llm_pp_layers=(llm,), vit_pp_layers=(vit,))


class TestFreeze:
    def test_marks_whole_towers_and_tells_every_parameter(self) -> None:
        model = whole_model(tiny_config())
        rows = freeze(model, PROJECTOR_ONLY)
        assert [row.name for row in rows] == [name for name, _ in model.named_parameters()]
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == name.startswith("image_encoder.projector.")

    def test_the_summary_counts_elements(self) -> None:
        model = whole_model(tiny_config())
        counts = summary(freeze(model, PROJECTOR_ONLY))
        assert counts["vision_encoder"]["trained"] == counts["text_decoder"]["trained"] == 0
        total = sum(count for tower in counts.values() for count in tower.values())
        assert total == sum(parameter.numel() for parameter in model.parameters())

    def test_a_parameter_of_no_tower_is_our_own_mistake(self) -> None:
        with pytest.raises(AssertionError, match="no tower"):
            tower_of("audio.weight")


class TestPlan:
    @pytest.mark.parametrize("spec", [VISION, PROJECTOR_ONLY, FreezeSpec(vision_encoder=False)])
    def test_what_the_plan_says_trains_is_what_has_trained_parameters(self, spec: FreezeSpec) -> None:
        config = tiny_config()
        for stage in stages(config, layout((0, 0, 4), (1, 3, 0))):
            model = stage_model(config, stage)
            assert trains(stage, spec) == any(row.trained for row in freeze(model, spec))

    def test_gradients_reach_a_stage_once_something_before_it_trains(self) -> None:
        found = stages(tiny_config(), layout((0, 0, 2, 2), (2, 2, 0, 0)))
        assert gradient_reaches(found, VISION) == [False, False, False, True]
        assert gradient_reaches(found, PROJECTOR_ONLY) == [False, False, True, True]
