"""Job specs: what a user posts, discriminated by `kind`."""

from __future__ import annotations

from typing import Literal

from core.specs.base import JobInputs
from core.specs.conversion import ConversionSpec
from core.specs.dataset import DatasetSpec
from core.specs.evaluation import EvaluationSpec
from core.specs.training import TrainingSpec

JobKind = Literal["conversion", "dataset", "training", "evaluation"]
JobSpec = ConversionSpec | DatasetSpec | TrainingSpec | EvaluationSpec

SPECS: dict[JobKind, type[JobInputs]] = {
    "conversion": ConversionSpec,
    "dataset": DatasetSpec,
    "training": TrainingSpec,
    "evaluation": EvaluationSpec,
}


def parse_stored_spec(kind: str, blob: dict[str, object]) -> JobSpec:
    """Read a spec that this service stored itself, whatever version wrote it: fields it no longer knows are dropped."""
    model = SPECS[kind]  # type: ignore[index]  # a stored kind is one of the keys
    known = {name: value for name, value in blob.items() if name in model.model_fields}
    return model.model_validate(known)  # type: ignore[return-value]  # SPECS holds the members of JobSpec


__all__ = [
    "SPECS",
    "ConversionSpec",
    "DatasetSpec",
    "EvaluationSpec",
    "JobKind",
    "JobSpec",
    "TrainingSpec",
    "parse_stored_spec",
]
