"""The Celery application of a worker: tasks, the periodic tick, this host's beacon."""

from __future__ import annotations

import logging

import structlog
from celery import Celery
from celery.signals import setup_logging, worker_ready

from core.db.session import Database
from core.jobs import queue
from core.settings import Settings
from worker import tasks
from worker.node import Beacon

log = structlog.get_logger(__name__)


def build_worker(settings: Settings) -> Celery:
    """The application with its tasks bound to one database."""
    app = queue.build_app(settings)
    database = Database.from_settings(settings)

    @app.task(name=queue.TICK)
    def tick() -> None:
        tasks.tick(database, settings)

    @app.task(name=queue.LAUNCH)
    def launch(lease_id: str) -> None:
        tasks.launch(database, settings, lease_id)

    @app.task(name=queue.CLEAN)
    def clean() -> None:
        tasks.clean(database, settings)

    app.conf.beat_schedule = {
        "clean": {
            "task": queue.CLEAN,
            "schedule": 3600.0,
            "options": {"queue": queue.CONTROL_QUEUE, "expires": 3600.0},
        },
        "tick": {
            "task": queue.TICK,
            "schedule": settings.tick_s,
            "options": {"queue": queue.CONTROL_QUEUE, "expires": max(2.0, settings.tick_s)},
        },
    }
    app.conf.beat_scheduler = "celery.beat:Scheduler"  # in memory: the schedule is this one line

    @setup_logging.connect(weak=False)
    def keep_ours(**_: object) -> None:
        """Celery would set up logging of its own, with two lines for every tick."""
        for name in ("celery", "kombu"):
            logging.getLogger(name).setLevel(logging.WARNING)

    @worker_ready.connect(weak=False)
    def start_beacon(**_: object) -> None:
        log.info("worker.ready", node=settings.node_name)
        Beacon(database, settings).start()

    return app
