"""The one clock for stored times: UTC, timezone-aware."""

from __future__ import annotations

from datetime import datetime, timezone


def utcnow() -> datetime:
    """Return the current time in UTC."""
    return datetime.now(timezone.utc)
