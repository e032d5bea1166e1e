"""The loop: it learns, stops, skips, and goes on exactly where it was."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from core.data.loader import LoadedStep
from core.errors import AppError, NonFiniteLoss
from core.models.batch import PackedBatch
from core.models.flops import model_flops
from core.specs.events import TRAINING_METRICS
from core.training import checkpoint
from core.training.checks import OutOfMemory
from core.training.trainer import MAX_SKIPPED, Outcome, Trainer
from tests.core.training.tiny import (
    Case,
    Notes,
    Rank,
    Trained,
    make_trainer,
    pack,
    samples,
    steps,
    tiny_config,
    train,
    training_spec,
)
from tests.distributed import run

ONE = Case()
PP2_DP2 = Case(llm=(2, 2), vit=(4, 0), micro_batches=(((0,),), ((1,),)), tied=True)
PP2_DP2_SPEC: dict[str, Any] = {
    "parallel": {"llm_pp_layers": [[2, 2]], "vit_pp_layers": [[4, 0]], "nproc_per_node": 4},
}


def equal(first: Trained, second: Trained) -> bool:
    return all(torch.equal(tensor, second.weights[name]) for name, tensor in first.weights.items())


class TestLearning:
    def test_a_tiny_training_lowers_the_loss(self, tmp_path: Path) -> None:
        trained = train(0, ONE, training_spec(train_iters=40), tmp_path)
        losses = [values["loss"] for values in trained.metrics.values()]
        assert losses[0] > 4
        assert losses[-1] < losses[0] / 2

    def test_metrics_have_the_names_of_the_contract(self, tmp_path: Path) -> None:
        trained = train(0, ONE, training_spec(train_iters=2), tmp_path)
        assert list(trained.metrics) == [1, 2]
        assert list(trained.metrics[1]) == [name for name in TRAINING_METRICS if name != "mfu"]
        assert trained.metrics[2]["consumed_samples"] == 8

    def test_where_a_devices_peak_is_known_the_model_operations_are_a_share_of_it(self, tmp_path: Path) -> None:
        rank, notes = Rank(ONE), Notes()
        trainer = make_trainer(rank, training_spec(train_iters=1), tmp_path, notes)
        trainer.peak_flops = 1e9
        step = next(steps(trainer, rank.config))
        trainer.train(iter([step]))
        values = notes.metrics[1]
        assert values["mfu"] == pytest.approx(values["model_flops_per_second"] / 1e9)
        flops = values["model_flops_per_second"] * values["step_time_ms"] / 1000
        assert flops == pytest.approx(model_flops(rank.config).of(step.work))

    def test_the_log_interval_averages_the_loss(self, tmp_path: Path) -> None:
        each = train(0, ONE, training_spec(train_iters=4), tmp_path / "each")
        pairs = train(0, ONE, training_spec(train_iters=4, log_interval=2), tmp_path / "pairs")
        assert list(pairs.metrics) == [2, 4]
        assert pairs.metrics[2]["loss"] == pytest.approx((each.metrics[1]["loss"] + each.metrics[2]["loss"]) / 2)


class TestWaiting:
    def test_time_waited_for_data_is_told(self, tmp_path: Path) -> None:
        rank, notes = Rank(ONE), Notes()
        trainer = make_trainer(rank, training_spec(train_iters=1), tmp_path, notes)

        def late() -> Iterator[LoadedStep]:
            time.sleep(0.2)
            yield next(steps(trainer, rank.config))

        trainer.train(late())
        told = notes.metrics[1]
        assert told["host_wait_fraction"] * told["step_time_ms"] >= 200


class TestResume:
    @pytest.mark.parametrize("stop_after", [1, 4])
    def test_stopping_and_going_on_equals_never_stopping_bit_for_bit(self, tmp_path: Path, stop_after: int) -> None:
        spec = training_spec(optimizer={"lr": 1e-2, "lr_warmup_fraction": 0.5, "weight_decay": 0.1})
        straight = train(0, ONE, spec, tmp_path / "straight")
        first = train(0, ONE, spec, tmp_path / "broken", stop_after=stop_after)
        assert first.outcome is Outcome.STOPPED
        assert list(first.metrics) == list(range(1, stop_after + 1))
        second = train(0, ONE, spec, tmp_path / "broken")
        assert second.outcome is Outcome.FINISHED
        assert list(second.metrics) == list(range(stop_after + 1, 7))
        assert equal(second, straight)
        assert second.metrics[6]["loss"] == straight.metrics[6]["loss"]

    def test_it_holds_on_a_pipeline_with_data_parallel_and_tied_embeddings(self, tmp_path: Path) -> None:
        straight = self.assert_exact(PP2_DP2, PP2_DP2_SPEC, tmp_path)
        assert equal(straight[0], straight[1])  # replicas

    def test_it_holds_on_a_pipeline_of_slices(self, tmp_path: Path) -> None:
        parallel = {"parallel": {**PP2_DP2_SPEC["parallel"], "tp_size": 2}}
        self.assert_exact(replace(PP2_DP2, tp=2, micro_batches=(((0,),),)), parallel, tmp_path)

    def test_it_holds_with_virtual_chunks(self, tmp_path: Path) -> None:
        case = Case(vpp=2, llm=(0, 2, 1, 1), vit=(4, 0, 0, 0), micro_batches=(((0,),),), tied=True)
        layout = {"llm_pp_layers": [[0, 2], [1, 1]], "vit_pp_layers": [[4, 0], [0, 0]], "nproc_per_node": 2}
        self.assert_exact(case, {"parallel": layout}, tmp_path)

    def assert_exact(self, case: Case, parallel: dict[str, Any], folder: Path) -> list[Trained]:
        spec = training_spec(**parallel, train_iters=4, checkpoint={"save_interval": 2})
        results = run(interrupted, case.world_size, case, spec, folder, 3)
        assert all(equal(resumed, straight) for straight, resumed in results)
        return [straight for straight, _ in results]

    def test_without_optimizer_state_only_weights_and_position_go_on(self, tmp_path: Path) -> None:
        spec = training_spec(checkpoint={"save_optim": False}, train_iters=4)
        train(0, ONE, spec, tmp_path, stop_after=2)
        assert not list(tmp_path.rglob("temper_optim_*.pt"))
        assert list(train(0, ONE, spec, tmp_path).metrics) == [3, 4]


class TestRehearsal:
    def test_it_leaves_nothing_behind(self, tmp_path: Path) -> None:
        plain = train(0, ONE, training_spec(train_iters=2), tmp_path / "plain")
        rank, notes = Rank(ONE, training_spec().optimizer), Notes()
        trainer = make_trainer(rank, training_spec(train_iters=2), tmp_path / "rehearsed", notes)
        trainer.rehearse(pack(samples(8), rank.config))
        trainer.train(steps(trainer, rank.config))
        assert notes.metrics[2]["loss"] == plain.metrics[2]["loss"]
        assert all(torch.equal(tensor, plain.weights[name]) for name, tensor in rank.model.state_dict().items())

    def test_what_does_not_fit_is_named(self, tmp_path: Path) -> None:
        trainer, batch = self.without_memory(tmp_path)
        with pytest.raises(
            OutOfMemory, match=rf"^the largest micro-batch \({batch.num_tokens} tokens, 16 patches\) does not fit"
        ):
            trainer.rehearse(batch)

    def test_so_it_is_in_a_later_step(self, tmp_path: Path) -> None:
        trainer, _ = self.without_memory(tmp_path)
        with pytest.raises(OutOfMemory, match=r"^a micro-batch of iteration 1, rows \d+, \d+, \d+, \d+, does not fit"):
            trainer.train(steps(trainer, tiny_config()))

    def without_memory(self, folder: Path) -> tuple[Trainer, PackedBatch]:
        """A trainer whose head asks for more memory than there is, and a batch."""
        rank = Rank(Case())
        trainer = make_trainer(rank, training_spec(), folder, Notes())
        trainer.pipeline.head = lambda hidden_TH, _: hidden_TH.new_empty(1 << 50)
        return trainer, pack(samples(2), rank.config)


class TestStop:
    def test_one_rank_that_is_asked_to_stop_stops_all_in_the_same_iteration(self, tmp_path: Path) -> None:
        spec = training_spec(**PP2_DP2_SPEC)
        results = run(stopped, 4, PP2_DP2, spec, tmp_path, 2)
        assert {trained.outcome for trained in results} == {Outcome.STOPPED}
        assert {max(trained.metrics) for trained in results} == {2}
        assert (tmp_path / "iter_0000002" / "mp_rank_00_001" / "model_optim_rng.pt").is_file()

    def test_a_stop_in_the_last_iteration_finishes(self, tmp_path: Path) -> None:
        assert train(0, ONE, training_spec(train_iters=2), tmp_path, stop_after=2).outcome is Outcome.FINISHED


def stopped(rank: int, case: Case, spec: Any, folder: Path, after: int) -> Trained:
    """Only the last rank is asked to stop."""
    return train(rank, case, spec, folder, stop_after=after if rank == case.world_size - 1 else None)


def interrupted(rank: int, case: Case, spec: Any, folder: Path, after: int) -> tuple[Trained, Trained]:
    """A training without a stop, and one that is stopped and goes on."""
    straight = train(rank, case, spec, folder / "straight")
    stopped(rank, case, spec, folder / "broken", after)
    return straight, train(rank, case, spec, folder / "broken")


class TestSaving:
    def test_a_checkpoint_that_cannot_be_written_fails_the_next_step_on_all_ranks(self, tmp_path: Path) -> None:
        results = run(train_on_a_full_disk, 2, tmp_path)
        assert [code for code, _ in results] == ["disk_full", "disk_full"]
        assert all("rank 1" in message for _, message in results)
        assert [path.name for path in tmp_path.iterdir()] == []

    def test_what_is_being_written_when_training_fails_is_completed(self, tmp_path: Path) -> None:
        rank, notes = Rank(ONE), Notes()
        trainer = make_trainer(rank, training_spec(train_iters=100), tmp_path, notes)
        trainer.save()
        rank.model.load_state_dict({name: tensor * math.nan for name, tensor in rank.model.state_dict().items()})
        with pytest.raises(NonFiniteLoss), closing(trainer.checkpoints):
            trainer.train(steps(trainer, rank.config))
        assert trainer.checkpoints.newest() == tmp_path / "iter_0000000"


def train_on_a_full_disk(rank_number: int, folder: Path) -> tuple[str, str]:
    """Rank 1 finds it full; training goes on until that is known."""
    case = Case(micro_batches=(((0,),), ((1,),)))
    parallel = {"llm_pp_layers": [[4]], "vit_pp_layers": [[4]], "nproc_per_node": 2}
    spec = training_spec(train_iters=100, parallel=parallel, checkpoint={"save_interval": 2})
    rank, notes = Rank(case), Notes()
    trainer = make_trainer(rank, spec, folder, notes)
    if rank_number == 1:

        def full(*_: Any) -> str:
            raise OSError(28, os.strerror(28))

        checkpoint.write_pt = full  # this process ends with the test
    save = trainer.checkpoints.save

    def save_and_let_it_fail(*args: Any, **options: Any) -> None:
        save(*args, **options)
        writing = trainer.checkpoints._writing
        assert writing is not None
        writing.wait_for_own_part()

    trainer.checkpoints.save = save_and_let_it_fail  # type: ignore[method-assign]
    with pytest.raises(AppError) as caught:
        trainer.train(steps(trainer, rank.config))
    assert trainer.facts.position.iteration == 2
    return caught.value.code, caught.value.message


class TestPadding:
    def test_a_micro_batch_of_padding_alone_is_not_computed(self, tmp_path: Path) -> None:
        rank = Rank(ONE)
        trainer = make_trainer(rank, training_spec(train_iters=1), tmp_path, Notes())
        step = next(steps(trainer, rank.config))
        (own,) = step.plan.micro_batches
        padding = replace(
            pack(samples(1), rank.config), rows=(-1,)
        )  # as the loader fills up an empty one to static shapes
        step = replace(
            step,
            plan=replace(step.plan, micro_batches=((*own[:1], (), *own[1:]),)),
            micro_batches=iter([*islice(step.micro_batches, 1), padding, *step.micro_batches]),
        )
        _, batches, _ = trainer._load(iter([step]))
        assert [batch.rows for batch in batches] == list(own)


class TestNotFinite:
    def test_a_bad_step_is_skipped_and_names_its_rows(self, tmp_path: Path) -> None:
        rank, notes = Rank(ONE), Notes()
        trainer = make_trainer(rank, training_spec(train_iters=3), tmp_path, notes)
        before = {name: tensor.clone() for name, tensor in rank.model.state_dict().items()}
        bad = Poison(rank, at_step=0)
        trainer.head = rank.pipeline.head = bad  # type: ignore[assignment]
        loaded = steps(trainer, rank.config)
        trainer.spec = training_spec(train_iters=1)
        trainer.train(loaded)
        assert all(torch.equal(tensor, before[name]) for name, tensor in rank.model.state_dict().items())
        assert notes.warnings[0][0] == "skipped_step"
        assert f"in rows {', '.join(map(str, bad.rows))}" in notes.warnings[0][1]
        assert math.isnan(notes.metrics[1]["loss"])
        assert notes.metrics[1]["skipped_iterations"] == 1
        trainer.spec = training_spec(train_iters=3)
        trainer.train(loaded)
        assert math.isfinite(notes.metrics[2]["loss"])
        assert notes.metrics[2]["skipped_iterations"] == 0
        assert not all(torch.equal(tensor, before[name]) for name, tensor in rank.model.state_dict().items())

    def test_too_many_in_a_row_fail_the_job(self, tmp_path: Path) -> None:
        rank, notes = Rank(ONE), Notes()
        trainer = make_trainer(rank, training_spec(train_iters=100), tmp_path, notes)
        rank.model.load_state_dict({name: tensor * math.nan for name, tensor in rank.model.state_dict().items()})
        with pytest.raises(NonFiniteLoss, match=f"{MAX_SKIPPED} steps in a row"):
            trainer.train(steps(trainer, rank.config))

    def test_a_gradient_alone_that_is_not_finite_names_the_rank(self, tmp_path: Path) -> None:
        rank, notes = Rank(ONE), Notes()
        trainer = make_trainer(rank, training_spec(train_iters=1), tmp_path, notes)
        reduce = rank.optimizer.reduce_gradients

        def overflow() -> None:
            reduce()
            rank.optimizer.buffer.gradients[0] = math.inf

        rank.optimizer.reduce_gradients = overflow  # type: ignore[method-assign]
        trainer.train(steps(trainer, rank.config))
        assert "the gradient is not finite on rank 0" in notes.warnings[0][1]

    def test_every_rank_skips_when_one_has_a_bad_loss(self, tmp_path: Path) -> None:
        for warnings in run(poisoned, 2, tmp_path):
            assert "on rank 1 in rows" in warnings[0][1]


class Poison:
    """The head, with a NaN in the first micro-batch of one step."""

    def __init__(self, rank: Rank, *, at_step: int) -> None:
        self.head, self.at_step, self.step, self.rows = rank.head, at_step, 0, ()

    def __call__(self, hidden_TH: torch.Tensor, batch: Any) -> torch.Tensor | None:
        gradient = self.head(hidden_TH, batch)
        if self.step == self.at_step and len(self.head.losses) == 1:
            self.head.losses[0] = self.head.losses[0] * math.nan
            self.rows = batch.rows
        return gradient

    def take(self) -> list[float]:
        self.step += 1
        return self.head.take()


def poisoned(rank_number: int, folder: Path) -> list[tuple[str, str]]:
    case = Case(micro_batches=(((0,),), ((1,),)))
    spec = training_spec(train_iters=1, parallel={"llm_pp_layers": [[4]], "vit_pp_layers": [[4]], "nproc_per_node": 2})
    rank, notes = Rank(case), Notes()
    trainer = make_trainer(rank, spec, folder, notes)
    if rank_number == 1:
        trainer.head = rank.pipeline.head = Poison(rank, at_step=0)  # type: ignore[assignment]
    trainer.train(steps(trainer, rank.config))
    return notes.warnings
