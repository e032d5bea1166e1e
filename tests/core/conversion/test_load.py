"""Stages loaded from any layout are equal."""

from pathlib import Path

import pytest
import torch

from core.conversion.convert import hf_to_mm
from core.conversion.load import load_stage, load_stage_from_hf
from core.conversion.mm import write_rank_file, write_tracker
from core.errors import IncompatiblePlan, InvalidModel
from core.models.hf_folder import HFFolder, inspect_hf_folder
from core.models.mm_folder import RANK_FILE, rank_dir
from core.models.plan import stages, whole
from core.specs.parallel import ParallelSpec
from tests.core.conversion.conftest import ONE, TWO_BY_TWO, VIRTUAL, load, split
from tests.tiny import TinyShape, tiny_model

PIPELINE = split([[1, 3]], [[3, 0]])


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("stored", [ONE, TWO_BY_TWO, VIRTUAL], ids=["tp1", "tp2pp2", "tp2pp2vpp2"])
def test_every_layout_loads_like_the_hf_folder(tmp_path: Path, source: HFFolder, stored: ParallelSpec) -> None:
    hf_to_mm(source, tmp_path / "mm", stored)
    for stage in (whole(source.config), *stages(source.config, PIPELINE)):
        assert_same(
            dict(load_stage(tmp_path / "mm", stored, source.config, stage)),
            dict(load_stage_from_hf(source.path, source.config, stage)),
        )


def test_a_stage_is_what_its_rank_file_holds(tmp_path: Path, source: HFFolder) -> None:
    hf_to_mm(source, tmp_path / "wanted", PIPELINE)
    hf_to_mm(source, tmp_path / "mm", TWO_BY_TWO)
    for rank, stage in enumerate(stages(source.config, PIPELINE)):
        loaded = dict(load_stage(tmp_path / "mm", TWO_BY_TWO, source.config, stage))
        assert_same(loaded, load(tmp_path / f"wanted/release/mp_rank_00_{rank:03d}/model_optim_rng.pt")["model"])


@pytest.mark.parametrize("stored", [ONE, TWO_BY_TWO], ids=["tp1", "tp2pp2"])
def test_a_slice_of_a_stage_is_what_its_rank_file_holds(tmp_path: Path, source: HFFolder, stored: ParallelSpec) -> None:
    sliced = PIPELINE.model_copy(update={"tp_size": 2})
    hf_to_mm(source, tmp_path / "wanted", sliced)
    hf_to_mm(source, tmp_path / "mm", stored)
    for pp_rank, stage in enumerate(stages(source.config, sliced)):
        for tp_rank in range(2):
            wanted = load(tmp_path / f"wanted/release/mp_rank_{tp_rank:02d}_{pp_rank:03d}/model_optim_rng.pt")["model"]
            tp = (2, tp_rank)
            assert_same(dict(load_stage(tmp_path / "mm", stored, source.config, stage, tp=tp)), wanted)
            assert_same(dict(load_stage_from_hf(source.path, source.config, stage, tp=tp)), wanted)


def test_a_tied_head_comes_only_without_the_embedding(tmp_path: Path) -> None:
    source = inspect_hf_folder(tiny_model(tmp_path / "hf", shape=TinyShape(vision_layers=3, text_layers=4, tied=True)))
    hf_to_mm(source, tmp_path / "mm", ONE)
    first, second = stages(source.config, PIPELINE)
    head, embedding = "text_decoder.output_layer.weight", "text_decoder.embedding.word_embeddings.weight"
    loaded = [
        dict(load_stage(tmp_path / "mm", ONE, source.config, stage)) for stage in (whole(source.config), first, second)
    ]
    assert [head in names for names in loaded] == [False, False, True]
    assert torch.equal(loaded[2][head], loaded[1][embedding])


def test_what_training_writes_is_loaded(tmp_path: Path, source: HFFolder) -> None:
    written = []
    for rank, stage in enumerate(stages(source.config, PIPELINE)):
        state = dict(load_stage_from_hf(source.path, source.config, stage))
        write_rank_file(tmp_path / "mm" / rank_dir(50, 0, rank, 2) / RANK_FILE, state, iteration=50)
        written.append(state)
    write_tracker(tmp_path / "mm", 50)
    assert load(tmp_path / "mm/iter_0000050/mp_rank_00_000/model_optim_rng.pt")["iteration"] == 50
    for state, stage in zip(written, stages(source.config, PIPELINE), strict=True):
        assert_same(dict(load_stage(tmp_path / "mm", PIPELINE, source.config, stage)), state)
        assert_same(dict(load_stage(tmp_path / "mm", PIPELINE, source.config, stage, iteration=50)), state)


def test_a_wrong_source_parallel_is_refused(tmp_path: Path, source: HFFolder) -> None:
    hf_to_mm(source, tmp_path / "mm", TWO_BY_TWO)
    with pytest.raises(IncompatiblePlan):
        dict(load_stage(tmp_path / "mm", split([[2, 2]], [[3, 0]], 2), source.config, whole(source.config)))


def test_another_config_is_refused(tmp_path: Path, source: HFFolder) -> None:
    other = inspect_hf_folder(tiny_model(tmp_path / "other"))
    with pytest.raises(InvalidModel, match="is not the config"):
        dict(load_stage_from_hf(source.path, other.config, whole(other.config)))
