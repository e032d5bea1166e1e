"""A training on the simulated NPU: no step waits for the device before its end, and none asks of it what an NPU cannot do.

Simulated: see `tests.core.device.simulated`. Fused kernels are called by `core.device.npu`, and stood in for.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from core.data.loader import LoadedStep
from core.models.layers.recompute import Recompute, RecomputePolicy
from core.specs.training import FreezeSpec
from tests.core.device.simulated import move, simulated_npu, speak
from tests.core.training.tiny import Case, Notes, Rank, make_trainer, steps, training_spec
from tests.distributed import run

FULL, SELECTIVE = RecomputePolicy("full", "uniform", 2), RecomputePolicy("selective")
CASES = {
    "all is trained": Case(),
    "the vision tower is frozen": Case(frozen=FreezeSpec()),
    "bf16": Case(dtype=torch.bfloat16),
    "tied embeddings": Case(tied=True),
    "LoRA": Case(
        frozen=FreezeSpec(vision_encoder=False), lora=("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    ),
    "full recompute": Case(recompute=Recompute(FULL, FULL)),
    "selective recompute": Case(recompute=Recompute(SELECTIVE, SELECTIVE)),
    "samples weigh alike": Case(loss_reduction="sample"),
}
ON_TWO = {
    "tensor parallel": Case(tp=2),
    "pipeline": Case(llm=(2, 2), vit=(4, 0)),
    "data parallel": Case(micro_batches=(((0,),), ((1,),))),
}
ALONE: dict[str, Any] = {"tp": 1, "llm": (4,), "vit": (4,), "micro_batches": (((0,),),)}
SPEC = training_spec(train_iters=3, optimizer={"lr": 1e-2, "lr_warmup_fraction": 0, "adam_eps": 1e-2})
AT_THE_END = Counter({"copy from the device in take": 1, "copy from the device in _squared_norm": 1})
"""Loss and gradient norm, of which the host decides whether to take the step."""


def losses(rank: Rank, folder: Path, waits: Counter[str] | None = None) -> tuple[list[float], list[Counter[str]]]:
    """The loss of each step, and what it waited for."""
    spec = SPEC.model_copy(update={"loss_reduction": rank.case.loss_reduction})
    notes, before = Notes(), list[Counter[str]]()
    trainer = make_trainer(rank, spec, folder, notes)

    def watched() -> Iterator[LoadedStep]:
        for step in steps(trainer, rank.config):
            before.append(Counter(waits))
            yield step

    trainer.train(watched())
    waited = [after - first for first, after in itertools.pairwise(before)]
    return [notes.metrics[step]["loss"] for step in sorted(notes.metrics)], waited


def on_ranks(number: int, case: Case, folder: str) -> tuple[list[float], list[Counter[str]]]:
    """The same on one of several ranks, whose tensors travel by gloo."""
    with simulated_npu() as (accelerator, device):
        rank = Rank(case, SPEC.optimizer, accelerator=accelerator, move=move)
        if rank.mesh.pp_group is not None:
            speak(rank.mesh.pp_group)
        return losses(rank, Path(folder), device.waits)


class TestStep:
    @pytest.mark.parametrize("name", CASES)
    def test_waits_for_the_device_at_its_end_alone_and_learns_as_on_a_cpu(self, name: str, tmp_path: Path) -> None:
        case = CASES[name]
        expected, _ = losses(Rank(case, SPEC.optimizer), tmp_path / "cpu")
        with simulated_npu() as (accelerator, device):
            rank = Rank(case, SPEC.optimizer, accelerator=accelerator, move=move)
            found, waited = losses(rank, tmp_path / "npu", device.waits)
        assert waited[1] == AT_THE_END
        assert (
            waited[0].pop("copy from the device in _values") <= 5
        )  # whether frozen weights stayed and trained ones moved
        assert waited[0] == AT_THE_END
        tolerance = 2e-2 if case.dtype == torch.bfloat16 else 1e-4
        assert found == pytest.approx(expected, rel=tolerance)

    @pytest.mark.parametrize("name", ON_TWO)
    def test_ranks_wait_once_more_for_what_they_tell_each_other(self, name: str, tmp_path: Path) -> None:
        case = ON_TWO[name]
        expected, _ = losses(Rank(replace(case, **ALONE), SPEC.optimizer), tmp_path / "cpu")
        for found, waited in run(on_ranks, 2, case, str(tmp_path / "npu")):
            assert waited[1] <= AT_THE_END + Counter({"copy from the device in all_reduce_rows": 1})
            assert found == pytest.approx(expected, rel=1e-4)
