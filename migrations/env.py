"""Alembic's entry: migrate the database of `core.settings`, or the connection that the caller hands over."""

from __future__ import annotations

from alembic import context
from sqlalchemy.engine import Connection

import core.db.models  # noqa: F401  (fills the metadata)
from core.db.base import Base
from core.db.session import Database
from core.settings import Settings


def _run(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True, compare_type=True)
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    _run(given)
else:
    with Database.from_settings(Settings()).engine.begin() as fresh:
        _run(fresh)
