"""Run a function on several ranks over gloo, in processes of this machine, and bring results and errors back.

results = run(body, 2, argument)      # body(rank, argument) -> anything that pickles; results[rank]
"""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class RankFailed(AssertionError):
    """A rank raised; the message holds each failing rank's traceback."""


def run(fn: Callable[..., Any], world: int, *args: Any, timeout_s: float = 120) -> list[Any]:
    """Call `fn(rank, *args)` on `world` ranks with a process group; return each rank's result, in order of rank.

    `fn` must be importable (a module-level function). Raises RankFailed with the rank and its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = forkserver()
        processes = [
            context.Process(target=_main, args=(fn, rank, world, folder, timeout_s, args)) for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout_s + 60)
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for rank in hung:
            processes[rank].kill()
            processes[rank].join()
        outcomes = [_outcome(Path(folder), rank) for rank in range(world)]
    errors = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(outcomes) if error] + [
        f"rank {rank}: hung" for rank in hung
    ]
    if errors:
        raise RankFailed("\n".join(errors))
    return [result for _, result in outcomes]


def forkserver() -> ForkServerContext:
    """Return a way to start processes in which torch is imported already (torch.optim needs _dynamo): once, in the server."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch._dynamo", "core.training.wiring", "core.conversion.mm", "core.data.loader", __name__]
    )
    return context


def _main(fn: Callable[..., Any], rank: int, world: int, folder: str, timeout_s: float, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    error, result = None, None
    try:
        store = dist.FileStore(f"{folder}/store", world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s))
        result = fn(rank, *args)
        dist.barrier()
    except BaseException:  # noqa: BLE001 - told to the test, whatever it is
        error = traceback.format_exc()
    torch.save((error, result), f"{folder}/{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


def _outcome(folder: Path, rank: int) -> tuple[str | None, Any]:
    path = folder / f"{rank}.pt"
    if not path.exists():
        return "died without a result", None
    error, result = torch.load(path, weights_only=False)  # written by our own child a moment ago
    return error, result
