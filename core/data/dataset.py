"""The tokenised data set on disk: what the data set job writes and training reads, by memory map.

    DATASET/
      train.jsonl  validation.jsonl  refused.jsonl  report.json  preview.json      for people and other tools
      tokens/
        meta.json            version, counts, media root, image and video processing, special tokens, tokenizer digest
        input_ids.i32        [tokens]      all rows end to end
        trained.u8           [tokens]      1 where the token is learnt (assistant text and its end mark)
        token_offsets.i64    [rows + 1]    row i is tokens[token_offsets[i] : token_offsets[i + 1]]
        grids.i32            [media, 3]    (t, h, w) in patches of each image and video, in order of appearance
        frames.i32           [media, 2]    frames of a video before sampling, and those taken; 0 = an image
        seconds.f64          [media]       time from one step of t to the next; 0 = an image
        media_offsets.i64    [rows + 1]    row i has media[media_offsets[i] : media_offsets[i + 1]]
        paths.u8             [bytes]       paths relative to the media root, UTF-8, end to end; NUL between those of a video's frames
        path_offsets.i64     [media + 1]
        patches.i64          [rows]        image and video patches of the row
        num_targets.i64      [rows]        learnt tokens of the row
        source_rows.i64      [rows]        row number in the user's annotation file, from 1
        train.i64            [num_train]   rows of the split
        validation.i64       [num_validation]

All files are little-endian and grow by appending, so that writing needs no memory per row. No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from core.data.media import Grid, ImageProcessing, Medium
from core.data.video import VideoProcessing
from core.errors import InvalidDataset
from core.models.config import Config

VERSION = 2
NO_TARGET = -100
SPLITS = ("train", "validation")

_REMAKE = "tokenizer and processor files must be those of the model: make the data set with its folder as tokenizer"

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Meta:
    """What training needs to know of the whole data set; `tokens/meta.json`."""

    version: int
    num_rows: int
    num_train: int
    num_validation: int
    num_tokens: int
    num_images: int
    num_videos: int
    num_frames: int
    """Taken of all videos."""
    max_length: int
    max_patches: int
    media_root: str
    vocab_size: int
    """One more than the largest id of the tokenizer."""
    tokenizer_digest: str
    """SHA-256 of tokenizer.json."""
    image_token_id: int
    video_token_id: int
    pad_token_id: int
    image_processing: ImageProcessing
    video_processing: VideoProcessing


@dataclass(frozen=True)
class Row:
    """One sample, ready for a batch."""

    index: int
    """Position in the split."""
    source_row: int
    """Row number in the user's annotation file, from 1; for messages."""
    input_ids: npt.NDArray[np.int32]
    """[L]"""
    targets: IntArray
    """[L]: the token that position t must predict (input_ids[t + 1]), NO_TARGET where nothing is learnt."""
    media: tuple[Medium, ...]
    """Images and videos in order of appearance."""

    @property
    def grid_thw(self) -> tuple[Grid, ...]:
        return tuple(medium.grid for medium in self.media)

    @property
    def seconds_per_grid(self) -> tuple[float, ...]:
        return tuple(medium.seconds_per_grid for medium in self.media)


