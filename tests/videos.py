"""Tiny videos, made here, whose frames can be told apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
from PIL import Image


def pictures(count: int, *, width: int = 64, height: int = 48) -> list[np.ndarray]:
    """Frames [H, W, 3]: a ramp that grows brighter by 10 from one to the next."""
    ramp = np.linspace(0, 40, width, dtype=np.uint8)
    return [np.stack([np.tile(ramp + 10 * (n % 21), (height, 1))] * 3, axis=2) for n in range(count)]


def write_video(
    path: Path, frames: Sequence[np.ndarray], *, rate: int = 10, lossless: bool = False, rotation: int = 0
) -> Path:
    """MPEG-4, or FFV1 where `lossless`; the container follows the name."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1" if lossless else "mpeg4", rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "bgr0" if lossless else "yuv420p"
        stream.codec_context.gop_size = 8
        if rotation:
            stream.set_display_rotation(rotation)
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def write_animation(path: Path, frames: Sequence[np.ndarray], *, duration_ms: int = 100) -> Path:
    """GIF, WebP or PNG by the name; lossless but for a GIF's palette."""
    first, *others = [Image.fromarray(pixels) for pixels in frames]
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    first.save(path, save_all=True, append_images=others, duration=duration_ms, loop=0, **lossless)
    return path
