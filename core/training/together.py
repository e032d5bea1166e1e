"""What all ranks do together: what one of them raises, all of them raise."""

from __future__ import annotations

import errno
from typing import Any

import torch.distributed as dist

from core.errors import AppError, DiskFull
from core.parallel.mesh import Mesh


class Together:
    """A part of the work that all ranks do, or that all ranks fail with the error of the first rank that failed."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value."""
        if self.mesh.world_group is None:
            return [value]
        values: list[Any] = [None] * self.mesh.world_size
        dist.all_gather_object(values, value, group=self.mesh.world_group)
        return values

    def __enter__(self) -> Together:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if error is not None and not isinstance(error, Exception):
            return
        told = None if error is None else _describe(self.mesh.rank, error)
        first = next((item for item in self.gather(told) if item is not None), None)
        if first is None or isinstance(error, AppError):
            return
        code, status, message, hint = told or first
        failure = AppError(message, hint=hint, code=code)
        failure.status = status
        raise failure from error


def _describe(rank: int, error: Exception) -> tuple[str, int, str, str | None]:
    """Return code, status, message and hint, to tell other ranks."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull.code, DiskFull.status, f"rank {rank}: {error}", "free space, or lower checkpoint.keep_last"
    if isinstance(error, AppError):
        return error.code, error.status, f"rank {rank}: {error.message}", error.hint
    return AppError.code, AppError.status, f"rank {rank}: {type(error).__name__}: {error}", None
