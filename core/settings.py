"""All settings, read from the environment once; the only reader of `TEMPER_*`.

Embedded mode is what the defaults give: SQLite and a file-system broker under `home`. Cluster mode is `database_url`
(PostgreSQL) and `broker_url` (Redis) set, with `store` on a file system that all hosts share.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


class Settings(BaseSettings):
    """Settings of every process; each field is the environment variable `TEMPER_<FIELD>`."""

    model_config = SettingsConfigDict(env_prefix="TEMPER_", frozen=True, extra="ignore")

    home: Path = Field(
        Path("~/.temper"), description="Folder of the embedded database, broker, artifacts, logs and admin key."
    )
    store: Path | None = Field(
        None, description="Artifact store and job folders; HOME/store if absent. Shared by all hosts."
    )
    database_url: str | None = Field(None, description="SQLAlchemy URL; SQLite under HOME if absent.")
    broker_url: str | None = Field(None, description="Celery broker URL (redis://…); files under HOME if absent.")
    host: str = Field("127.0.0.1", description="Address that the API binds to.")
    port: int = Field(8400, ge=0, le=65535, description="Port of the API; 0 = a free one.")
    allow_roots: Annotated[tuple[Path, ...], NoDecode] = Field(
        (), description="Folders (separated by `:`) that artifacts may be registered from."
    )

    node_name: str = Field(default_factory=socket.gethostname, description="Name of this host in the cluster.")
    node_address: str = Field("127.0.0.1", description="Address at which other hosts reach this one's rendezvous.")
    device_kind: Literal["auto", "npu", "cuda", "cpu"] = Field("auto", description="What this host trains on.")
    devices: int | None = Field(
        None, ge=0, le=1024, description="Devices to offer; detected if absent (CPU: one per core, at least 2)."
    )
    reserve_after_s: float = Field(
        600.0, ge=0, description="Seconds after which free devices are kept for a queued job that has not fitted yet."
    )
    host_jobs: int = Field(
        2, ge=1, le=256, description="Jobs without a device (conversion, dataset) that run here at once."
    )
    max_user_jobs: int | None = Field(None, ge=1, description="Most unfinished jobs of one user; no limit if absent.")
    max_user_devices: int | None = Field(
        None, ge=1, description="Most devices that one user's jobs hold at once, others wait; no limit if absent."
    )

    heartbeat_s: float = Field(
        2.0, gt=0, description="Seconds between lease renewals and between looks at the cancel flag."
    )
    lease_ttl_s: float = Field(60.0, gt=0, description="Seconds after which an unrenewed lease is void.")
    fence_margin_s: float = Field(5.0, ge=0, description="Seconds after a lease's end before its devices are given on.")
    start_timeout_s: float = Field(60.0, gt=0, description="Seconds for a host to take up a job placed on it.")
    stop_grace_s: float = Field(60.0, gt=0, description="Seconds between TERM and KILL of a cancelled job.")
    node_ttl_s: float = Field(20.0, gt=0, description="Seconds after which a silent host gets no more jobs.")
    tick_s: float = Field(1.0, gt=0, description="Seconds between runs of the scheduler.")
    ship_s: float = Field(0.25, gt=0, description="Seconds between shipments of events and log to the database.")
    max_log_bytes: int = Field(
        256 << 20, ge=1 << 16, description="Most that is kept of a log of an attempt; beyond it only the last 64 KiB."
    )

    stall_limit_s: float = Field(
        1800.0,
        gt=0,
        description="Seconds without progress after which a training fails as stalled; 4 times as many for start and checkpoints.",
    )
    peak_tflops: float | None = Field(
        None,
        gt=0,
        description="10^12 operations per second that one device can do, for MFU; if absent, known for common devices at bf16.",
    )

    max_body_bytes: int = Field(8 << 20, ge=1024, description="Largest JSON request body.")
    max_chunk_bytes: int = Field(64 << 20, ge=1024, description="Largest upload chunk.")
    max_upload_bytes: int = Field(1 << 40, ge=1, description="Largest upload.")
    upload_ttl_s: float = Field(
        7 * 86400.0, gt=0, description="Seconds after which an upload that was not completed is removed."
    )
    keep_checkpoints_s: float = Field(
        7 * 86400.0,
        gt=0,
        description="Seconds for which a failed or cancelled training can go on from its checkpoints.",
    )
    max_unpacked_bytes: int = Field(4 << 40, ge=1, description="Most bytes that an archive may unpack to.")
    max_unpacked_files: int = Field(2_000_000, ge=1, description="Most files that an archive may hold.")
    max_unpack_ratio: float = Field(200.0, gt=1, description="Largest ratio of unpacked to packed size.")
    hash_limit_bytes: int = Field(
        2 << 30, ge=0, description="Registered folders up to this size are hashed at registration."
    )
    sse_lifetime_s: float = Field(3600.0, gt=0, description="Longest life of one event stream; the client resumes.")
    log_format: Literal["json", "console"] = Field("console", description="Form of the service's own logs.")

    @field_validator("allow_roots", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part for part in value.split(os.pathsep) if part) if isinstance(value, str) else value

    @property
    def home_dir(self) -> Path:
        """The home folder, absolute."""
        return self.home.expanduser().absolute()

    @property
    def store_dir(self) -> Path:
        """The artifact store and job folders, absolute."""
        return (self.store or self.home_dir / "store").expanduser().absolute()

    @property
    def sqlalchemy_url(self) -> str:
        """The database URL in force."""
        return self.database_url or f"sqlite:///{self.home_dir / 'temper.db'}"

    @property
    def embedded(self) -> bool:
        """True when no broker server is configured."""
        return self.broker_url is None

    def environment(self) -> dict[str, str]:
        """The `TEMPER_*` variables with which a child process reads these very settings."""
        return {f"TEMPER_{name.upper()}": _as_env(value) for name, value in self if value is not None}


def _as_env(value: object) -> str:
    return os.pathsep.join(map(str, value)) if isinstance(value, tuple) else str(value)
