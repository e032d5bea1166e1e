"""Wire format of what a runner tells: one JSON object per line of `events.jsonl`, and `job.json` that starts it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

TRAINING_METRICS = {
    "loss": "Mean loss of the interval's steps, weighted as `loss_reduction` says; null when all were skipped.",
    "learning_rate": "Of the last step.",
    "grad_norm": "Global gradient norm of the last step, before clipping.",
    "step_time_ms": "Mean time of a step, without checkpoints.",
    "tokens_per_second": "Tokens of the samples, without padding, over all devices.",
    "tokens_per_second_per_device": "The same per device.",
    "target_tokens_per_second": "Tokens that are learnt.",
    "target_tokens_per_second_per_device": "The same per device.",
    "padded_tokens_per_second": "Tokens that are computed, padding included.",
    "padded_tokens_per_second_per_device": "The same per device.",
    "model_flops_per_second": "Operations that the model needs for forward and backward of what is trained; none for recompute or padding.",
    "model_flops_per_second_per_device": "The same per device.",
    "mfu": "Share of the devices' peak that this is; only where the peak is known or set (`TEMPER_PEAK_TFLOPS`).",
    "images_per_second": "Images and videos.",
    "host_wait_fraction": "Share of the time that the slowest rank waited for its data.",
    "skipped_iterations": "Iterations of the interval without an optimizer step: loss or gradient not finite, or no targets.",
    "consumed_samples": "Samples since the start of the training.",
    "memory_peak_bytes": "Most memory that a rank has held on its device.",
}
"""Series that a training tells every `log_interval` iterations."""


class _Event(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    time: float = Field(description="Seconds since the epoch, when it happened.")


class Started(_Event):
    """The runner has its devices and works."""

    type: Literal["started"] = "started"


class Progress(_Event):
    """How far the work is."""

    type: Literal["progress"] = "progress"
    done: float
    total: float | None
    unit: str
    rate: float | None = None


class MetricPoint(_Event):
    """Values at one step."""

    type: Literal["metric"] = "metric"
    step: int
    values: dict[str, float | None]


class Warned(_Event):
    """Something that the user should know, and that does not stop the job."""

    type: Literal["warning"] = "warning"
    code: str
    message: str


class ArtifactReady(_Event):
    """An artifact lies in the store, complete."""

    type: Literal["artifact"] = "artifact"
    artifact_id: str
    name: str
    kind: str
    size_bytes: int
    num_files: int
    metadata: dict[str, Any]
    parents: list[str]


class Failed(_Event):
    """Why the runner gives up."""

    type: Literal["error"] = "error"
    code: str
    message: str
    hint: str | None = None


RunnerEvent = Annotated[Started | Progress | MetricPoint | Warned | ArtifactReady | Failed, Field(discriminator="type")]
RUNNER_EVENT: TypeAdapter[RunnerEvent] = TypeAdapter(RunnerEvent)


class InputArtifact(BaseModel):
    """An input, resolved to a folder."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    artifact_id: str | None
    kind: str
    path: str
    metadata: dict[str, Any] = {}


class JobFile(BaseModel):
    """`job.json`: all that a runner needs to know."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    job_id: str
    attempt: int
    kind: str
    spec: dict[str, Any]
    inputs: dict[str, InputArtifact]
    store: str
    device: str
    allow_roots: list[str] = []
