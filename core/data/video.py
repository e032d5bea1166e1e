"""Videos: which frames are taken, and what becomes of them; equal to transformers' Qwen2VLVideoProcessor but for rounding.

    paths ─► probe: size, number of frames, rate (from the header) ─► plan: (t, h, w), seconds from step to step
          ─► check: decodes everything once, counts ─┘            └─► decode: takes up to t · temporal_patch_size frames

A video is a file (mp4, mkv, avi … by PyAV; GIF, WebP, PNG by Pillow) or a list of images, its frames. Frames are decoded
one after the other and only those that are taken are kept, in the size of the grid.
"""

from __future__ import annotations

import itertools
import logging
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from core.data.media import Frame, Grid, ImageProcessing, MediaError, Medium, load_rgb, opened, probe_size, to_rgb

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

MIN_PIXELS = 128 * 28 * 28
"""Qwen's least size of a frame; not used where the user's limit is below it."""

MAX_FILE_BYTES = 4 << 30
MAX_FRAME_PIXELS = 20_000_000
"""A decoder holds up to 20 frames: 600 MB."""
MAX_DECODED_PIXELS = 100_000_000_000
"""An hour of 720p at 30 frames a second: some minutes of one processor core."""
MAX_ANIMATION_PIXELS = 5_000_000_000
"""Of GIF, WebP and PNG, which take ten times as long."""
MISSING_FRAMES = 0.1
"""A file that ends after less than nine tenths of what its header announces is cut off; headers may be inexact."""
RATES = (1 / 3600, 1000.0)
"""Frames per second that are believed."""

CONTAINERS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,h264,hevc,ivf"
CODECS = (
    *("h264", "hevc", "av1", "libdav1d", "libaom-av1", "vp8", "vp9", "libvpx", "libvpx-vp9", "mpeg4", "mpeg1video"),
    *("mpeg2video", "mjpeg", "h263", "flv", "msmpeg4", "msmpeg4v1", "msmpeg4v2", "wmv1", "wmv2", "wmv3", "vc1"),
    *("theora", "prores", "dnxhd", "ffv1", "rawvideo"),
)  # fmt: skip
"""Formats and decoders of PyAV that user files may reach: playlists, which open other files, and rarely tested ones are not."""

_ANIMATIONS = (b"GIF8", b"\x89PNG", b"RIFF", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*")
_TURN = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    -180: Image.Transpose.ROTATE_180,
    -90: Image.Transpose.ROTATE_270,
}
"""Degrees against the clock → what turns the frame upright."""


@dataclass(frozen=True)
class Clip:
    """A video before its frames are chosen."""

    height: int
    width: int
    """Of the upright picture, in pixels."""
    num_frames: int
    rate: float
    """Frames per second."""
    chosen: bool = False
    """The user chose the frames: all are taken."""


