"""Which parameters are trained: by tower, told by the place that the family's table gives each weight.

A frozen parameter gets no gradient, no optimizer state, and no work in the backward pass that only it would need.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from core.models.plan import Stage
from core.models.qwen2_5_vl.family import MAPPING
from core.parallel.tensor import local_name, pattern
from core.specs.training import FreezeSpec

_TOWER_OF = {rule.mm: rule.place.tower for rule in MAPPING}


@dataclass(frozen=True)
class ParameterRow:
    """One line of the table of parameters that is kept with a training."""

    name: str
    tower: str
    shape: tuple[int, ...]
    trained: bool

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def tower_of(name: str) -> str:
    """Return the tower that an mm parameter name belongs to."""
    tower = _TOWER_OF.get(pattern(local_name(name)))
    assert tower is not None, f"parameter {name} belongs to no tower"
    return tower


def freeze(model: nn.Module, spec: FreezeSpec, *, all_weights: bool = False) -> list[ParameterRow]:
    """Mark the parameters of frozen towers; return the table of all parameters of this stage.

    With `all_weights` those of the other towers are frozen too: LoRA trains adapters, and the spec says which towers get some.
    """
    rows = []
    for name, parameter in model.named_parameters():
        tower = tower_of(name)
        trained = not (all_weights or getattr(spec, tower))
        parameter.requires_grad_(trained)
        rows.append(ParameterRow(name, tower, tuple(parameter.shape), trained))
    return rows


def trains(stage: Stage, spec: FreezeSpec) -> bool:
    """Whether the stage holds any trained parameter; known from the plan, so every rank knows it of every stage."""
    has_vision = len(stage.vit_layers) > 0 or stage.has_patch_embed
    has_text = len(stage.llm_layers) > 0 or stage.has_embedding or stage.has_output
    return (
        (has_vision and not spec.vision_encoder)
        or (stage.has_projector and not spec.vision_projector)
        or (has_text and not spec.text_decoder)
    )


def gradient_reaches(stages: Sequence[Stage], spec: FreezeSpec) -> list[bool]:
    """For each stage, whether gradients of what comes into it are needed: whether any stage before it trains."""
    reached, before = [], False
    for stage in stages:
        reached.append(before)
        before = before or trains(stage, spec)
    return reached


def summary(rows: Sequence[ParameterRow]) -> dict[str, dict[str, int]]:
    """Return trained and frozen element counts per tower."""
    table: dict[str, dict[str, int]] = {}
    for row in rows:
        counts = table.setdefault(row.tower, {"trained": 0, "frozen": 0})
        counts["trained" if row.trained else "frozen"] += row.count
    return table
