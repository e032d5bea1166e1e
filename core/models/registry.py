"""The model families that Temper knows. Without torch: only `Family.build` imports the computation."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from core.errors import InvalidModel, NotFound
from core.models.config import Config
from core.models.mapping import Rule
from core.models.plan import Plan, Stage, legal_tp
from core.models.qwen2_5_vl import family as qwen2_5_vl
from core.models.qwen2_vl import family as qwen2_vl


@dataclass(frozen=True)
class Family:
    """One model family: how to read its config, its two tables, and where its computation lives."""

    name: str
    model_type: str
    """`model_type` of HF's `config.json`."""
    parse_config: Callable[[Mapping[str, Any]], Config]
    sizes: Mapping[str, Config]
    """Published size -> config."""
    mapping: tuple[Rule, ...]
    """HF <-> mm, fused as MindSpeed-MM's training layers hold them."""
    canonical_mapping: tuple[Rule, ...] | None
    """HF <-> mm, unfused (`canonical_model: true`); None where MindSpeed-MM has no such model."""
    plan: Plan
    """mm name pattern -> tensor-parallel rule."""
    model: str | None
    """`module:class` of the pipeline stage; imports torch. None: the family is only converted."""

    def legal_tp(self, config: Config) -> list[int]:
        """Every tensor-parallel size that the model can be cut into."""
        return legal_tp(config)

    def build(self, config: Config, stage: Stage, **options: Any) -> Any:
        """The `torch.nn.Module` of one pipeline stage; options as its constructor takes them."""
        assert self.model is not None, "submission refuses to train or evaluate a family without a model"
        module, name = self.model.split(":")
        return getattr(importlib.import_module(module), name)(config, stage, **options)


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            name=qwen2_5_vl.NAME,
            model_type=qwen2_5_vl.NAME,
            parse_config=qwen2_5_vl.parse_config,
            sizes=qwen2_5_vl.SIZES,
            mapping=qwen2_5_vl.MAPPING,
            canonical_mapping=qwen2_5_vl.CANONICAL_MAPPING,
            plan=qwen2_5_vl.PLAN,
            model="core.models.qwen2_5_vl.model:Qwen2_5_VLStage",
        ),
        Family(
            name=qwen2_vl.NAME,
            model_type=qwen2_vl.NAME,
            parse_config=qwen2_vl.parse_config,
            sizes=qwen2_vl.SIZES,
            mapping=qwen2_vl.MAPPING,
            canonical_mapping=None,
            plan=qwen2_vl.PLAN,
            model=None,
        ),
    )
}


def get_family(name: str) -> Family:
    """The family of that name; NotFound names those that there are."""
    if name not in FAMILIES:
        raise NotFound(f"no model family {name!r}; known: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]


def detect(config_json: Mapping[str, Any]) -> Family:
    """The family that a `config.json` is of, by its `model_type`."""
    found = config_json.get("model_type")
    for family in FAMILIES.values():
        if family.model_type == found:
            return family
    known = ", ".join(sorted(family.model_type for family in FAMILIES.values()))
    raise InvalidModel(f"config.json: model_type is {found!r}; supported: {known}")
