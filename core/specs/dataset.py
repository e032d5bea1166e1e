"""Spec of a data set job."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from core.specs.base import ArtifactRef, JobInputs


class DatasetSpec(JobInputs):
    """Annotations, images and videos to normalised, tokenised, checked rows."""

    source: ArtifactRef = Field(description="Folder with annotations and media.")
    annotations: str = Field(
        max_length=1024, description="JSON or JSONL file inside the source.", examples=["llava_instruct.json"]
    )
    media_root: str = Field(
        ".", max_length=1024, description="Folder inside the source that paths of images and videos start from."
    )
    format: Literal["llava", "sharegpt", "messages", "auto"] = Field("auto", description="Form of the records.")
    tokenizer: ArtifactRef = Field(
        description="A model folder with tokenizer and processor files (Hugging Face or mm)."
    )
    cutoff_len: int = Field(1024, ge=16, le=1 << 20, description="Rows with more tokens are refused, never cut.")
    max_samples: int | None = Field(
        None, ge=1, description="Use at most this many records, from the start of the file."
    )
    image_max_pixels: int = Field(262144, ge=784, description="Larger images are scaled down to this many pixels.")
    image_min_pixels: int | None = Field(
        None, ge=0, description="Smaller images are scaled up to this many pixels; the model's own minimum if absent."
    )
    video_fps: float = Field(2.0, gt=0, le=60, description="Frames that are taken of a video per second, at least 4.")
    video_max_frames: int = Field(64, ge=2, le=768, description="Of longer videos so many frames are taken, evenly.")
    video_max_pixels: int = Field(16384, ge=784, description="Larger frames are scaled down to this many pixels.")
    video_min_pixels: int | None = Field(
        None,
        ge=0,
        description="Smaller frames are scaled up to this many pixels; if absent Qwen's 100352, where the maximum admits it.",
    )
    on_bad_sample: Literal["skip", "fail"] = Field(
        "skip", description="A bad row is reported and skipped, or fails the job."
    )
    validation_fraction: float = Field(0.0, ge=0.0, lt=1.0, description="Share of rows held out.")
    seed: int = Field(42, ge=0, lt=1 << 32, description="Seed of the split.")

    @model_validator(mode="after")
    def _relative(self) -> DatasetSpec:
        for name in ("annotations", "media_root"):
            value = getattr(self, name)
            if value.startswith("/") or ".." in value.split("/") or "\\" in value or "\0" in value:
                raise ValueError(f"{name} must be a relative path inside the source, got {value!r}")
        for kind in ("image", "video"):
            least, most = getattr(self, f"{kind}_min_pixels"), getattr(self, f"{kind}_max_pixels")
            if least is not None and least > most:
                raise ValueError(f"{kind}_min_pixels ({least}) must not exceed {kind}_max_pixels ({most})")
        return self
