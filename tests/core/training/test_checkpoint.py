"""Checkpoints are complete or not there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from core.conversion.mm import write_rank_file
from core.errors import AppError, CorruptCheckpoint, DiskFull
from core.parallel.mesh import Mesh, build_mesh
from core.training import checkpoint
from core.training.checkpoint import Checkpoints, Facts, Position, plain
from core.training.optimizer import OptimizerState, Piece
from tests.distributed import run

FACTS = Facts(Position(5, 40), {"llm_pp_layers": [[4]]}, "fp32", 42, "abc", True)
WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "b.weight": torch.ones(4)}
STATE = {
    "optimizer": plain(OptimizerState(3, {"a.weight": Piece(0, 6, {"exp_avg": torch.ones(6)})})),
    "rng": {"host": torch.zeros(4)},
}


def store(folder: Path, *, keep_last: int = 2, mesh: Mesh | None = None) -> Checkpoints:
    return Checkpoints(
        folder, mesh or Mesh(), rank_folder="mp_rank_00", write_weights=write_rank_file, keep_last=keep_last
    )


def at(iteration: int) -> Facts:
    return replace(FACTS, position=Position(iteration, iteration * 8))


class TestSave:
    def test_what_is_written_is_read_back(self, tmp_path: Path) -> None:
        checkpoints = store(tmp_path)
        checkpoints.save(FACTS, WEIGHTS, STATE)
        path = checkpoints.newest()
        assert path == tmp_path / "iter_0000005"
        facts = Facts.read(path)
        assert (facts.position, facts.layout, facts.dataset) == (FACTS.position, FACTS.layout, "abc")
        loaded = dict(checkpoints.load_weights(path))
        assert all(torch.equal(loaded[name], tensor) for name, tensor in WEIGHTS.items())
        saved = checkpoints.load_state(path)
        assert saved.num_steps == 3
        assert torch.equal(saved.read("a.weight", "exp_avg", 1, 5), torch.ones(4))
        with pytest.raises(KeyError, match=r"b\.weight"):
            saved.read("b.weight", "exp_avg", 0, 1)
        assert (tmp_path / "latest_checkpointed_iteration.txt").read_bytes() == b"5"

    def test_weights_are_a_megatron_file_that_torch_reads_safely(self, tmp_path: Path) -> None:
        store(tmp_path).save(FACTS, WEIGHTS, None)
        file = torch.load(tmp_path / "iter_0000005" / "mp_rank_00" / "model_optim_rng.pt", weights_only=True)
        assert file["checkpoint_version"] == 3.0
        assert file["iteration"] == 5
        assert set(file["model"]) == set(WEIGHTS)

    def test_views_into_a_large_buffer_are_written_without_the_buffer(self, tmp_path: Path) -> None:
        buffer = torch.zeros(1_000_000)
        store(tmp_path).save(FACTS, {"a": buffer[:4]}, {"optimizer": {"a": {"exp_avg": buffer[4:8]}}})
        assert sum(path.stat().st_size for path in tmp_path.rglob("*.pt")) < 20_000

    def test_the_oldest_are_removed_once_a_new_one_is_complete(self, tmp_path: Path) -> None:
        checkpoints = store(tmp_path, keep_last=2)
        for iteration in (1, 2, 3, 10):
            checkpoints.save(at(iteration), WEIGHTS, None)
        assert [path.name for path in checkpoints.kept()] == ["iter_0000003", "iter_0000010"]

    def test_a_full_disk_is_said_before_anything_is_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
        with pytest.raises(DiskFull, match="needs"):
            store(tmp_path).save(FACTS, WEIGHTS, STATE)
        assert store(tmp_path).newest() is None


class TestInterrupted:
    def test_a_write_that_dies_leaves_the_one_before(self, tmp_path: Path) -> None:
        checkpoints = store(tmp_path)
        checkpoints.save(at(1), WEIGHTS, STATE)

        def die(path: Path, state_dict: Mapping[str, Tensor], *, iteration: int | None = None) -> str:
            path.write_bytes(b"half")
            raise OSError(28, os.strerror(28))

        checkpoints.write_weights = die
        with pytest.raises(AppError) as caught:
            checkpoints.save(at(2), WEIGHTS, STATE)
        assert caught.value.code == "disk_full"
        assert checkpoints.newest() == tmp_path / "iter_0000001"
        assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "1"

    def test_leftovers_are_cleared_by_the_next_save(self, tmp_path: Path) -> None:
        (tmp_path / ".iter_0000003.tmp" / "mp_rank_00").mkdir(parents=True)
        store(tmp_path).save(at(4), WEIGHTS, None)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000004", "latest_checkpointed_iteration.txt"]

    def test_a_truncated_file_is_told_and_an_older_checkpoint_is_used(self, tmp_path: Path) -> None:
        checkpoints = store(tmp_path)
        for iteration in (1, 2):
            checkpoints.save(at(iteration), WEIGHTS, None)
        file = tmp_path / "iter_0000002" / "mp_rank_00" / "model_optim_rng.pt"
        os.truncate(file, 100)
        with pytest.raises(
            CorruptCheckpoint, match=r"iter_0000002/mp_rank_00/model_optim_rng.pt should have \d+ bytes"
        ):
            Facts.read(tmp_path / "iter_0000002")
        assert checkpoints.newest() == tmp_path / "iter_0000001"

    def test_a_checkpoint_refused_earlier_is_replaced(self, tmp_path: Path) -> None:
        checkpoints = store(tmp_path)
        checkpoints.save(at(1), WEIGHTS, None)
        (tmp_path / "iter_0000001" / "checkpoint.json").unlink()
        assert checkpoints.newest() is None
        checkpoints.save(at(1), WEIGHTS, None)
        assert checkpoints.newest() == tmp_path / "iter_0000001"


class TestRanks:
    def test_the_error_of_one_rank_fails_all_with_its_code(self, tmp_path: Path) -> None:
        assert run(_save_on_a_full_disk, 2, tmp_path) == [
            ("disk_full", True), ("disk_full", True),
        ]  # fmt: skip
        assert not list(tmp_path.glob("iter_*"))


def _save_on_a_full_disk(rank: int, folder: Path) -> tuple[str, bool]:
    checkpoints = store(folder, mesh=build_mesh(pp_size=2, dp_size=1))
    checkpoints.rank_folder = f"mp_rank_00_{rank:03d}"
    if rank == 1:

        def full(path: Path, state_dict: Mapping[str, Tensor], *, iteration: int | None = None) -> str:
            raise OSError(28, os.strerror(28))

        checkpoints.write_weights = full
    try:
        checkpoints.save(FACTS, WEIGHTS, None)
    except AppError as error:
        return error.code, "rank 1" in error.message
    return "no error", False
