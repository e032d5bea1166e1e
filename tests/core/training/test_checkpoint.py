"""Checkpoints are complete or not there."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from core.errors import AppError, CorruptCheckpoint, DiskFull
from core.parallel.mesh import Mesh, build_mesh
from core.storage.manifest import hash_file
from core.training import checkpoint
from core.training.checkpoint import Checkpoints, Facts, Position
from core.training.contents import Contents, load_optimizer
from core.training.host_memory import available_bytes
from core.training.optimizer import OptimizerState, Piece
from tests.distributed import run

FACTS = Facts(Position(5, 40), {"llm_pp_layers": [[4]]}, "fp32", 42, "abc", True)
WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "b.weight": torch.ones(4)}
OPTIMIZER = OptimizerState(3, {"a.weight": Piece(2, 6, {"exp_avg": torch.arange(4.0), "exp_avg_sq": torch.ones(4)})})
ALL = Contents(WEIGHTS, OPTIMIZER, {"host": torch.arange(4, dtype=torch.uint8)})
ONLY_WEIGHTS = Contents(WEIGHTS)


def store(folder: Path, *, keep_last: int = 2, mesh: Mesh | None = None) -> Checkpoints:
    return Checkpoints(folder, mesh or Mesh(), rank_folder="mp_rank_00", keep_last=keep_last)


def save(checkpoints: Checkpoints, iteration: int, contents: Contents = ONLY_WEIGHTS) -> None:
    checkpoints.save(at(iteration), contents)
    checkpoints.wait()


def at(iteration: int) -> Facts:
    return replace(FACTS, position=Position(iteration, iteration * 8))


def full_disk(*_: Any, **__: Any) -> str:
    raise OSError(28, os.strerror(28))


class TestSave:
    def test_what_is_written_is_read_back(self, tmp_path: Path) -> None:
        checkpoints = store(tmp_path)
        checkpoints.save(FACTS, ALL)
        checkpoints.wait()
        path = checkpoints.newest()
        assert path == tmp_path / "iter_0000005"
        facts = Facts.read(path)
        assert (facts.position, facts.layout, facts.dataset) == (FACTS.position, FACTS.layout, "abc")
        loaded = dict(checkpoints.load_weights(path))
        assert all(torch.equal(loaded[name], tensor) for name, tensor in WEIGHTS.items())
        state = load_optimizer(path / "mp_rank_00" / "temper_optim_000.pt")
        piece = state.pieces["a.weight"]
        assert (state.num_steps, piece.start, piece.stop) == (3, 2, 6)
        assert torch.equal(piece.tensors["exp_avg"], torch.arange(4.0))
        assert checkpoints.load_rng(path)["host"].tolist() == [0, 1, 2, 3]
        assert (tmp_path / "latest_checkpointed_iteration.txt").read_bytes() == b"5"

    def test_size_and_digest_of_every_file_are_recorded(self, tmp_path: Path) -> None:
        save(store(tmp_path), 5, ALL)
        folder = tmp_path / "iter_0000005"
        facts = Facts.read(folder)
        names = {str(path.relative_to(folder)) for path in folder.rglob("*.pt")}
        assert set(facts.files) == names == set(facts.digests)
        assert len(names) == 3
        assert all(hash_file(folder / name) == digest for name, digest in facts.digests.items())
        assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.json", "mp_rank_00"]

    def test_weights_are_a_megatron_file_that_torch_reads_safely(self, tmp_path: Path) -> None:
        save(store(tmp_path), 5)
        file = torch.load(tmp_path / "iter_0000005" / "mp_rank_00" / "model_optim_rng.pt", weights_only=True)
        assert file["checkpoint_version"] == 3.0
        assert file["iteration"] == 5
        assert set(file["model"]) == set(WEIGHTS)

    def test_views_into_a_large_buffer_are_written_without_the_buffer(self, tmp_path: Path) -> None:
        buffer = torch.zeros(1_000_000)
        state = OptimizerState(1, {"a": Piece(0, 4, {"exp_avg": buffer[4:8]})})
        save(store(tmp_path), 5, Contents({"a": buffer[:4]}, state))
        assert sum(path.stat().st_size for path in tmp_path.rglob("*.pt")) < 20_000

    def test_the_oldest_are_removed_once_a_new_one_is_complete(self, tmp_path: Path) -> None:
        checkpoints = store(tmp_path, keep_last=2)
        for iteration in (1, 2, 3, 10):
            save(checkpoints, iteration)
        assert [path.name for path in checkpoints.kept()] == ["iter_0000003", "iter_0000010"]

    def test_a_full_disk_is_said_before_anything_is_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
        with pytest.raises(DiskFull, match="needs"):
            store(tmp_path).save(FACTS, ALL)
        assert list(tmp_path.iterdir()) == []


class Gate:
    """Holds up the writing of weights until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.write, self.open, self.num_waiting = checkpoint.write_rank_file, threading.Event(), threading.Semaphore(0)
        monkeypatch.setattr(checkpoint, "write_rank_file", self)

    def __call__(self, *args: Any, **options: Any) -> str:
        self.num_waiting.release()
        self.open.wait()
        return self.write(*args, **options)


