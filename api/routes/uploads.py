"""Resumable uploads: begin, ask for the offset, send chunks, complete."""

from __future__ import annotations

from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Body, Header, Request, Response
from sqlalchemy.orm import Session
from starlette.requests import ClientDisconnect

from api import examples, uploads
from api.deps import DatabaseDep, PrincipalDep, SettingsDep, StoreDep
from api.idempotency import Answer, OnceDep
from api.problems import responses
from api.schemas import ArtifactDetail, CompleteRequest, UploadOut, UploadRequest

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])

_OFFSET: dict[str, Any] = {
    "Upload-Offset": {"description": "Where the next chunk starts.", "schema": {"type": "integer"}}
}
_CHUNK: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/offset+octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.post("", status_code=201, response_model=UploadOut, responses=responses(400, 413, 507))
def begin_upload(
    request: Annotated[UploadRequest, Body(openapi_examples=examples.UPLOAD)],
    once: OnceDep,
    principal: PrincipalDep,
    settings: SettingsDep,
    store: StoreDep,
) -> Response:
    """Begin an upload of one archive or file."""

    def effect(session: Session) -> Answer:
        upload = uploads.begin(
            settings,
            store,
            principal,
            filename=request.filename,
            kind=request.kind,
            name=request.name,
            size_bytes=request.size_bytes,
            sha256=request.sha256,
        )
        session.add(upload)
        session.flush()
        return Answer(201, UploadOut.of(upload), {"Location": f"/v1/uploads/{upload.id}", "Upload-Offset": "0"})

    return once.run(effect)


@router.get("/{upload_id}", response_model=UploadOut, responses=responses(404))
def get_upload(upload_id: str, principal: PrincipalDep, database: DatabaseDep) -> UploadOut:
    """An upload and where it stands."""
    return UploadOut.of(uploads.find(database, principal, upload_id))


@router.head(
    "/{upload_id}",
    response_class=Response,
    responses={200: {"description": "Where the upload stands.", "headers": _OFFSET}, **responses(404)},
)
def head_upload(upload_id: str, principal: PrincipalDep, database: DatabaseDep) -> Response:
    """Where the upload stands, as in tus."""
    upload = uploads.find(database, principal, upload_id)
    headers = {
        "Upload-Offset": str(upload.offset),
        "Upload-Length": str(upload.size_bytes),
        "Cache-Control": "no-store",
    }
    return Response(headers=headers)


@router.patch(
    "/{upload_id}",
    status_code=204,
    response_class=Response,
    responses={204: {"description": "The chunk is safe.", "headers": _OFFSET}, **responses(400, 404, 409, 413, 507)},
    openapi_extra=_CHUNK,
)
async def send_chunk(
    upload_id: str,
    request: Request,
    principal: PrincipalDep,
    database: DatabaseDep,
    store: StoreDep,
    upload_offset: Annotated[
        int, Header(ge=0, le=1 << 50, description="Where this chunk starts: the upload's offset.")
    ],
) -> Response:
    """Append a chunk. What arrived of a chunk that broke off counts; ask for the offset and go on from there."""
    upload = await to_thread.run_sync(uploads.find, database, principal, upload_id)
    try:
        offset = await uploads.receive(database, store, upload, upload_offset, request.stream())
    except ClientDisconnect:
        return Response(status_code=400)  # nobody reads it
    return Response(status_code=204, headers={"Upload-Offset": str(offset)})


@router.post(
    "/{upload_id}/complete",
    status_code=201,
    response_model=ArtifactDetail,
    responses=responses(400, 404, 409, 413, 507),
)
def complete_upload(
    upload_id: str,
    once: OnceDep,
    principal: PrincipalDep,
    settings: SettingsDep,
    database: DatabaseDep,
    store: StoreDep,
    request: Annotated[CompleteRequest | None, Body(openapi_examples=examples.COMPLETE)] = None,
) -> Response:
    """Verify, unpack and check the upload, and make an artifact of it. Completing it again gives the same artifact."""
    if (stored := once.replay()) is not None:
        return stored
    upload = uploads.find(database, principal, upload_id)
    artifact = uploads.complete(database, settings, store, principal, upload, request.sha256 if request else None)
    detail = ArtifactDetail.read(artifact, store.manifest(artifact.id))
    return once.run(lambda _: Answer(201, detail, {"Location": f"/v1/artifacts/{artifact.id}"}))


@router.delete("/{upload_id}", status_code=204, responses=responses(404, 409))
def abort_upload(upload_id: str, principal: PrincipalDep, database: DatabaseDep, store: StoreDep) -> None:
    """Forget an upload that is not complete."""
    uploads.abort(database, store, uploads.find(database, principal, upload_id))
