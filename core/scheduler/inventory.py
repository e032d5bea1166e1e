"""Which devices this host has, without loading torch: `npu-smi`, `nvidia-smi`, or CPU slots."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from core import doctor
from core.settings import Settings

DeviceKind = Literal["npu", "cuda", "cpu"]
_TIMEOUT_S = 20


@dataclass(frozen=True)
class Device:
    """One device of a host; `id` is what `ASCEND_RT_VISIBLE_DEVICES` or `CUDA_VISIBLE_DEVICES` takes."""

    id: int
    name: str
    healthy: bool = True
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Inventory:
    """What a worker reports of its host."""

    device_kind: DeviceKind
    devices: tuple[Device, ...]
    healthy: bool = True
    reason: str | None = None

    def as_rows(self) -> list[dict[str, Any]]:
        """The devices as stored."""
        return [asdict(device) for device in self.devices]


def inspect_host(settings: Settings) -> Inventory:
    """`detect`, and on an NPU host also the whole software stack: what is wrong there makes the host unhealthy.

    This imports torch_npu in a child process and takes seconds: once at the start of a worker.
    """
    found = detect(settings)
    if found.device_kind != "npu" or not found.healthy:
        return found
    wrong = doctor.examine(doctor.look()).first_wrong
    if wrong is None:
        return found
    return replace(found, healthy=False, reason=f"{wrong.name}: {wrong.problem}; {wrong.remedy}")


def detect(settings: Settings) -> Inventory:
    """Look at the devices, or believe the settings."""
    kind = settings.device_kind
    if kind in ("auto", "npu") and shutil.which("npu-smi"):
        return _limited(_npu(), settings)
    if kind in ("auto", "cuda") and shutil.which("nvidia-smi"):
        return _limited(_cuda(), settings)
    if kind in ("npu", "cuda"):
        tool = {"npu": "npu-smi", "cuda": "nvidia-smi"}[kind]
        return Inventory(
            kind, (), healthy=False, reason=f"{tool} was not found: install the driver (see `temper doctor`)"
        )
    count = settings.devices if settings.devices is not None else max(2, os.cpu_count() or 1)
    return Inventory("cpu", tuple(Device(index, "cpu") for index in range(count)))


def parse_npu_smi(text: str) -> tuple[Device, ...]:
    """Read `npu-smi info`: one line `| NPU Name | Health | …` per card, followed by one line per chip with its memory.

    Only the columns that have been stable over driver releases are read; chips are numbered in order of appearance, as
    the runtime numbers them.
    """
    devices: list[Device] = []
    card: tuple[str, bool] | None = None
    for line in text.splitlines():
        if not line.startswith("|"):
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        head = re.match(r"^\d+\s+(\S*[A-Za-z]\S*)$", cells[0])
        if head and len(cells) > 1:
            card = (head.group(1), cells[1].upper() == "OK")
        elif card and re.match(r"^\d+(\s+\d+)?$", cells[0]) and len(cells) > 2 and ":" in cells[1]:
            memory = re.findall(r"(\d+)\s*/\s*(\d+)", cells[2])
            size = int(memory[-1][1]) << 20 if memory and int(memory[-1][1]) else None
            devices.append(Device(len(devices), card[0], card[1], size))
    return tuple(devices)


def _npu() -> Inventory:
    text, problem = _output(["npu-smi", "info"])
    devices = parse_npu_smi(text)
    if problem or not devices:
        return Inventory(
            "npu", (), healthy=False, reason=problem or "npu-smi info lists no card: check driver and firmware"
        )
    return Inventory("npu", devices)


def _cuda() -> Inventory:
    text, problem = _output(["nvidia-smi", "--query-gpu=index,name,memory.total", "--format=csv,noheader,nounits"])
    rows = [line.split(", ") for line in text.splitlines() if line.count(", ") == 2]
    devices = tuple(Device(int(index), name, memory_bytes=int(memory) << 20) for index, name, memory in rows)
    if problem or not devices:
        return Inventory("cuda", (), healthy=False, reason=problem or "nvidia-smi lists no GPU")
    return Inventory("cuda", devices)


def _output(command: list[str]) -> tuple[str, str | None]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"{command[0]}: {error}"
    return (
        done.stdout,
        f"{command[0]} exited with {done.returncode}: {done.stderr.strip()}" if done.returncode else None,
    )


def _limited(found: Inventory, settings: Settings) -> Inventory:
    if settings.devices is None:
        return found
    return Inventory(found.device_kind, found.devices[: settings.devices], found.healthy, found.reason)