@dataclass(frozen=True)
class VideoProcessing:
    """How videos become patches."""

    frames: ImageProcessing
    """What is done with each frame, with the limits of its size."""
    fps: float = 2.0
    """Frames that are taken per second."""
    min_frames: int = 4
    max_frames: int = 768

    @classmethod
    def like(
        cls,
        images: ImageProcessing,
        *,
        fps: float = 2.0,
        max_frames: int = 768,
        max_pixels: int = 768 * 28 * 28,
        min_pixels: int | None = None,
    ) -> VideoProcessing:
        """As images are processed, within limits of their own; without `min_pixels` Qwen's, if `max_pixels` admits it."""
        least = min_pixels or (MIN_PIXELS if max_pixels >= MIN_PIXELS else 1)
        frames = replace(images, min_pixels=least, max_pixels=max(max_pixels, least))
        return cls(frames, fps=fps, max_frames=max(max_frames, images.temporal_patch_size))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VideoProcessing:
        """Build from JSON values; raises TypeError for an unknown key, ValueError for an impossible value."""
        return cls(**{**values, "frames": ImageProcessing.from_dict(values["frames"])})

    def probe(self, paths: Sequence[Path]) -> Clip:
        """Size, length and rate, from the header where there is one; raises MediaError."""
        with _open(paths, self.fps) as source:
            return source.clip

    def check(self, paths: Sequence[Path], clip: Clip) -> Clip:
        """Decode everything; `clip` with the true size and number of frames. Raises MediaError for a damaged file."""
        with _open(paths, self.fps) as source:
            first, count = None, 0
            for make in source.pictures():
                first = first or make()
                count += 1
        if first is None:
            raise MediaError("unreadable_video", "the file has no frame")
        if count < (1 - MISSING_FRAMES) * clip.num_frames - 2:
            raise MediaError(
                "unreadable_video",
                f"the file is cut off: {count} frames of the {clip.num_frames} that its header announces",
            )
        return replace(clip, height=first.height, width=first.width, num_frames=count)

    def plan(self, paths: Sequence[Path], clip: Clip) -> Medium:
        """Choose the frames; raises MediaError.

        As in transformers: `fps` frames per second, at least `min_frames` and at most `max_frames` and what there is,
        rounded down to whole steps.
        """
        if clip.num_frames < 1:
            raise MediaError("unreadable_video", "the file has no frame")
        depth = self.frames.temporal_patch_size
        _, h, w = self.frames.grid(clip.height, clip.width)
        most = min(self.max_frames, clip.num_frames) // depth * depth
        if clip.chosen:
            taken = clip.num_frames if clip.num_frames <= self.max_frames else most
        else:
            wanted = max(clip.num_frames / clip.rate * self.fps, self.min_frames)
            taken = int(min(wanted, most)) // depth * depth
        taken = max(taken, 1)  # of a video of one frame
        return Medium(
            paths=tuple(paths),
            grid=(-(-taken // depth), h, w),
            num_frames=clip.num_frames,
            num_taken=taken,
            seconds_per_grid=depth / (taken / clip.num_frames * clip.rate),
        )

    def load(self, video: Medium) -> npt.NDArray[np.float32]:
        """Patches [P, D] of a video; raises MediaError as `decode` does."""
        return self.frames.patchify(self.decode(video), video.grid)

    def decode(self, video: Medium) -> list[Frame]:
        """Decode the frames that are taken; raises MediaError, also if the file now has another size or fewer frames."""
        grid, taken = video.grid, video.num_taken
        wanted = {place * video.num_frames // taken for place in range(taken)}
        kept: list[Frame] = []
        with _open(video.paths, self.fps) as source:
            for index, make in enumerate(itertools.islice(source.pictures(), max(wanted) + 1)):
                if index in wanted:
                    picture = make()
                    if index == 0:  # planned for its size; a stream may change it later
                        check_grid(video, (grid[0], *self.frames.grid(picture.height, picture.width)[1:]))
                    kept.append(self.frames.resized(picture, grid))
        if len(kept) < taken:
            missing = sorted(wanted)[len(kept)]
            raise MediaError("unreadable_video", f"the file ends before frame {missing} of {video.num_frames}")
        return kept


def load_medium(medium: Medium, images: ImageProcessing, videos: VideoProcessing | None) -> npt.NDArray[np.float32]:
    """Patches [P, D] of an image, or of a video, for which `videos` is needed; raises MediaError as `decode_medium` does."""
    return patchify_medium(medium, decode_medium(medium, images, videos), images, videos)


def decode_medium(medium: Medium, images: ImageProcessing, videos: VideoProcessing | None) -> list[Frame]:
    """Decode what is taken of an image or video. Raises MediaError, also if the file is no longer the one that was planned."""
    if medium.is_video:
        assert videos is not None, "nobody said how videos are processed"
        return videos.decode(medium)
    pixels, grid = images.decode(medium.paths[0])
    check_grid(medium, grid)
    return [pixels]


def patchify_medium(
    medium: Medium, frames: Sequence[Frame], images: ImageProcessing, videos: VideoProcessing | None
) -> npt.NDArray[np.float32]:
    """Patches [P, D] of what was decoded."""
    processing = videos.frames if medium.is_video and videos is not None else images
    return processing.patchify(frames, medium.grid)


def check_grid(medium: Medium, found: Grid) -> None:
    """Raise MediaError unless `found` is the grid that was planned."""
    if found != medium.grid:
        raise MediaError("changed", f"the file now gives the grid {found}, the data set was made with {medium.grid}")


def first_picture(paths: Sequence[Path]) -> Image.Image:
    """The first frame, upright RGB; raises MediaError."""
    with _open(paths, 1.0) as source:
        for make in source.pictures():
            return make()
    raise MediaError("unreadable_video", "the file has no frame")


@dataclass(frozen=True)
class _Source:
    """An open video."""

    clip: Clip
    pictures: Callable[[], Iterator[Callable[[], Image.Image]]]
    """Its frames in order, each made into an upright RGB picture on demand and before the next is asked for."""


@contextmanager
def _open(paths: Sequence[Path], rate: float) -> Iterator[_Source]:
    """`rate` is that of a video which has none of its own: given as frames, or one still picture."""
    if len(paths) > 1:
        yield _frame_files(paths, rate)
        return
    head = _head(paths[0])
    if head.startswith(_ANIMATIONS) and (head[:4] != b"RIFF" or head[8:12] == b"WEBP"):
        with opened(paths[0]) as image:
            moves = image.format in ("GIF", "WEBP", "PNG") and getattr(image, "n_frames", 1) > 1
            yield _animation(image) if moves else _frame_files(paths, rate)
        return
    with _container(paths[0]) as container:
        yield _stream(container)


def _head(path: Path) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for, for ever
            raise MediaError("unreadable_video", "not a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise MediaError("video_too_large", f"{status.st_size} bytes, at most {MAX_FILE_BYTES} are read")
        with path.open("rb") as file:
            return file.read(12)
    except (FileNotFoundError, NotADirectoryError):
        raise MediaError("missing_video", "the file does not exist") from None
    except OSError as error:
        raise MediaError("unreadable_video", f"the file cannot be read: {error.strerror}") from error


def _check_size(height: int, width: int, num_frames: int, limit: int) -> None:
    if height * width > MAX_FRAME_PIXELS:
        raise MediaError(
            "video_too_large", f"frames of {width}×{height} pixels, at most {MAX_FRAME_PIXELS} are decoded"
        )
    if height * width * num_frames > limit:
        raise MediaError(
            "video_too_large", f"{num_frames} frames of {width}×{height}, at most {limit} pixels are decoded of a video"
        )


def _frame_files(paths: Sequence[Path], rate: float) -> _Source:
    height, width = probe_size(paths[0])
    for number, path in enumerate(paths):
        if probe_size(path) != (height, width):
            raise MediaError("unreadable_video", f"frame {number} differs in size from the first, {width}×{height}")

    def pictures() -> Iterator[Callable[[], Image.Image]]:
        for path in paths:
            picture = load_rgb(path)
            yield lambda picture=picture: picture  # type: ignore[misc]

    return _Source(Clip(height, width, len(paths), rate, chosen=True), pictures)


def _animation(image: Image.Image) -> _Source:
    """The rate follows from the durations of the frames."""
    count: int = image.n_frames  # type: ignore[attr-defined]
    _check_size(image.height, image.width, count, MAX_ANIMATION_PIXELS)

    def pictures() -> Iterator[Callable[[], Image.Image]]:
        for number in range(count):
            _seek(image, number)
            yield lambda: to_rgb(image)

    milliseconds = 0.0
    for number in range(count):
        _seek(image, number)
        milliseconds += image.info.get("duration") or 100  # what browsers take for none
    return _Source(Clip(image.height, image.width, count, _believed(1000 * count / milliseconds)), pictures)


def _seek(image: Image.Image, number: int) -> None:
    try:
        image.seek(number)
        image.load()
    except Exception as error:  # foreign bytes: a decoder may raise anything
        raise MediaError("unreadable_video", f"frame {number} is damaged: {error}") from error


@contextmanager
def _container(path: Path) -> Iterator[InputContainer]:
    try:
        import av
    except ImportError:
        raise MediaError(
            "no_video_decoder", "videos need PyAV, which is not installed here: pip install 'temper[video]'"
        ) from None
    logging.getLogger("libav").setLevel(logging.CRITICAL)
    limits = {
        "format_whitelist": CONTAINERS,
        "codec_whitelist": ",".join(CODECS),
        "protocol_whitelist": "file",
    }
    try:
        container = av.open(str(path.absolute()), options=limits, metadata_errors="ignore")
    except Exception as error:  # foreign bytes: a parser may raise anything
        raise MediaError("unreadable_video", f"the header cannot be read: {_reason(error)}") from error
    with container:
        yield container


def _stream(container: InputContainer) -> _Source:
    if not container.streams.video:
        raise MediaError("unreadable_video", "the file has no video stream")
    stream = container.streams.video[0]
    context = stream.codec_context
    if context is None or context.name not in CODECS:
        name = "" if context is None else f" {context.name}"
        raise MediaError("unreadable_video", f"the codec{name} is not one that user files may reach")
    context.thread_count = 1  # the caller's threads and processes are the parallel ones
    context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}  # sizes may change in mid-stream
    rate = _believed(stream.average_rate or stream.guessed_rate or Fraction(0))
    count = stream.frames or round(_seconds(container, stream) * rate)
    _check_size(context.height, context.width, count, MAX_DECODED_PIXELS)

    def pictures() -> Iterator[Callable[[], Image.Image]]:
        pixels = 0
        for frame in _decoded(container, stream):
            pixels += frame.width * frame.height
            if pixels > MAX_DECODED_PIXELS:
                raise MediaError(
                    "video_too_large", f"more than {MAX_DECODED_PIXELS} pixels of the video are not decoded"
                )
            yield lambda frame=frame: _upright(frame)  # type: ignore[misc]

    return _Source(Clip(context.height, context.width, count, rate), pictures)


def _decoded(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    frames = iter(container.decode(stream))
    while True:
        try:
            frame = next(frames, None)
        except Exception as error:  # foreign bytes: a decoder may raise anything
            raise MediaError("unreadable_video", f"the file is damaged: {_reason(error)}") from error
        if frame is None:
            return
        yield frame


def _upright(frame: VideoFrame) -> Image.Image:
    try:
        picture = frame.to_image()
        turn = _TURN.get(frame.rotation)
    except Exception as error:  # as above
        raise MediaError("unreadable_video", f"a frame cannot be converted: {_reason(error)}") from error
    return picture if turn is None else picture.transpose(turn)


def _seconds(container: InputContainer, stream: VideoStream) -> float:
    """Duration by the header; 0 where it has none, as recorded by browsers."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / 1_000_000


def _believed(rate: float | Fraction) -> float:
    if not RATES[0] <= rate <= RATES[1]:
        raise MediaError("unreadable_video", f"{float(rate):g} frames per second is not believed")
    return float(rate)


def _reason(error: Exception) -> str:
    """What went wrong, without the path, which the caller names."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
