"""Images: size from the header, decode check, and preprocessing equal to transformers' Qwen2VLImageProcessor.

Letters in shapes: P patches, D = channels · temporal_patch · patch · patch. P runs over merge×merge blocks of patches,
block rows before block columns, so that the 4 patches that the merger joins are neighbours.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from core.errors import AppError, InvalidModel

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Decoders that user files may reach (JPEG includes MPO); Pillow has others that call programs or are rarely tested."""

MAX_DECODE_PIXELS = 80_000_000
"""Larger images are refused before they are decoded: 240 MB as RGB."""

MAX_ASPECT_RATIO = 200
"""Limit of smart_resize, as in transformers."""

_ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → what turns the stored image upright."""


Grid = tuple[int, int, int]
Frame = npt.NDArray[np.uint8]
"""Upright pixels [H, W, 3] in the size of a grid: what is decoded once, kept and sent, at an eighth of a still image's patches."""


class MediaError(Exception):
    """An image or video that cannot be used; `code` is stable, the message does not repeat the file's name."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class UnreadableMedia(AppError):
    """An image or video that passed the data set job cannot be read in training any more."""

    code, status = "unreadable_media", 422


@dataclass(frozen=True)
class Medium:
    """An image or a video of a row, and what it takes of the model's input."""

    paths: tuple[Path, ...]
    """Several only for a video given as frames. Relative to the media root in a data set, absolute where it is read."""
    grid: Grid
    """(t, h, w) in patches"""
    num_frames: int = 0
    """Frames that a video has; 0 for an image."""
    num_taken: int = 0
    """Frames that are taken of a video, spread evenly; 0 for an image."""
    seconds_per_grid: float = 0.0
    """Time from one step of t to the next; 0 for an image."""

    @property
    def is_video(self) -> bool:
        return self.num_frames > 0

    @property
    def num_patches(self) -> int:
        t, h, w = self.grid
        return t * h * w

    @property
    def seconds(self) -> float:
        """Duration of a video."""
        return self.seconds_per_grid * self.grid[0]

    def __str__(self) -> str:
        more = f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else ""
        return f"{'video' if self.is_video else 'image'} {self.paths[0]}{more}"


@dataclass(frozen=True)
class ImageProcessing:
    """How images become patches; from the model's preprocessor_config.json."""

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    rescale_factor: float = 1 / 255
    resample: int = int(Image.Resampling.BICUBIC)

    @classmethod
    def from_model_dir(cls, path: Path) -> ImageProcessing:
        """Read preprocessor_config.json (or the image_processor part of processor_config.json) of a model folder.

        Defaults are Qwen2.5-VL's where neither file exists. Raises InvalidModel naming the field.
        """
        for name, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
            file = Path(path) / name
            if not file.exists():
                continue
            try:
                values = json.loads(file.read_text(encoding="utf-8"))
                values = values if key is None else values.get(key)
            except (ValueError, AttributeError) as error:
                raise InvalidModel(f"{name} is not JSON: {error}") from error
            if values is not None:
                return cls._from_hf(values, name)
        return cls()

    @classmethod
    def _from_hf(cls, values: Mapping[str, Any], name: str) -> ImageProcessing:
        for flag in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
            if values.get(flag, True) is not True:
                raise InvalidModel(f"{name}: {flag} must be true, got {values[flag]!r}")
        size = values.get("size") or {}
        given = {
            "patch_size": values.get("patch_size"),
            "temporal_patch_size": values.get("temporal_patch_size"),
            "merge_size": values.get("merge_size"),
            "min_pixels": _first(values.get("min_pixels"), size.get("shortest_edge"), size.get("min_pixels")),
            "max_pixels": _first(values.get("max_pixels"), size.get("longest_edge"), size.get("max_pixels")),
            "mean": values.get("image_mean"),
            "std": values.get("image_std"),
            "rescale_factor": values.get("rescale_factor"),
            "resample": values.get("resample"),
        }
        try:
            return cls.from_dict({key: value for key, value in given.items() if value is not None})
        except (TypeError, ValueError) as error:
            raise InvalidModel(f"{name}: {error}") from error

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ImageProcessing:
        """Build from JSON values; raises TypeError for an unknown key, ValueError for an impossible value."""
        as_tuples: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        made = cls(**as_tuples)
        for field in ("patch_size", "temporal_patch_size", "merge_size", "min_pixels", "max_pixels"):
            value = getattr(made, field)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{field} must be a positive whole number, got {value!r}")
        if len(made.mean) != 3 or len(made.std) != 3:
            raise ValueError(f"mean and std need 3 numbers each, got {made.mean} and {made.std}")
        return made

    def limited(self, *, min_pixels: int | None = None, max_pixels: int | None = None) -> ImageProcessing:
        """The same with other pixel limits; a limit that is None or 0 stays the model's own, within the other one."""
        high = max_pixels or self.max_pixels
        low = min_pixels or min(self.min_pixels, high)
        return replace(self, min_pixels=low, max_pixels=max(high, low))

    @property
    def patch_dim(self) -> int:
        """D: numbers per patch."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    def grid(self, height: int, width: int) -> Grid:
        """(t, h, w) in patches of an image of that size in pixels; raises MediaError."""
        height, width = smart_resize(
            height, width, self.patch_size * self.merge_size, min_pixels=self.min_pixels, max_pixels=self.max_pixels
        )
        return 1, height // self.patch_size, width // self.patch_size

    def num_tokens(self, grid: Grid) -> int:
        """Tokens that an image or video of that grid takes in the text."""
        t, h, w = grid
        return t * h * w // self.merge_size**2

    def patches(self, image: Image.Image) -> tuple[npt.NDArray[np.float32], Grid]:
        """Patches [P, D] and (t, h, w) of an upright RGB image; raises MediaError."""
        grid = self.grid(image.height, image.width)
        return self.patchify([self.resized(image, grid)], grid), grid

    def load(self, path: Path) -> tuple[npt.NDArray[np.float32], Grid]:
        """Decode a file to patches [P, D] and (t, h, w); raises MediaError."""
        pixels, grid = self.decode(path)
        return self.patchify([pixels], grid), grid

    def decode(self, path: Path) -> tuple[Frame, Grid]:
        """Decode a file to pixels in the size of its grid, and (t, h, w); raises MediaError."""
        image = load_rgb(path)
        grid = self.grid(image.height, image.width)
        return self.resized(image, grid), grid

    def resized(self, image: Image.Image, grid: Grid) -> Frame:
        """Pixels [H, W, 3] of an RGB image in the size of a grid."""
        size = (grid[2] * self.patch_size, grid[1] * self.patch_size)
        return np.asarray(image.resize(size, resample=Image.Resampling(self.resample)))

    def patchify(self, frames: Sequence[Frame], grid: Grid) -> npt.NDArray[np.float32]:
        """Patches [P, D] of t · temporal_patch_size frames; where the last step lacks some, as of a still image, the last frame stays.

        Reorders while the pixels are still bytes, then looks up their normalised values: exact and quick.
        """
        t, h, w = grid
        p, m, depth = self.patch_size, self.merge_size, self.temporal_patch_size
        assert 0 <= t * depth - len(frames) < depth, f"{len(frames)} frames for {t} steps of {depth}"
        normalised = np.empty((t, h * w, 3, depth, p * p), np.float32)
        tables = self._tables()
        for place, pixels_HWC in enumerate(frames):
            step, layer = divmod(place, depth)
            blocks = pixels_HWC.reshape(h // m, m, p, w // m, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)
            for channel, table in enumerate(tables):
                values = np.ascontiguousarray(blocks[:, :, :, :, channel]).reshape(h * w, p * p)
                normalised[step, :, channel, layer] = table.take(values)
        for layer in range(len(frames) - (t - 1) * depth, depth):
            normalised[-1, :, :, layer] = normalised[-1, :, :, layer - 1]
        return normalised.reshape(t * h * w, self.patch_dim)

    def _tables(self) -> npt.NDArray[np.float32]:
        """Normalised value of each byte per channel, [3, 256]; operations and precision are those of transformers."""
        scaled = (np.arange(256, dtype=np.float64) * self.rescale_factor).astype(np.float32)
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        return (scaled[None] - mean[:, None]) / std[:, None]


def smart_resize(height: int, width: int, factor: int, *, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Size near (height, width) in aspect, with sides that are multiples of `factor` and an area within the limits.

    As in transformers (models/qwen2_vl/image_processing_qwen2_vl.py), except that a side never becomes 0, which there
    happens when min_pixels is below factor². Raises MediaError past an aspect ratio of 200.
    """
    if min(height, width) < 1:
        raise MediaError("empty_image", f"the image has no pixels ({width}×{height})")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise MediaError("aspect_ratio", f"{width}×{height} has an aspect ratio above {MAX_ASPECT_RATIO}")
    least = factor if min_pixels < factor**2 else 0
    new_height = max(least, round(height / factor) * factor)
    new_width = max(least, round(width / factor) * factor)
    if new_height * new_width > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / scale / factor) * factor)
        new_width = max(factor, math.floor(width / scale / factor) * factor)
    elif new_height * new_width < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * scale / factor) * factor
        new_width = math.ceil(width * scale / factor) * factor
    return new_height, new_width


