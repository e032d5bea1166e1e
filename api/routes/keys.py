"""API keys, for admins."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Response
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from api import auth, examples
from api.deps import AdminDep, After, DatabaseDep, Limit
from api.idempotency import Answer, OnceDep
from api.problems import responses
from api.schemas import KeyOut, KeyRequest, NewKeyOut, Page, page
from core.clock import utcnow
from core.db.models import ApiKey
from core.errors import Conflict, NotFound

router = APIRouter(prefix="/v1/keys", tags=["keys"], dependencies=[Depends(auth.require_admin)])


@router.get("", response_model=Page[KeyOut], responses=responses(403))
def list_keys(database: DatabaseDep, after: After = None, limit: Limit = 50) -> dict[str, Any]:
    """All keys, newest first, revoked ones too; never their secrets."""
    with database.read() as session:
        query = select(ApiKey).order_by(ApiKey.id.desc()).limit(limit + 1)
        found = session.scalars(query.where(ApiKey.id < after) if after else query).all()
    return page([KeyOut.of(key) for key in found], limit, lambda key: key.id)


@router.post("", status_code=201, response_model=NewKeyOut, responses=responses(400, 403, 413))
def create_key(
    request: Annotated[KeyRequest, Body(openapi_examples=examples.KEY)], admin: AdminDep, once: OnceDep
) -> Response:
    """Make a key. Its secret is in this answer and nowhere else: a repetition by Idempotency-Key leaves it out."""

    def effect(session: Session) -> Answer:
        row, secret = auth.new_key(user=request.user or admin.user, name=request.name, role=request.role)
        session.add(row)
        session.flush()
        shown = KeyOut.of(row).model_dump()
        headers = {"Location": f"/v1/keys/{row.id}"}
        return Answer(201, NewKeyOut(**shown, key=secret), headers, replay=NewKeyOut(**shown, key=None))

    return once.run(effect)


@router.get("/{key_id}", response_model=KeyOut, responses=responses(403, 404))
def get_key(key_id: str, database: DatabaseDep) -> KeyOut:
    """One key."""
    with database.read() as session:
        return KeyOut.of(_find(session, key_id))


@router.delete("/{key_id}", status_code=204, responses=responses(403, 404, 409))
def revoke_key(key_id: str, database: DatabaseDep) -> None:
    """Revoke a key. The last admin's key stays."""
    with database.write() as session:
        key = _find(session, key_id)
        if key.revoked_at is not None:
            return
        admins = session.scalar(
            select(func.count()).select_from(ApiKey).where(ApiKey.role == "admin", ApiKey.revoked_at.is_(None))
        )
        if key.role == "admin" and admins == 1:
            raise Conflict(f"key {key_id} is the last admin's key", hint="make another admin's key first")
        key.revoked_at = utcnow()


def _find(session: Session, key_id: str) -> ApiKey:
    key = session.get(ApiKey, key_id)
    if key is None:
        raise NotFound(f"no key {key_id}")
    return key
