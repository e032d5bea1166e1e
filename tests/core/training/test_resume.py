"""Going on from a checkpoint: at another layout, without optimizer state, and never with a weight too few."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core.conversion.pt import write_pt
from core.device.cpu import CpuAccelerator
from core.errors import CorruptCheckpoint, IncompatiblePlan, UnknownWeights
from core.models.config import Config
from core.models.layout import hf_shapes, stage_layout
from core.models.mapping import width
from core.models.plan import stages
from core.parallel.mesh import Mesh
from core.specs.parallel import ParallelSpec
from core.specs.training import TrainingSpec
from core.training.checkpoint import Facts
from core.training.contents import tree_of
from core.training.optimizer import OptimizerState, Piece
from core.training.resume import Origin, load_weights
from core.training.saved_optimizer import RankState, RecutState
from tests.core.training.tiny import Case, Notes, Rank, Trained, make_trainer, steps, tiny_config, train, training_spec
from tests.distributed import run

ONE_ROW: tuple[tuple[int, ...], ...] = ((0,),)
LAYOUTS: dict[str, Case] = {
    "tp2 pp2": Case(tp=2, llm=(2, 2), vit=(4, 0), micro_batches=(ONE_ROW,), tied=True),
    "tp2 dp2": Case(tp=2, micro_batches=(ONE_ROW, ONE_ROW), tied=True),
    "dp4": Case(micro_batches=(ONE_ROW,) * 4, tied=True),
    "pp2 vpp2 dp2": Case(vpp=2, llm=(0, 2, 1, 1), vit=(4, 0, 0, 0), micro_batches=(ONE_ROW, ONE_ROW), tied=True),
    "pp4": Case(llm=(0, 1, 1, 2), vit=(3, 1, 0, 0), micro_batches=(ONE_ROW,), tied=True),
}


def spec_of(case: Case, **changes: Any) -> TrainingSpec:
    parallel = {**case.layout.model_dump(), "nproc_per_node": case.world_size}
    return training_spec(parallel=parallel, train_iters=2 * len(LAYOUTS), **changes)


class TestAnotherLayout:
    def test_a_training_that_changes_its_layout_all_the_time_learns_as_one_that_never_does(
        self, tmp_path: Path
    ) -> None:
        straight = train(0, Case(tied=True), spec_of(Case(tied=True)), tmp_path / "straight")
        legs = run(wander, 4, tmp_path / "wandering")[0]
        losses = {step: values["loss"] for leg in legs for step, values in leg.metrics.items()}
        norms = {step: values["grad_norm"] for leg in legs for step, values in leg.metrics.items()}
        assert list(losses) == list(straight.metrics)
        assert losses == pytest.approx({step: values["loss"] for step, values in straight.metrics.items()}, rel=1e-5)
        assert norms == pytest.approx({step: v["grad_norm"] for step, v in straight.metrics.items()}, rel=1e-4)
        assert straight.metrics[10]["loss"] < 0.8 * straight.metrics[1]["loss"]

    def test_weights_and_state_go_there_and_back_bit_for_bit(self, tmp_path: Path) -> None:
        """Each layout's state is made from the same tensors of the whole model, cut by hand."""
        config, dice = tiny_config(), random.Random(3)
        whole = {
            kind: {name: torch.rand(shape[0], width(shape)) for name, shape in hf_shapes(config).items()}
            for kind in ("exp_avg", "exp_avg_sq", "master")
        }
        layouts = [case.layout for case in LAYOUTS.values()]
        for number, (old, new) in enumerate(zip(layouts, layouts[1:] + layouts[:1], strict=True)):
            folder = tmp_path / str(number)
            for pp_rank, tp_rank in itertools.product(range(old.pp_size), range(old.tp_size)):
                saved = {kind: cut(tensors, config, old, pp_rank, tp_rank) for kind, tensors in whole.items()}
                write_state(folder / rank_folder(old, pp_rank, tp_rank), saved, dice)
            for pp_rank, tp_rank in itertools.product(range(new.pp_size), range(new.tp_size)):
                mesh = Mesh(rank=pp_rank * new.tp_size + tp_rank, pp_size=new.pp_size, tp_size=new.tp_size)
                state = RecutState(folder, old, config, stages(config, new)[pp_rank :: new.pp_size], mesh)
                assert state.num_steps == 7
                for kind, tensors in whole.items():
                    for name, wanted in cut(tensors, config, new, pp_rank, tp_rank).items():
                        start = dice.randrange(len(wanted))
                        assert torch.equal(state.read(name, kind, 0, len(wanted)), wanted)
                        assert torch.equal(state.read(name, kind, start, len(wanted)), wanted[start:])


def wander(rank_number: int, folder: Path) -> list[Trained]:
    """Two steps at each layout, then on to the next."""
    legs = []
    for case in LAYOUTS.values():
        last = case is list(LAYOUTS.values())[-1]
        legs.append(train(rank_number, case, spec_of(case), folder, stop_after=None if last else 2))
    return legs


def rank_folder(layout: ParallelSpec, pp_rank: int, tp_rank: int) -> str:
    return f"mp_rank_{tp_rank:02d}_{pp_rank:03d}" if layout.pp_size > 1 else f"mp_rank_{tp_rank:02d}"


def cut(
    whole: dict[str, Tensor], config: Config, layout: ParallelSpec, pp_rank: int, tp_rank: int
) -> dict[str, Tensor]:
    """Flattened local parameters of a rank, by the names in its module."""
    own = stages(config, layout)[pp_rank :: layout.pp_size]
    parameters = {}
    for index, stage in enumerate(own):
        for name, target in stage_layout(config, stage, tp_size=layout.tp_size, tp_rank=tp_rank).items():
            blocks = [
                whole[b.source][b.source_row : b.source_row + b.rows, b.column : b.column + b.columns]
                for b in target.blocks
            ]
            parameters[f"model{index}.{name}" if len(own) > 1 else name] = torch.cat(blocks).reshape(-1)
    return parameters


