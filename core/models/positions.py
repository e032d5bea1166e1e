"""M-RoPE positions of one sample: text counts up on all three axes, images and videos spread over time, height and width.

text  text  | 2 x 3 image (merged patches)      | text  | video: 2 steps of 1 x 2, two seconds apart | text
0     1     | t: 2 2 2 2 2 2                     | 5     | t: 6 6 10 10    2 positions per second      | 11
            | h: 2 2 2 3 3 3                     |       | h: 6 6  6  6                               |
            | w: 2 3 4 2 3 4                     |       | w: 6 7  6  7                               |

What follows begins at the largest position so far + 1, on whichever axis: Qwen's rule, which the published weights learnt.
Transformers 5.3 and later count on from height and width alone, so that text after a video of more seconds than its
sides are wide gets positions of the video again; up to there, and for everything else, positions are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from core.errors import InvalidDataset
from core.models.config import Config


def mrope_positions(
    input_ids: Sequence[int],
    grid_thw: Sequence[tuple[int, int, int]],
    config: Config,
    seconds_per_grid: Sequence[float] = (),
) -> Tensor:
    """Positions (int64 [3, L]) of `input_ids`; grids of images and videos in order of appearance.

    `seconds_per_grid`: for each grid the time between its steps, of no account for an image; may be left out without
    videos. Raises InvalidDataset when the image and video tokens are not exactly those that the grids call for.
    """
    merge = config.vision.spatial_merge_size
    seconds = seconds_per_grid or [0.0] * len(grid_thw)
    ids = torch.as_tensor(input_ids, dtype=torch.int64)
    is_video = ids == config.video_token_id
    places = ((ids == config.image_token_id) | is_video).nonzero().flatten().tolist()
    expected = sum(t * h * w // merge**2 for t, h, w in grid_thw)
    if len(places) != expected:
        raise InvalidDataset(
            f"{len(places)} image and video tokens in the text, but its {len(grid_thw)} images and videos need {expected}"
        )

    parts: list[Tensor] = []
    token, position, used = 0, 0, 0
    for (t, grid_h, grid_w), step_seconds in zip(grid_thw, seconds, strict=True):
        h, w = grid_h // merge, grid_w // merge
        start, count = places[used], t * h * w
        if places[used + count - 1] != start + count - 1 or len(ids[start : start + count].unique()) > 1:
            raise InvalidDataset(
                f"the {count} tokens of an image or video of {t} x {h} x {w} do not stand together at token {start}"
            )
        parts.append(_text_positions(start - token, position))
        position += start - token
        interval = config.vision.tokens_per_second * torch.tensor(step_seconds, dtype=torch.float32)
        parts.append(_grid_positions(t, h, w, interval if is_video[start] else torch.tensor(1.0)) + position)
        position = int(parts[-1].max()) + 1
        token, used = start + count, used + count
    parts.append(_text_positions(len(ids) - token, position))
    return torch.cat(parts, dim=1)


def _text_positions(length: int, start: int) -> Tensor:
    return torch.arange(start, start + length).expand(3, length)


def _grid_positions(t: int, h: int, w: int, interval: Tensor) -> Tensor:
    time = (torch.arange(t) * interval).long()  # float32, as transformers rounds it
    return torch.stack(torch.meshgrid(time, torch.arange(h), torch.arange(w), indexing="ij")).reshape(3, -1)
