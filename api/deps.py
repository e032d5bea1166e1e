"""What routes ask for, as `Annotated` aliases."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Query, Request

from api.auth import authenticate, require_admin
from core.db.session import Database
from core.jobs.principal import Principal
from core.settings import Settings
from core.storage.local import Store


def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


def _database(request: Request) -> Database:
    database: Database = request.app.state.database
    return database


def _store(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


SettingsDep = Annotated[Settings, Depends(_settings)]
DatabaseDep = Annotated[Database, Depends(_database)]
StoreDep = Annotated[Store, Depends(_store)]
PrincipalDep = Annotated[Principal, Depends(authenticate)]
AdminDep = Annotated[Principal, Depends(require_admin)]

Limit = Annotated[int, Query(ge=1, le=500, description="Entries per page.")]
After = Annotated[str | None, Query(max_length=200, description="`next` of the page before.")]
