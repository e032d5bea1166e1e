"""All tables. The database is the truth: what is not here did not happen."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, LargeBinary, String, Text, UniqueConstraint, false
from sqlalchemy.orm import Mapped, mapped_column

from core.db.base import Base

ID = String(40)
NAME = String(200)
STATE = String(16)


class ApiKey(Base):
    """An API key; only its SHA-256 is kept (a key is 256 random bits, so a fast hash is right)."""

    __tablename__ = "api_keys"
    id: Mapped[str] = mapped_column(ID, primary_key=True)
    user: Mapped[str] = mapped_column(NAME)
    name: Mapped[str] = mapped_column(NAME)
    role: Mapped[str] = mapped_column(String(16))
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    prefix: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[datetime]
    last_used_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class Job(Base):
    """A job; `state` changes only through `core.jobs.lifecycle`."""

    __tablename__ = "jobs"
    id: Mapped[str] = mapped_column(ID, primary_key=True)
    kind: Mapped[str] = mapped_column(String(16), index=True)
    name: Mapped[str] = mapped_column(NAME)
    labels: Mapped[dict[str, Any]]
    priority: Mapped[int]
    owner: Mapped[str] = mapped_column(NAME, index=True)
    spec: Mapped[dict[str, Any]]
    num_nodes: Mapped[int]
    devices_per_node: Mapped[int]
    state: Mapped[str] = mapped_column(STATE, index=True)
    reason: Mapped[str | None] = mapped_column(Text)
    max_attempts: Mapped[int]
    retries_left: Mapped[int]
    last_seq: Mapped[int] = mapped_column(BigInteger)
    progress: Mapped[dict[str, Any] | None]
    latest_metrics: Mapped[dict[str, Any]]
    error: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(index=True)
    queued_at: Mapped[datetime | None]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class JobInput(Base):
    """One input of a job, as posted; `source_job_id` makes it a dependency."""

    __tablename__ = "job_inputs"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    field: Mapped[str] = mapped_column(String(40), primary_key=True)
    source_job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"), index=True)
    output: Mapped[str | None] = mapped_column(NAME)
    artifact_id: Mapped[str | None] = mapped_column(ForeignKey("artifacts.id"), index=True)
    path: Mapped[str | None] = mapped_column(Text)


class Attempt(Base):
    """One try at running a job; `token` fences every write of its supervisors."""

    __tablename__ = "attempts"
    __table_args__ = (UniqueConstraint("job_id", "number"),)
    id: Mapped[str] = mapped_column(ID, primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    number: Mapped[int]
    state: Mapped[str] = mapped_column(STATE)
    rendezvous: Mapped[str | None] = mapped_column(NAME)
    started_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    exit: Mapped[dict[str, Any] | None]


class Lease(Base):
    """The right of one host to run its part of an attempt on some devices until `expires_at`.

    `pending` (placed, not taken up) → `held` (a supervisor renews it) → `released`. `token` is new for each lease; every
    write of a supervisor is guarded by it. `shipped` holds the byte offsets up to which the spool is in the database.
    """

    __tablename__ = "leases"
    __table_args__ = (Index("ix_leases_node_state", "node", "state"),)
    id: Mapped[str] = mapped_column(ID, primary_key=True)
    attempt_id: Mapped[str] = mapped_column(ForeignKey("attempts.id"), index=True)
    node: Mapped[str] = mapped_column(NAME)
    node_rank: Mapped[int]
    devices: Mapped[list[Any]]
    token: Mapped[str] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(STATE)
    expires_at: Mapped[datetime]
    created_at: Mapped[datetime]
    acquired_at: Mapped[datetime | None]
    pid: Mapped[int | None]
    exit_code: Mapped[int | None]
    shipped: Mapped[dict[str, Any]]


class Event(Base):
    """A job's history in order: state changes, progress, metric points, warnings, artifacts.

    `seq` counts from 1 within the job and is handed out under the job's row lock, so that a reader who has seen `seq`
    has seen everything before it.
    """

    __tablename__ = "events"
    __table_args__ = (Index("ix_events_job_type_step", "job_id", "type", "step"),)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    seq: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    attempt: Mapped[int | None]
    type: Mapped[str] = mapped_column(String(16))
    step: Mapped[int | None] = mapped_column(BigInteger)
    data: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]


class LogChunk(Base):
    """A compressed piece of an attempt's log; rank -1 is the job's own log, others are the ranks' files."""

    __tablename__ = "log_chunks"
    attempt_id: Mapped[str] = mapped_column(ForeignKey("attempts.id"), primary_key=True)
    rank: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    offset: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    size: Mapped[int]
    data: Mapped[bytes] = mapped_column(LargeBinary)


class Artifact(Base):
    """An immutable folder with a manifest."""

    __tablename__ = "artifacts"
    id: Mapped[str] = mapped_column(ID, primary_key=True)
    kind: Mapped[str] = mapped_column(String(32), index=True)
    name: Mapped[str] = mapped_column(NAME)
    owner: Mapped[str] = mapped_column(NAME, index=True)
    shared: Mapped[bool]
    path: Mapped[str] = mapped_column(Text)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    num_files: Mapped[int]
    meta: Mapped[dict[str, Any]] = mapped_column("metadata")
    parents: Mapped[list[Any]]
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"), index=True)
    created_at: Mapped[datetime] = mapped_column(index=True)
    deleted_at: Mapped[datetime | None]


class Upload(Base):
    """A resumable upload; `offset` is how much is safely on disk."""

    __tablename__ = "uploads"
    id: Mapped[str] = mapped_column(ID, primary_key=True)
    owner: Mapped[str] = mapped_column(NAME, index=True)
    filename: Mapped[str] = mapped_column(NAME)
    kind: Mapped[str] = mapped_column(String(32))
    name: Mapped[str] = mapped_column(NAME)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    offset: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str | None] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(STATE)
    artifact_id: Mapped[str | None] = mapped_column(ForeignKey("artifacts.id"))
    created_at: Mapped[datetime]


class Node(Base):
    """A host with its devices, as its worker last reported them; `drained` is the operator's wish: no new jobs there."""

    __tablename__ = "nodes"
    name: Mapped[str] = mapped_column(NAME, primary_key=True)
    id: Mapped[str] = mapped_column(ID, unique=True)
    address: Mapped[str] = mapped_column(NAME)
    device_kind: Mapped[str] = mapped_column(String(16))
    devices: Mapped[list[Any]]
    host_jobs: Mapped[int]
    healthy: Mapped[bool]
    reason: Mapped[str | None] = mapped_column(Text)
    drained: Mapped[bool] = mapped_column(default=False, server_default=false())
    version: Mapped[str] = mapped_column(String(40))
    last_seen_at: Mapped[datetime]


class IdempotencyKey(Base):
    """The answer to a POST with `Idempotency-Key`, to be repeated for the same request."""

    __tablename__ = "idempotency_keys"
    owner: Mapped[str] = mapped_column(NAME, primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64))
    status: Mapped[int]
    body: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(index=True)


class Mutex(Base):
    """A named right to do something alone until `expires_at`."""

    __tablename__ = "mutexes"
    name: Mapped[str] = mapped_column(String(40), primary_key=True)
    holder: Mapped[str] = mapped_column(String(64))
    expires_at: Mapped[datetime]
