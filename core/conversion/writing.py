"""Writes the files of a conversion, several at a time, and takes up what an earlier attempt finished."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from core.conversion.apply import Findings
from core.conversion.files import make_folder
from core.conversion.journal import Journal, Record
from core.models.hf_folder import listed

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_THREADS = 8
"""More do not help: hashing keeps up with any disk long before, and each may hold RELEASE_BYTES of its source."""


class Watch(Protocol):
    """Hears how a conversion goes on, one call at a time. Any call may raise, which ends it."""

    def begin(self, total_bytes: int, *, to_write: int) -> None:
        """Everything is checked; so many bytes of weights will be gone through, of which so many are still to be written."""

    def advance(self, num_bytes: int) -> None:
        """So many more bytes are done."""

    def wrote(self, file: str, size_bytes: int) -> None:
        """A file is complete."""

    def warn(self, code: str, message: str) -> None:
        """Something that the user should know."""


class Quiet:
    """A watch that does nothing."""

    def begin(self, total_bytes: int, *, to_write: int) -> None:
        """Nothing."""

    def advance(self, num_bytes: int) -> None:
        """Nothing."""

    def wrote(self, file: str, size_bytes: int) -> None:
        """Nothing."""

    def warn(self, code: str, message: str) -> None:
        """Nothing."""


class Abandoned(Exception):
    """Another thread failed; its error is the one to report."""


class SharedWatch:
    """A watch for several threads: one call at a time, and after a failure none goes on."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._lock = threading.Lock()
        self._abandoned = False

    def begin(self, total_bytes: int, *, to_write: int) -> None:
        """Pass it on."""
        self._watch.begin(total_bytes, to_write=to_write)

    def advance(self, num_bytes: int) -> None:
        """Pass it on, unless the work was abandoned."""
        with self._lock:
            if self._abandoned:
                raise Abandoned
            self._watch.advance(num_bytes)

    def wrote(self, file: str, size_bytes: int) -> None:
        """Pass it on."""
        with self._lock:
            self._watch.wrote(file, size_bytes)

    def warn(self, code: str, message: str) -> None:
        """Pass it on."""
        with self._lock:
            self._watch.warn(code, message)

    def abandon(self) -> None:
        """Let every thread end at its next step."""
        with self._lock:
            self._abandoned = True


@dataclass(frozen=True)
class OutFile:
    """A file to be written."""

    path: str
    """Below the target, with forward slashes."""
    size_bytes: int
    """Of its weights."""
    write: Callable[[Path], str]
    """Writes it; returns its SHA-256."""
    findings: Findings = field(default_factory=Findings)


def write_files(
    target: Path, files: Sequence[OutFile], watch: SharedWatch, journal: Journal | None = None
) -> dict[str, str]:
    """Write all but what the journal has; return path -> SHA-256. After the first failure the other threads end too."""
    finished = dict(journal.finished) if journal else {}
    for file in files:
        if file.path in finished:
            watch.advance(file.size_bytes)

    def write(file: OutFile) -> Record:
        path = target / file.path
        make_folder(path.parent)
        digest = file.write(path)
        findings = file.findings
        record = Record(file.path, path.stat().st_size, digest, findings.non_finite, findings.overflowing)
        if journal is not None:
            journal.record(record)
        watch.wrote(file.path, record.size_bytes)
        return record

    todo = [file for file in files if file.path not in finished]
    todo.sort(key=lambda file: -file.size_bytes)  # the long ones first, or one of them runs alone at the end
    for record in in_threads(write, todo, watch):
        finished[record.path] = record
    _warn(watch, list(finished.values()))
    return {file.path: finished[file.path].sha256 for file in files}


def in_threads(work: Callable[[Item], Result], items: Sequence[Item], watch: SharedWatch) -> list[Result]:
    """`work` of each item, as they come; the first failure is raised when all threads have ended."""
    with ThreadPoolExecutor(min(MAX_THREADS, usable_cpus(), max(1, len(items)))) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            return [future.result() for future in as_completed(futures)]
        except BaseException:
            watch.abandon()
            for future in futures:
                future.cancel()
            raise


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _warn(watch: SharedWatch, records: list[Record]) -> None:
    non_finite = sorted({name for record in records for name in record.non_finite})
    if non_finite:
        watch.warn("non_finite_weights", f"NaN or infinite values in {listed(non_finite)}")
    overflowing = sorted({name for record in records for name in record.overflowing})
    if overflowing:
        watch.warn("overflow", f"values too large for the new type became infinite in {listed(overflowing)}")
