"""Rotary tables: one pair (cos, sin) per forward pass and tower, shared by its layers.

Shapes: T tokens, P patches, D head size. Tables repeat their first half, as rotation pairs dim i with dim i + D / 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

VISION_THETA = 10000.0


def mrope_tables(
    position_ids_3T: Tensor, *, head_dim: int, theta: float, sections: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin [T, D] of the decoder: frequencies go in `sections` to time, height and width in turn."""
    freqs_3TF = position_ids_3T[..., None].float() * _inverse_frequencies(head_dim, theta, position_ids_3T.device)
    parts = freqs_3TF.split(list(sections), dim=-1)
    freqs_TF = torch.cat([part[axis % 3] for axis, part in enumerate(parts)], dim=-1)
    table_TD = torch.cat((freqs_TF, freqs_TF), dim=-1)
    return table_TD.cos().to(dtype), table_TD.sin().to(dtype)


def vision_tables(position_ids_P2: Tensor, *, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [P, D] of the vision encoder, float32: a quarter of D for the row, one for the column, twice."""
    inverse = _inverse_frequencies(head_dim // 2, VISION_THETA, position_ids_P2.device)
    freqs_PF = (position_ids_P2[..., None].float() * inverse).flatten(1)
    table_PD = torch.cat((freqs_PF, freqs_PF), dim=-1)
    return table_PD.cos(), table_PD.sin()


def _inverse_frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    return 1.0 / (theta**exponents)
