"""A tiny model folder and a small tokenised data set, both made here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.data.dataset import TokenWriter
from core.data.media import ImageProcessing, Medium
from core.models.config import Config
from tests.tiny import tiny_model

IMAGE_SIZES = ((60, 40), (100, 30), (28, 28))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2.5-VL folder: config, tokenizer, processor files, weights."""
    path = tmp_path_factory.mktemp("model")
    tiny_model(path)
    return path


@pytest.fixture(scope="session")
def config(model_dir: Path) -> Config:
    return Config.from_hf(json.loads((model_dir / "config.json").read_text()))


@pytest.fixture
def media_root(tmp_path: Path) -> Path:
    """Images 0.png, 1.png … of IMAGE_SIZES, in random colours."""
    root = tmp_path / "media"
    root.mkdir()
    for number, (width, height) in enumerate(IMAGE_SIZES):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.png")
    return root


@pytest.fixture
def dataset_dir(tmp_path: Path, media_root: Path, config: Config) -> Path:
    """Four rows with images 0; none; 1 and 2; 1. The second is for validation, the others for training."""
    processing = ImageProcessing()
    path = tmp_path / "dataset"
    path.mkdir()
    with TokenWriter(path) as writer:
        for source_row, numbers in enumerate([[0], [], [1, 2], [1]], start=11):
            grids = [processing.grid(IMAGE_SIZES[n][1], IMAGE_SIZES[n][0]) for n in numbers]
            media = [Medium((Path(f"{n}.png"),), grid) for n, grid in zip(numbers, grids, strict=True)]
            ids = [1, 2]
            for grid in grids:
                ids += [config.vision_start_token_id]
                ids += [config.image_token_id] * processing.num_tokens(grid) + [config.vision_end_token_id]
            ids += [3, 4, 5]
            trained = np.zeros(len(ids), np.uint8)
            trained[-2:] = 1
            writer.add(np.array(ids), trained, media=media, source_row=source_row)
        writer.finish(
            train=[0, 2, 3],
            validation=[1],
            media_root=media_root,
            vocab_size=config.text.vocab_size,
            tokenizer_digest="",
            image_token_id=config.image_token_id,
            video_token_id=config.video_token_id,
            pad_token_id=0,
            image_processing=processing,
        )
    return path
