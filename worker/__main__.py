"""`python -m worker`: the Celery worker of this host."""

from __future__ import annotations

import warnings

from celery.exceptions import SecurityWarning

from core.jobs.queue import CONTROL_QUEUE, node_queue
from core.settings import Settings
from core.telemetry.logging import configure
from worker.app import build_worker


def main() -> None:
    """Run until told to stop; trainings go on without it."""
    settings = Settings()
    configure(settings)
    # Celery warns root because a pickled message could run anything; ours accept JSON only.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    app = build_worker(settings)
    app.worker_main(
        [
            "--quiet",
            "worker",
            f"--hostname=temper@{settings.node_name}",
            f"--queues={CONTROL_QUEUE},{node_queue(settings.node_name)}",
            "--pool=threads",
            "--concurrency=4",
            "--beat",
            "--without-gossip",
            "--without-mingle",
            "--loglevel=WARNING",
        ]
    )


if __name__ == "__main__":
    main()
