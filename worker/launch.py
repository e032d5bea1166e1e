"""How a runner is started: a pure function of the job and its placement."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

VISIBLE_DEVICES = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}

NPU_ENVIRONMENT = {
    "ACLNN_CACHE_LIMIT": "100000",
    "ASCEND_GLOBAL_LOG_LEVEL": "3",
    "ASCEND_SLOG_PRINT_TO_STDOUT": "0",
    "COMBINED_ENABLE": "1",
    "CPU_AFFINITY_CONF": "1",
    "HCCL_CONNECT_TIMEOUT": "1200",
    "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
    "TASK_QUEUE_ENABLE": "2",
}
"""What MindSpeed-MM's own scripts set; a value in the worker's environment wins."""

_SECRETS = ("TEMPER_DATABASE_URL", "TEMPER_BROKER_URL", "TEMPER_API_KEY")


@dataclass(frozen=True)
class Part:
    """One host's part of an attempt."""

    device_kind: str
    devices: Sequence[int]
    num_nodes: int
    node_rank: int
    rendezvous: str | None
    """`host:port` of the first host's rendezvous; None on a single host."""


@dataclass(frozen=True)
class Launch:
    """Command line and environment of the runner."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    through_torchrun: bool


def command(part: Part, attempt_dir: Path, *, base_env: Mapping[str, str], num_cores: int) -> Launch:
    """One process is started as it is; more go through torchrun, whose rendezvous is this host alone or `part.rendezvous`."""
    per_node = max(1, len(part.devices))
    through_torchrun = per_node * part.num_nodes > 1
    runner = ("-m", "core.runners", str(attempt_dir))
    launcher = _torchrun(part, per_node) if through_torchrun else ()
    return Launch(
        (sys.executable, *launcher, *runner), _environment(part, per_node, base_env, num_cores), through_torchrun
    )


def _torchrun(part: Part, per_node: int) -> tuple[str, ...]:
    options = [
        "-m",
        "torch.distributed.run",
        "--max-restarts=0",
        f"--nnodes={part.num_nodes}",
        f"--nproc-per-node={per_node}",
    ]
    if part.rendezvous is None:
        options += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--local-addr=localhost"]
    else:
        address, port = part.rendezvous.rsplit(":", 1)
        options += [f"--node-rank={part.node_rank}", f"--master-addr={address}", f"--master-port={port}"]
    return tuple(options)


def _environment(part: Part, per_node: int, base_env: Mapping[str, str], num_cores: int) -> dict[str, str]:
    env = {name: value for name, value in base_env.items() if name not in _SECRETS}
    if part.device_kind == "npu":
        env = {**NPU_ENVIRONMENT, **env}
    if variable := VISIBLE_DEVICES.get(part.device_kind):
        env[variable] = ",".join(map(str, part.devices))
    env.setdefault("OMP_NUM_THREADS", str(max(1, num_cores // per_node)))
    env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    if part.rendezvous is None and part.device_kind == "cpu":
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return env
