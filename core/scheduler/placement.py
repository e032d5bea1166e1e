"""Where a job may run: a pure function of what it needs and what is free."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Need:
    """What a job needs: `num_nodes` hosts with `devices_per_node` devices each (0 = runs beside the devices)."""

    num_nodes: int
    devices_per_node: int


@dataclass(frozen=True)
class FreeNode:
    """A live, healthy host and what is free there."""

    name: str
    devices: tuple[int, ...]
    host_slots: int
    drained: bool = False
    """Gets nothing new."""
    size: int = 0
    """Its healthy devices, free or not."""


@dataclass(frozen=True)
class Share:
    """One host's part of a placement."""

    node: str
    devices: tuple[int, ...]


@dataclass(frozen=True)
class Refusal:
    """Why nothing could be placed now."""

    reason: str


def offers_devices(device_kind: str, kinds: Collection[str]) -> bool:
    """Whether a host of that kind runs jobs with devices in a cluster of those kinds.

    Beside accelerators a CPU host is for conversions and data sets: a training must not end up there.
    """
    return device_kind != "cpu" or set(kinds) <= {"cpu"}


def choose(need: Need, free: Sequence[FreeNode]) -> tuple[Share, ...] | Refusal:
    """All hosts of a job or none.

    Among the hosts that fit, those with the fewest free devices come first, so that large gaps stay for large jobs. The
    lowest device ids are taken, which on Ascend hosts keeps a small job inside one HCCS ring.
    """
    takers = [node for node in free if not node.drained]
    if need.devices_per_node == 0:
        fitting = sorted(
            (node for node in takers if node.host_slots > 0), key=lambda node: (-node.host_slots, node.name)
        )
    else:
        fitting = sorted(
            (node for node in takers if len(node.devices) >= need.devices_per_node),
            key=lambda node: (len(node.devices), node.name),
        )
    if len(fitting) < need.num_nodes:
        return Refusal(_explain(need, free, len(fitting)))
    return tuple(
        Share(node.name, tuple(sorted(node.devices)[: need.devices_per_node])) for node in fitting[: need.num_nodes]
    )


def fits_when_empty(need: Need, nodes: Sequence[FreeNode]) -> bool:
    """Whether the job will fit once the jobs that run now have ended; what waits for a host to come back does not."""
    return sum(not node.drained and node.size >= need.devices_per_node for node in nodes) >= need.num_nodes


def _explain(need: Need, free: Sequence[FreeNode], fitting: int) -> str:
    if not free:
        return "no healthy host is connected"
    if all(node.drained for node in free):
        return f"every healthy host is drained ({', '.join(node.name for node in free)})"
    if need.devices_per_node == 0:
        return "all hosts run as many device-less jobs as they may (TEMPER_HOST_JOBS)"
    state = ", ".join(f"{node.name}: {'drained' if node.drained else f'{len(node.devices)} free'}" for node in free)
    return f"needs {need.num_nodes} host(s) with {need.devices_per_node} free device(s); {fitting} fit(s) now ({state})"
