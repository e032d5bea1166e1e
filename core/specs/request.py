"""What is posted to `/v1/jobs`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from core.specs.base import Spec
from core.specs.conversion import ConversionSpec
from core.specs.dataset import DatasetSpec
from core.specs.evaluation import EvaluationSpec
from core.specs.training import TrainingSpec

LabelKey = Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")]
LabelValue = Annotated[str, Field(max_length=255)]


class _Request(Spec):
    name: str | None = Field(None, min_length=1, max_length=200, description="A name for people; the kind if absent.")
    labels: dict[LabelKey, LabelValue] = Field({}, max_length=32, description="Free key-value pairs to filter by.")
    priority: int = Field(0, ge=-1000, le=1000, description="Higher goes first.")
    max_attempts: int = Field(3, ge=1, le=100, description="Tries in all when hosts are lost.")


class ConversionRequest(_Request):
    """Convert weights."""

    kind: Literal["conversion"]
    spec: ConversionSpec


class DatasetRequest(_Request):
    """Build a data set."""

    kind: Literal["dataset"]
    spec: DatasetSpec


class TrainingRequest(_Request):
    """Fine-tune."""

    kind: Literal["training"]
    spec: TrainingSpec


class EvaluationRequest(_Request):
    """Evaluate."""

    kind: Literal["evaluation"]
    spec: EvaluationSpec


JobRequest = Annotated[
    ConversionRequest | DatasetRequest | TrainingRequest | EvaluationRequest, Field(discriminator="kind")
]
