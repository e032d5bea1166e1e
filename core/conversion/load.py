"""Loads the weights of one pipeline stage, whole or a tensor-parallel slice, from an mm checkpoint of any split or from a HF folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from core.conversion.apply import Bytes, WeightSource, chunks, layout_dtype
from core.conversion.hf import HFWeights
from core.conversion.mm import MMWeights
from core.errors import InvalidModel
from core.models.config import Config
from core.models.hf_folder import inspect_hf_folder
from core.models.layout import TensorLayout, stage_layout
from core.models.mm_folder import inspect_mm_folder
from core.models.plan import Split, Stage


def load_stage(
    mm_dir: Path,
    source_parallel: Split,
    config: Config,
    stage: Stage,
    *,
    tp: tuple[int, int] = (1, 0),
    iteration: int | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name in the rank file of `stage`, tensor) in the stored type; the parts of split tensors are put together.

    `tp` = (size, rank) asks for the slice of one tensor-parallel rank. `iteration` picks another than the tracker names. A tied
    output layer comes only where the embedding is on another stage. Raises CorruptCheckpoint, UnknownWeights, and IncompatiblePlan
    for a wrong `source_parallel`.
    """
    folder = inspect_mm_folder(mm_dir, source_parallel, iteration=iteration)
    return _stage_tensors(MMWeights(folder, config, source_parallel), config, stage, tp)


def load_stage_from_hf(
    hf_dir: Path, config: Config, stage: Stage, *, tp: tuple[int, int] = (1, 0)
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same from a HF folder. Raises InvalidModel, also when `config` is not the folder's."""
    folder = inspect_hf_folder(hf_dir)
    if folder.config != config:
        raise InvalidModel(f"{hf_dir / 'config.json'} is not the config that the stage was built with")
    return _stage_tensors(HFWeights(folder), config, stage, tp)


def _stage_tensors(
    weights: WeightSource, config: Config, stage: Stage, tp: tuple[int, int]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, layout in stage_layout(config, stage, tp_size=tp[0], tp_rank=tp[1]).items():
        if layout_dtype(layout, weights) is None:
            raise InvalidModel(f"the parts of {name} have different types")
        yield name, _to_tensor(layout, weights)


def _to_tensor(layout: TensorLayout, source: WeightSource) -> torch.Tensor:
    """The whole tensor, in memory of its own."""
    stored = layout_dtype(layout, source)
    assert stored is not None, "checked before"
    out = torch.empty(layout.shape, dtype=getattr(torch, stored))
    flat: Bytes = out.view(-1).view(torch.uint8).numpy()
    position = 0
    for chunk in chunks(layout, source):
        flat[position : position + chunk.size] = chunk.reshape(-1)
        position += chunk.size
    assert position == flat.size, "layouts cover every row"
    return out
