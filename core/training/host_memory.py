"""Whether this host has memory for a copy of what is to be written."""

from __future__ import annotations

from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
SPARE_SHARE = 0.1
"""Of the available memory, left to others."""


def has_room_for(size_bytes: int) -> bool:
    """Whether so many bytes can be taken of this host's memory with some left over."""
    return size_bytes <= available_bytes() * (1 - SPARE_SHARE)


def available_bytes(cgroup: Path = CGROUP) -> int:
    """What the host can give, or the container's control group (v2) if that is less; file cache counts as free in both."""
    free = psutil.virtual_memory().available
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        counts = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no control group, or "max"
        return free
    return min(free, max(limit - used + int(counts.get("inactive_file", 0)), 0))
