"""`Idempotency-Key` on POST (draft-ietf-httpapi-idempotency-key-header): the same request twice has one effect and one answer.

The answer is stored in the transaction that makes the effect. Of two equal requests at once the later one fails on the
key's uniqueness, is rolled back, and gives the first one's answer. Refusals are not stored: they had no effect.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Annotated, Any

from fastapi import Depends, Header, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from sqlalchemy import delete
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from api.auth import authenticate
from core.clock import utcnow
from core.db.models import IdempotencyKey
from core.db.session import Database
from core.errors import InvalidSpec
from core.jobs.principal import Principal

LIFETIME = timedelta(hours=24)
REPLAYED = "Idempotent-Replayed"

KeyHeader = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern=r"^[\x20-\x7e]+$",
        description="The same key with the same body within 24 hours repeats the first answer instead of the effect.",
    ),
]


@dataclass(frozen=True)
class Answer:
    """An answer that can be stored; `replay` replaces the body in later answers (for secrets that are shown once)."""

    status: int
    body: BaseModel
    headers: Mapping[str, str] = field(default_factory=dict)
    replay: BaseModel | None = None

    def response(self) -> Response:
        """As sent now."""
        return JSONResponse(self.body.model_dump(mode="json"), status_code=self.status, headers=dict(self.headers))


@dataclass(frozen=True)
class Once:
    """One POST and its key, if it has one."""

    database: Database
    owner: str
    key: str | None
    fingerprint: str

    def run(self, effect: Callable[[Session], Answer]) -> Response:
        """Have the effect in a transaction of its own, unless this request had it before."""
        if (stored := self.replay()) is not None:
            return stored
        try:
            with self.database.write() as session:
                answer = effect(session)
                self.remember(session, answer)
        except IntegrityError:
            if (stored := self.replay()) is not None:
                return stored
            raise
        return answer.response()

    def replay(self) -> Response | None:
        """The stored answer; InvalidSpec when the key came with another request."""
        if self.key is None:
            return None
        with self.database.read() as session:
            row = session.get(IdempotencyKey, (self.owner, self.key))
        if row is None or row.created_at < utcnow() - LIFETIME:
            return None
        if row.fingerprint != self.fingerprint:
            raise InvalidSpec(
                f"Idempotency-Key {self.key!r} was used before with another request",
                hint="use a new key for a new request",
                code="idempotency_key_reused",
            )
        stored: dict[str, Any] = row.body
        return JSONResponse(stored["body"], status_code=row.status, headers={**stored["headers"], REPLAYED: "true"})

    def remember(self, session: Session, answer: Answer) -> None:
        """Store the answer in the effect's transaction; drop what has expired."""
        if self.key is None:
            return
        session.execute(delete(IdempotencyKey).where(IdempotencyKey.created_at < utcnow() - LIFETIME))
        body = (answer.replay or answer.body).model_dump(mode="json")
        session.add(
            IdempotencyKey(
                owner=self.owner,
                key=self.key,
                fingerprint=self.fingerprint,
                status=answer.status,
                body={"body": body, "headers": dict(answer.headers)},
                created_at=utcnow(),
            )
        )
        session.flush()


async def once(request: Request, principal: Annotated[Principal, Depends(authenticate)], key: KeyHeader = None) -> Once:
    what = f"{request.method} {request.url.path}?{request.url.query}\n".encode() + await request.body()
    return Once(request.app.state.database, principal.user, key, hashlib.sha256(what).hexdigest())


OnceDep = Annotated[Once, Depends(once)]