class TestBackground:
    def test_what_changes_while_it_is_written_does_not_reach_the_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gate, checkpoints = Gate(monkeypatch), store(tmp_path)
        weights, average = torch.ones(4), torch.ones(4)
        state = OptimizerState(1, {"a": Piece(0, 4, {"exp_avg": average})})
        checkpoints.save(FACTS, Contents({"a": weights}, state))
        gate.num_waiting.acquire()
        weights.zero_()
        average.zero_()
        assert checkpoints.newest() is None
        gate.open.set()
        checkpoints.wait()
        path = checkpoints.newest()
        assert path is not None
        assert dict(checkpoints.load_weights(path))["a"].sum() == 4
        file = path / "mp_rank_00" / "temper_optim_000.pt"
        assert load_optimizer(file).pieces["a"].tensors["exp_avg"].sum() == 4

    def test_the_next_copy_takes_the_memory_of_the_one_before_where_it_fits(self) -> None:
        first = Contents({"a": torch.ones(4), "b": torch.ones(2)}, OPTIMIZER).copied(None)
        second = Contents({"a": torch.zeros(4), "b": torch.zeros(3)}, replace(OPTIMIZER, num_steps=4)).copied(first)
        assert second.weights["a"] is first.weights["a"]
        assert first.weights["a"].sum() == 0
        assert second.weights["b"].shape == (3,)
        assert first.optimizer is not None
        assert second.optimizer is not None
        assert second.optimizer.num_steps == 4
        tensors = (state.pieces["a.weight"].tensors["exp_avg"] for state in (first.optimizer, second.optimizer))
        assert next(tensors) is next(tensors)

    def test_the_memory_for_copies_can_be_taken_before(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        checkpoints = store(tmp_path)
        checkpoints.reserve(ALL)
        monkeypatch.setattr(checkpoint, "has_room_for", lambda _: False)
        checkpoints.save(FACTS, ALL)
        checkpoints.wait()
        assert checkpoints._copy is not None
        path = checkpoints.newest()
        assert path is not None
        assert torch.equal(dict(checkpoints.load_weights(path))["b.weight"], torch.ones(4))

    def test_the_last_one_is_written_without_a_copy(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Contents, "copied", None)
        checkpoints = store(tmp_path)
        checkpoints.save(FACTS, ALL, in_background=False)
        checkpoints.wait()
        assert checkpoints.newest() == tmp_path / "iter_0000005"

    def test_a_second_save_waits_for_the_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        gate, checkpoints = Gate(monkeypatch), store(tmp_path)
        checkpoints.save(at(1), ONLY_WEIGHTS)
        gate.num_waiting.acquire()
        threading.Thread(target=gate.open.set).start()
        checkpoints.save(at(2), ONLY_WEIGHTS)
        assert (tmp_path / "iter_0000001" / "checkpoint.json").is_file()
        checkpoints.wait()
        assert [path.name for path in checkpoints.kept()] == ["iter_0000001", "iter_0000002"]

    def test_without_host_memory_for_a_copy_training_waits_and_is_told_so(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(checkpoint, "has_room_for", lambda _: False)
        monkeypatch.setattr(Contents, "copied", None)
        checkpoints, weights = store(tmp_path), torch.ones(4)
        with caplog.at_level(logging.WARNING):
            checkpoints.save(FACTS, Contents({"a": weights}))
        weights.zero_()
        checkpoints.wait()
        path = checkpoints.newest()
        assert path is not None
        assert dict(checkpoints.load_weights(path))["a"].sum() == 4
        assert "no host memory for a copy of 16 bytes" in caplog.text

    def test_a_container_may_use_less_than_its_host_has(self, tmp_path: Path) -> None:
        for name, text in (
            ("memory.max", "1000000\n"),
            ("memory.current", "900000\n"),
            ("memory.stat", "anon 5\ninactive_file 50000\n"),
        ):
            (tmp_path / name).write_text(text)
        assert available_bytes(tmp_path) == 150_000
        (tmp_path / "memory.max").write_text("max\n")
        assert available_bytes(tmp_path) > 1_000_000

    def test_on_the_way_out_of_an_error_it_is_still_completed(self, tmp_path: Path) -> None:
        checkpoints = store(tmp_path)
        checkpoints.save(FACTS, ALL)
        checkpoints.close()
        assert checkpoints.newest() == tmp_path / "iter_0000005"

    def test_a_file_that_reads_back_otherwise_makes_no_checkpoint(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write = checkpoint.write_rank_file

        def flipped(path: Path, *args: Any, **options: Any) -> str:
            digest = write(path, *args, **options)
            with path.open("r+b") as stream:
                stream.seek(300)
                stream.write(b"?")
            return digest

        monkeypatch.setattr(checkpoint, "write_rank_file", flipped)
        with pytest.raises(CorruptCheckpoint, match=r"model_optim_rng.pt reads back as"):
            save(store(tmp_path), 1)
        assert list(tmp_path.iterdir()) == []


class TestInterrupted:
    def test_a_write_that_fails_leaves_the_one_before_and_nothing_of_its_own(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        checkpoints = store(tmp_path)
        save(checkpoints, 1, ALL)
        monkeypatch.setattr(checkpoint, "write_rank_file", full_disk)
        checkpoints.save(at(2), ALL)
        with pytest.raises(AppError) as caught:
            checkpoints.wait()
        assert caught.value.code == "disk_full"
        assert checkpoints.newest() == tmp_path / "iter_0000001"
        assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "1"
        assert not list(tmp_path.glob(".iter_*"))

    def test_leftovers_are_cleared_by_the_next_save(self, tmp_path: Path) -> None:
        (tmp_path / ".iter_0000003.tmp" / "mp_rank_00").mkdir(parents=True)
        save(store(tmp_path), 4)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000004", "latest_checkpointed_iteration.txt"]

    def test_a_truncated_file_is_told_and_an_older_checkpoint_is_used(self, tmp_path: Path) -> None:
        checkpoints = store(tmp_path)
        for iteration in (1, 2):
            save(checkpoints, iteration)
        file = tmp_path / "iter_0000002" / "mp_rank_00" / "model_optim_rng.pt"
        os.truncate(file, 100)
        with pytest.raises(
            CorruptCheckpoint, match=r"iter_0000002/mp_rank_00/model_optim_rng.pt should have \d+ bytes"
        ):
            Facts.read(tmp_path / "iter_0000002")
        assert checkpoints.newest() == tmp_path / "iter_0000001"

    def test_a_checkpoint_refused_earlier_is_replaced(self, tmp_path: Path) -> None:
        checkpoints = store(tmp_path)
        save(checkpoints, 1)
        (tmp_path / "iter_0000001" / "checkpoint.json").unlink()
        assert checkpoints.newest() is None
        save(checkpoints, 1)
        assert checkpoints.newest() == tmp_path / "iter_0000001"
        assert not list(tmp_path.glob(".iter_*"))


class TestRanks:
    def test_parts_of_all_ranks_or_the_error_of_one_on_all(self, tmp_path: Path) -> None:
        results = run(_save_twice, 4, tmp_path)
        assert {error for _, error in results} == {("disk_full", True)}
        assert [has_failed for has_failed, _ in results] == [False, False, True, False]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000001", "latest_checkpointed_iteration.txt"]
        facts = json.loads((tmp_path / "iter_0000001" / "checkpoint.json").read_text())
        assert sorted(facts["files"]) == [
            f"mp_rank_00_00{stage}/{name}"
            for stage in (0, 1)
            for name in ("model_optim_rng.pt", "temper_optim_000.pt", "temper_optim_001.pt")
        ]


def _save_twice(rank: int, folder: Path) -> tuple[bool, tuple[str, bool]]:
    """The second time the first rank of the second stage finds the disk full."""
    mesh = build_mesh(pp_size=2, dp_size=2)
    checkpoints = store(folder, mesh=mesh)
    checkpoints.rank_folder = f"mp_rank_00_{mesh.pp_rank:03d}"
    checkpoints.save(at(1), replace(ALL, rng=None))
    checkpoints.wait()
    write: Callable[..., str] = checkpoint.write_rank_file
    if rank == 2:
        checkpoint.write_rank_file = full_disk
    try:
        checkpoints.save(at(2), ALL)
        writing = checkpoints._writing
        assert writing is not None
        writing.wait_for_own_part()
        has_failed = checkpoints.has_failed
        checkpoints.wait()
    except AppError as error:
        return has_failed, (error.code, "rank 2" in error.message)
    finally:
        checkpoint.write_rank_file = write
    return has_failed, ("no error", False)
