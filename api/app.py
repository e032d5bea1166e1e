"""The web application. It never loads torch; everything that touches a device happens in other processes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
from fastapi import Depends, FastAPI
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline

import core
from api import problems
from api.auth import ensure_admin_key, key_path
from api.deps import refuse_unknown_query
from api.middleware import RequestMiddleware
from api.routes import artifacts, cluster, families, health, jobs, keys, streams, uploads
from core.db.migrate import upgrade
from core.db.session import Database
from core.settings import Settings
from core.storage.local import Store

_STREAM_THREADS = 16
_DESCRIPTION = """
Fine-tunes multimodal models on Ascend NPUs: convert weights, build a data set, train, evaluate, export.

Errors are RFC 9457 problem details with a stable `code`, a `detail` that names field and value, and a `hint` that says what
would work. Lists come in pages: give `next` as `after`. Every POST accepts `Idempotency-Key`.
"""
_ROUTERS = (jobs, streams, artifacts, uploads, families, cluster, keys, health)


def create_app(settings: Settings) -> FastAPI:
    """Build the application; its lifespan opens the database, brings it to the newest schema and makes the first admin key."""
    app: FastAPI = FastAPIOffline(  # /docs with its scripts served from here: a cluster has no road to a CDN
        docs_url="/docs",
        redoc_url=None,
        title="Temper",
        version=core.__version__,
        description=_DESCRIPTION,
        lifespan=_lifespan,
        generate_unique_id_function=_operation_id,
    )
    app.state.settings = settings
    app.state.store = Store(settings.store_dir)
    app.state.stopping = lambda: False
    problems.install(app)
    for module in _ROUTERS:
        app.include_router(module.router, dependencies=[Depends(refuse_unknown_query)])
    app.add_middleware(RequestMiddleware, settings=settings)
    _describe_errors(app)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.database = await anyio.to_thread.run_sync(open_database, app.state.settings)
    app.state.stream_limiter = anyio.CapacityLimiter(_STREAM_THREADS)
    try:
        yield
    finally:
        app.state.database.dispose()


def open_database(settings: Settings) -> Database:
    """Open the database, migrate it and see that there is an admin key; tell where a new one lies."""
    for folder in (settings.home_dir, settings.store_dir):
        folder.mkdir(parents=True, exist_ok=True)
    database = Database.from_settings(settings)
    upgrade(database)
    secret = ensure_admin_key(database, settings)
    if secret is not None:
        print(f"Admin key (shown this once; also in {key_path(settings)}): {secret}", flush=True)  # noqa: T201  for the operator
    return database


def _operation_id(route: APIRoute) -> str:
    return route.name


def _describe_errors(app: FastAPI) -> None:
    """Put the `Problem` schema, to which the routes' error answers refer, into the OpenAPI document."""
    build = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = build()
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            problem = problems.Problem.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(problem.pop("$defs"), Problem=problem)
            for unused in ("HTTPValidationError", "ValidationError"):
                schemas.pop(unused, None)
        return app.openapi_schema or build()

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI documents this as the way to extend it
