"""Which parameters are trained: by tower, told by the first words of their mm names.

A frozen parameter gets no gradient, no optimizer state, and no work in the backward pass that only it would need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from core.models.plan import Stage
from core.parallel.tensor import local_name
from core.specs.training import FreezeSpec

TOWERS = {
    "vision_encoder": "image_encoder.encoder.",
    "vision_projector": "image_encoder.projector.",
    "text_decoder": "text_decoder.",
}


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
        product = 1
        for size in self.shape:
            product *= size
        return product


def tower_of(name: str) -> str:
    """Return the tower that an mm parameter name belongs to."""
    for tower, prefix in TOWERS.items():
        if local_name(name).startswith(prefix):
            return tower
    raise AssertionError(f"parameter {name} belongs to no tower")


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
