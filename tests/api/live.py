"""The API on a real socket, in a thread: for streams, broken connections, and what a test client does not do."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from api.app import create_app
from core.db.session import Database
from core.settings import Settings
from tests.services import free_port, wait_until


@dataclass
class Live:
    port: int
    key: str
    app: FastAPI
    server: uvicorn.Server
    http: httpx.Client

    @property
    def database(self) -> Database:
        database: Database = self.app.state.database
        return database

    def get(self, url: str, **options: Any) -> httpx.Response:
        return self.http.get(url, **options)

    def post(self, url: str, json: Any = None, **options: Any) -> httpx.Response:
        return self.http.post(url, json=json, **options)


@contextmanager
def running(settings: Settings) -> Iterator[Live]:
    """Serve until the end of the block; the client carries the admin key."""
    app, port = create_app(settings), free_port()
    config = uvicorn.Config(
        app, host="127.0.0.1", port=port, log_config=None, access_log=False, timeout_graceful_shutdown=30
    )
    server = uvicorn.Server(config)
    app.state.stopping = lambda: server.should_exit
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started, timeout_s=120, what="the start of the API")
        key = (settings.home_dir / "admin.key").read_text().strip()
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {key}"}, timeout=60
        ) as client:
            yield Live(port, key, app, server, client)
    finally:
        server.should_exit = True
        thread.join(timeout=60)
