"""Exit code 0 when this host's Celery worker answers a ping through the broker."""

import sys

from core.jobs.queue import build_app
from core.settings import Settings

settings = Settings()
name = f"temper@{settings.node_name}"
sys.exit(0 if build_app(settings).control.ping(destination=[name], timeout=10) else f"{name} does not answer")
