"""Tiny models in every form that the conversion tests need."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.models.hf_folder import HFFolder, inspect_hf_folder
from core.specs.parallel import ParallelSpec
from tests.tiny import TinyShape, random_weights, tiny_model

SHAPE = TinyShape(vision_layers=3, text_layers=4)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def source(tmp_path: Path) -> HFFolder:
    """An untied model of 3 vision and 4 language layers, in two shards."""
    return inspect_hf_folder(tiny_model(tmp_path / "hf", shape=SHAPE, num_shards=2))


def split(llm: list[list[int]], vit: list[list[int]], tp: int = 1) -> ParallelSpec:
    return ParallelSpec.model_validate({"tp_size": tp, "llm_pp_layers": llm, "vit_pp_layers": vit})


ONE = split([[4]], [[3]])
TWO_BY_TWO = split([[1, 3]], [[3, 0]], tp=2)
VIRTUAL = split([[0, 1], [1, 2]], [[2, 1], [0, 0]], tp=2)


def hf_weights(folder: HFFolder, shape: TinyShape = SHAPE, seed: int = 0) -> Mapping[str, np.ndarray]:
    return dict(random_weights(shape, vocab_size=folder.config.text.vocab_size, seed=seed))


def load(file: Path) -> dict[str, Any]:
    tree: dict[str, Any] = torch.load(file, weights_only=True)
    return tree


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Relative path -> contents, of all files."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
