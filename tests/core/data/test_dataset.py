"""The token files: what is written comes back, and what does not fit together is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from core.data.dataset import NO_TARGET, TokenisedDataset
from core.errors import InvalidDataset
from core.models.config import Config


class TestTokenisedDataset:
    def test_gives_back_what_was_written(self, dataset_dir: Path, media_root: Path) -> None:
        row = TokenisedDataset(dataset_dir).row(1)
        assert (row.index, row.source_row) == (1, 13)
        assert [medium.paths for medium in row.media] == [(media_root / "1.png",), (media_root / "2.png",)]
        assert row.input_ids[:2].tolist() == [1, 2]
        assert row.grid_thw == ((1, 2, 8), (1, 4, 4))

    def test_targets_are_the_next_tokens_where_trained(self, dataset_dir: Path) -> None:
        row = TokenisedDataset(dataset_dir).row(0)
        assert row.targets[-4:].tolist() == [NO_TARGET, 4, 5, NO_TARGET]
        assert (row.targets[:-4] == NO_TARGET).all()

    def test_counts_per_row_of_the_split(self, dataset_dir: Path) -> None:
        dataset = TokenisedDataset(dataset_dir)
        assert len(dataset) == 3
        assert dataset.lengths.tolist() == [len(dataset.row(i).input_ids) for i in range(3)]
        assert dataset.patches.tolist() == [sum(t * h * w for t, h, w in dataset.row(i).grid_thw) for i in range(3)]
        assert dataset.num_targets.tolist() == [2, 2, 2]

    def test_validation_has_its_own_rows(self, dataset_dir: Path) -> None:
        dataset = TokenisedDataset(dataset_dir, "validation")
        assert (len(dataset), dataset.row(0).source_row, dataset.row(0).media) == (1, 12, ())
        assert dataset.patches.tolist() == [0]

    def test_media_may_have_moved(self, dataset_dir: Path, tmp_path: Path) -> None:
        dataset = TokenisedDataset(dataset_dir, media_root=tmp_path / "elsewhere")
        assert dataset.row(0).media[0].paths == (tmp_path / "elsewhere" / "0.png",)

    def test_a_truncated_file_is_named(self, dataset_dir: Path) -> None:
        file = dataset_dir / "tokens" / "input_ids.i32"
        file.write_bytes(file.read_bytes()[:-4])
        with pytest.raises(InvalidDataset, match=r"input_ids\.i32 has \d+ bytes, expected \d+"):
            TokenisedDataset(dataset_dir)

    def test_a_missing_file_is_named(self, dataset_dir: Path) -> None:
        (dataset_dir / "tokens" / "grids.i32").unlink()
        with pytest.raises(InvalidDataset, match=r"grids\.i32 is missing"):
            TokenisedDataset(dataset_dir)

    def test_a_folder_that_is_no_data_set_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidDataset, match=r"meta\.json cannot be read"):
            TokenisedDataset(tmp_path)

    def test_another_version_is_refused(self, dataset_dir: Path) -> None:
        file = dataset_dir / "tokens" / "meta.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "version": 99}))
        with pytest.raises(InvalidDataset, match="version 99"):
            TokenisedDataset(dataset_dir)

    def test_an_unknown_split_is_refused(self, dataset_dir: Path) -> None:
        with pytest.raises(InvalidDataset, match="train, validation, got 'test'"):
            TokenisedDataset(dataset_dir, "test")


class TestCheckModel:
    def test_accepts_the_model_it_was_made_for(self, dataset_dir: Path, config: Config) -> None:
        TokenisedDataset(dataset_dir).check_model(config)

    def test_names_what_differs(self, dataset_dir: Path, config: Config) -> None:
        dataset = TokenisedDataset(dataset_dir)
        with pytest.raises(InvalidDataset, match="image_token_id"):
            dataset.check_model(replace(config, image_token_id=1))
        with pytest.raises(InvalidDataset, match="patch_size is 14 for the data set, 16 for the model"):
            dataset.check_model(replace(config, vision=replace(config.vision, patch_size=16)))
        with pytest.raises(InvalidDataset, match="the model up to 9"):
            dataset.check_model(replace(config, text=replace(config.text, vocab_size=10)))


def test_reading_tokens_needs_no_torch() -> None:
    code = "import core.data.dataset, core.data.plan, core.data.media, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
