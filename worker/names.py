"""Names that one process of a host can have at a time."""

from __future__ import annotations

import socket


def take_name(name: str) -> socket.socket | None:
    """Take a name on this host, or return None when it is taken; it is free again when the last copy of the socket is closed."""
    taken = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        taken.bind(f"\0temper-{name}")  # abstract: no file that could be left behind
    except OSError:
        taken.close()
        return None
    return taken
