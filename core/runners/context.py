"""What a runner gets (spec, inputs, folders) and how it talks back (events, artifacts, the stop flag)."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import core
from core.clock import utcnow
from core.errors import AppError
from core.ids import new_id
from core.specs.events import ArtifactReady, Failed, MetricPoint, Progress, Started, Warned
from core.storage.local import Store
from core.storage.manifest import Lineage, Manifest, describe

EXIT_STOPPED = 75
"""Exit code of a runner that stopped because it was told to (EX_TEMPFAIL of sysexits.h)."""


class Stopped(Exception):
    """The runner was asked to stop and has put its state in order."""


@dataclass(frozen=True)
class InputArtifact:
    """An input of the job: a folder and what its manifest says of it."""

    artifact_id: str | None
    kind: str
    path: Path
    metadata: dict[str, Any]


@dataclass
class RunContext:
    """One rank's view of the attempt. Events are written by rank 0 alone; elsewhere the calls do nothing."""

    job_id: str
    attempt: int
    kind: str
    spec: BaseModel
    inputs: dict[str, InputArtifact]
    job_dir: Path
    attempt_dir: Path
    store: Store
    device: str = "cpu"
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    allow_roots: tuple[Path, ...] = ()
    log: logging.Logger = field(default_factory=lambda: logging.getLogger("temper.runner"))
    _stop: threading.Event = field(default_factory=threading.Event)
    _last_progress: tuple[float, float] | None = None

    @property
    def is_main(self) -> bool:
        """True on the rank that speaks for all."""
        return self.rank == 0

    def install_signals(self) -> None:
        """From now on TERM sets the stop flag instead of ending the process."""
        signal.signal(signal.SIGTERM, lambda *_: self._stop.set())

    def should_stop(self) -> bool:
        """True once the job is to stop; the runner then saves what it has and raises `Stopped`."""
        return self._stop.is_set()

    def started(self) -> None:
        """Tell that the work begins."""
        self.emit(Started(time=time.time()))

    def progress(self, done: float, total: float | None, unit: str) -> None:
        """Tell how far the work is; the rate is taken over the time since the first call."""
        now = time.time()
        first_time, first_done = self._last_progress = self._last_progress or (now, done)
        rate = (done - first_done) / (now - first_time) if now - first_time > 0.05 else None
        self.emit(Progress(time=now, done=done, total=total, unit=unit, rate=rate))

    def metric(self, step: int, **values: float) -> None:
        """Tell the values of metrics at `step`; a value that is not finite becomes null."""
        finite = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
        self.emit(MetricPoint(time=time.time(), step=step, values=finite))

    def warn(self, code: str, message: str) -> None:
        """Tell the user of something that does not stop the job."""
        self.log.warning("%s: %s", code, message)
        self.emit(Warned(time=time.time(), code=code, message=message))

    def failed(self, error: AppError, *, in_place_of_rank_0: bool = False) -> None:
        """Tell why the runner gives up; `in_place_of_rank_0` where that can tell nothing any more."""
        event = Failed(time=time.time(), code=error.code, message=error.message, hint=error.hint)
        if in_place_of_rank_0:
            self._append(event)
        else:
            self.emit(event)

    def new_artifact(self, name: str, kind: str) -> ArtifactWriter:
        """Begin an output (rank 0 only); write below `.path`, then `.commit()`."""
        return ArtifactWriter(self, name=name, kind=kind)

    def spec_sha256(self) -> str:
        """Digest of the spec, for lineage."""
        return hashlib.sha256(json.dumps(self.spec.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    def emit(self, event: BaseModel) -> None:
        """Append one event to the attempt's `events.jsonl` (rank 0 only)."""
        if self.is_main:
            self._append(event)

    def _append(self, event: BaseModel) -> None:
        line = event.model_dump_json().encode() + b"\n"
        descriptor = os.open(self.attempt_dir / "events.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)


def unexpected(error: Exception) -> AppError:
    """What the user is told of an error that is none of theirs."""
    return AppError(f"{type(error).__name__}: {error}", hint="the job's log has the traceback", code="runner_error")


class ArtifactWriter:
    """An output being written under a temporary name; nobody sees it before `commit`.

    A context manager that removes what was written when its body fails.
    """

    def __init__(self, ctx: RunContext, *, name: str, kind: str) -> None:
        self._ctx, self.name, self.kind = ctx, name, kind
        self.id = new_id("art")
        self.path = ctx.store.begin(self.id)

    def commit(
        self, metadata: dict[str, Any], *, parents: Iterable[str] = (), digests: dict[str, str] | None = None
    ) -> str:
        """Hash, sync, rename and announce the artifact; return its id.

        `digests` gives the SHA-256 (by relative path) of files that were hashed while they were written. Inputs of the
        job that are artifacts are parents without being named.
        """
        ctx = self._ctx
        inputs = [item.artifact_id for item in ctx.inputs.values() if item.artifact_id]
        manifest = Manifest(
            id=self.id,
            kind=self.kind,
            name=self.name,
            created_at=utcnow(),
            files=describe(self.path, digests=digests),
            metadata=metadata,
            lineage=Lineage(
                job_id=ctx.job_id,
                attempt=ctx.attempt,
                spec_sha256=ctx.spec_sha256(),
                code_version=core.__version__,
                parents=sorted({*inputs, *parents}),
            ),
        )
        ctx.store.publish(manifest)
        ctx.log.info(
            "artifact %s (%s) is ready: %d files, %d bytes",
            self.name,
            self.id,
            len(manifest.files),
            manifest.size_bytes,
        )
        ctx.emit(
            ArtifactReady(
                time=time.time(),
                artifact_id=self.id,
                name=self.name,
                kind=self.kind,
                size_bytes=manifest.size_bytes,
                num_files=len(manifest.files),
                metadata=metadata,
                parents=manifest.lineage.parents,
            )
        )
        return self.id

    def __enter__(self) -> ArtifactWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._ctx.store.abort(self.id)
