"""Artifacts: register, list, get, download by file or as a tar, delete."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from fastapi import APIRouter, BackgroundTasks, Body, Query, Request, Response
from sqlalchemy.orm import Session

from api import examples, queries, ranges
from api.archive import Archive, read_file
from api.deps import After, DatabaseDep, Limit, PrincipalDep, SettingsDep, StoreDep
from api.idempotency import Answer, OnceDep
from api.problems import responses
from api.schemas import ArtifactDetail, ArtifactOut, Page, RegisterRequest, page
from core.db.models import Artifact
from core.db.session import Database
from core.errors import Conflict, Forbidden, NotFound
from core.jobs import service
from core.jobs.principal import Principal
from core.settings import Settings
from core.storage.local import Store
from core.storage.manifest import FileEntry, Manifest

router = APIRouter(prefix="/v1/artifacts", tags=["artifacts"])

_BYTES: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
_RANGE_HEADERS: dict[str, Any] = {
    "ETag": {"description": "Names the content; give it as If-Range.", "schema": {"type": "string"}},
    "Accept-Ranges": {"schema": {"type": "string"}},
}


def _downloads(media_type: str) -> dict[int | str, dict[str, Any]]:
    content = {media_type: _BYTES}
    return {
        200: {"description": "The whole.", "content": content, "headers": _RANGE_HEADERS},
        206: {"description": "The range that was asked for.", "content": content, "headers": _RANGE_HEADERS},
        304: {"description": "You have it already."},
        **responses(404, 409, 416),
    }


@router.post("", status_code=201, response_model=ArtifactDetail, responses=responses(400, 404, 413))
def register_artifact(
    request: Annotated[RegisterRequest, Body(openapi_examples=examples.REGISTER)],
    once: OnceDep,
    principal: PrincipalDep,
    settings: SettingsDep,
    store: StoreDep,
) -> Response:
    """Make an artifact of a folder on the server, under an allow-listed root. It is checked first; its files stay where they are."""

    def effect(session: Session) -> Answer:
        artifact = service.register(
            session,
            settings=settings,
            store=store,
            principal=principal,
            kind=request.kind,
            path=request.path,
            name=request.name,
        )
        detail = ArtifactDetail.read(artifact, store.manifest(artifact.id))
        return Answer(201, detail, {"Location": f"/v1/artifacts/{artifact.id}"})

    return once.run(effect)


@router.get("", response_model=Page[ArtifactOut], responses=responses())
def list_artifacts(
    principal: PrincipalDep,
    database: DatabaseDep,
    kind: Annotated[str | None, Query(pattern=r"^[a-z_]{1,32}$", description="Of this kind.")] = None,
    job: Annotated[str | None, Query(max_length=40, description="Made by this job.")] = None,
    after: After = None,
    limit: Limit = 50,
) -> dict[str, Any]:
    """Your artifacts and the shared ones (an admin's: all), newest first."""
    with database.read() as session:
        found = queries.find_artifacts(session, principal, kind=kind, job=job, after=after, limit=limit)
        return page([ArtifactOut.of(artifact) for artifact in found], limit, lambda artifact: artifact.id)


@router.get("/{artifact_id}", response_model=ArtifactDetail, responses=responses(404))
def get_artifact(artifact_id: str, principal: PrincipalDep, database: DatabaseDep, store: StoreDep) -> Response:
    """One artifact: every file with size and SHA-256, and where it comes from."""
    artifact = _find(database, principal, artifact_id)
    detail = ArtifactDetail.read(artifact, _manifest(store.root, artifact_id))
    return Response(detail.model_dump_json(), media_type="application/json")


@router.delete("/{artifact_id}", status_code=204, responses=responses(403, 404, 409))
def delete_artifact(
    artifact_id: str, principal: PrincipalDep, database: DatabaseDep, store: StoreDep, background: BackgroundTasks
) -> None:
    """Delete an artifact; refused while a job that has not finished uses it. A registered folder's own files are left alone."""
    with database.write() as session:
        artifact = service.get_artifact(session, principal, artifact_id)
        if not (principal.is_admin or artifact.owner == principal.user):
            raise Forbidden(f"artifact {artifact_id} is shared with you; its owner or an admin may delete it")
        service.delete_artifact(session, artifact)
    background.add_task(store.delete, artifact_id)


@router.get(
    "/{artifact_id}/files/{path:path}", response_class=Response, responses=_downloads("application/octet-stream")
)
def download_file(
    artifact_id: str,
    path: str,
    request: Request,
    principal: PrincipalDep,
    database: DatabaseDep,
    store: StoreDep,
    settings: SettingsDep,
) -> Response:
    """One file, or a range of it."""
    artifact = _find(database, principal, artifact_id)
    entry = _entries(store.root, artifact_id).get(path)
    if entry is None:
        raise NotFound(f"artifact {artifact_id} has no file {path!r}")
    return ranges.respond(request, _file_content(artifact, entry, settings))


@router.head(
    "/{artifact_id}/files/{path:path}", response_class=Response, responses=_downloads("application/octet-stream")
)
def head_file(
    artifact_id: str,
    path: str,
    request: Request,
    principal: PrincipalDep,
    database: DatabaseDep,
    store: StoreDep,
    settings: SettingsDep,
) -> Response:
    """Size and ETag of a file."""
    return download_file(artifact_id, path, request, principal, database, store, settings)


@router.get("/{artifact_id}/archive", response_class=Response, responses=_downloads("application/x-tar"))
def download_archive(
    artifact_id: str,
    request: Request,
    principal: PrincipalDep,
    database: DatabaseDep,
    store: StoreDep,
    settings: SettingsDep,
) -> Response:
    """The whole as an uncompressed tar of fixed layout, so that a broken download goes on with `Range`."""
    artifact = _find(database, principal, artifact_id)
    manifest = _manifest(store.root, artifact_id)
    archive = Archive(
        manifest.files,
        mtime=int(manifest.created_at.timestamp()),
        locate=lambda entry: _locate(artifact, entry, settings),
    )
    content = ranges.Content(
        size=archive.size,
        etag=archive.etag,
        filename=f"{artifact.name}.tar",
        media_type="application/x-tar",
        read=archive.read,
    )
    return ranges.respond(request, content)


@router.head("/{artifact_id}/archive", response_class=Response, responses=_downloads("application/x-tar"))
def head_archive(
    artifact_id: str,
    request: Request,
    principal: PrincipalDep,
    database: DatabaseDep,
    store: StoreDep,
    settings: SettingsDep,
) -> Response:
    """Size and ETag of the tar."""
    return download_archive(artifact_id, request, principal, database, store, settings)


def _find(database: Database, principal: Principal, artifact_id: str) -> Artifact:
    with database.read() as session:
        return service.get_artifact(session, principal, artifact_id)


@lru_cache(maxsize=32)
def _manifest(root: Path, artifact_id: str) -> Manifest:
    """A published manifest never changes."""
    return Store(root).manifest(artifact_id)


@lru_cache(maxsize=32)
def _entries(root: Path, artifact_id: str) -> dict[str, FileEntry]:
    return {entry.path: entry for entry in _manifest(root, artifact_id).files}


def _file_content(artifact: Artifact, entry: FileEntry, settings: Settings) -> ranges.Content:
    path = _locate(artifact, entry, settings)
    found = path.stat()
    if found.st_size != entry.size:
        raise Conflict(
            f"file {entry.path!r} was changed after it became an artifact: {found.st_size} bytes instead of {entry.size}"
        )
    version = f"sha256-{entry.sha256}" if entry.sha256 else f"stat-{found.st_size}-{found.st_mtime_ns}"
    return ranges.Content(
        size=entry.size,
        etag=f'"{version}"',
        filename=PurePosixPath(entry.path).name,
        media_type="application/octet-stream",
        read=lambda start, stop: read_file(path, entry.size, start, stop),
        sha256=entry.sha256,
    )


def _locate(artifact: Artifact, entry: FileEntry, settings: Settings) -> Path:
    """The file on disk. A link in a registered folder is followed only to where registering is allowed."""
    root = Path(artifact.path)
    real = (root / entry.path).resolve()
    allowed = (root, *settings.allow_roots)
    if not real.is_file() or not any(real.is_relative_to(folder.expanduser().resolve()) for folder in allowed):
        raise NotFound(f"file {entry.path!r} of artifact {artifact.id} is no longer there")
    return real
