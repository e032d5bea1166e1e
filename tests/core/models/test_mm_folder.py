"""Inspection of mm checkpoint folders without torch."""

import zipfile
from pathlib import Path

import pytest

from core.errors import CorruptCheckpoint, IncompatiblePlan
from core.models.mm_folder import inspect_mm_folder, rank_dir
from core.specs.parallel import ParallelSpec


def checkpoint(root: Path, *, tp: int = 2, pp: int = 2, iteration: int | None = None) -> Path:
    name = "release" if iteration is None else iteration
    for tp_rank in range(tp):
        for pp_rank in range(pp):
            folder = root / rank_dir(name, tp_rank, pp_rank, pp)
            folder.mkdir(parents=True)
            with zipfile.ZipFile(folder / "model_optim_rng.pt", "w") as archive:
                archive.writestr("archive/version", "3")
    (root / "latest_checkpointed_iteration.txt").write_text(str(name))
    return root


def test_rank_folders_are_named_as_upstream_names_them() -> None:
    assert rank_dir("release", 1, 0, 1) == "release/mp_rank_01"
    assert rank_dir(5000, 3, 12, 16) == "iter_0005000/mp_rank_03_012"


class TestSound:
    def test_layout_is_read_from_the_names(self, tmp_path: Path) -> None:
        found = inspect_mm_folder(checkpoint(tmp_path, tp=2, pp=3))
        assert (found.tp_size, found.pp_size, found.iteration, found.hf_dir) == (2, 3, None, None)
        assert len(found.rank_files()) == 6

    def test_iterations(self, tmp_path: Path) -> None:
        checkpoint(tmp_path, pp=1, iteration=50)
        checkpoint(tmp_path, pp=1, iteration=100)
        assert inspect_mm_folder(tmp_path).iteration == 100
        assert inspect_mm_folder(tmp_path, iteration=50).rank_files()[0][2].parts[-3] == "iter_0000050"

    def test_files_beside_the_ranks_do_not_matter(self, tmp_path: Path) -> None:
        (checkpoint(tmp_path) / "release" / "notes.txt").write_text("hello")
        assert inspect_mm_folder(tmp_path).tp_size == 2


class TestBroken:
    def test_no_tracker(self, tmp_path: Path) -> None:
        with pytest.raises(CorruptCheckpoint, match=r"has no latest_checkpointed_iteration\.txt"):
            inspect_mm_folder(tmp_path)

    def test_a_tracker_that_says_nothing(self, tmp_path: Path) -> None:
        (checkpoint(tmp_path) / "latest_checkpointed_iteration.txt").write_text("soon")
        with pytest.raises(CorruptCheckpoint, match="says 'soon'"):
            inspect_mm_folder(tmp_path)

    def test_a_tracker_that_points_nowhere(self, tmp_path: Path) -> None:
        (checkpoint(tmp_path) / "latest_checkpointed_iteration.txt").write_text("7")
        with pytest.raises(CorruptCheckpoint, match="iter_0000007, which is not there"):
            inspect_mm_folder(tmp_path)

    def test_no_ranks(self, tmp_path: Path) -> None:
        (tmp_path / "release").mkdir()
        (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
        with pytest.raises(CorruptCheckpoint, match="has no mp_rank"):
            inspect_mm_folder(tmp_path)

    def test_a_missing_rank_is_named(self, tmp_path: Path) -> None:
        (checkpoint(tmp_path) / "release/mp_rank_01_000/model_optim_rng.pt").unlink()
        with pytest.raises(CorruptCheckpoint, match=r"tp 2 x pp 2 lacks release/mp_rank_01_000/model_optim_rng\.pt"):
            inspect_mm_folder(tmp_path)

    def test_a_truncated_rank_is_named(self, tmp_path: Path) -> None:
        file = checkpoint(tmp_path) / "release/mp_rank_01_001/model_optim_rng.pt"
        file.write_bytes(file.read_bytes()[:40])
        with pytest.raises(CorruptCheckpoint, match=r"release/mp_rank_01_001/model_optim_rng\.pt is truncated"):
            inspect_mm_folder(tmp_path)

    def test_mixed_layouts(self, tmp_path: Path) -> None:
        checkpoint(tmp_path, tp=1, pp=1)
        checkpoint(tmp_path, tp=1, pp=2)
        with pytest.raises(CorruptCheckpoint, match="two layouts"):
            inspect_mm_folder(tmp_path)

    def test_expert_parallel(self, tmp_path: Path) -> None:
        (checkpoint(tmp_path) / "release/mp_rank_00_000_000").mkdir()
        with pytest.raises(CorruptCheckpoint, match="expert-parallel"):
            inspect_mm_folder(tmp_path)

    def test_another_layout_than_given(self, tmp_path: Path) -> None:
        parallel = ParallelSpec(tp_size=1, llm_pp_layers=((1, 1),), vit_pp_layers=((2, 0),))
        with pytest.raises(IncompatiblePlan, match=r"tp 2 x pp 2, but the layout given is tp 1 x pp 2"):
            inspect_mm_folder(checkpoint(tmp_path), parallel)
