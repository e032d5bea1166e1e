"""What can be trained: model families, their sizes, and the schema of every spec."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from fastapi import APIRouter, Depends

from api.auth import authenticate
from api.problems import responses
from api.schemas import FamiliesOut, FamilyOut, SizeOut
from core.models.config import Config
from core.models.registry import FAMILIES, Family
from core.specs import SPECS

router = APIRouter(prefix="/v1/families", tags=["families"], dependencies=[Depends(authenticate)])


@router.get("", response_model=FamiliesOut, responses=responses())
def list_families() -> FamiliesOut:
    """Model families with their published sizes and legal splits, and the JSON Schema of each job kind's spec."""
    return FamiliesOut(
        data=[_family(family) for family in FAMILIES.values()], has_more=False, next=None, specs=_schemas()
    )


def _family(family: Family) -> FamilyOut:
    sizes = {name: _size(family, config) for name, config in family.sizes.items()}
    return FamilyOut(name=family.name, model_type=family.model_type, sizes=sizes)


def _size(family: Family, config: Config) -> SizeOut:
    text = config.text
    return SizeOut(
        num_hidden_layers=text.num_hidden_layers,
        vision_depth=config.vision.depth,
        hidden_size=text.hidden_size,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        vocab_size=text.vocab_size,
        legal_tp=family.legal_tp(config),
    )


@lru_cache(maxsize=1)
def _schemas() -> dict[str, dict[str, Any]]:
    return {kind: spec.model_json_schema() for kind, spec in SPECS.items()}
