"""Bring a database to the newest schema."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config

import migrations
from core.db.session import Database


def upgrade(database: Database, revision: str = "head") -> None:
    """Run all migrations up to `revision`; concurrent callers wait for one another (SQLite's or a PostgreSQL lock)."""
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    with database.engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7302839)")
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
