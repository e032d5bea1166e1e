"""Predicted memory: what must grow, shrink or stay when a setting changes. `tests/bench/test_memory.py` compares it with measurements."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest

from core.models.memory import LayerRecompute, Workload, activation_bytes, in_flight, stage_parameters, training_memory
from core.models.plan import stages, whole
from core.specs.parallel import ParallelSpec
from tests.core.training.tiny import tiny_config, whole_model

CONFIG = tiny_config()
WORK = Workload(num_tokens=4096, num_patches=1024)
FULL = LayerRecompute("full")


def activations(work: Workload = WORK, *, frozen: tuple[str, ...] = (), **more: Any) -> int:
    return activation_bytes(
        CONFIG, whole(CONFIG), work, frozen=set(frozen), precision=more.pop("precision", "fp32"), **more
    )


class TestWeights:
    def test_parameters_are_those_of_the_model(self) -> None:
        counted = sum(stage_parameters(CONFIG, whole(CONFIG)).values())
        assert counted == sum(parameter.numel() for parameter in whole_model(CONFIG).parameters())

    def test_a_frozen_tower_has_weights_and_nothing_else(self) -> None:
        held = training_memory(CONFIG, whole(CONFIG), frozen={"text_decoder"}, precision="bf16")
        trained = sum(
            count for name, count in stage_parameters(CONFIG, whole(CONFIG)).items() if name != "text_decoder"
        )
        assert (held["gradients_bytes"], held["optimizer_bytes"]) == (4 * trained, 12 * trained)

    @pytest.mark.parametrize(("precision", "per_parameter"), [("bf16", 12), ("fp32", 8)])
    def test_data_parallel_ranks_share_the_optimizers_state_and_nothing_else(
        self, precision: Literal["bf16", "fp32"], per_parameter: int
    ) -> None:
        one, four = (
            training_memory(CONFIG, whole(CONFIG), frozen=set(), precision=precision, dp_size=size) for size in (1, 4)
        )
        assert one["optimizer_bytes"] == per_parameter * one["trained_parameters"]
        assert four == {**one, "optimizer_bytes": math.ceil(one["optimizer_bytes"] / 4)}


class TestActivations:
    def test_plain_torch_keeps_more_in_bfloat16_than_fused_kernels(self) -> None:
        plain = Workload(num_tokens=4096, num_patches=1024, has_fused_kernels=False)
        assert activations(plain, precision="bf16") > activations(precision="bf16")

    def test_recompute_keeps_less(self) -> None:
        full = activations(text_recompute=FULL, vision_recompute=FULL)
        assert full < activations(text_recompute=FULL) < activations()

    def test_block_lies_between_none_and_uniform(self) -> None:
        block = activations(text_recompute=LayerRecompute("full", "block", 2))
        assert activations(text_recompute=FULL) < block < activations()

    def test_freezing_vision_keeps_less(self) -> None:
        assert (
            activations(frozen=("vision_encoder", "vision_projector"))
            < activations(frozen=("vision_encoder",))
            < activations()
        )

    def test_they_grow_with_tokens_and_micro_batches_in_flight(self) -> None:
        assert activations(Workload(8192, 1024)) > activations() < activations(Workload(4096, 1024, num_in_flight=2))

    def test_half_the_precision_is_less_than_all_of_it(self) -> None:
        assert activations(precision="bf16") < activations()

    def test_tensor_parallel_ranks_hold_less_each(self) -> None:
        assert activations(tp_size=2) < activations()

    def test_a_stage_without_vision_needs_nothing_for_patches(self) -> None:
        layout = ParallelSpec(llm_pp_layers=((2, 2),), vit_pp_layers=((4, 0),))
        last = stages(CONFIG, layout)[1]
        few, many = (
            activation_bytes(CONFIG, last, Workload(64, patches), frozen=set(), precision="fp32")
            for patches in (0, 4096)
        )
        assert few == many


class TestInFlight:
    @pytest.mark.parametrize(("rank", "expected"), [(0, 4), (1, 3), (3, 1)])
    def test_an_earlier_rank_has_more(self, rank: int, expected: int) -> None:
        assert in_flight(rank, 4) == expected
