"""M-RoPE positions of one sample: text counts up on all three axes, an image spreads over time, height and width.

text  text  | 2 x 3 image (merged patches)      | text
0     1     | t: 2 2 2 2 2 2                     | 5    = largest position so far + 1
            | h: 2 2 2 3 3 3                     |
            | w: 2 3 4 2 3 4                     |
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from core.errors import InvalidDataset
from core.models.qwen2_5_vl.family import Config


def mrope_positions(input_ids: Sequence[int], grid_thw: Sequence[tuple[int, int, int]], config: Config) -> Tensor:
    """Positions (int64 [3, L]) of `input_ids`, equal to transformers' `get_rope_index` for text and still images.

    Raises InvalidDataset when the image tokens are not exactly those that the grids call for.
    """
    merge = config.vision.spatial_merge_size
    ids = torch.as_tensor(input_ids, dtype=torch.int64)
    image_starts = (ids == config.image_token_id).nonzero().flatten().tolist()
    expected = sum(t * h * w // merge**2 for t, h, w in grid_thw)
    if len(image_starts) != expected:
        raise InvalidDataset(
            f"{len(image_starts)} image tokens in the text, but its {len(grid_thw)} images need {expected}"
        )

    parts: list[Tensor] = []
    token, position, used = 0, 0, 0
    for t, grid_h, grid_w in grid_thw:
        h, w = grid_h // merge, grid_w // merge
        start, count = image_starts[used], t * h * w
        if image_starts[used + count - 1] != start + count - 1:
            raise InvalidDataset(
                f"the {count} image tokens of an image of {t} x {h} x {w} do not stand together at token {start}"
            )
        parts.append(_text_positions(start - token, position))
        position += start - token
        parts.append(_image_positions(t, h, w, position))
        position += max(h, w)
        token, used = start + count, used + count
    parts.append(_text_positions(len(ids) - token, position))
    return torch.cat(parts, dim=1)


def _text_positions(length: int, start: int) -> Tensor:
    return torch.arange(start, start + length).expand(3, length)


def _image_positions(t: int, h: int, w: int, start: int) -> Tensor:
    axes = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack(axes).reshape(3, -1) + start
