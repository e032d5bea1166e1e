"""Real servers for the tests: PostgreSQL, Redis and Temper itself, each private, on a free port, and gone afterwards.

`python -m tests.services` installs the Debian packages that are missing (root or sudo) and checks that they are there.
Nothing on a standard port is used, started or touched: while apt installs, services are kept from starting.

Every process is started with a parent-death signal, so that a killed pytest leaves none behind.
"""

import contextlib
import ctypes
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import psutil
import psycopg
import redis

REPOSITORY = Path(__file__).resolve().parent.parent
DEBIAN_PACKAGES = {"postgres": "postgresql", "redis-server": "redis-server"}
_POLICY = Path("/usr/sbin/policy-rc.d")


class MissingProgram(RuntimeError):
    """A server that the tests need is not installed and could not be installed; the message says what to do."""


# Programs


def find_program(name: str) -> Path | None:
    """The newest `name` of Debian's PostgreSQL folders, else the one on the PATH."""
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: float(path.parts[-3]))
    if versions:
        return versions[-1]
    found = shutil.which(name)
    return Path(found) if found else None


def require_program(name: str) -> Path:
    program = find_program(name)
    if program is None:
        install_missing()
        program = find_program(name)
    if program is None:
        raise MissingProgram(
            f"{name} is not installed; install it, or run `make test` as root or with sudo on Debian or Ubuntu"
        )
    return program