def probe_size(path: Path) -> tuple[int, int]:
    """(height, width) of the upright image from its header alone; raises MediaError."""
    with opened(path) as image:
        turned = _orientation(image) >= 5
        return (image.width, image.height) if turned else (image.height, image.width)


def check_decodes(path: Path) -> None:
    """Decode the whole file, at an eighth of its size where the format can; raises MediaError for a damaged one."""
    with opened(path) as image:
        image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
        _decode(image)


def load_rgb(path: Path) -> Image.Image:
    """Decode to an upright RGB image, transparency on white as in transformers' convert_to_rgb; raises MediaError."""
    with opened(path) as image:
        orientation = _orientation(image)
        _decode(image)
        return to_rgb(image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB, transparency on white."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def opened(path: Path) -> Image.Image:
    """Read the header; raises MediaError when the file is missing, no known image, or too large to decode."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for, for ever
            raise MediaError("unreadable_image", "not a regular file")
        image = Image.open(path, formats=FORMATS)
    except MediaError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise MediaError("missing_image", "the file does not exist") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise MediaError("image_too_large", str(error)) from error
    except UnidentifiedImageError as error:
        raise MediaError("unreadable_image", f"the file is none of {', '.join(FORMATS)}") from error
    except Exception as error:  # foreign bytes: a decoder may raise anything
        raise MediaError("unreadable_image", f"the header cannot be read: {error}") from error
    if image.width * image.height > MAX_DECODE_PIXELS:
        image.close()
        pixels = f"{image.width}×{image.height} pixels"
        raise MediaError("image_too_large", f"{pixels}, at most {MAX_DECODE_PIXELS} are decoded")
    return image


def _decode(image: Image.Image) -> None:
    try:
        image.load()
    except Exception as error:  # foreign bytes: a decoder may raise anything
        raise MediaError("unreadable_image", f"the file is damaged: {error}") from error


def _orientation(image: Image.Image) -> int:
    """EXIF orientation as far as the header tells it, 1..8; unreadable EXIF counts as upright."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # PNG may carry EXIF after the pixels, and asking for it would decode them
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # noqa: BLE001 - foreign bytes: the parser may raise anything
        return 1
    return orientation if isinstance(orientation, int) else 1


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
