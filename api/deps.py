"""What routes ask for, as `Annotated` aliases."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Annotated

from fastapi import Depends, Query, Request
from fastapi.dependencies.models import Dependant

from api.auth import authenticate, require_admin
from core.db.session import Database
from core.errors import InvalidSpec
from core.jobs.principal import Principal
from core.settings import Settings
from core.storage.local import Store


def refuse_unknown_query(request: Request) -> None:
    """Dependency of every route: a filter that is misspelt must not silently match everything."""
    known = set(_queried(request.scope["route"].dependant))
    for name in request.query_params:
        if name not in known:
            likely = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {likely[0]}? " if likely else ""
            raise InvalidSpec(
                f"query.{name}: there is no such parameter here",
                hint=hint + (f"known here: {', '.join(sorted(known))}" if known else "it takes none"),
            )


def _queried(dependant: Dependant) -> Iterator[str]:
    yield from (field.alias for field in dependant.query_params)
    for inner in dependant.dependencies:
        yield from _queried(inner)


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
