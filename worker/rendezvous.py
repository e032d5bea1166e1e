"""The port at which the hosts of a job meet: torchrun of the first host binds it, seconds after it was offered.

Nobody can hold the port itself meanwhile. So it is taken from a range that the kernel does not hand out by itself
(`net.ipv4.ip_local_port_range` begins at 32768), where no connection or server that wants any free port can come before, and two
supervisors of one host keep apart by a name.
"""

from __future__ import annotations

import random
import socket

from core.errors import AppError
from worker.names import take_name

PORTS = range(20_000, 30_000)
_TRIES = 200


def reserve_port() -> tuple[socket.socket, int]:
    """Find a free port; no other supervisor of this host takes it while the socket that is returned is open."""
    for port in random.sample(PORTS, _TRIES):
        name = take_name(f"port-{port}")
        if name is None:
            continue
        try:
            with socket.socket() as probe:
                probe.bind(("", port))
        except OSError:
            name.close()
            continue
        return name, port
    raise AppError(f"of {_TRIES} ports between {PORTS[0]} and {PORTS[-1]} none is free", code="no_free_port")
