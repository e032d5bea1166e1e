"""A typed client of the HTTP API (the contract: README, `/docs`): used by the CLI, the demo and the end-to-end tests.

Connection errors and 5xx answers are retried: on GET always; on POST because every POST carries an Idempotency-Key,
which makes the second one harmless. Answers are read leniently: fields that this version does not know are kept.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ConfigDict

from api.transfer import (
    BLOCK_BYTES,
    PART_SUFFIX,
    Download,
    OnBytes,
    Source,
    TransferError,
    is_complete,
    open_source,
    sha256_of,
    target_path,
)

TERMINAL_STATES = frozenset({"succeeded", "failed", "cancelled"})
CHUNK_BYTES = 8 << 20
_RETRIED_STATUSES = frozenset({429, 500, 502, 503, 504})


# What the server answers


class Resource(BaseModel):
    """Anything the API answers; unknown fields are kept."""

    model_config = ConfigDict(extra="allow")


class Progress(Resource):
    done: float
    total: float | None = None
    unit: str = ""
    rate: float | None = None
    remaining_s: float | None = None


class Problem(Resource):
    code: str
    message: str = ""
    hint: str | None = None


class Attempt(Resource):
    number: int
    state: str
    placement: list[dict[str, Any]] = []
    started_at: str | None = None
    finished_at: str | None = None
    exit: Any = None


class Output(Resource):
    name: str
    artifact_id: str


class Job(Resource):
    id: str
    kind: str
    state: str
    name: str | None = None
    labels: dict[str, str] = {}
    owner: str | None = None
    priority: int = 0
    reason: str | None = None
    spec: dict[str, Any] = {}
    progress: Progress | None = None
    latest_metrics: dict[str, Any] = {}
    risks: list[str] = []
    inputs: list[Any] = []
    outputs: list[Output] = []
    error: Problem | None = None
    attempts: list[Attempt] = []
    created_at: str | None = None
    started_at: str | None = None
    finished_at: str | None = None

    @property
    def finished(self) -> bool:
        return self.state in TERMINAL_STATES

    def output(self, name: str) -> str:
        """Artifact id of the output `name`; KeyError names what there is."""
        for output in self.outputs:
            if output.name == name:
                return output.artifact_id
        raise KeyError(f"{self.id} has no output {name!r}; it has {[output.name for output in self.outputs]}")


class FileEntry(Resource):
    path: str
    size: int
    sha256: str | None = None


class Artifact(Resource):
    id: str
    kind: str
    name: str | None = None
    size_bytes: int = 0
    num_files: int = 0
    files: list[FileEntry] = []
    metadata: dict[str, Any] = {}
    created_at: str | None = None


class Upload(Resource):
    id: str
    offset: int = 0


class Key(Resource):
    id: str
    user: str | None = None
    name: str | None = None
    role: str
    key: str | None = None
    """The secret itself; only in the answer that made it."""


class Event(Resource):
    """One thing that happened to a job: `type` is state, progress, metric, log, …; `data` holds its facts."""

    id: str | None = None
    type: str
    data: dict[str, Any] = {}


@dataclass(frozen=True)
class LogChunk:
    content: bytes
    next_offset: int
    complete: bool


# Errors


class ClientError(Exception):
    """Anything that keeps a call from being answered as asked."""

    hint: str | None = None


class ApiError(ClientError):
    """The server refused or failed: RFC 9457 problem details."""

    def __init__(self, status: int, problem: Mapping[str, Any]) -> None:
        self.status = status
        self.code = str(problem.get("code", f"http_{status}"))
        self.detail = str(problem.get("detail") or problem.get("title") or f"HTTP {status}")
        self.hint = problem.get("hint")
        self.request_id = problem.get("request_id")
        self.errors: list[dict[str, Any]] = list(problem.get("errors") or [])
        super().__init__(self.detail)


class ServerUnreachable(ClientError):
    """No connection, after all retries."""


_Model = TypeVar("_Model", bound=Resource)


class Client:
    """Talks to one Temper server. A context manager; every method raises ClientError.

    `retry_s` bounds how long a call is retried while the server is away or answers 5xx.
    """

    def __init__(self, url: str, api_key: str | None = None, *, retry_s: float = 30, timeout_s: float = 60) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.url = url.rstrip("/")
        self.retry_s = retry_s
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=httpx.Timeout(timeout_s, connect=10))

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # Jobs

    def submit(
        self,
        kind: str,
        spec: Mapping[str, Any],
        *,
        name: str | None = None,
        labels: Mapping[str, str] | None = None,
        priority: int | None = None,
        max_attempts: int | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """Submit a job. With the same `idempotency_key` twice, the second answer is the first job again."""
        body = _without_none(
            kind=kind, spec=spec, name=name, labels=labels, priority=priority, max_attempts=max_attempts
        )
        return self._post(Job, "/v1/jobs", body, idempotency_key=idempotency_key)

    def plan(self, kind: str, spec: Mapping[str, Any]) -> dict[str, Any]:
        """What the job would need and do; nothing is stored."""
        return self._post(Resource, "/v1/jobs/plan", {"kind": kind, "spec": spec}).model_dump()

    def job(self, job_id: str) -> Job:
        return self._get(Job, f"/v1/jobs/{job_id}")

    def jobs(self, *, limit: int | None = None, **filters: str | None) -> Iterator[Job]:
        """Newest first, over all pages; filters: kind, state, label, owner, name, created_after, created_before."""
        return self._pages(Job, "/v1/jobs", limit=limit, **filters)

    def cancel(self, job_id: str) -> Job:
        return self._post(Job, f"/v1/jobs/{job_id}/cancel")

    def retry(self, job_id: str) -> Job:
        return self._post(Job, f"/v1/jobs/{job_id}/retry")

    def wait(self, job_id: str, *, timeout_s: float | None = None, every_s: float = 0.5) -> Job:
        """The job once it has finished; TimeoutError after `timeout_s`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not (job := self.job(job_id)).finished:
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"{job_id} is still {job.state} after {timeout_s:.0f} s")
            time.sleep(every_s)
        return job

    def history(self, job_id: str) -> Iterator[Event]:
        """Every stored event of the job, oldest first."""
        for item in self._pages(Resource, f"/v1/jobs/{job_id}/events"):
            yield _event(item.model_dump())

    def events(self, job_id: str, *, last_event_id: str | None = None) -> Iterator[Event]:
        """Follow a job until it has finished: every event once, in order, over any number of broken connections.

        The server's `end` event says that the job has finished and all was sent; a stream that stops without it (the
        connection broke, the stream was old, the server restarted) is opened again after the last event that came.
        """
        deadline = time.monotonic() + self.retry_s
        while True:
            try:
                for event in self._event_stream(job_id, last_event_id):
                    if event.type == "end":
                        return
                    last_event_id = event.id or last_event_id
                    deadline = time.monotonic() + self.retry_s
                    yield event
            except httpx.TransportError as error:
                if time.monotonic() > deadline:
                    raise self._unreachable(error) from error
            except ApiError as error:
                if error.status not in _RETRIED_STATUSES or time.monotonic() > deadline:
                    raise
            time.sleep(0.2)

    def logs(
        self,
        job_id: str,
        *,
        offset: int | None = None,
        limit: int | None = None,
        tail: int | None = None,
        attempt: int | None = None,
        rank: int | None = None,
    ) -> LogChunk:
        """A piece of the log from byte `offset`, or its last `tail` lines."""
        query = _without_none(offset=offset, limit=limit, tail=tail, attempt=attempt, rank=rank)
        response = self._request("GET", f"/v1/jobs/{job_id}/logs", params=query)
        next_offset = int(response.headers.get("Temper-Next-Offset", (offset or 0) + len(response.content)))
        return LogChunk(response.content, next_offset, response.headers.get("Temper-Complete", "true") == "true")

    def follow_logs(
        self,
        job_id: str,
        *,
        offset: int = 0,
        attempt: int | None = None,
        rank: int | None = None,
        follow: bool = True,
        every_s: float = 0.5,
    ) -> Iterator[bytes]:
        """The log from `offset`, in pieces, until it is complete (or, without `follow`, until what there is now)."""
        while True:
            chunk = self.logs(job_id, offset=offset, attempt=attempt, rank=rank)
            offset = chunk.next_offset
            if chunk.content:
                yield chunk.content
            elif chunk.complete or not follow:
                return
            else:
                time.sleep(every_s)

    def metrics(
        self,
        job_id: str,
        *,
        names: Sequence[str] | None = None,
        since_step: int | None = None,
        max_points: int | None = None,
    ) -> dict[str, list[tuple[int, Any, float | None]]]:
        """Series by name: (step, time, value), oldest first."""
        query = _without_none(names=",".join(names) if names else None, since_step=since_step, max_points=max_points)
        answer = self._request("GET", f"/v1/jobs/{job_id}/metrics", params=query).json()
        return {name: [(point[0], point[1], point[2]) for point in points] for name, points in answer["series"].items()}

    # Artifacts

    def artifact(self, artifact_id: str) -> Artifact:
        return self._get(Artifact, f"/v1/artifacts/{artifact_id}")

    def artifacts(self, *, limit: int | None = None, **filters: str | None) -> Iterator[Artifact]:
        return self._pages(Artifact, "/v1/artifacts", limit=limit, **filters)

    def delete_job(self, job_id: str, *, artifacts: bool = False) -> None:
        """Delete a finished job; with `artifacts` also what it made."""
        self._request("DELETE", f"/v1/jobs/{job_id}", params={"artifacts": "true"} if artifacts else None)

    def delete_artifact(self, artifact_id: str) -> None:
        self._request("DELETE", f"/v1/artifacts/{artifact_id}")

    def register(self, kind: str, path: str | Path, *, name: str | None = None) -> Artifact:
        """Make an artifact of a folder that the server sees under an allow-listed root; nothing is copied."""
        return self._post(
            Artifact, "/v1/artifacts", _without_none(kind=kind, path=str(path), name=name), timeout_s=None
        )

    def upload(
        self,
        kind: str,
        path: Path,
        *,
        name: str | None = None,
        resume: str | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        on_bytes: OnBytes = lambda *_: None,
        on_start: Callable[[str], None] = lambda _: None,
    ) -> Artifact:
        """Send a file, or a folder as a tar, and make an artifact of it.

        `on_start` is told the upload's id; given as `resume`, it continues where the server stopped receiving.
        """
        source = open_source(path)
        if resume:
            upload = self._get(Upload, f"/v1/uploads/{resume}")
        else:
            body = _without_none(kind=kind, name=name, filename=source.filename, size_bytes=source.size)
            upload = self._post(Upload, "/v1/uploads", body)
        on_start(upload.id)
        digest = self._send(source, upload, chunk_bytes=chunk_bytes, on_bytes=on_bytes)
        return self._post(Artifact, f"/v1/uploads/{upload.id}/complete", {"sha256": digest}, timeout_s=None)

    def download(
        self, artifact_id: str, folder: Path, *, names: Sequence[str] | None = None, on_bytes: OnBytes = lambda *_: None
    ) -> Download:
        """Fetch an artifact (or the files `names` of it) into `folder`.

        Files that are there and right are left alone; a file that was begun goes on where it stopped; every SHA-256 is
        checked before the file gets its name.
        """
        artifact = self.artifact(artifact_id)
        wanted = [entry for entry in artifact.files if names is None or entry.path in names]
        if missing := set(names or ()) - {entry.path for entry in wanted}:
            raise TransferError(f"{artifact_id} holds no {', '.join(sorted(missing))}")
        total, done, report = sum(entry.size for entry in wanted), 0, Download()
        for entry in wanted:
            target = target_path(folder, entry.path)
            if not is_complete(target, size=entry.size, sha256=entry.sha256):
                told = partial(_within, on_bytes, done, total, entry.path)
                report.fetched_bytes += self._fetch(artifact_id, entry, target, told)
            done += entry.size
            on_bytes(done, total, entry.path)
            report.files, report.size = report.files + 1, report.size + entry.size
            if entry.sha256 is None:
                report.unverified.append(entry.path)
        return report

    # Keys and the cluster

    def api_keys(self) -> Iterator[Key]:
        return self._pages(Key, "/v1/keys")

    def create_key(self, name: str, *, user: str | None = None, role: str = "user") -> Key:
        """A new key, ours or another user's; its secret is in this answer only."""
        return self._post(Key, "/v1/keys", _without_none(name=name, user=user, role=role))

    def delete_key(self, key_id: str) -> None:
        self._request("DELETE", f"/v1/keys/{key_id}")

    def families(self) -> list[Resource]:
        return list(self._pages(Resource, "/v1/families"))

    def nodes(self) -> list[Resource]:
        return list(self._pages(Resource, "/v1/nodes"))

    def drain_node(self, name: str) -> Resource:
        """No new jobs there; running ones go on."""
        return self._post(Resource, f"/v1/nodes/{quote(name, safe='')}/drain")

    def resume_node(self, name: str) -> Resource:
        return self._post(Resource, f"/v1/nodes/{quote(name, safe='')}/resume")

    def forget_node(self, name: str) -> None:
        self._request("DELETE", f"/v1/nodes/{quote(name, safe='')}")

    def queue(self) -> dict[str, Any]:
        return self._get(Resource, "/v1/queue").model_dump()

    # How it is done

    def _send(self, source: Source, upload: Upload, *, chunk_bytes: int, on_bytes: OnBytes) -> str:
        """Send `source` from where the server is; the SHA-256 of the whole."""
        digest, position, size = hashlib.sha256(), 0, source.size
        while position < upload.offset:  # sent before: hashed again, not sent again
            block = source.read(position, min(BLOCK_BYTES, upload.offset - position))
            digest.update(block)
            position += len(block)
        while position < size:
            block = source.read(position, chunk_bytes)
            if not block:
                raise TransferError(f"{source.path} became shorter while it was sent")
            self._send_block(upload.id, position, block)
            digest.update(block)
            position += len(block)
            on_bytes(position, size, source.filename)
        return digest.hexdigest()

    def _send_block(self, upload_id: str, position: int, block: bytes) -> None:
        """PATCH until the server has all of the block; after a broken connection it says how much of it had arrived."""
        end, deadline = position + len(block), time.monotonic() + self.retry_s
        start = position
        while start < end:
            headers = {"Upload-Offset": str(start), "Content-Type": "application/offset+octet-stream"}
            try:
                response = self._http.patch(
                    f"/v1/uploads/{upload_id}", content=block[start - position :], headers=headers
                )
            except httpx.TransportError as error:
                if time.monotonic() > deadline:
                    raise self._unreachable(error) from error
                start = self._get(Upload, f"/v1/uploads/{upload_id}").offset
            else:
                if response.status_code in _RETRIED_STATUSES and time.monotonic() < deadline:
                    time.sleep(0.5)
                    start = self._get(Upload, f"/v1/uploads/{upload_id}").offset
                    continue
                _raise_for(response)
                start = int(response.headers.get("Upload-Offset", end))
            if not position <= start <= end:
                raise TransferError(
                    f"upload {upload_id} stands at {start}, outside {position} to {end}: somebody else writes to it"
                )

    def _fetch(self, artifact_id: str, entry: FileEntry, target: Path, on_bytes: Callable[[int], None]) -> int:
        """Fetch one file, from where an earlier try stopped; the number of bytes that came over the wire."""
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + PART_SUFFIX)
        resumed = part.exists() and 0 < part.stat().st_size <= entry.size
        if not resumed:
            part.unlink(missing_ok=True)
        fetched = self._fetch_into(part, f"/v1/artifacts/{artifact_id}/files/{quote(entry.path)}", entry.size, on_bytes)
        if part.stat().st_size != entry.size or (entry.sha256 and sha256_of(part) != entry.sha256):
            part.unlink()
            if not resumed:
                raise TransferError(
                    f"{entry.path} arrived with the wrong content: SHA-256 or size differ from {artifact_id}'s manifest"
                )
            return fetched + self._fetch(
                artifact_id, entry, target, on_bytes
            )  # what was there before was something else
        part.rename(target)
        return fetched

    def _fetch_into(self, part: Path, url: str, size: int, on_bytes: Callable[[int], None]) -> int:
        deadline, fetched = time.monotonic() + self.retry_s, 0
        part.touch()
        while (have := part.stat().st_size) < size:
            try:
                with self._http.stream(
                    "GET", url, headers={"Accept-Encoding": "identity", "Range": f"bytes={have}-"}
                ) as response:
                    if response.status_code in _RETRIED_STATUSES and time.monotonic() < deadline:
                        time.sleep(0.5)
                        continue
                    if response.is_error:
                        response.read()
                        _raise_for(response)
                    if response.status_code != httpx.codes.PARTIAL_CONTENT:
                        have = 0
                    with part.open("r+b") as sink:
                        sink.seek(have)
                        sink.truncate()
                        for block in response.iter_raw():  # as it comes: a fixed size would drop the piece before a cut
                            sink.write(block)
                            have, fetched = have + len(block), fetched + len(block)
                            on_bytes(have)
                            deadline = time.monotonic() + self.retry_s
                    if have < size:
                        raise TransferError(f"{url} ended at byte {have} of {size}")
            except httpx.TransportError as error:
                if time.monotonic() > deadline:
                    raise self._unreachable(error) from error
                time.sleep(0.5)
        return fetched

    def _event_stream(self, job_id: str, last_event_id: str | None) -> Iterator[Event]:
        headers = {"Accept": "text/event-stream"}
        if last_event_id is not None:
            headers["Last-Event-ID"] = last_event_id
        timeout = httpx.Timeout(60, connect=10)  # the server sends a comment at least every 15 s
        with self._http.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers, timeout=timeout) as response:
            if response.is_error:
                response.read()
                _raise_for(response)
            yield from parse_sse(response.iter_lines())

    def _get(self, model: type[_Model], url: str, **query: Any) -> _Model:
        return model.model_validate(self._request("GET", url, params=_without_none(**query)).json())

    def _post(
        self,
        model: type[_Model],
        url: str,
        body: Mapping[str, Any] | None = None,
        *,
        idempotency_key: str | None = None,
        timeout_s: float | None = 60,
    ) -> _Model:
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        timeout = httpx.Timeout(timeout_s, connect=10)
        return model.model_validate(self._request("POST", url, json=body, headers=headers, timeout=timeout).json())

    def _pages(
        self, model: type[_Model], url: str, *, limit: int | None = None, **filters: str | None
    ) -> Iterator[_Model]:
        count, after = 0, None
        while limit is None or count < limit:
            size = min(limit - count, 100) if limit is not None else None
            page = self._request("GET", url, params=_without_none(limit=size, after=after, **filters)).json()
            for item in page["data"]:
                yield model.model_validate(item)
                count += 1
            after = page.get("next")
            if not page.get("has_more") or after is None:
                return

    def _request(self, method: str, url: str, **options: Any) -> httpx.Response:
        deadline, pause_s = time.monotonic() + self.retry_s, 0.1
        repeatable = method in {"GET", "HEAD", "DELETE"} or "Idempotency-Key" in (options.get("headers") or {})
        while True:
            late = time.monotonic() + pause_s > deadline
            try:
                response = self._http.request(method, url, **options)
            except httpx.TransportError as error:
                if late or not repeatable:
                    raise self._unreachable(error) from error
            else:
                if response.status_code not in _RETRIED_STATUSES or late or not repeatable:
                    return _raise_for(response)
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, 2)

    def _unreachable(self, error: httpx.TransportError) -> ServerUnreachable:
        unreachable = ServerUnreachable(f"no answer from {self.url}: {error or type(error).__name__}")
        unreachable.hint = "is the server running (`temper serve`), and is TEMPER_URL its address?"
        return unreachable


