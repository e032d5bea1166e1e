"""A training that hangs ends with the culprit named: two ranks under torchrun, one of which waits for an image that never comes."""

from __future__ import annotations

import itertools
import json
import os
import re
from pathlib import Path

import pytest

from core.data.dataset import TokenisedDataset
from core.data.plan import StepPlan, plan_step
from core.specs.training import TrainingSpec
from core.training.checks import largest_micro_batch
from tests.core.runners.test_training import WHOLE, Bench, training_spec
from tests.tiny import tiny_model

LIMIT_S = 10
"""A step takes milliseconds: even on a machine that is busy with much else, ten seconds without progress are a stall."""


def step_plans(dataset: TokenisedDataset, spec: TrainingSpec) -> list[StepPlan]:
    return [
        plan_step(
            dataset.lengths, dataset.patches, seed=spec.seed, consumed_samples=index * spec.global_batch_size,
            global_batch_size=spec.global_batch_size, dp_size=2, token_budget=spec.micro_batch_size * spec.seq_length,
        )
        for index in range(3)
    ]  # fmt: skip


def with_a_late_image(dataset: TokenisedDataset) -> tuple[TrainingSpec, int, int]:
    """A spec by whose seed rank 1 needs some image in step 2 or 3, which neither rank 0 nor the largest micro-batch asks for before."""
    for seed in itertools.count():
        parallel = {**WHOLE, "nproc_per_node": 2}
        spec = training_spec(parallel, train_iters=3, global_batch_size=2, micro_batch_size=1, seed=seed)
        plans = step_plans(dataset, spec)
        seen = set(largest_micro_batch(plans, dataset.lengths, dataset.patches))
        for step, plan in enumerate(plans):
            first, second = (set(itertools.chain(*rank)) for rank in plan.micro_batches)
            late = [row for row in second if dataset.patches[row] and row not in seen | first]
            if step > 0 and late:
                return spec, step + 1, late[0]
            seen |= first | second
    raise AssertionError


@pytest.mark.slow
def test_the_job_fails_and_names_rank_step_phase_and_rows_with_all_stacks_in_the_log(tmp_path: Path) -> None:
    bench = Bench(tmp_path, tiny_model(tmp_path / "hf"))
    dataset = TokenisedDataset(bench.dataset.path)
    spec, step, row = with_a_late_image(dataset)
    image = dataset.row(row).media[0].paths[0]
    os.mkfifo(image.with_suffix(".pipe"))

    module = "tests.core.runners.hanging"
    done = bench.torchrun(spec, 2, module=module, HANGS=image.name, TEMPER_STALL_LIMIT_S=str(LIMIT_S))
    log = done.stdout + done.stderr
    assert done.returncode != 0, log
    (error,) = bench.events("error")
    assert error["code"] == "stalled"
    assert f"rank 1 is furthest behind, in step {step}, data, rows {row}" in error["message"]
    assert len(bench.losses()) == step - 1
    assert set(bench.outputs()) == {"tensorboard"}
    for rank in (0, 1):
        assert f"the stacks of rank {rank}" in log
        beat = json.loads((bench.store.attempt_dir("job_a", 1) / f"heartbeats/rank_{rank}.json").read_text())
        assert beat["has_told"]
    assert len(re.findall(r"trainer\.py\", line \d+ in train\b", log)) == 2  # both main threads
    assert "decode_or_hang" in log  # where rank 1 does
