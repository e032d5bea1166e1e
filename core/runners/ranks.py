"""What the ranks of one attempt share around their work: the process group, and the one error to report."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from core.device import Accelerator
from core.errors import AppError
from core.runners.context import RunContext, unexpected


@contextmanager
def process_group(ctx: RunContext, accelerator: Accelerator) -> Iterator[None]:
    """Join torchrun's process group for the time of the training; one process needs none."""
    if ctx.world_size == 1:
        yield
        return
    dist.init_process_group(accelerator.backend)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def errors_of_other_ranks(ctx: RunContext, *, patience_s: float = 5.0) -> Iterator[None]:
    """Have rank 0 fail with the cause, not with the broken connection that another rank's failure looks like from there."""
    folder = ctx.attempt_dir / "errors"
    try:
        yield
    except Exception as error:
        if ctx.is_main and not isinstance(error, AppError):
            raise _first_told(folder, time.monotonic() + patience_s) or error from error
        if not ctx.is_main:
            folder.mkdir(exist_ok=True)
            told = error if isinstance(error, AppError) else unexpected(error)
            temporary = folder / f".rank_{ctx.rank}.tmp"
            temporary.write_text(
                json.dumps([ctx.rank, time.time(), told.code, told.message, told.hint]), encoding="utf-8"
            )
            temporary.rename(folder / f"rank_{ctx.rank}.json")
        raise


def _first_told(folder: Path, deadline: float) -> AppError | None:
    """Wait for the error of another rank; return that of the one that failed first."""
    while time.monotonic() < deadline:
        found = [json.loads(path.read_bytes()) for path in folder.glob("rank_*.json")]
        if found:
            rank, _, code, message, hint = min(found, key=lambda item: item[1])
            return AppError(f"rank {rank}: {message}", code=code, hint=hint)
        time.sleep(0.1)
    return None
