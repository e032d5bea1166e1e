"""Fixtures that every test may ask for. Servers are started at their first use and once per session."""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from core.db.migrate import upgrade
from core.db.session import Database
from core.settings import Settings
from tests.services import REPOSITORY, Postgres, RedisServer, running_postgres, running_redis

# The same examples in every run, and no time limit on one: a loaded machine must not make a test fail, and CI must not find what
# nobody changed. To look for more: pytest --hypothesis-profile=explore
hypothesis.settings.register_profile(
    "steady", deadline=None, derandomize=True, database=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("steady")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


@pytest.fixture(scope="session")
def postgres_url(postgres: Postgres) -> str:
    """The maintenance database of the private cluster; make your own in it, or ask for `database_url`."""
    return postgres.url


@pytest.fixture(scope="session")
def _redis_server() -> Iterator[RedisServer]:
    with running_redis() as server:
        yield server


@pytest.fixture
def redis(_redis_server: RedisServer) -> RedisServer:
    """A running, empty Redis that the test may stop, start and restart."""
    _redis_server.start()
    _redis_server.flush()
    return _redis_server


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/temper.db"


@pytest.fixture
def fresh_postgres_url(postgres: Postgres) -> Iterator[str]:
    url = postgres.create_database()
    yield url
    postgres.drop_database(url)


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest) -> str:
    """An empty database of each kind; the test runs on both."""
    fixture = {"sqlite": "sqlite_url", "postgres": "fresh_postgres_url"}[request.param]
    return str(request.getfixturevalue(fixture))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real tokenizer, photos and records from outside the repository (TEMPER_TEST_DATA, default ../shared/data)."""
    folder = Path(os.environ.get("TEMPER_TEST_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(
            f"no test data at {folder}; set TEMPER_TEST_DATA to the folder that holds qwen2-tokenizer/ and cc12m/"
        )
    return folder.resolve()


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A migrated database, once on SQLite and once on PostgreSQL."""
    opened = Database(database_url, pool_size=5)
    upgrade(opened)
    yield opened
    opened.dispose()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings of a home of its own; folders below `tmp_path` may be registered. A host that was reported stays alive for the test."""
    return Settings(home=tmp_path / "home", allow_roots=(tmp_path,), node_ttl_s=120)
