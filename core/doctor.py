"""Whether this host can train on Ascend NPUs: each layer of the stack, in the order in which it is installed.

`look()` reads the host; `examine()` judges what was read and touches nothing, so that tests feed it recorded outputs.
The first layer that is wrong is the one to mend: what lies above it cannot work, and often looks wrong only because of
it.

    driver → firmware → CANN toolkit → kernels → nnal → Python → torch → torch_npu
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

Verdict = Literal["ok", "wrong", "unknown"]


# What works together


@dataclass(frozen=True)
class Combination:
    """Versions that belong together: CANN, torch and torch_npu are bound strictly; a driver may be newer."""

    cann: str
    torch: str
    torch_npu: str
    pythons: tuple[str, ...]
    driver: str
    """The Ascend HDK release; this one or a later one."""


SUPPORTED = (Combination(cann="8.2.RC1", torch="2.7.1", torch_npu="2.7.1", pythons=("3.10", "3.11"), driver="25.2.0"),)
_NAMED = SUPPORTED[0]

ASCEND = Path("/usr/local/Ascend")


# What is read from the host


@dataclass(frozen=True)
class Host:
    """All that the checks look at; None where it was not found."""

    machine: str = "aarch64"
    npu_smi: str | None = None
    """Output of `npu-smi info`; None where the program is missing."""
    npu_smi_failed: bool = False
    driver: str | None = None
    firmware: str | None = None
    toolkit: str | None = None
    kernels: str | None = None
    nnal: str | None = None
    toolkit_sourced: bool = False
    nnal_sourced: bool = False
    python: str = ""
    torch: str | None = None
    torch_npu: str | None = None
    torch_npu_error: str | None = None
    """Why `import torch_npu` failed; None when it worked or was not tried."""
    root: Path = field(default=ASCEND)


def look(root: Path = ASCEND) -> Host:
    """Read this host. Imports of torch happen in a child process, which may crash without harm."""
    smi = _run(["npu-smi", "info"])
    toolkit_dir, nnal_dir = _latest(root / "ascend-toolkit"), _latest(root / "nnal" / "atb")
    torch_npu = _distribution("torch_npu")
    return Host(
        machine=platform.machine(),
        npu_smi=smi.stdout if smi else None,
        npu_smi_failed=bool(smi and smi.returncode),
        driver=version_in(root / "driver" / "version.info"),
        firmware=version_in(root / "firmware" / "version.info"),
        toolkit=_toolkit_version(toolkit_dir),
        kernels=_kernels_version(toolkit_dir),
        nnal=version_in(nnal_dir / "version.info") if nnal_dir else None,
        # Set by the stack's own set_env.sh in the shell that started us; no settings of Temper.
        toolkit_sourced="ASCEND_TOOLKIT_HOME" in os.environ,
        nnal_sourced="ATB_HOME_PATH" in os.environ,
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        torch=_distribution("torch"),
        torch_npu=torch_npu,
        torch_npu_error=_import_error("torch_npu") if torch_npu else None,
        root=root,
    )


def version_in(path: Path) -> str | None:
    """The release that a `version.info` or `install.info` of the stack names.

    Driver and firmware have `package_version=25.2.0` (the HDK release) beside their own `Version=7.7.0.6.236`; CANN has
    `version=8.2.RC1`; nnal has `Ascend-cann-atb : 8.2.RC1`.
    """
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return None
    for name in ("package_version", "version", "ascend-cann-atb"):
        if found := re.search(rf"^\s*{name}\s*[=:]\s*([0-9][\w.]*)", text, re.IGNORECASE | re.MULTILINE):
            return found[1]
    return None


def _latest(folder: Path) -> Path | None:
    """The installed version that the stack's `latest` link names, else the newest."""
    if (folder / "latest").exists():
        return folder / "latest"
    versions = sorted(path for path in folder.glob("[0-9]*") if path.is_dir())
    return versions[-1] if versions else None


def _first_version(paths: Iterable[Path]) -> str | None:
    return next((version for version in map(version_in, paths) if version), None)


def _toolkit_version(folder: Path | None) -> str | None:
    if folder is None:
        return None
    records = sorted(folder.glob("*-linux/ascend_toolkit_install.info"))
    return _first_version([*records, folder / "toolkit" / "version.info"])


def _kernels_version(folder: Path | None) -> str | None:
    """Kernels are a package per chip series, installed into the toolkit's own folder."""
    if folder is None:
        return None
    records = [folder / "opp_kernel" / "version.info", *sorted(folder.glob("*-linux/ascend*kernels*_install.info"))]
    return _first_version(records)


