"""API keys: `temper_` and 256 random bits; the database keeps only their SHA-256."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from datetime import timedelta
from pathlib import Path
from typing import Annotated

from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import func, or_, select, update
from sqlalchemy.exc import IntegrityError

from core.clock import utcnow
from core.db.models import ApiKey
from core.db.session import Database
from core.errors import Forbidden, Unauthenticated
from core.ids import new_id
from core.jobs.principal import Principal, Role
from core.settings import Settings

PREFIX = "temper_"
_FIRST_KEY_ID = "key_00000000000000000000000000"
"""Id of the first admin key: fixed, so that of two servers that start at once only one makes it."""
_USED_EVERY = timedelta(minutes=1)

_bearer = HTTPBearer(auto_error=False, scheme_name="ApiKey", description="An API key: `temper_…`")


def new_key(*, user: str, name: str, role: Role, key_id: str | None = None) -> tuple[ApiKey, str]:
    """Make a key; return its row and the secret, which exists nowhere else."""
    secret = PREFIX + secrets.token_hex(32)
    row = ApiKey(
        id=key_id or new_id("key"),
        user=user,
        name=name,
        role=role,
        digest=digest_of(secret),
        prefix=secret[: len(PREFIX) + 6],
        created_at=utcnow(),
    )
    return row, secret


def digest_of(secret: str) -> str:
    """What is stored of a key. A fast hash is right: the key is 256 random bits, not a password."""
    return hashlib.sha256(secret.encode()).hexdigest()


def find_principal(database: Database, secret: str) -> Principal:
    """The caller behind a key; Unauthenticated when there is none."""
    digest, now = digest_of(secret), utcnow()
    with database.read() as session:
        key = session.scalars(select(ApiKey).where(ApiKey.digest == digest)).first()
    if key is None or not hmac.compare_digest(key.digest, digest) or key.revoked_at is not None:
        raise Unauthenticated("the API key is not known, or was revoked")
    if key.last_used_at is None or now - key.last_used_at > _USED_EVERY:
        unused = or_(ApiKey.last_used_at.is_(None), ApiKey.last_used_at < now - _USED_EVERY)
        with database.write() as session:
            session.execute(update(ApiKey).where(ApiKey.id == key.id, unused).values(last_used_at=now))
    return Principal(key_id=key.id, user=key.user, role="admin" if key.role == "admin" else "user")


def authenticate(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]
) -> Principal:
    """Dependency: who asks."""
    if credentials is None:
        raise Unauthenticated(
            "no API key came with the request",
            hint="send Authorization: Bearer temper_…; the first key lies in HOME/admin.key on the server",
        )
    principal = find_principal(request.app.state.database, credentials.credentials)
    request.state.user = principal.user
    return principal


def require_admin(principal: Annotated[Principal, Security(authenticate)]) -> Principal:
    """Dependency: who asks, if an admin."""
    if not principal.is_admin:
        raise Forbidden(f"user {principal.user!r} is not an admin", hint="use an admin's key")
    return principal


def ensure_admin_key(database: Database, settings: Settings) -> str | None:
    """Make the first admin key, if there was never any, and write it to HOME/admin.key; return it if it is new."""
    with database.read() as session:
        if session.scalar(select(func.count()).select_from(ApiKey)):
            return None
    row, secret = new_key(user="admin", name="first key", role="admin", key_id=_FIRST_KEY_ID)
    try:
        with database.write() as session:
            session.add(row)
            session.flush()  # a second server waits here, and then fails: the file is written by one only
            write_private(key_path(settings), secret + "\n")
    except IntegrityError:
        return None
    return secret


def key_path(settings: Settings) -> Path:
    """Where the first admin key lies."""
    return settings.home_dir / "admin.key"


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(path)