def parse_sse(lines: Iterator[str]) -> Iterator[Event]:
    """Server-sent events (WHATWG HTML §9.2) with JSON data; comments and events without data are left out."""
    kind, identifier, data = "message", None, list[str]()
    for line in lines:
        if line:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            match name:
                case "event":
                    kind = value
                case "id":
                    identifier = value
                case "data":
                    data.append(value)
                case _:
                    pass  # a comment (empty name), `retry`, or a field of a later standard
            continue
        if data:
            yield _event({"id": identifier, "type": kind, "data": json.loads("\n".join(data))})
        kind, data = "message", []


def _within(on_bytes: OnBytes, before: int, total: int, name: str, size: int) -> None:
    on_bytes(before + size, total, name)


def _event(fields: Mapping[str, Any]) -> Event:
    """An event from the JSON history or the stream; facts beside `data` are taken into it."""
    data = fields.get("data")
    facts = dict(data) if isinstance(data, Mapping) else {"value": data} if data is not None else {}
    beside = {name: value for name, value in fields.items() if name not in {"id", "type", "data"}}
    identifier = fields.get("id")
    return Event(id=None if identifier is None else str(identifier), type=str(fields["type"]), data={**beside, **facts})


def _raise_for(response: httpx.Response) -> httpx.Response:
    """The response itself when it is a success; ApiError otherwise."""
    if not response.is_error:
        return response
    try:
        problem = response.json()
    except ValueError:
        problem = {"detail": response.text[:500] or response.reason_phrase}
    raise ApiError(response.status_code, problem if isinstance(problem, dict) else {"detail": str(problem)})


def _without_none(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