def install_missing() -> list[str]:
    """Install by apt what is missing; return the packages. Raises MissingProgram when that is not possible."""
    packages = [package for program, package in DEBIAN_PACKAGES.items() if find_program(program) is None]
    if not packages:
        return []
    as_root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if not shutil.which("apt-get") or (as_root and not shutil.which("sudo")):
        raise MissingProgram(
            f"the tests need {' and '.join(packages)}: install them, or run once as root on Debian or Ubuntu"
        )
    print(f"installing {', '.join(packages)} for the tests (they will not be started as services)", file=sys.stderr)
    with _services_kept_from_starting(as_root):
        environment = [*as_root, "env", "DEBIAN_FRONTEND=noninteractive"]
        install = [*environment, "apt-get", "install", "-qy", "--no-install-recommends", *packages]
        subprocess.run([*environment, "apt-get", "update", "-q"], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(install, check=True, stdout=subprocess.DEVNULL)
    return packages


@contextlib.contextmanager
def _services_kept_from_starting(as_root: Sequence[str]) -> Iterator[None]:
    """Debian asks policy-rc.d before it starts a new service; 101 means: do not. An existing policy is left alone."""
    if _POLICY.exists():
        yield
        return
    subprocess.run(
        [*as_root, "tee", str(_POLICY)], input=b"#!/bin/sh\nexit 101\n", stdout=subprocess.DEVNULL, check=True
    )
    subprocess.run([*as_root, "chmod", "755", str(_POLICY)], check=True)
    try:
        yield
    finally:
        subprocess.run([*as_root, "rm", "-f", str(_POLICY)], check=True)


def free_port() -> int:
    """A port that nobody listens on, below those that the kernel gives to outgoing connections: it is still free after a restart."""
    for _ in range(1000):
        port = random.randrange(10_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("1000 ports in a row are taken")


def wait_until(condition: Callable[[], bool], *, timeout_s: float, what: str, every_s: float = 0.05) -> None:
    """Poll until `condition()` holds; raises TimeoutError naming `what`. For what other processes do."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {timeout_s:.0f} s")
        time.sleep(every_s)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not reaped does not."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def _die_with_parent(signum: int) -> Callable[[], None]:
    libc = ctypes.CDLL(None, use_errno=True)
    pr_set_pdeathsig = 1
    return lambda: libc.prctl(pr_set_pdeathsig, signum, 0, 0, 0)


# PostgreSQL


@dataclass
class Postgres:
    """A private cluster in a temporary folder, trusting its own loopback port. `url` is SQLAlchemy's form."""

    folder: Path
    port: int
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        return self.database_url("postgres")

    def database_url(self, name: str) -> str:
        return f"postgresql+psycopg://temper@127.0.0.1:{self.port}/{name}"

    def start(self) -> None:
        postgres = require_program("postgres")
        owner = _unprivileged_user()
        if not (self.folder / "PG_VERSION").exists():
            command = [
                str(postgres.with_name("initdb")),
                "-D",
                str(self.folder),
                "-U",
                "temper",
                "--auth=trust",
                "--encoding=UTF8",
                "--locale=C",
                "--no-sync",
            ]
            subprocess.run(command, check=True, capture_output=True, cwd="/", **owner)
        # Durability is of no use in a folder that is deleted afterwards.
        settings = {
            "listen_addresses": "127.0.0.1", "port": self.port, "unix_socket_directories": self.folder,
            "max_connections": 200, "shared_buffers": "32MB",
            "fsync": "off", "synchronous_commit": "off", "full_page_writes": "off",
        }  # fmt: skip
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(postgres), "-D", str(self.folder), *options],
                stdout=log,
                stderr=log,
                cwd="/",
                preexec_fn=_die_with_parent(signal.SIGINT),
                **owner,
            )
        wait_until(self._answers, timeout_s=120, what=f"PostgreSQL on port {self.port}")

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)  # fast shutdown: cut the sessions
            self.process.wait(timeout=120)
            self.process = None

    def create_database(self) -> str:
        """A new empty database; its URL."""
        name = f"temper_{uuid.uuid4().hex[:12]}"
        self._execute(f'CREATE DATABASE "{name}"')
        return self.database_url(name)

    def drop_database(self, url: str) -> None:
        self._execute(f'DROP DATABASE IF EXISTS "{url.rpartition("/")[2]}" WITH (FORCE)')

    def _connect(self) -> "psycopg.Connection[tuple[object, ...]]":
        return psycopg.connect(
            host="127.0.0.1", port=self.port, user="temper", dbname="postgres", autocommit=True, connect_timeout=5
        )

    def _execute(self, statement: str) -> None:
        with contextlib.closing(self._connect()) as connection:
            connection.execute(statement)  # names are made above, not taken from outside

    def _answers(self) -> bool:
        if self.process is not None and self.process.poll() is not None:
            raise RuntimeError(f"PostgreSQL ended at its start:\n{(self.folder / 'server.log').read_text()[-2000:]}")
        try:
            self._connect().close()
        except psycopg.OperationalError:
            return False
        return True


def _unprivileged_user() -> dict[str, Any]:
    """How root starts a process that refuses root: as the system user postgres, or nobody. Empty for anybody else."""
    if os.geteuid() != 0:
        return {}
    user = _user_entry()
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _user_entry() -> pwd.struct_passwd:
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")


@contextlib.contextmanager
def running_postgres() -> Iterator[Postgres]:
    require_program("postgres")  # its package makes the user that the folder is given to
    folder = Path(tempfile.mkdtemp(prefix="temper-pg-"))
    if os.geteuid() == 0:
        user = _user_entry()
        os.chown(folder, user.pw_uid, user.pw_gid)
    server = Postgres(folder, free_port())
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


# Redis


@dataclass
class RedisServer:
    """A private Redis that never evicts and keeps nothing: a stop loses every message, the hardest case for Temper."""

    folder: Path
    port: int
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        if self.is_running:
            return
        settings = {
            "bind": "127.0.0.1", "port": self.port, "dir": self.folder, "logfile": self.folder / "redis.log",
            "save": "", "appendonly": "no", "maxmemory-policy": "noeviction", "daemonize": "no",
        }  # fmt: skip
        options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        self.process = subprocess.Popen(
            [str(require_program("redis-server")), *options],
            stdout=subprocess.DEVNULL,
            preexec_fn=_die_with_parent(signal.SIGTERM),
        )
        wait_until(self._answers, timeout_s=120, what=f"Redis on port {self.port}")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()  # as a power cut would
            self.process.wait()
            self.process = None

    def restart(self) -> None:
        self.stop()
        self.start()

    def flush(self) -> None:
        with contextlib.closing(redis.Redis(port=self.port)) as client:
            client.flushall()

    def _answers(self) -> bool:
        try:
            with contextlib.closing(redis.Redis(port=self.port)) as client:
                return bool(client.ping())
        except redis.ConnectionError:
            return False


