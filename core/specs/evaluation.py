"""Spec of an evaluation: generate answers, score them, show them side by side."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from core.specs.base import ArtifactRef, JobInputs, Spec

Metric = Literal["exact_match", "rouge_l", "loss"]


class GenerationSpec(Spec):
    """Decoding."""

    max_new_tokens: int = Field(64, ge=1, le=8192)
    temperature: float = Field(0.0, ge=0, le=10, description="0 = greedy.")
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = Field(42, ge=0, lt=1 << 32, description="Seed of sampling.")


class PromptSpec(Spec):
    """One prompt; images and videos are paths under an allow-listed root.

    They stand where the text has <image> and <video>, or before it. Of a video two frames a second are taken, at most 64.
    """

    text: str = Field(min_length=1, max_length=65536)
    images: tuple[Annotated[str, Field(max_length=4096)], ...] = ()
    videos: tuple[Annotated[str, Field(max_length=4096)], ...] = ()


class EvaluationSpec(JobInputs):
    """Evaluate a model, optionally against its base, on held-out rows or on given prompts."""

    model: ArtifactRef = Field(description="Weights to evaluate: mm or Hugging Face layout.")
    base: ArtifactRef | None = Field(None, description="Weights to compare with.")
    dataset: ArtifactRef | None = Field(None, description="Data set whose held-out rows are answered.")
    prompts: Annotated[tuple[PromptSpec, ...], Field(min_length=1, max_length=1000)] | None = None
    max_samples: int | None = Field(None, ge=1, description="Answer at most this many held-out rows.")
    generation: GenerationSpec = GenerationSpec()
    metrics: tuple[Metric, ...] = ("exact_match",)

    @model_validator(mode="after")
    def _one_source(self) -> EvaluationSpec:
        if (self.dataset is None) == (self.prompts is None):
            raise ValueError("exactly one of dataset and prompts is needed")
        if self.prompts is not None and self.max_samples is not None:
            raise ValueError("max_samples has no effect with prompts")
        if self.prompts is not None and "metrics" in self.model_fields_set and self.metrics:
            raise ValueError("metrics have no effect with prompts: there is no reference to compare with")
        return self
