"""What one forward pass works on: samples packed end to end, without padding between them.

Shapes: T tokens of all samples, P patches of all images and videos, D = in_channels * temporal_patch * patch * patch.

    tokens   |-- sample 0 --|---- sample 1 ----|- sample 2 -|   cu_seqlens = (0, len0, len0 + len1, T)
    patches  |image|-video-| (samples without media add none)   grid_thw = one (t, h, w) per image and video, in order of appearance
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from core.device.sending import send


@dataclass(frozen=True)
class PackedBatch:
    """Tensors of a micro-batch, and on the host every length that describes them: no layer asks the device for one.

    Where a device wants static shapes, the tail is padding: one more segment of tokens without targets, and one more
    image whose features no token takes (`rows` does not count them).
    """

    input_ids_T: Tensor
    """int64"""
    position_ids_3T: Tensor
    """int64, M-RoPE positions (temporal, height, width), starting anew in each sample"""
    targets_T: Tensor
    """int64: the token that position t must predict (already shifted inside its sample), -100 where there is none"""
    cu_seqlens: tuple[int, ...]
    """(0, len0, len0 + len1, ..., T)"""
    pixel_values_PD: Tensor
    """float32 [P, D] in the patch order of transformers' processor; P may be 0"""
    grid_thw: tuple[tuple[int, int, int], ...]
    """patches of each image and video along time, height and width"""
    rows: tuple[int, ...]
    """dataset row of each sample, for messages"""
    weights_T: Tensor | None = None
    """float32: weight of each position's target in the loss; None: all count alike"""

    @property
    def num_tokens(self) -> int:
        return self.input_ids_T.shape[0]

    @property
    def num_patches(self) -> int:
        """P as the grids tell it: a stage that embeds no patches gets a batch without pixels, but with its grids."""
        return sum(t * h * w for t, h, w in self.grid_thw)

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on `device`, sent without waiting."""
        return replace(
            self,
            input_ids_T=send(self.input_ids_T, device),
            position_ids_3T=send(self.position_ids_3T, device),
            targets_T=send(self.targets_T, device),
            pixel_values_PD=send(self.pixel_values_PD, device),
            weights_T=None if self.weights_T is None else send(self.weights_T, device),
        )

    def padded_to(self, multiple: int) -> PackedBatch:
        """The same batch with a number of tokens that `multiple` divides; a host-side batch."""
        missing = -self.num_tokens % multiple
        if missing == 0:
            return self
        padding = torch.zeros(missing, dtype=torch.int64)
        return replace(
            self,
            input_ids_T=torch.cat([self.input_ids_T, padding]),
            position_ids_3T=torch.cat([self.position_ids_3T, torch.arange(missing).expand(3, -1)], dim=1),
            targets_T=torch.cat([self.targets_T, padding - 100]),
            weights_T=None if self.weights_T is None else torch.cat([self.weights_T, padding.float()]),
            cu_seqlens=(*self.cu_seqlens, self.num_tokens + missing),
        )
