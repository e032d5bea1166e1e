"""The shapes of answers. Bodies of requests come from `core.specs`, where they are not here."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, computed_field

from core.db.models import ApiKey, Artifact, Attempt, Event, JobInput, Lease, Node, Upload
from core.jobs.principal import Role
from core.specs import JobKind
from core.specs.base import Spec
from core.storage.manifest import FileEntry, Lineage, Manifest

JobStateName = Literal["waiting", "queued", "starting", "running", "cancelling", "succeeded", "failed", "cancelled"]
Item = TypeVar("Item")


class Page(BaseModel, Generic[Item]):
    """A part of a list."""

    data: list[Item]
    has_more: bool = Field(description="True when there is another page.")
    next: str | None = Field(description="Give it as `after` for the next page.")


def page(items: Sequence[Item], limit: int, cursor_of: Any) -> dict[str, Any]:
    """Fields of a page from up to `limit + 1` items: one more than asked for tells that there is more."""
    shown = list(items[:limit])
    more = len(items) > limit
    return {"data": shown, "has_more": more, "next": cursor_of(shown[-1]) if more else None}


class InputOut(BaseModel):
    """An input as it was posted."""

    field: str
    artifact: str | None
    job: str | None
    output: str | None
    path: str | None

    @classmethod
    def of(cls, row: JobInput) -> InputOut:
        """From the database."""
        return cls(field=row.field, artifact=row.artifact_id, job=row.source_job_id, output=row.output, path=row.path)


class OutputOut(BaseModel):
    """An artifact that the job made."""

    name: str
    artifact_id: str
    kind: str
    size_bytes: int

    @classmethod
    def of(cls, row: Artifact) -> OutputOut:
        """From the database."""
        return cls(name=row.name, artifact_id=row.id, kind=row.kind, size_bytes=row.size_bytes)


class Placed(BaseModel):
    """One host's part of an attempt."""

    node: str
    node_rank: int
    devices: list[int]
    state: str = Field(description="pending, held or released.")


class AttemptOut(BaseModel):
    """One try at running the job."""

    number: int
    state: str
    placement: list[Placed]
    started_at: datetime
    finished_at: datetime | None
    exit: dict[str, Any] | None

    @classmethod
    def of(cls, row: Attempt, leases: Sequence[Lease]) -> AttemptOut:
        """From the database."""
        placement = [
            Placed(node=item.node, node_rank=item.node_rank, devices=item.devices, state=item.state) for item in leases
        ]
        return cls(
            number=row.number,
            state=row.state,
            placement=placement,
            started_at=row.started_at,
            finished_at=row.finished_at,
            exit=row.exit,
        )


class ProgressOut(BaseModel):
    """How far the work is."""

    done: float
    total: float | None
    unit: str
    rate: float | None = Field(None, description="Units per second.")

    @computed_field(description="Seconds that the rest takes at this rate.")  # type: ignore[prop-decorator]
    @property
    def remaining_s(self) -> float | None:
        """None where the total or the rate is not known."""
        return max(0.0, self.total - self.done) / self.rate if self.total is not None and self.rate else None


class ErrorOut(BaseModel):
    """Why the job failed."""

    code: str
    message: str
    hint: str | None = None


class JobOut(BaseModel):
    """A job."""

    id: str
    kind: JobKind
    name: str
    labels: dict[str, str]
    priority: int
    owner: str
    state: JobStateName
    reason: str | None = Field(description="Why it is in this state; for a queued job, what it waits for.")
    spec: dict[str, Any]
    progress: ProgressOut | None
    latest_metrics: dict[str, float | None]
    risks: list[str] = Field(description="Why it may fail all the same, as was known when it was submitted.")
    inputs: list[InputOut]
    outputs: list[OutputOut]
    error: ErrorOut | None
    attempts: list[AttemptOut]
    max_attempts: int
    created_at: datetime
    queued_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None


class EventOut(BaseModel):
    """One thing that happened to a job."""

    id: str = Field(description="Its number, counted from 1.")
    type: str = Field(description="state, progress, metric, warning, artifact or error.")
    attempt: int | None
    time: datetime
    data: dict[str, Any]

    @classmethod
    def of(cls, row: Event) -> EventOut:
        """From the database; the time is that of the happening where the runner told it."""
        data = dict(row.data)
        told = data.pop("time", None)
        return cls(id=str(row.seq), type=row.type, attempt=row.attempt, time=told or row.created_at, data=data)


SeriesPoint = Annotated[
    list[int | datetime | float | None],
    Field(min_length=3, max_length=3, description="Step, time (RFC 3339), value; null where the value was not finite."),
]


class SeriesOut(BaseModel):
    """Metric series."""

    series: dict[str, list[SeriesPoint]] = Field(description="By metric: points in the order of steps.")


class ArtifactOut(BaseModel):
    """An artifact, as listed."""

    id: str
    kind: str
    name: str
    owner: str
    shared: bool = Field(description="True when every user may read it.")
    size_bytes: int
    num_files: int
    metadata: dict[str, Any]
    job_id: str | None
    parents: list[str] = Field(description="Artifacts that it was made from.")
    created_at: datetime

    @classmethod
    def of(cls, row: Artifact) -> ArtifactOut:
        """From the database."""
        return cls(**_artifact_fields(row))


class ArtifactDetail(ArtifactOut):
    """An artifact with its files and lineage."""

    files: list[FileEntry]
    lineage: Lineage

    @classmethod
    def read(cls, row: Artifact, manifest: Manifest) -> ArtifactDetail:
        """From the database and the store."""
        return cls(**_artifact_fields(row), files=manifest.files, lineage=manifest.lineage)