def _run(command: list[str]) -> subprocess.CompletedProcess[str] | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", "no answer within 60 s")


def _distribution(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _import_error(module: str) -> str | None:
    tried = _run([sys.executable, "-c", f"import {module}"])
    if tried is None or tried.returncode == 0:
        return None
    lines = tried.stderr.strip().splitlines()
    return lines[-1] if lines else f"ended with {tried.returncode}"


# The judgement


class Check(BaseModel):
    """One layer: what was found, and if it is wrong, why and what mends it."""

    name: str
    verdict: Verdict
    found: str
    problem: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    checks: tuple[Check, ...]

    @property
    def first_wrong(self) -> Check | None:
        return next((check for check in self.checks if check.verdict == "wrong"), None)


def examine(host: Host) -> Report:
    """Judge every layer, lowest first."""
    return Report(tuple(check(host) for check in _CHECKS))


def check_driver(host: Host) -> Check:
    if host.npu_smi is None or host.driver is None:
        return _wrong(
            "driver",
            "npu-smi is missing" if host.npu_smi is None else f"no {host.root}/driver/version.info",
            "the NPU driver is not installed",
            f"bash Ascend-hdk-*-npu-driver_{_NAMED.driver}_linux-{host.machine}.run --full --force",
        )
    if host.npu_smi_failed or not npu_count(host.npu_smi):
        return _wrong(
            "driver",
            f"{host.driver}, but npu-smi shows no card",
            "the driver does not see the cards; this is what the remains of an older driver do",
            f"uninstall every driver completely ({host.root}/driver/script/uninstall.sh), reboot, then install the "
            "driver again with --full --force; if it stays so, look at `dmesg` and `lspci | grep -i accelerators`",
        )
    if _older(host.driver, _NAMED.driver):
        return _wrong(
            "driver",
            host.driver,
            f"the driver {host.driver} is older than {_NAMED.driver}, which CANN {_NAMED.cann} needs",
            f"uninstall it completely ({host.root}/driver/script/uninstall.sh), then "
            f"bash Ascend-hdk-*-npu-driver_{_NAMED.driver}_linux-{host.machine}.run --full --force",
        )
    return _ok("driver", f"{host.driver}, {npu_count(host.npu_smi)} cards")


def check_firmware(host: Host) -> Check:
    install = "bash Ascend-hdk-*-npu-firmware_*.run --full, then reboot"
    if host.firmware is None:
        return _wrong("firmware", "missing", "the firmware is not installed; it comes after the driver", install)
    if host.driver and _release(host.firmware) != _release(host.driver):
        if firmware_is_numbered_apart(host.firmware):
            return Check(
                name="firmware", verdict="unknown", found=f"{host.firmware}; compare it with the driver's release notes"
            )
        problem = f"the firmware {host.firmware} and the driver {host.driver} are not of one Ascend HDK release"
        return _wrong("firmware", host.firmware, problem, f"take both from one release: {install}")
    return _ok("firmware", host.firmware)


def check_toolkit(host: Host) -> Check:
    source = f"source {host.root}/ascend-toolkit/set_env.sh"
    known = {combination.cann for combination in SUPPORTED}
    install = f"bash Ascend-cann-toolkit_{_NAMED.cann}_linux-{host.machine}.run --install, then {source}"
    if host.toolkit is None:
        return _wrong("toolkit", "missing", "the CANN toolkit is not installed", install)
    if _cann(host.toolkit) not in {_cann(version) for version in known}:
        problem = f"CANN {host.toolkit} is not a version that Temper was made for ({', '.join(sorted(known))})"
        return _wrong("toolkit", host.toolkit, problem, install)
    if not host.toolkit_sourced:
        problem = "the toolkit's environment is not set in this shell, so nothing above it finds its libraries"
        return _wrong("toolkit", f"{host.toolkit}, not sourced", problem, source)
    return _ok("toolkit", host.toolkit)


def check_kernels(host: Host) -> Check:
    return _part_of_cann(
        host, "kernels", host.kernels, f"Ascend-cann-kernels-910b_{_NAMED.cann}_linux-{host.machine}.run --install"
    )


def check_nnal(host: Host) -> Check:
    source = f"source {host.root}/nnal/atb/set_env.sh"
    check = _part_of_cann(
        host, "nnal", host.nnal, f"Ascend-cann-nnal_{_NAMED.cann}_linux-{host.machine}.run --install, then {source}"
    )
    if check.verdict == "ok" and not host.nnal_sourced:
        return _wrong("nnal", f"{host.nnal}, not sourced", "nnal's environment is not set in this shell", source)
    return check


def check_python(host: Host) -> Check:
    pythons = sorted({python for combination in SUPPORTED for python in combination.pythons})
    if host.python not in pythons:
        problem = f"Python {host.python} has no matching torch_npu; {' and '.join(pythons)} have"
        return _wrong(
            "python", host.python, problem, f"make an environment of Python {pythons[0]} and install Temper in it"
        )
    return _ok("python", host.python)


def check_torch(host: Host) -> Check:
    wanted = _combination(host)
    install = f"pip install torch=={wanted.torch}"
    if host.torch is None:
        return _wrong("torch", "missing", "torch is not installed in this environment", install)
    if _public(host.torch) != wanted.torch:
        problem = f"torch {host.torch} does not go with CANN {wanted.cann}, which needs torch {wanted.torch}"
        return _wrong("torch", host.torch, problem, install)
    return _ok("torch", host.torch)


def check_torch_npu(host: Host) -> Check:
    wanted = _combination(host)
    install = f"pip install torch_npu=={wanted.torch_npu}"
    if host.torch_npu is None:
        return _wrong("torch_npu", "missing", "torch_npu is not installed in this environment", install)
    if _public(host.torch_npu) != wanted.torch_npu:
        problem = f"torch_npu {host.torch_npu} does not go with CANN {wanted.cann} and torch {wanted.torch}"
        return _wrong("torch_npu", host.torch_npu, problem, install)
    if host.torch_npu_error:
        problem = f"torch_npu does not import: {host.torch_npu_error}"
        sources = f"source {host.root}/ascend-toolkit/set_env.sh; source {host.root}/nnal/atb/set_env.sh"
        return _wrong(
            "torch_npu", f"{host.torch_npu}, does not import", problem, f"{sources}; then start again from that shell"
        )
    return _ok("torch_npu", host.torch_npu)


_CHECKS: tuple[Callable[[Host], Check], ...] = (
    check_driver,
    check_firmware,
    check_toolkit,
    check_kernels,
    check_nnal,
    check_python,
    check_torch,
    check_torch_npu,
)


def npu_count(npu_smi: str) -> int:
    """Cards in the table of `npu-smi info`: lines such as `| 0     910B3               | OK            | …`."""
    return len(re.findall(r"^\|\s*\d+\s+(?:Ascend)?\d{3}\w*\s*\|", npu_smi, re.MULTILINE))


def firmware_is_numbered_apart(version: str) -> bool:
    """Firmware of some releases carries its own numbers (7.7.0.6.236) beside the driver's (25.2.0)."""
    return version.count(".") >= 3


def _part_of_cann(host: Host, name: str, found: str | None, package: str) -> Check:
    order = f"source {host.root}/ascend-toolkit/set_env.sh first, then bash {package}"
    if found is None:
        return _wrong(name, "missing", f"CANN's {name} are not installed; they come after the toolkit", order)
    if host.toolkit and _cann(found) != _cann(host.toolkit):
        problem = f"{name} {found} and the toolkit {host.toolkit} are of different CANN releases"
        return _wrong(name, found, problem, order)
    return _ok(name, found)


def _combination(host: Host) -> Combination:
    """The supported row of the CANN that is there; the first row when it fits none."""
    if host.toolkit:
        for combination in SUPPORTED:
            if _cann(combination.cann) == _cann(host.toolkit):
                return combination
    return _NAMED


def _ok(name: str, found: str) -> Check:
    return Check(name=name, verdict="ok", found=found)


def _wrong(name: str, found: str, problem: str, remedy: str) -> Check:
    return Check(name=name, verdict="wrong", found=found, problem=problem, remedy=remedy)


def _public(version: str) -> str:
    """2.7.1 of `2.7.1+cpu` and of `2.7.1.post11`."""
    return re.sub(r"\.post\d+$", "", version.split("+")[0])


def _cann(version: str) -> tuple[int, ...]:
    """(8, 2, 1) of `8.2.RC1` and of its build number `8.2.0.1.201`: releases count their candidates from 1."""
    numbers = [int(number) for number in re.findall(r"\d+", version)]
    if "rc" in version.lower() or len(numbers) < 4:
        return tuple(numbers[:3])
    return (*numbers[:2], numbers[3])


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _older(version: str, needed: str) -> bool:
    def numbers(text: str) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", text)]

    return numbers(version) < numbers(needed)