@contextlib.contextmanager
def running_redis() -> Iterator[RedisServer]:
    with tempfile.TemporaryDirectory(prefix="temper-redis-", ignore_cleanup_errors=True) as folder:
        server = RedisServer(Path(folder), free_port())
        try:
            server.start()
            yield server
        finally:
            server.stop()


# Temper


@dataclass
class Temper:
    """`temper serve` as a real process: API and worker on a free port, with its own home. A context manager.

    A second `start()` on the same home is a restart: the same port, the same key, the same jobs.
    """

    home: Path
    allow_roots: Sequence[Path] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def admin_key(self) -> str:
        return (self.home / "admin.key").read_text().strip()

    @property
    def output(self) -> str:
        """What the process has printed so far."""
        return _read(self.home / "serve.out")

    def start(self, *, timeout_s: float = 120) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        roots = [word for root in self.allow_roots for word in ("--allow-root", str(root))]
        arguments = ["serve", "--home", str(self.home), "--port", str(self.port), *roots]
        self.process = start_temper(
            arguments, home=self.home, environment=self.environment, output=self.home / "serve.out"
        )
        wait_until_ready(self.url, self.process, self.home / "serve.out", timeout_s=timeout_s)

    def stop(self) -> None:
        """TERM, and then nothing of this home is left: neither workers nor detached supervisors and runners."""
        stop_process(self.process)
        self.process = None
        kill_home(self.home)

    def crash(self) -> None:
        """KILL to everything at once, as when the machine loses its power; `start()` is the reboot."""
        assert self.process is not None
        kill_home(self.home)
        self.process.wait(timeout=120)
        self.process = None

    def __enter__(self) -> "Temper":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


