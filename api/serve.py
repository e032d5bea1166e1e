"""`temper serve` (API and worker on this machine, watched by one process) and `temper api` (the API alone)."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import http.client
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import structlog
import uvicorn
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from api.app import create_app, open_database
from api.auth import key_path
from core.db.models import Lease
from core.db.session import Database
from core.settings import Settings
from core.telemetry.logging import configure

_POLL_S = 0.1
_STABLE_S = 30.0
_MAX_BACKOFF_S = 30.0
_STOP_GRACE_S = 10.0
_STREAM_GRACE_S = 3
_PR_SET_PDEATHSIG = 1

log = structlog.get_logger(__name__)


def main(
    *,
    home: Path | None = None,
    host: str | None = None,
    port: int | None = None,
    allow_roots: Sequence[Path] | None = None,
) -> None:
    """`temper serve`: the environment's settings, with what the command line says on top."""
    given = {"home": home, "host": host, "port": port, "allow_roots": tuple(allow_roots) if allow_roots else None}
    serve(Settings(**{name: value for name, value in given.items() if value is not None}))  # type: ignore[arg-type]


def run_api(settings: Settings | None = None, *, host: str | None = None, port: int | None = None) -> None:
    """`temper api`: serve HTTP until TERM or INT; event streams end at once, other requests get a few seconds."""
    given = {"host": host, "port": port}
    base = settings or Settings()
    settings = base.model_copy(update={name: value for name, value in given.items() if value is not None})
    _refuse_exposure(settings)
    configure(settings)
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_STREAM_GRACE_S,
    )
    server = uvicorn.Server(config)
    app.state.stopping = lambda: server.should_exit
    listener = _listen(settings)
    log.info("api.listening", url=_url(settings.host, listener.getsockname()[1]))
    server.run(sockets=[listener])
    if not server.started:
        raise SystemExit(1)


def serve(settings: Settings) -> None:
    """Start API and worker, restart what dies, until TERM or INT. Trainings that run go on without them."""
    _refuse_exposure(settings)
    configure(settings)
    settings.home_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _alone(settings), _signals() as stopped:
        open_database(settings).dispose()
        settings = settings.model_copy(
            update={"home": settings.home_dir, "port": settings.port or _free_port(settings)}
        )
        url = _url(settings.host, settings.port)
        children = [Child("api", ["-m", "api.serve"], settings), Child("worker", ["-m", "worker"], settings)]
        server_file = settings.home_dir / "server.json"
        try:
            for child in children:
                child.start()
            announced = False
            while not stopped():
                for child in children:
                    child.watch()
                if not announced and _answers(settings):
                    server_file.write_text(json.dumps({"url": url, "pid": os.getpid()}), encoding="utf-8")
                    _say(f"Temper serves {url} (docs: {url}/docs); the admin key lies in {key_path(settings)}")
                    announced = True
                time.sleep(_POLL_S)
        finally:
            server_file.unlink(missing_ok=True)
            _stop_all(children)
        _say(_farewell(settings))


@dataclass
class Child:
    """A process of ours that is started again when it dies, later and later while it dies at once."""

    name: str
    arguments: list[str]
    settings: Settings
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    restart_at: float = 0.0
    failures: int = field(default=0)

    def start(self) -> None:
        """Start it, in a process group of its own (so that Ctrl-C reaches us alone) that ends with us."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("TEMPER_")}
        parent = os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, *self.arguments],
            env={**inherited, **self.settings.environment()},
            stdin=subprocess.DEVNULL,
            preexec_fn=lambda: _become_child(parent),
        )
        self.started_at = time.monotonic()

    def watch(self) -> None:
        """Start it again if it has died and its pause is over."""
        now = time.monotonic()
        if self.process is None:
            if now >= self.restart_at:
                self.start()
            return
        code = self.process.poll()
        if code is None:
            return
        self.failures = 1 if now - self.started_at > _STABLE_S else self.failures + 1
        pause = min(0.25 * 2**self.failures, _MAX_BACKOFF_S)
        log.error("child.died", child=self.name, exit_code=code, again_in_s=pause)
        self.process, self.restart_at = None, now + pause

    def terminate(self) -> None:
        """Ask it to end."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def reap(self, deadline: float) -> None:
        """Wait until it has ended; make it end at the deadline."""
        if self.process is None:
            return
        try:
            self.process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.warning("child.killed", child=self.name)
            self.process.kill()
            self.process.wait()


def _become_child(parent: int) -> None:
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def _stop_all(children: Sequence[Child]) -> None:
    for child in children:
        child.terminate()
    deadline = time.monotonic() + _STOP_GRACE_S
    for child in children:
        child.reap(deadline)


def _farewell(settings: Settings) -> str:
    database = Database.from_settings(settings)
    try:
        with database.read() as session:
            running = session.scalar(
                select(func.count(Lease.attempt_id.distinct())).where(
                    Lease.state == "held", Lease.node == settings.node_name
                )
            )
    except SQLAlchemyError as error:
        return f"Temper has stopped; the database does not say what still runs: {str(error).splitlines()[0]}"
    finally:
        database.dispose()
    if not running:
        return "Temper has stopped; no job runs on this host."
    jobs = "1 running job goes" if running == 1 else f"{running} running jobs go"
    return f"Temper has stopped; {jobs} on without it. `temper serve` finds them again; cancel them first to stop them."


def _refuse_exposure(settings: Settings) -> None:
    """Embedded mode stays on this machine."""
    if settings.embedded and not _is_loopback(settings.host):
        raise SystemExit(
            f"temper: host {settings.host} is not a loopback address, and embedded mode is for this machine alone; use 127.0.0.1, "
            "or set TEMPER_DATABASE_URL and TEMPER_BROKER_URL (cluster mode) to serve a network"
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise SystemExit(f"temper: cannot listen on {settings.host}:{settings.port}: {error.strerror}") from None
    return listener


def _free_port(settings: Settings) -> int:
    with contextlib.closing(_listen(settings)) as probe:
        return int(probe.getsockname()[1])


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _answers(settings: Settings) -> bool:
    connection = http.client.HTTPConnection(settings.host, settings.port, timeout=2)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


@contextlib.contextmanager
def _alone(settings: Settings) -> Iterator[IO[str]]:
    """One `temper serve` per home."""
    with (settings.home_dir / "serve.lock").open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"temper: another `temper serve` runs on {settings.home_dir}") from None
        yield lock


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Within: TERM and INT set a flag instead of ending the process; yields how to ask for it."""
    received: list[int] = []

    def note(number: int, _frame: Any) -> None:
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201  the program's own words to its operator


if __name__ == "__main__":
    run_api()