def write_state(folder: Path, saved: dict[str, dict[str, Tensor]], dice: random.Random) -> None:
    """Two data-parallel ranks have the parameters from either end; one parameter is split between them."""
    folder.mkdir(parents=True)
    names = list(saved["exp_avg"])
    shared = dice.randrange(len(names))
    pieces: list[dict[str, Piece]] = [{}, {}]
    for index, name in enumerate(names):
        size = len(saved["exp_avg"][name])
        middle = dice.randrange(1, size) if index == shared else size if index < shared else 0
        for rank, (start, stop) in enumerate(((0, middle), (middle, size))):
            if start < stop:
                tensors: Any = {kind: tensors[name][start:stop] for kind, tensors in saved.items()}
                pieces[rank][name] = Piece(start, stop, tensors)
    for rank, part in enumerate(pieces):
        write_pt(folder / f"temper_optim_{rank:03d}.pt", tree_of(OptimizerState(7, part)))


class TestRankState:
    def test_a_piece_that_is_not_there_is_not_made_up(self, tmp_path: Path) -> None:
        piece = Piece(0, 4, {"exp_avg": torch.ones(4)})
        write_pt(tmp_path / "temper_optim_000.pt", tree_of(OptimizerState(7, {"a": piece})))
        state = RankState(tmp_path)
        with pytest.raises(KeyError, match="b"):
            state.read("b", "exp_avg", 0, 4)
        with pytest.raises(CorruptCheckpoint, match="the pieces of a's exp_avg do not make up elements 2 to 6"):
            state.read("a", "exp_avg", 2, 6)

    def test_files_of_different_steps_are_refused(self, tmp_path: Path) -> None:
        for rank in (0, 1):
            write_pt(tmp_path / f"temper_optim_{rank:03d}.pt", tree_of(OptimizerState(rank, {})))
        with pytest.raises(CorruptCheckpoint, match=r"optimizer state of \[0, 1\] steps"):
            RankState(tmp_path)


class TestOptions:
    def test_what_is_not_saved_is_not_there_and_its_lack_is_told(self, tmp_path: Path) -> None:
        spec = training_spec(checkpoint={"save_optim": False, "save_rng": False}, train_iters=4)
        train(0, Case(), spec, tmp_path, stop_after=2)
        assert [path.name for path in tmp_path.rglob("*.pt")] == ["model_optim_rng.pt"]
        (folder,) = tmp_path.glob("iter_*")
        assert not Facts.read(folder).has_optimizer
        notes, rank = Notes(), Rank(Case(), spec.optimizer)
        trainer = make_trainer(rank, spec, tmp_path, notes)
        assert notes.warnings[0][0] == "no_optimizer_state"
        assert "the checkpoint has no optimizer state: AdamW's moments start from zero" in notes.warnings[0][1]
        trainer.train(steps(trainer, rank.config))
        assert list(notes.metrics) == [3, 4]

    def test_load_optim_false_starts_the_moments_from_zero(self, tmp_path: Path) -> None:
        spec = training_spec(train_iters=4)
        train(0, Case(), spec, tmp_path / "first", stop_after=2)
        fresh = training_spec(train_iters=4, resume_from={"path": "/nowhere"}, checkpoint={"load_optim": False})
        for wanted, num_steps, codes in ((spec, 2, []), (fresh, 0, ["no_optimizer_state"])):
            notes, rank = Notes(), Rank(Case(), spec.optimizer)
            folder = tmp_path / str(num_steps)
            trainer = make_trainer(rank, wanted, folder, notes, resume_from=tmp_path / "first")
            assert [code for code, _ in notes.warnings] == codes
            assert trainer.facts.position.iteration == 2
            assert trainer.optimizer.num_steps == num_steps

    def test_random_state_goes_on_where_the_ranks_are_the_same(self, tmp_path: Path) -> None:
        spec = training_spec(train_iters=2)
        train(0, Case(), spec, tmp_path, stop_after=1)
        trainer = make_trainer(Rank(Case()), spec, tmp_path, Notes())
        origin = Origin.find(trainer.checkpoints, None)
        assert origin is not None
        assert origin.loads_rng(spec, trainer.facts)
        assert not origin.loads_rng(spec, replace(trainer.facts, dp_size=2))
        torch.manual_seed(99)
        origin.load_rng(CpuAccelerator())
        assert torch.equal(torch.get_rng_state(), trainer.checkpoints.load_rng(origin.path)["host"])

    def test_what_was_not_trained_has_no_state_to_go_on_with(self, tmp_path: Path) -> None:
        frozen = replace(Case(), frozen=training_spec(freeze={"vision_encoder": True}).freeze)
        train(0, frozen, training_spec(train_iters=2), tmp_path, stop_after=1)
        with pytest.raises(IncompatiblePlan, match="no optimizer state for 'image_encoder"):
            make_trainer(Rank(Case()), training_spec(train_iters=2), tmp_path, Notes())


class TestLoadWeights:
    def test_lists_what_is_missing_left_over_and_misshapen(self) -> None:
        model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        weights = [("0.weight", torch.zeros(2, 3)), ("1.weight", torch.zeros(1, 3)), ("extra", torch.zeros(1))]
        with pytest.raises(UnknownWeights) as caught:
            load_weights(model, weights)
        assert "2 missing: 0.bias, 1.bias" in caught.value.message
        assert "1 not of this model: extra" in caught.value.message
        assert "0.weight [2, 3] instead of [3, 2]" in caught.value.message
