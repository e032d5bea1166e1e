"""Wire format of what a runner tells: one JSON object per line of `events.jsonl`, and `job.json` that starts it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter


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
