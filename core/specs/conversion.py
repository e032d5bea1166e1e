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
        description="Hugging Face folder with config and tokenizer files, when an mm source does not carry them; an adapter's base model.",
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
    verify: Literal[False, True, "logits"] = Field(
        False,
        description="Read the output back from the disk and compare every weight with its source; logits: also run the first, "
        "middle and last layers of both forms (Hugging Face's by transformers, mm by Temper) and compare their logits.",
    )
    lora_alpha: float | None = Field(
        None,
        gt=0,
        description="mm_to_hf of an adapter that MindSpeed-MM trained: its scale, which the files do not tell.",
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
            if self.lora_alpha is not None:
                raise ValueError(f"lora_alpha has no effect with {self.operation}; it goes with mm_to_hf of an adapter")
        if self.operation == "hf_to_mm" and self.source_parallel is not None:
            raise ValueError("source_parallel has no effect with hf_to_mm: the source is a Hugging Face folder")
        if self.operation == "mm_to_hf" and self.canonical:
            raise ValueError("canonical has no effect with mm_to_hf: how the source is fused is read from its weights")
        return self
