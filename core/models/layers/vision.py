"""The vision encoder beside its transformer layers: patch embedding, merger, and the order and windows of patches.

Shapes: P patches, D = channels * time * height * width of a patch, H hidden size, M = P / merge ** 2 merged patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.device.base import Accelerator
from core.models.layers.blocks import RMSNorm
from core.models.layers.linear import Linear

MERGER_EPS = 1e-6


class PatchEmbed(nn.Module):
    """A convolution whose kernel equals its stride is a matrix product: computed as one, stored as the 5-D kernel."""

    def __init__(self, in_channels: int, temporal_patch_size: int, patch_size: int, hidden_size: int) -> None:
        super().__init__()
        kernel = (temporal_patch_size, patch_size, patch_size)
        # Holds the kernel and is never called: NPUs have no fast Conv3d, and CPUs take four times as long for it.
        self.proj = nn.Conv3d(in_channels, hidden_size, kernel_size=kernel, stride=kernel, bias=False)

    def forward(self, pixel_values_PD: Tensor) -> Tensor:
        weight_HD = self.proj.weight.flatten(1)
        return F.linear(pixel_values_PD.to(weight_HD.dtype), weight_HD)


class MergerMLP(nn.Module):
    def __init__(self, in_size: int, out_size: int) -> None:
        super().__init__()
        self.linear_fc1 = Linear(in_size, in_size)
        self.linear_fc2 = Linear(in_size, out_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))


class PatchMerger(nn.Module):
    """Norm, then an MLP over the merge x merge neighbours laid side by side; gives features of the decoder's width."""

    def __init__(self, hidden_size: int, out_size: int, merge_size: int, accelerator: Accelerator) -> None:
        super().__init__()
        self.merged_size = hidden_size * merge_size**2
        self.layernorm = RMSNorm(hidden_size, MERGER_EPS, accelerator)
        self.encoder = MergerMLP(self.merged_size, out_size)

    def forward(self, x_PH: Tensor) -> Tensor:
        return self.encoder(self.layernorm(x_PH).view(-1, self.merged_size))


@dataclass(frozen=True)
class PatchLayout:
    """Where the patches of a batch lie while the encoder works: window by window, so that a window is a run of rows.

    Host-side, a pure function of the grids; the same on every pipeline stage.
    """

    order_P: Tensor
    """patch of the processor's order that stands at each place of window order"""
    restore_M: Tensor
    """place in window order of each merged patch of the processor's order"""
    positions_P2: Tensor
    """row and column of each patch in its frame, in window order"""
    cu_windows: tuple[int, ...]
    """bounds of the windows, in patches"""
    cu_frames: tuple[int, ...]
    """bounds of the frames (an image is one frame): the segments of full attention"""


@lru_cache(maxsize=128)
def patch_layout(
    grid_thw: tuple[tuple[int, int, int], ...], *, merge_size: int, window_size: int, patch_size: int
) -> PatchLayout:
    """Layout for images and videos of these grids (in patches); `window_size` and `patch_size` are in pixels."""
    unit = merge_size**2
    window = window_size // merge_size // patch_size  # side of a window in merged patches
    merged_orders: list[Tensor] = [torch.zeros(0, dtype=torch.int64)]
    positions: list[Tensor] = [torch.zeros(0, 2, dtype=torch.int64)]
    window_sizes: list[Tensor] = [torch.zeros(0, dtype=torch.int64)]
    cu_frames = [0]
    base = 0
    for t, h, w in grid_thw:
        rows, columns = h // merge_size, w // merge_size
        order, sizes = _window_order(rows, columns, window)
        for _ in range(t):
            merged_orders.append(order + base)
            window_sizes.append(sizes * unit)
            positions.append(_patch_positions(h, w, merge_size))
            base += rows * columns
            cu_frames.append(base * unit)
    merged_order_M = torch.cat(merged_orders)
    order_P = (merged_order_M[:, None] * unit + torch.arange(unit)).flatten()
    cu_windows = torch.cat(window_sizes).cumsum(0).tolist()
    return PatchLayout(
        order_P=order_P,
        restore_M=torch.argsort(merged_order_M),
        positions_P2=torch.cat(positions)[order_P],
        cu_windows=(0, *cu_windows),
        cu_frames=tuple(cu_frames),
    )


def _window_order(rows: int, columns: int, window: int) -> tuple[Tensor, Tensor]:
    """Merged patches of one frame sorted by window (stable, so row by row inside it), and the size of each window."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    windows_across = -(-columns // window)
    window_of = ((row // window) * windows_across + column // window).flatten()
    return torch.argsort(window_of, stable=True), torch.bincount(window_of)


def _patch_positions(h: int, w: int, merge_size: int) -> Tensor:
    """Row and column of each patch of a frame in the processor's order: merge x merge blocks, row by row."""
    grid = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), dim=-1)
    blocks = grid.reshape(h // merge_size, merge_size, w // merge_size, merge_size, 2).transpose(1, 2)
    return blocks.reshape(-1, 2)
