import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from httpx2 import Response

from api.app import create_app
from api.auth import new_key
from core.db.migrate import upgrade
from core.db.session import Database
from core.jobs.principal import Role
from core.settings import Settings
from core.storage.local import Store
from core.telemetry.logging import configure
from tests.factories import LAYOUT_7B, add_node, hf_7b


@dataclass
class Api:
    """The application, running, with keys of an admin and of two users."""

    client: TestClient
    settings: Settings
    database: Database
    keys: dict[str, str]

    @property
    def store(self) -> Store:
        return Store(self.settings.store_dir)

    def call(self, method: str, url: str, *, by: str | None = "alice", **options: Any) -> Response:
        """A request with the key of `by`; None = anonymous."""
        headers = {"Authorization": f"Bearer {self.keys[by]}"} if by else {}
        return self.client.request(method, url, headers=headers | options.pop("headers", {}), **options)

    def get(self, url: str, **options: Any) -> Response:
        return self.call("GET", url, **options)

    def post(self, url: str, json: Any = None, **options: Any) -> Response:
        return self.call("POST", url, json=json, **options)

    def add_user(self, user: str, role: Role = "user") -> None:
        with self.database.write() as session:
            row, self.keys[user] = new_key(user=user, name="test", role=role)
            session.add(row)

    def conversion(self, **changes: Any) -> dict[str, Any]:
        """A body for POST /v1/jobs that is accepted: a conversion of an artifact that alice owns."""
        with self.database.write() as session:
            source = hf_7b(session)
        spec = {"operation": "hf_to_mm", "source": {"artifact": source.id}, "parallel": LAYOUT_7B}
        return {"kind": "conversion", "spec": spec, **changes}

    def submit(self, *, by: str = "alice", **changes: Any) -> str:
        """Submit a job; its id."""
        answer = self.post("/v1/jobs", self.conversion(**changes), by=by)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])


@pytest.fixture(scope="session")
def migrated_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a migrated, empty SQLite database, to be copied: a migration per test would take longer than the test."""
    home = tmp_path_factory.mktemp("migrated")
    database = Database.from_settings(Settings(home=home))
    upgrade(database)
    database.dispose()
    return home


@pytest.fixture
def settings(tmp_path: Path, migrated_home: Path) -> Settings:
    """Settings of the API under test; override for other limits or another database."""
    home = tmp_path / "home"
    shutil.copytree(migrated_home, home)
    return Settings(home=home, allow_roots=(tmp_path / "allowed",), log_format="json", node_ttl_s=120)


@pytest.fixture
def api(settings: Settings) -> Iterator[Api]:
    configure(settings)
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        database = client.app.state.database  # type: ignore[attr-defined]  # typed as any ASGI application
        admin_key = (settings.home_dir / "admin.key").read_text().strip()
        running = Api(client, settings, database, {"admin": admin_key})
        running.add_user("alice")
        running.add_user("bob")
        add_node(database, settings, devices=8)
        yield running
