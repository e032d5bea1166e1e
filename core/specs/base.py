"""What all specs share: strict reading, references to inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

JobId = Annotated[str, Field(pattern=r"^job_[0-9a-z]{26}$", examples=["job_01k0a2b3c4d5e6f7g8h9j0kmnp"])]
ArtifactId = Annotated[str, Field(pattern=r"^art_[0-9a-z]{26}$", examples=["art_01k0a2b3c4d5e6f7g8h9j0kmnp"])]
DType = Literal["bfloat16", "float16", "float32"]


class Spec(BaseModel):
    """Base of everything that a user posts: unknown fields are refused, values are frozen once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def field_names(model: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """The fields that may stand at `path` (field names and list indices) inside a spec; none where no object stands."""
    for part in path:
        if isinstance(part, int):
            continue
        info = model.model_fields.get(part)
        inner = _model_in(info.annotation) if info else None
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def _model_in(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for item in get_args(annotation) if (found := _model_in(item))), None)


class ArtifactRef(Spec):
    """An input: an artifact, another job's output (which makes a dependency), or a path under an allow-listed root."""

    artifact: ArtifactId | None = Field(None, description="Id of an existing artifact.")
    job: JobId | None = Field(None, description="Id of the job whose output is used; this job waits for it.")
    output: str | None = Field(
        None, max_length=200, description="Name of that job's output; its main output if absent."
    )
    path: str | None = Field(None, max_length=4096, description="Absolute path of a folder under an allow-listed root.")

    @model_validator(mode="after")
    def _exactly_one(self) -> ArtifactRef:
        given = [name for name in ("artifact", "job", "path") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of artifact, job, path is needed, {len(given)} given: {given}")
        if self.output is not None and self.job is None:
            raise ValueError("output goes with job only")
        return self


class JobInputs(Spec):
    """Base of the job specs: knows which of its fields are inputs."""

    def references(self) -> Iterator[tuple[str, ArtifactRef]]:
        """Yield (field name, reference) for each input that was given."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, ArtifactRef):
                yield name, value
