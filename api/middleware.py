"""Around every request, as pure ASGI: its id, the body limit, the last resort for errors, the access log and the latency metric."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import MutableMapping
from typing import Any

import structlog
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.problems import from_unexpected, problem_response
from core.settings import Settings
from core.telemetry.logging import bind_request
from core.telemetry.metrics import HTTP_SECONDS

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_CHUNK_PATH = re.compile(r"/v1/uploads/[^/]+")
_QUIET_PATHS = ("/healthz", "/readyz", "/metrics")

log = structlog.get_logger(__name__)


class RequestMiddleware:
    """The outermost layer: nothing leaves without a request id, and no exception leaves at all."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, limit=self._limit(scope))
        started = time.perf_counter()
        with bind_request(exchange.request_id):
            try:
                if exchange.announces_too_much:
                    await exchange.refuse_body()
                else:
                    await self.app(scope, exchange.receive, exchange.send)
            except Exception as error:  # the edge of the process: the caller gets a problem, the log the traceback
                response = from_unexpected(exchange.request_id, error)
                if exchange.status is not None:
                    raise  # too late for an answer: cut the connection, so that the client sees a truncated one
                await response(scope, receive, exchange.send)
            finally:
                _record(scope, exchange.status, time.perf_counter() - started)

    def _limit(self, scope: Scope) -> int:
        is_chunk = scope["method"] == "PATCH" and _CHUNK_PATH.fullmatch(scope["path"])
        return self.settings.max_chunk_bytes if is_chunk else self.settings.max_body_bytes


class _Exchange:
    """One request: counts the body as it is read, and marks the answer with the request's id."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, limit: int) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._limit, self._received = limit, 0
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        self.request_id = given.decode() if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        self.status: int | None = None
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        state["request_id"] = self.request_id
        announced = headers.get(b"content-length", b"0")
        self.announces_too_much = announced.isdigit() and int(announced) > limit

    async def receive(self) -> Message:
        """The next part of the body; 413 once it is too much."""
        message = await self._receive()
        self._received += len(message.get("body", b""))
        if self._received > self._limit:
            raise HTTPException(413, self._too_much())
        return message

    async def send(self, message: Message) -> None:
        """Send on, with the request id."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", []), (b"x-request-id", self.request_id.encode())]
        await self._send(message)

    async def refuse_body(self) -> None:
        """Answer 413 before anything of the body is read."""
        response = problem_response(
            self.request_id, status=413, code="too_large", detail=self._too_much(), headers={"Connection": "close"}
        )
        await response(self._scope, self._receive, self.send)

    def _too_much(self) -> str:
        return f"the request body is larger than {self._limit} bytes"


def _record(scope: Scope, status: int | None, seconds: float) -> None:
    route = getattr(scope.get("route"), "path", None) or "unmatched"
    HTTP_SECONDS.labels(scope["method"], route, str(status or 0)).observe(seconds)
    facts = {
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "ms": round(seconds * 1000, 1),
        "user": scope.get("state", {}).get("user"),
    }
    if scope["path"] in _QUIET_PATHS:
        log.debug("http.request", **facts)
    else:
        log.info("http.request", **facts)
