"""Going on from a checkpoint, judged when the job is submitted."""

from __future__ import annotations

from typing import Any

import pytest

from core.errors import AppError, IncompatiblePlan, InvalidSpec, UnsupportedOption
from core.jobs.resuming import check_resume, checkpoint_metadata
from tests.core.training.tiny import training_spec
from tests.factories import QWEN_7B

RESUME = {"resume_from": {"artifact": "art_" + "0" * 26}}
FIRST = {**checkpoint_metadata(training_spec()), "iteration": 4, "config": QWEN_7B}
MODEL = {"config": {**QWEN_7B, "torch_dtype": "float32"}}


class TestCheckResume:
    def test_a_checkpoint_of_the_same_model_at_any_layout_goes_on(self) -> None:
        other = {**FIRST, "parallel": {"tp_size": 2, "llm_pp_layers": [[2, 2]], "vit_pp_layers": [[4, 0]]}}
        assert check_resume(training_spec(**RESUME), other, MODEL) == []

    def test_what_is_not_known_is_let_through(self) -> None:
        assert check_resume(training_spec(**RESUME), {"iteration": 4}, {}) == []

    @pytest.mark.parametrize(
        ("spec", "checkpoint", "error", "message"),
        [
            ({}, {"iteration": None}, InvalidSpec, "give it as model instead"),
            ({}, {"iteration": 6}, InvalidSpec, "at iteration 6 already, train_iters is 6"),
            ({"precision": "bf16"}, {}, IncompatiblePlan, "was trained in float32"),
            ({}, {"config": {**QWEN_7B, "vocab_size": 96}}, IncompatiblePlan, "different models"),
            ({}, {"lora": {"r": 8}}, InvalidSpec, "give it as model"),
            ({"lora": {}}, {}, UnsupportedOption, "its own attempts resume"),
        ],
    )
    def test_what_cannot_go_on_is_refused(
        self, spec: dict[str, Any], checkpoint: dict[str, Any], error: type[AppError], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            check_resume(training_spec(**RESUME, **spec), {**FIRST, **checkpoint}, MODEL)

    @pytest.mark.parametrize(("options", "checkpoint"), [({"load_optim": False}, {}), ({}, {"optimizer_state": False})])
    def test_moments_that_start_anew_are_warned_of(self, options: dict[str, Any], checkpoint: dict[str, Any]) -> None:
        spec = training_spec(**RESUME, checkpoint=options)
        (warning,) = check_resume(spec, {**FIRST, **checkpoint}, MODEL)
        assert "without optimizer state" in warning

    @pytest.mark.parametrize("name", ["load_optim", "load_rng"])
    def test_an_option_of_a_resume_without_one_is_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"checkpoint.{name} goes with resume_from only"):
            training_spec(checkpoint={name: False})
