"""An HTTP server that answers what a test tells it to: refusals, broken connections, and other things that are rare."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    """Answers by a table of `METHOD path` patterns; remembers what was asked."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.split("?")[0]
        self.server.seen.append((self.command, self.path, dict(self.headers), body))
        for pattern, answer in self.server.answers.items():
            method, _, expression = pattern.partition(" ")
            if method == self.command and re.fullmatch(expression, path):
                answer(self, body)
                return
        self.reply(404, {"code": "not_found", "detail": f"no {path}"})

    do_GET = do_POST = do_PATCH = do_DELETE = _serve  # names given by http.server

    def reply(self, status: int, body: object, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def reply_cut(self, status: int, content: bytes, announced: int, **headers: str) -> None:
        """Announce more than is sent, then cut the connection."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(announced))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


Answer = Callable[[Handler, bytes], None]


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, Answer] = {}
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def asked(self, method: str) -> list[tuple[str, str, dict[str, str], bytes]]:
        return [request for request in self.seen if request[0] == method]


@contextmanager
def running() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def in_turn(*answers: Answer) -> Answer:
    """One answer after the other; the last one for good."""
    rest = list(answers)
    return lambda handler, body: (rest.pop(0) if len(rest) > 1 else rest[0])(handler, body)


def says(status: int, body: object, **headers: str) -> Answer:
    return lambda handler, _: handler.reply(status, body, **headers)
