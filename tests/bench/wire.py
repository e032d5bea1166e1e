"""A wire of a given rate between processes of one machine: two network namespaces joined by a pair of virtual interfaces.

    namespace …a                     namespace …b
    rank 0 ── wire 10.0.0.1  ◄────►  wire 10.0.0.2 ── rank 1        tc's token buckets let through RATE each way

Wants root and Debian's iproute2. Addresses exist inside the namespaces only; those are removed at the end, also after a failure.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where a process runs."""

    interface: str
    """By which it reaches the others."""
    prefix: tuple[str, ...] = ()
    """What its command begins with."""


LOOPBACK = (Place("lo"), Place("lo"))


@contextmanager
def wire(rate: str) -> Iterator[tuple[Place, Place]]:
    """Lay a wire of a rate that tc understands (`1gbit`) and give its two ends. Raises SystemExit where that is not possible."""
    missing = [command for command in ("ip", "tc") if shutil.which(command) is None]
    if os.geteuid() != 0 or missing:
        why = f"no command {' and '.join(missing)}: install iproute2" if missing else "only root may lay one"
        raise SystemExit(f"no wire of {rate}: {why}; --rate none measures over loopback alone")
    name = f"temper-{uuid.uuid4().hex[:8]}"
    ends = f"{name}-a", f"{name}-b"
    try:
        for end in ends:
            _run("ip", "netns", "add", end)
        _run("ip", "link", "add", "wire", "netns", ends[0], "type", "veth", "peer", "name", "wire", "netns", ends[1])
        for number, end in enumerate(ends, start=1):
            _run("ip", "-netns", end, "address", "add", f"10.0.0.{number}/24", "dev", "wire")
            _run("ip", "-netns", end, "link", "set", "wire", "up")
            _run("tc", "-netns", end, "qdisc", "add", "dev", "wire", "root", "tbf",
                 "rate", rate, "burst", "256kb", "latency", "100ms")  # fmt: skip
        first, second = (Place("wire", ("ip", "netns", "exec", end)) for end in ends)
        yield first, second
    finally:
        for end in ends:
            subprocess.run(["ip", "netns", "delete", end], check=False, stderr=subprocess.DEVNULL)


def _run(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"no wire: {' '.join(command)}: {done.stderr.strip()}")


def run_at(places: Sequence[Place], commands: Sequence[Sequence[str]], *, timeout_s: float) -> None:
    """Run one command at each place, together. Raises RuntimeError if one fails, after ending the others."""
    processes = [
        subprocess.Popen([*place.prefix, *command], env={**os.environ, "GLOO_SOCKET_IFNAME": place.interface})
        for place, command in zip(places, commands, strict=True)
    ]
    try:
        codes = [process.wait(timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(codes):
        raise RuntimeError(f"exit codes {codes}")
