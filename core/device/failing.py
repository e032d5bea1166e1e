"""What a device's errors mean."""

from __future__ import annotations

import torch

_SAYINGS = ("out of memory", "can't allocate memory")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the device had no memory left: torch_npu (2.7.1) and the CPU's allocator have no class of error for it, only words."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _SAYINGS)
