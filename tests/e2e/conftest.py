"""One server of each mode for all tests of the road; each test leaves its server in working order."""

from collections.abc import Iterator

import pytest

from api.client import Client
from tests.e2e.service import HASTE, Service
from tests.services import (
    Postgres,
    RedisServer,
    Temper,
    TemperCluster,
    processes_of_home,
    running_postgres,
    running_redis,
)


@pytest.fixture(scope="package")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """`temper serve`."""
    folder = tmp_path_factory.mktemp("embedded")
    server = Temper(folder / "home", allow_roots=[folder], environment=HASTE)
    with server, Client(server.url, server.admin_key) as client:
        service = Service(server, client, folder)
        service.prepare()
        yield service
    assert processes_of_home(server.home) == []


@pytest.fixture(scope="package")
def cluster_database() -> Iterator[Postgres]:
    """A PostgreSQL of the cluster's own, which a test may stop."""
    with running_postgres() as server:
        yield server


@pytest.fixture(scope="package")
def cluster_broker() -> Iterator[RedisServer]:
    """A Redis of the cluster's own, which a test may stop."""
    with running_redis() as server:
        yield server


@pytest.fixture(scope="package")
def cluster(
    tmp_path_factory: pytest.TempPathFactory, cluster_database: Postgres, cluster_broker: RedisServer
) -> Iterator[Service]:
    """`temper api` and two `temper worker`, node-a and node-b."""
    folder = tmp_path_factory.mktemp("cluster")
    server = TemperCluster(
        folder / "home", cluster_database.create_database(), cluster_broker.url, [folder], environment=HASTE
    )
    with server:
        server.start("node-a", "node-b")
        with Client(server.url, server.admin_key) as client:
            service = Service(server, client, folder)
            service.prepare()
            yield service
    assert processes_of_home(server.home) == []


@pytest.fixture(params=["embedded", "cluster"])
def service(request: pytest.FixtureRequest) -> Service:
    """Either mode."""
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Service)
    return found
