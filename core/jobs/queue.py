"""The Celery application as a producer: task names, queues, and how to wake the scheduler.

Messages carry ids only and may be lost, late or doubled: the scheduler's next tick makes good for them.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import structlog
from celery import Celery

from core.settings import Settings

TICK = "temper.tick"
LAUNCH = "temper.launch"
CLEAN = "temper.clean"
CONTROL_QUEUE = "control"

log = structlog.get_logger(__name__)


def node_queue(node: str) -> str:
    """The queue that only the worker of this host reads."""
    return f"node.{node}"


def build_app(settings: Settings) -> Celery:
    """The application of producers and workers alike; see `worker/README.md` for why each setting is what it is."""
    app = Celery("temper", broker=settings.broker_url or "filesystem://localhost", set_as_current=False)
    app.conf.update(
        broker_transport="core.jobs.transport:Transport" if settings.embedded else None,
        broker_transport_options=_transport_options(settings),
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        task_acks_late=False,
        task_ignore_result=True,
        task_publish_retry=False,
        task_serializer="json",
        accept_content=["json"],
        task_default_queue=CONTROL_QUEUE,
        task_create_missing_queues=True,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=settings.broker_url is not None,
        worker_hijack_root_logger=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        enable_utc=True,
    )
    return app


def kick(settings: Settings) -> None:
    """Ask the scheduler to look now. Never raises: a broker that is away only costs time until the next tick."""
    _send(settings, TICK, (), CONTROL_QUEUE, expires=30)


def send_launch(settings: Settings, lease_id: str, node: str) -> None:
    """Ask the worker of `node` to start the supervisor of a lease. Never raises."""
    _send(settings, LAUNCH, (lease_id,), node_queue(node), expires=settings.start_timeout_s)


def _send(settings: Settings, task: str, args: tuple[str, ...], queue: str, *, expires: float) -> None:
    try:
        _producer(settings).send_task(task, args=args, queue=queue, expires=expires, ignore_result=True)
    except Exception as error:  # noqa: BLE001  whatever the transport throws: the message is a hint, the database is the truth
        log.warning("queue.unavailable", task=task, error=repr(error))


@lru_cache(maxsize=4)
def _producer(settings: Settings) -> Celery:
    return build_app(settings)


def _transport_options(settings: Settings) -> dict[str, Any]:
    if settings.broker_url is not None:
        return {"socket_connect_timeout": 1, "socket_timeout": 30, "retry_on_timeout": False, "max_retries": 0}
    root = settings.home_dir / "broker"
    folders = {"data_folder_in": root / "queue", "data_folder_out": root / "queue", "control_folder": root / "control"}
    for folder in folders.values():
        Path(folder).mkdir(parents=True, exist_ok=True)
    return {name: str(folder) for name, folder in folders.items()} | {"polling_interval": 0.1}