def _artifact_fields(row: Artifact) -> dict[str, Any]:
    return {
        "id": row.id,
        "kind": row.kind,
        "name": row.name,
        "owner": row.owner,
        "shared": row.shared,
        "size_bytes": row.size_bytes,
        "num_files": row.num_files,
        "metadata": row.meta,
        "job_id": row.job_id,
        "parents": row.parents,
        "created_at": row.created_at,
    }


ArtifactKind = Literal["hf_model", "mm_checkpoint", "dataset_source", "hf_adapter", "mm_adapter"]
Name = Field(None, min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$", description="A name for people.")


class RegisterRequest(Spec):
    """A folder on the server to make an artifact of; its files stay where they are."""

    kind: ArtifactKind = Field(description="What the folder holds; it is checked.")
    path: str = Field(min_length=1, max_length=4096, description="Absolute path under an allow-listed root.")
    name: str | None = Name


class UploadRequest(Spec):
    """An upload to begin."""

    filename: str = Field(
        min_length=1,
        max_length=200,
        pattern=r"^[^\x00-\x1f\x7f/\\]+$",
        description="A .tar, .tar.gz, .tgz or .zip is unpacked; any other file becomes the artifact's only file.",
    )
    size_bytes: int = Field(ge=1, le=1 << 50, description="Size of the whole file.")
    kind: ArtifactKind = Field(description="What it holds; it is checked at completion.")
    name: str | None = Name
    sha256: str | None = Field(
        None, pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the whole file, if known already."
    )


class CompleteRequest(Spec):
    """The end of an upload."""

    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the whole file.")


class UploadOut(BaseModel):
    """An upload."""

    id: str
    filename: str
    kind: str
    name: str
    size_bytes: int
    offset: int = Field(description="Bytes that are safe on the server; the next chunk starts here.")
    sha256: str | None
    state: str = Field(description="receiving, complete or failed.")
    artifact_id: str | None
    created_at: datetime

    model_config = ConfigDict(from_attributes=True)

    @classmethod
    def of(cls, row: Upload) -> UploadOut:
        """From the database."""
        return cls.model_validate(row)


class KeyRequest(Spec):
    """A new API key."""

    name: str = Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$", description="What it is for.")
    user: str | None = Field(
        None,
        min_length=1,
        max_length=200,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]*$",
        description="Whose it is; jobs and artifacts belong to users. The maker of the key if absent.",
    )
    role: Role = Field("user", description="Admins see everything and manage keys.")


class KeyOut(BaseModel):
    """An API key without its secret."""

    id: str
    user: str
    name: str
    role: Role
    prefix: str = Field(description="The key's first characters.")
    created_at: datetime
    last_used_at: datetime | None
    revoked_at: datetime | None

    model_config = ConfigDict(from_attributes=True)

    @classmethod
    def of(cls, row: ApiKey) -> KeyOut:
        """From the database."""
        return cls.model_validate(row)


class NewKeyOut(KeyOut):
    """A new API key."""

    key: str | None = Field(None, description="The key itself, shown this once; null when the answer is repeated.")


class DeviceOut(BaseModel):
    """A device of a host."""

    id: int
    name: str
    healthy: bool
    memory_bytes: int | None = None
    job_id: str | None = Field(None, description="The job that holds it, if you may see that job.")
    in_use: bool = False


class NodeOut(BaseModel):
    """A host."""

    id: str
    name: str
    address: str
    device_kind: str
    devices: list[DeviceOut]
    host_jobs: int = Field(description="Jobs without a device that run there at once.")
    healthy: bool
    alive: bool = Field(description="True when its worker was heard of lately.")
    drained: bool = Field(description="True when an operator took it out of service: it gets no new jobs.")
    reason: str | None
    version: str
    last_seen_at: datetime

    @classmethod
    def of(cls, row: Node, *, holders: dict[int, str | None], alive: bool) -> NodeOut:
        """From the database; `holders`: device -> job id, or None for somebody else's job."""
        devices = [
            DeviceOut(**device, in_use=device["id"] in holders, job_id=holders.get(device["id"]))
            for device in row.devices
        ]
        return cls(
            id=row.id,
            name=row.name,
            address=row.address,
            device_kind=row.device_kind,
            devices=devices,
            host_jobs=row.host_jobs,
            healthy=row.healthy,
            alive=alive,
            drained=row.drained,
            reason=row.reason,
            version=row.version,
            last_seen_at=row.last_seen_at,
        )


class QueuedOut(BaseModel):
    """A job in line."""

    job_id: str
    name: str
    kind: JobKind
    state: JobStateName
    priority: int
    position: int | None = Field(
        description="Place in the whole line, counted from 1; null for a job that waits for its inputs."
    )
    reason: str | None = Field(description="Why it does not run yet.")
    waiting_for: list[str] = Field(description="Jobs whose outputs it needs and that have not finished.")
    nodes: int
    devices_per_node: int
    queued_at: datetime | None


class QueueOut(BaseModel):
    """The line."""

    data: list[QueuedOut]
    num_queued: int = Field(description="Jobs in line, everybody's.")
    num_waiting: int = Field(description="Jobs that wait for their inputs, everybody's.")


class FamilyOut(BaseModel):
    """A model family."""

    name: str
    model_type: str
    sizes: dict[str, SizeOut]


class SizeOut(BaseModel):
    """A published size of a family."""

    num_hidden_layers: int
    vision_depth: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    legal_tp: list[int] = Field(description="Tensor-parallel sizes that the weights can be cut into.")


class FamiliesOut(Page[FamilyOut]):
    """The families, and the JSON Schema of each job kind's spec."""

    specs: dict[str, dict[str, Any]]


FamilyOut.model_rebuild()
FamiliesOut.model_rebuild()


class HealthOut(BaseModel):
    """All is well."""

    status: Literal["ok"] = "ok"
