"""The data set kind, from job inputs to a published artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from core.data.dataset import TokenisedDataset
from core.errors import InvalidDataset
from core.runners import dataset
from core.runners.context import InputArtifact, RunContext, Stopped
from core.specs.dataset import DatasetSpec
from core.storage.local import Store
from tests.tiny import tiny_model

ARTIFACT = "art_" + "0" * 26


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """LLaVA annotations of 100 rows on 4 images; every tenth row names a missing one."""
    source = tmp_path / "source"
    (source / "images").mkdir(parents=True)
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (30 + 20 * number, 60, 3), np.uint8)
        Image.fromarray(pixels).save(source / "images" / f"{number}.jpg")
    rows = [
        {
            "id": str(number),
            "image": "absent.jpg" if number % 10 == 9 else f"{number % 4}.jpg",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat?"},
                {"from": "gpt", "value": f"Number {number}."},
            ],
        }
        for number in range(100)
    ]
    (source / "rows.json").write_text(json.dumps(rows))
    return source


def context(tmp_path: Path, source: Path, tokenizer: Path, **fields: Any) -> RunContext:
    reference = {"artifact": ARTIFACT}
    values = {"source": reference, "annotations": "rows.json", "media_root": "images", "tokenizer": reference, **fields}
    attempt_dir = tmp_path / "attempt"
    attempt_dir.mkdir()
    return RunContext(
        job_id="job_" + "0" * 26,
        attempt=1,
        kind="dataset",
        spec=DatasetSpec.model_validate(values),
        inputs={
            "source": InputArtifact(ARTIFACT, "dataset_source", source, {}),
            "tokenizer": InputArtifact(ARTIFACT, "hf_model", tokenizer, {}),
        },
        job_dir=tmp_path / "job",
        attempt_dir=attempt_dir,
        store=Store(tmp_path / "store"),
    )


def run(ctx: RunContext) -> None:
    assert isinstance(ctx.spec, DatasetSpec)
    dataset.run(ctx, ctx.spec)


def events(ctx: RunContext) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ctx.attempt_dir / "events.jsonl").read_text().splitlines()]


def published(ctx: RunContext) -> Path:
    """Folder of the one artifact that was announced."""
    (ready,) = (event for event in events(ctx) if event["type"] == "artifact")
    return ctx.store.artifact_dir(ready["artifact_id"])


class TestRun:
    def test_publishes_a_data_set_that_training_can_open(self, tmp_path: Path, source: Path, model_dir: Path) -> None:
        ctx = context(tmp_path, source, model_dir, validation_fraction=0.2)
        run(ctx)
        files = published(ctx) / "files"
        assert len(TokenisedDataset(files)) == 72
        assert len(TokenisedDataset(files, "validation")) == 18
        assert TokenisedDataset(files).row(0).media[0].paths[0].is_file()

    def test_the_manifest_tells_what_is_in_it(self, tmp_path: Path, source: Path, model_dir: Path) -> None:
        ctx = context(tmp_path, source, model_dir)
        run(ctx)
        metadata = json.loads((published(ctx) / "manifest.json").read_text())["metadata"]
        assert (metadata["num_train"], metadata["num_validation"], metadata["num_refused"]) == (90, 0, 10)
        assert metadata["media_root"] == str(source / "images")
        assert metadata["max_length"] >= 30
        assert len(metadata["tokenizer_digest"]) == 64

    def test_tells_progress_in_rows_and_warns_of_refused_ones(
        self, tmp_path: Path, source: Path, model_dir: Path
    ) -> None:
        ctx = context(tmp_path, source, model_dir)
        run(ctx)
        told = events(ctx)
        last = [event for event in told if event["type"] == "progress"][-1]
        assert (last["done"], last["total"], last["unit"]) == (100, 100, "rows")
        assert [event["code"] for event in told if event["type"] == "warning"] == ["rows_refused"]

    def test_a_checkpoint_in_mm_form_serves_as_tokenizer(self, tmp_path: Path, source: Path, model_dir: Path) -> None:
        checkpoint = tmp_path / "checkpoint"
        checkpoint.mkdir()
        (checkpoint / "hf").symlink_to(model_dir)
        ctx = context(tmp_path, source, checkpoint)
        run(ctx)
        assert published(ctx).exists()

    def test_limits_of_the_spec_shrink_the_images(self, tmp_path: Path, source: Path, model_dir: Path) -> None:
        ctx = context(tmp_path, source, model_dir, image_max_pixels=784)
        run(ctx)
        assert set(TokenisedDataset(published(ctx) / "files").patches.tolist()) == {4}

    def test_a_failure_leaves_nothing_behind(self, tmp_path: Path, source: Path, model_dir: Path) -> None:
        ctx = context(tmp_path, source, model_dir, on_bad_sample="fail")
        with pytest.raises(InvalidDataset, match=r"row 10: image 'absent\.jpg'"):
            run(ctx)
        assert [path for path in ctx.store.root.rglob("*") if path.is_file()] == []

    def test_a_stop_is_obeyed(self, tmp_path: Path, source: Path, model_dir: Path) -> None:
        ctx = context(tmp_path, source, model_dir)
        ctx._stop.set()
        with pytest.raises(Stopped):
            run(ctx)
        assert [path for path in ctx.store.root.rglob("*") if path.is_file()] == []

    def test_other_ranks_do_nothing(self, tmp_path: Path, source: Path, model_dir: Path) -> None:
        ctx = context(tmp_path, source, model_dir)
        ctx.rank = 1
        run(ctx)
        assert not ctx.store.root.exists()
