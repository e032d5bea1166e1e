"""Spec of a weight conversion."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from core.specs.base import ArtifactRef, DType, JobInputs
from core.specs.parallel import ParallelSpec


class ConversionSpec(JobInputs):
    """Hugging Face layout to mm layout, back, or one mm layout to another."""

    operation: Literal["hf_to_mm", "mm_to_hf", "reshard"] = Field(description="Direction of the conversion.")
    source: ArtifactRef = Field(description="The weights to convert.")
    hf_source: ArtifactRef | None = Field(
        None,
        description="Hugging Face folder for config and tokenizer files, when an mm source does not carry them.",
    )
    parallel: ParallelSpec | None = Field(None, description="Layout to write (hf_to_mm, reshard).")
    source_parallel: ParallelSpec | None = Field(
        None, description="Layout of the source, when its manifest does not say it (mm_to_hf, reshard)."
    )
    dtype: DType | None = Field(None, description="Cast the weights (round to nearest even); unchanged if absent.")
    canonical: bool = Field(False, description="Write MindSpeed-MM's unfused layout (enable_canonical_hf_struct).")
    max_shard_bytes: int | None = Field(
        None, ge=1 << 16, description="mm_to_hf: largest safetensors file; the source's own shards if absent."
    )
    verify: bool = Field(
        False, description="Read the output back from the disk and compare every weight with its source."
    )

    @model_validator(mode="after")
    def _fields_of_the_operation(self) -> ConversionSpec:
        if self.operation == "mm_to_hf" and self.parallel is not None:
            raise ValueError("parallel has no effect with mm_to_hf: a Hugging Face folder is not split over ranks")
        if self.operation != "mm_to_hf":
            if self.parallel is None:
                raise ValueError(f"parallel is required with {self.operation}: it names the layout to write")
            if self.max_shard_bytes is not None:
                raise ValueError(f"max_shard_bytes has no effect with {self.operation}; it goes with mm_to_hf")
        if self.operation == "hf_to_mm":
            for name in ("source_parallel", "hf_source"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} has no effect with hf_to_mm: the source is a Hugging Face folder itself")
        if self.operation == "mm_to_hf" and self.canonical:
            raise ValueError("canonical has no effect with mm_to_hf: how the source is fused is read from its weights")
        return self
