from collections.abc import Iterator
from pathlib import Path

import pytest

from core.db.migrate import upgrade
from core.db.session import Database
from core.settings import Settings


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A migrated database, once on SQLite and once on PostgreSQL."""
    opened = Database(database_url, pool_size=5)
    upgrade(opened)
    yield opened
    opened.dispose()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", allow_roots=(tmp_path,))
