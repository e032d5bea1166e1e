"""Whether the service lives, whether a job can run, and its metrics; without authentication."""

from __future__ import annotations

from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import structlog
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from fastapi import APIRouter, Request, Response
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

import migrations
from api.deps import DatabaseDep, SettingsDep
from api.problems import FieldError, problem_response, request_id_of, responses
from api.schemas import HealthOut
from core.clock import utcnow
from core.db.models import Node
from core.db.session import Database
from core.settings import Settings
from core.telemetry.metrics import scrape

router = APIRouter(tags=["health"])
log = structlog.get_logger(__name__)


@router.get("/healthz", response_model=HealthOut)
def healthz() -> HealthOut:
    """200 while the process answers."""
    return HealthOut()


@router.get("/readyz", response_model=HealthOut, responses={503: responses()[503]})
def readyz(request: Request, settings: SettingsDep, database: DatabaseDep) -> Response:
    """200 when a job can run; else 503 with what is missing."""
    missing = _missing(database, settings)
    if not missing:
        return Response(HealthOut().model_dump_json(), media_type="application/json")
    return problem_response(
        request_id_of(request),
        status=503,
        code="not_ready",
        detail="; ".join(f"{name}: {message}" for name, message in missing.items()),
        errors=[FieldError(loc=[name], message=message) for name, message in missing.items()],
        headers={"Retry-After": "1"},
    )


@router.get(
    "/metrics", response_class=Response, responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
)
def prometheus_metrics(settings: SettingsDep, database: DatabaseDep) -> Response:
    """Prometheus metrics."""
    now = utcnow()
    try:
        with database.read() as session:
            text = scrape(session, now=now, node_ttl_s=settings.node_ttl_s)
    except SQLAlchemyError as error:
        log.warning("metrics.database.unavailable", error=str(error).splitlines()[0])
        text = scrape(None, now=now, node_ttl_s=settings.node_ttl_s)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _missing(database: Database, settings: Settings) -> dict[str, str]:
    """What keeps a job from running, by part."""
    try:
        with database.engine.connect() as connection:
            heads = set(MigrationContext.configure(connection).get_current_heads())
        if heads != _newest():
            return {"migrations": f"the database is at {_name(heads)}, this version needs {_name(_newest())}"}
        with database.read() as session:
            seen_after = utcnow() - timedelta(seconds=settings.node_ttl_s)
            if session.scalars(select(Node.name).where(Node.healthy, Node.last_seen_at > seen_after).limit(1)).first():
                return {}
            known = session.scalars(select(Node).order_by(Node.name)).all()
    except SQLAlchemyError as error:
        log.warning("readiness.database.unavailable", error=str(error).splitlines()[0])
        return {"database": "it does not answer"}
    silent = "; ".join(
        f"{node.name}: {node.reason or 'not heard of since ' + node.last_seen_at.isoformat()}" for node in known
    )
    return {
        "nodes": f"no healthy host was heard of in the last {settings.node_ttl_s:g} s ({silent or 'no worker ever registered'})"
    }


@lru_cache(maxsize=1)
def _newest() -> set[str]:
    return set(ScriptDirectory(str(Path(migrations.__file__).parent)).get_heads())


def _name(heads: set[str]) -> str:
    return ", ".join(sorted(heads)) or "nothing"