@dataclass
class TemperCluster:
    """Cluster mode on one machine: `temper api` and any number of `temper worker`, each with its own node name."""

    home: Path
    database_url: str
    broker_url: str
    allow_roots: Sequence[Path] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    api: "subprocess.Popen[bytes] | None" = None
    workers: "dict[str, subprocess.Popen[bytes]]" = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def admin_key(self) -> str:
        return (self.home / "admin.key").read_text().strip()

    def start(self, *node_names: str, timeout_s: float = 120) -> None:
        """The API, then a worker for each name, until every one of them has registered and a job can run."""
        self.start_api()
        for name in node_names:
            self.start_worker(name)
        assert self.api is not None
        wait_until_ready(self.url, self.api, self.home / "api.out", timeout_s=timeout_s)
        for name in node_names:
            self.wait_for_node(name, timeout_s=timeout_s)

    def wait_for_node(self, name: str, *, timeout_s: float = 120) -> None:
        """Until the cluster counts the host of that name among those that take work."""
        headers = {"Authorization": f"Bearer {self.admin_key}"}

        def takes_work() -> bool:
            nodes = httpx.get(f"{self.url}/v1/nodes", headers=headers, timeout=20).json()["data"]
            return any(node["name"] == name and node["alive"] and node["healthy"] for node in nodes)

        wait_until(takes_work, timeout_s=timeout_s, what=f"the registration of {name}")

    def start_api(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        arguments = ["api", "--port", str(self.port)]
        self.api = start_temper(
            arguments, home=self.home, environment=self._environment(), output=self.home / "api.out"
        )

    def start_worker(self, node_name: str) -> None:
        environment = {**self._environment(), "TEMPER_NODE_NAME": node_name}
        output = self.home / f"worker-{node_name}.out"
        self.workers[node_name] = start_temper(["worker"], home=self.home, environment=environment, output=output)

    def kill_worker(self, node_name: str) -> None:
        """-9 to the Celery worker and its pool; what it had started and detached lives on."""
        process = self.workers.pop(node_name)
        kill_tree(process.pid)
        process.wait()

    def stop_api(self) -> None:
        stop_process(self.api)
        self.api = None

    def stop(self) -> None:
        for process in [self.api, *self.workers.values()]:
            stop_process(process)
        self.api = None
        self.workers.clear()
        kill_home(self.home)

    def _environment(self) -> dict[str, str]:
        roots = {"TEMPER_ALLOW_ROOTS": os.pathsep.join(map(str, self.allow_roots))} if self.allow_roots else {}
        return {
            "TEMPER_DATABASE_URL": self.database_url,
            "TEMPER_BROKER_URL": self.broker_url,
            **roots,
            **self.environment,
        }

    def __enter__(self) -> "TemperCluster":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def start_temper(
    arguments: Sequence[str], *, home: Path, environment: Mapping[str, str], output: Path
) -> "subprocess.Popen[bytes]":
    """`python -m api.cli …` with TEMPER_HOME set and no other TEMPER_ setting inherited."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TEMPER_")}
    with output.open("ab") as sink:
        return subprocess.Popen(
            [sys.executable, "-m", "api.cli", *arguments],
            stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, cwd=REPOSITORY,
            env={**inherited, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment, "TEMPER_HOME": str(home)},
            start_new_session=True, preexec_fn=_die_with_parent(signal.SIGTERM),
        )  # fmt: skip


def wait_until_ready(
    url: str, process: "subprocess.Popen[bytes]", output: Path, *, timeout_s: float, path: str = "/readyz"
) -> None:
    """/readyz answers 200 when a job can run, /healthz when the API answers. Fails with what the process printed."""

    def ready() -> bool:
        if process.poll() is not None:
            raise RuntimeError(f"temper ended with {process.returncode} at its start:\n{_read(output)[-4000:]}")
        try:
            return httpx.get(f"{url}{path}", timeout=20).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    try:
        wait_until(ready, timeout_s=timeout_s, what=f"an answer of {url}{path}")
    except TimeoutError as error:
        raise TimeoutError(f"{error}; it printed:\n{_read(output)[-4000:]}") from None


def stop_process(process: "subprocess.Popen[bytes] | None", *, grace_s: float = 60) -> None:
    """TERM, a grace, then KILL to the process and everything below it. Nothing happens when it has ended."""
    if process is None:
        return
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=grace_s)
    if process.poll() is None:
        kill_tree(process.pid)
    process.wait(timeout=grace_s)


def kill_tree(pid: int) -> None:
    """KILL to a process and all its descendants that are its children now."""
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=60)


def processes_of_home(home: Path) -> list[psutil.Process]:
    """Every process that was started with this TEMPER_HOME, detached or not; this one excepted."""
    found = []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        with contextlib.suppress(psutil.Error, FileNotFoundError, ProcessLookupError):
            if process.environ().get("TEMPER_HOME") == str(home) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def kill_home(home: Path) -> None:
    """KILL until nobody of this home is left: a supervisor may start one more child while it dies."""

    def nobody_left() -> bool:
        processes = processes_of_home(home)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=5)
        return not processes

    wait_until(nobody_left, timeout_s=120, what=f"the end of every process of {home}")


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


if __name__ == "__main__":
    try:
        install_missing()
        print(", ".join(f"{name}: {require_program(name)}" for name in DEBIAN_PACKAGES))
    except (MissingProgram, subprocess.CalledProcessError) as failure:
        sys.exit(f"temper tests: {failure}")