class TokenisedDataset:
    """One split of a data set artifact; opening it reads offsets only, tokens stay on disk until asked for.

    Raises InvalidDataset if a file is missing or its size contradicts meta.json.
    """

    def __init__(self, path: Path, split: str = "train", *, media_root: Path | None = None) -> None:
        if split not in SPLITS:
            raise InvalidDataset(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        self.path = Path(path)
        self.split = split
        self.meta = _read_meta(self.path / "tokens" / "meta.json")
        self.media_root = Path(media_root or self.meta.media_root)
        meta = self.meta
        self._input_ids = self._map("input_ids.i32", np.int32, meta.num_tokens)
        self._trained = self._map("trained.u8", np.uint8, meta.num_tokens)
        self._token_offsets = self._map("token_offsets.i64", np.int64, meta.num_rows + 1)
        num_media = meta.num_images + meta.num_videos
        self._grids = self._map("grids.i32", np.int32, num_media * 3).reshape(-1, 3)
        self._frames = self._map("frames.i32", np.int32, num_media * 2).reshape(-1, 2)
        self._seconds = self._map("seconds.f64", np.float64, num_media)
        self._media_offsets = self._map("media_offsets.i64", np.int64, meta.num_rows + 1)
        self._path_offsets = self._map("path_offsets.i64", np.int64, num_media + 1)
        self._paths = self._map("paths.u8", np.uint8, int(self._path_offsets[-1]))
        self._source_rows = self._map("source_rows.i64", np.int64, meta.num_rows)
        self._rows = self._map(f"{split}.i64", np.int64, meta.num_train if split == "train" else meta.num_validation)

        rows = np.asarray(self._rows)
        self.lengths: IntArray = np.diff(np.asarray(self._token_offsets))[rows]
        """Tokens per row of the split, [N]."""
        self.patches: IntArray = np.asarray(self._map("patches.i64", np.int64, meta.num_rows))[rows]
        """Image and video patches per row of the split, [N]."""
        self.num_targets: IntArray = np.asarray(self._map("num_targets.i64", np.int64, meta.num_rows))[rows]
        """Tokens that are learnt per row of the split, [N]; the loss is averaged over them."""

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Row:
        """Read the sample at `index` of the split."""
        stored = int(self._rows[index])
        tokens = slice(int(self._token_offsets[stored]), int(self._token_offsets[stored + 1]))
        media = range(int(self._media_offsets[stored]), int(self._media_offsets[stored + 1]))
        input_ids = np.asarray(self._input_ids[tokens])
        return Row(
            index=index,
            source_row=int(self._source_rows[stored]),
            input_ids=input_ids,
            targets=shifted_targets(input_ids, self._trained[tokens]),
            media=tuple(self._medium(i) for i in media),
        )

    def grids(self, index: int) -> list[Grid]:
        """Grids of the images and videos of the sample at `index`, without reading more of it."""
        stored = int(self._rows[index])
        media = slice(int(self._media_offsets[stored]), int(self._media_offsets[stored + 1]))
        return [(t, h, w) for t, h, w in self._grids[media].tolist()]

    def source_row(self, index: int) -> int:
        """Row number in the user's annotation file of the sample at `index`, from 1."""
        return int(self._source_rows[self._rows[index]])

    def check_model(self, config: Config) -> None:
        """Refuse a model that this data set was not made for; raises InvalidDataset naming the difference."""
        meta = self.meta
        check_fits(
            config,
            image_token_id=meta.image_token_id,
            video_token_id=meta.video_token_id,
            vocab_size=meta.vocab_size,
            image_processing=meta.image_processing,
        )

    def _medium(self, index: int) -> Medium:
        paths = self._paths[int(self._path_offsets[index]) : int(self._path_offsets[index + 1])].tobytes().decode()
        t, h, w = (int(value) for value in self._grids[index])
        return Medium(
            paths=tuple(self.media_root / path for path in paths.split("\0")),
            grid=(t, h, w),
            num_frames=int(self._frames[index, 0]),
            num_taken=int(self._frames[index, 1]),
            seconds_per_grid=float(self._seconds[index]),
        )

    def _map(self, name: str, dtype: npt.DTypeLike, count: int) -> np.ndarray:
        path = self.path / "tokens" / name
        expected = count * np.dtype(dtype).itemsize
        actual = path.stat().st_size if path.exists() else None
        if actual != expected:
            found = "is missing" if actual is None else f"has {actual} bytes"
            raise InvalidDataset(f"{path} {found}, expected {expected} bytes", hint="run the data set job again")
        if count == 0:
            return np.empty(0, dtype)
        return np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r")


def check_fits(
    config: Config, *, image_token_id: int, video_token_id: int, vocab_size: int, image_processing: ImageProcessing
) -> None:
    """Refuse a model that tokens and patches are not made for; raises InvalidDataset naming the difference."""
    vision = config.vision
    pairs = {
        "image_token_id": (image_token_id, config.image_token_id),
        "video_token_id": (video_token_id, config.video_token_id),
        "patch_size": (image_processing.patch_size, vision.patch_size),
        "temporal_patch_size": (image_processing.temporal_patch_size, vision.temporal_patch_size),
        "spatial_merge_size": (image_processing.merge_size, vision.spatial_merge_size),
    }
    for name, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise InvalidDataset(f"{name} is {ours} for the data set, {theirs} for the model", hint=_REMAKE)
    if vocab_size > config.text.vocab_size:
        raise InvalidDataset(
            f"the data set has token ids up to {vocab_size - 1}, the model up to {config.text.vocab_size - 1}",
            hint=_REMAKE,
        )


def shifted_targets(input_ids: np.ndarray, trained: np.ndarray) -> IntArray:
    """Targets [L] of one sample: position t predicts token t + 1 if that is learnt; the last predicts nothing."""
    targets = np.full(len(input_ids), NO_TARGET, np.int64)
    targets[:-1] = np.where(trained[1:], input_ids[1:], NO_TARGET)
    return targets


class TokenWriter:
    """Appends rows to `tokens/`; `finish` writes the splits and meta.json. A context manager that closes its files."""

    def __init__(self, path: Path) -> None:
        self._folder = Path(path) / "tokens"
        self._folder.mkdir(parents=True)
        self._files: dict[str, BinaryIO] = {}
        self.num_rows = self.num_tokens = self.num_images = self.num_videos = self.num_frames = 0
        self.max_length = self.max_patches = 0
        self._path_bytes = 0
        for name in ("token_offsets.i64", "media_offsets.i64", "path_offsets.i64"):
            self._append(name, np.zeros(1, "<i8"))
        for name in ("input_ids.i32", "trained.u8", "grids.i32", "frames.i32", "seconds.f64", "paths.u8"):
            self._append(name, np.empty(0, np.uint8))

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def add(self, input_ids: np.ndarray, trained: np.ndarray, *, media: Sequence[Medium], source_row: int) -> None:
        """Append one row: ids and marks [L], and its images and videos with relative paths."""
        assert len(input_ids) == len(trained)
        self._append("input_ids.i32", np.asarray(input_ids, "<i4"))
        self._append("trained.u8", np.asarray(trained, np.uint8))
        for medium in media:
            encoded = "\0".join(map(str, medium.paths)).encode()
            self._append("paths.u8", np.frombuffer(encoded, np.uint8))
            self._path_bytes += len(encoded)
            self._append("path_offsets.i64", np.array([self._path_bytes], "<i8"))
            self._append("grids.i32", np.asarray(medium.grid, "<i4"))
            self._append("frames.i32", np.array([medium.num_frames, medium.num_taken], "<i4"))
            self._append("seconds.f64", np.array([medium.seconds_per_grid], "<f8"))
            self.num_videos += medium.is_video
            self.num_images += not medium.is_video
            self.num_frames += medium.num_taken
        self.num_rows += 1
        self.num_tokens += len(input_ids)
        self.max_length = max(self.max_length, len(input_ids))
        patches = sum(medium.num_patches for medium in media)
        self.max_patches = max(self.max_patches, patches)
        self._append("token_offsets.i64", np.array([self.num_tokens], "<i8"))
        self._append("media_offsets.i64", np.array([self.num_images + self.num_videos], "<i8"))
        self._append("patches.i64", np.array([patches], "<i8"))
        self._append("num_targets.i64", np.array([np.count_nonzero(trained[1:])], "<i8"))
        self._append("source_rows.i64", np.array([source_row], "<i8"))

    def finish(
        self,
        *,
        train: npt.ArrayLike,
        validation: npt.ArrayLike,
        media_root: Path,
        vocab_size: int,
        tokenizer_digest: str,
        image_token_id: int,
        video_token_id: int,
        pad_token_id: int,
        image_processing: ImageProcessing,
        video_processing: VideoProcessing | None = None,
    ) -> Meta:
        """Write the splits (row numbers in order of adding) and meta.json, last."""
        rows = {"train": np.asarray(train, "<i8"), "validation": np.asarray(validation, "<i8")}
        for split in SPLITS:
            self._append(f"{split}.i64", rows[split])
        for file in self._files.values():
            file.flush()
        meta = Meta(
            version=VERSION,
            num_rows=self.num_rows,
            num_train=len(rows["train"]),
            num_validation=len(rows["validation"]),
            num_tokens=self.num_tokens,
            num_images=self.num_images,
            num_videos=self.num_videos,
            num_frames=self.num_frames,
            max_length=self.max_length,
            max_patches=self.max_patches,
            media_root=str(media_root),
            vocab_size=vocab_size,
            tokenizer_digest=tokenizer_digest,
            image_token_id=image_token_id,
            video_token_id=video_token_id,
            pad_token_id=pad_token_id,
            image_processing=image_processing,
            video_processing=video_processing or VideoProcessing.like(image_processing),
        )
        (self._folder / "meta.json").write_text(json.dumps(asdict(meta), indent=2) + "\n", encoding="utf-8")
        return meta

    def _append(self, name: str, values: np.ndarray) -> None:
        if name not in self._files:
            self._files[name] = (self._folder / name).open("xb", buffering=1 << 18)
        self._files[name].write(values.tobytes())


def _read_meta(path: Path) -> Meta:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidDataset(
            f"{path} cannot be read: {error}", hint="is this folder the output of a data set job?"
        ) from error
    if values.get("version") != VERSION:
        raise InvalidDataset(
            f"{path} has version {values.get('version')!r}, this version reads {VERSION}",
            hint="run the data set job again",
        )
    try:
        values["image_processing"] = ImageProcessing.from_dict(values["image_processing"])
        values["video_processing"] = VideoProcessing.from_dict(values["video_processing"])
        return Meta(**{field.name: values[field.name] for field in fields(Meta)})
    except (KeyError, TypeError) as error:
        raise InvalidDataset(f"{path} lacks {error}", hint="run the data set job again") from error
