"""The service's own logs: structlog events to stderr, for people (console) or machines (JSON), with request and job ids bound."""

from __future__ import annotations

import logging
import sys
from contextlib import AbstractContextManager

import structlog
from structlog.typing import EventDict, Processor

from core.settings import Settings

_QUIET = ("alembic", "httpx", "uvicorn.access")
"""Loggers that only speak up when something is wrong."""


def configure(settings: Settings, *, level: int = logging.INFO) -> None:
    """Send structlog's and the standard library's logs to stderr in the configured form."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        _without_colours,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    final: list[Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if settings.log_format == "json"
        else [
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
        ]
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *final]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=True,
    )


def _without_colours(_logger: object, _method: str, event: EventDict) -> EventDict:
    """Uvicorn gives each message a second time, with terminal colours."""
    event.pop("color_message", None)
    return event


def bind_job(job_id: str, attempt: int) -> AbstractContextManager[None]:
    """Within the context every log line of this thread or task carries the job and the attempt."""
    return structlog.contextvars.bound_contextvars(job_id=job_id, attempt=attempt)


def bind_request(request_id: str) -> AbstractContextManager[None]:
    """Within the context every log line of this request carries its id."""
    return structlog.contextvars.bound_contextvars(request_id=request_id)
