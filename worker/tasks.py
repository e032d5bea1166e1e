"""The Celery tasks: seconds long, ids in, nothing out."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import structlog
from sqlalchemy.exc import SQLAlchemyError

from core.clock import utcnow
from core.db.models import Lease
from core.db.session import Database
from core.jobs import dispatch, housekeeping
from core.settings import Settings
from worker.names import take_name

log = structlog.get_logger(__name__)

LOG_BYTES = 16 << 20
"""Size at which the supervisors' log begins anew."""
_rotating = threading.Lock()


def tick(database: Database, settings: Settings) -> None:
    """Run one round of the scheduler; a database that is away, or not migrated yet, is tried again at the next tick."""
    try:
        dispatch.tick(database, settings)
    except SQLAlchemyError as error:
        log.warning("tick.database.unavailable", error=str(error).splitlines()[0])


def clean(database: Database, settings: Settings) -> None:
    """Remove what nobody will come back for."""
    try:
        housekeeping.clean(database, settings, utcnow())
    except SQLAlchemyError as error:
        log.warning("clean.database.unavailable", error=str(error).splitlines()[0])


def launch(database: Database, settings: Settings, lease_id: str) -> None:
    """Start the supervisor of a lease as a process of its own; a message that comes twice or late does nothing."""
    with database.read() as session:
        lease = session.get(Lease, lease_id)
    if lease is None or lease.state != "pending" or lease.node != settings.node_name:
        log.info("launch.skipped", lease_id=lease_id, state=lease.state if lease else None)
        return
    starting = hold(lease_id)
    if starting is None:
        log.info("launch.skipped", lease_id=lease_id, state="starting")
        return
    logs = settings.home_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    path = logs / f"supervisor-{settings.node_name}.log"
    begin_anew_if_long(path)
    with starting, path.open("ab") as stream:
        # setsid(1) --fork returns at once and leaves a process that is nobody's child: no signal, end or restart of
        # this worker reaches it, and nobody has to reap it.
        subprocess.run(
            ["setsid", "--fork", sys.executable, "-m", "worker.supervisor", lease_id],
            env={**os.environ, **settings.environment()},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            pass_fds=[starting.fileno()],
            check=True,
        )
    log.info("supervisor.started", lease_id=lease_id)


def begin_anew_if_long(path: Path) -> None:
    """Put a long log aside as `….log.1`, in place of the one before; supervisors that run write on into that one, a few lines each."""
    with _rotating:
        if path.exists() and path.stat().st_size > LOG_BYTES:
            path.replace(path.with_name(f"{path.name}.1"))


def hold(lease_id: str) -> socket.socket | None:
    """Take a lease's name on this host, or return None when it is taken.

    A supervisor inherits the socket, so the name is its own until it ends, whatever ends it. Without that, a host so busy that Python
    takes seconds to start would be sent a supervisor more at every repeated message, and become busier still.
    """
    return take_name(lease_id)
