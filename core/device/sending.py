"""Host tensors to the device, without waiting for what that still has to do."""

from __future__ import annotations

import torch
from torch import Tensor


def send(x: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to `device`, behind the work that is queued there; what is there already is returned as it is.

    From ordinary memory torch_npu copies only once its queue is empty (it synchronises the stream), and CUDA waits for more than 64 KiB:
    amid a step that leaves the device idle until the host has queued new work. From page-locked memory a copy is one more entry of the
    queue; the allocator of that memory keeps it until the copy is done.
    """
    if x.device == device or device.type == "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
