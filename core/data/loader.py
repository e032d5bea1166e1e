"""Rows to batches: packing, images and videos decoded ahead of use, and the order of the run.

    worker processes: file ─► frames, bytes ─► threads: kept in the cache ─► patches, packed ─► the training's main thread

Decoding in threads would take the interpreter lock from the main thread, which has to keep an accelerator busy. What is left to
them, patches and packing, is a few calls of numpy, which lets go of the lock.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from core.data.dataset import NO_TARGET, Row, TokenisedDataset
from core.data.decoding import DecoderDied, Decoders
from core.data.media import Frame, ImageProcessing, MediaError, Medium, UnreadableMedia
from core.data.plan import StepPlan
from core.data.video import VideoProcessing, decode_medium, patchify_medium
from core.errors import InvalidDataset
from core.models.batch import PackedBatch
from core.models.config import Config
from core.models.flops import Work, work_of
from core.models.positions import mrope_positions

LossReduction = Literal["token", "sample", "square"]
TARGET_WEIGHT: dict[LossReduction, Callable[[int], float]] = {
    "token": lambda _: 1.0,
    "sample": lambda num_targets: 1 / num_targets,
    "square": lambda num_targets: num_targets**-0.5,
}
"""Weight of one target token in the loss, by the number of targets of its sample (InternVL's `len2weight`)."""
PREFETCH = 4
"""Batches that are prepared ahead of use."""
CACHE_BYTES = 256 << 20
"""Memory of a rank for rows that were decoded before: a small data set is decoded once, not once per epoch."""


@dataclass(frozen=True)
class LoadedStep:
    """One optimizer step's work on this rank."""

    plan: StepPlan
    num_samples: int
    """Of the global batch."""
    work: Work
    """Of the global batch, without padding."""
    num_images: int
    """And videos; of the global batch."""
    loss_weight: float
    """Sum of the weights of the global batch's targets: what the loss is divided by."""
    micro_batches: Iterator[PackedBatch]
    """This rank's, `plan.num_micro_batches` of them, each ready or awaited when asked for; may be empty batches."""


class StepLoader:
    """Endless steps of one data-parallel rank from `consumed_samples` on, with batches prepared ahead of use.

    A context manager that ends its threads and their processes, `num_decoders` at most.

    `plan` maps a count of consumed samples to the step's plan (see plan.plan_step). `with_pixels=False` leaves pixels
    out, for ranks that do not embed patches: the batch's `grid_thw` still tells how many there are. `pad_to_tokens` and
    `pad_to_patches` fill every batch up to that size, for devices that want static shapes. `loss_reduction` is the spec's.
    """

    def __init__(
        self,
        dataset: TokenisedDataset,
        config: Config,
        plan: Callable[[int], StepPlan],
        *,
        consumed_samples: int = 0,
        dp_rank: int = 0,
        with_pixels: bool = True,
        pad_to_tokens: int | None = None,
        pad_to_patches: int | None = None,
        loss_reduction: LossReduction = "token",
        num_decoders: int = 2,
        prefetch: int = PREFETCH,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._dataset = dataset
        self._config = config
        self._plan = plan
        self._consumed_samples = consumed_samples
        self._dp_rank = dp_rank
        self._decoders = Decoders(dataset.meta.image_processing, dataset.meta.video_processing)
        self._with_pixels = with_pixels
        self._pad_to_tokens = pad_to_tokens
        self._pad_to_patches = pad_to_patches
        self._loss_reduction: LossReduction = loss_reduction
        self._prefetch = max(1, prefetch)
        self._cache: dict[int, _Part] = {}
        self._cache_bytes_left = cache_bytes
        self._cache_lock = threading.Lock()
        self._row_locks = [threading.Lock() for _ in range(64)]
        self._pool = ThreadPoolExecutor(max(1, num_decoders), thread_name_prefix="loader")

    def __enter__(self) -> StepLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop what was prepared ahead and end threads and processes."""
        self._decoders.close()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[LoadedStep]:
        upcoming = self._submissions()
        ahead: deque[tuple[StepPlan, Future[PackedBatch]]] = deque(itertools.islice(upcoming, self._prefetch))

        def next_batch(plan: StepPlan) -> PackedBatch:
            planned, future = ahead.popleft()
            assert planned is plan, "the micro-batches of a step were not all consumed"
            ahead.extend(itertools.islice(upcoming, 1))
            return future.result()

        while True:
            plan = ahead[0][0]
            rows = list(plan.rows)
            grids = [grid for row in rows for grid in self._dataset.grids(row)]
            num_targets = self._dataset.num_targets[rows]
            yield LoadedStep(
                plan=plan,
                num_samples=len(rows),
                work=work_of(self._dataset.lengths[rows].tolist(), num_targets.tolist(), grids, self._config.vision),
                num_images=len(grids),
                loss_weight=total_weight(num_targets, self._loss_reduction),
                micro_batches=(next_batch(plan) for _ in range(plan.num_micro_batches)),
            )
            while ahead[0][0] is plan:  # the caller broke off the step
                ahead.popleft()[1].cancel()
                ahead.extend(itertools.islice(upcoming, 1))

    def _submissions(self) -> Iterator[tuple[StepPlan, Future[PackedBatch]]]:
        consumed = self._consumed_samples
        while True:
            plan = self._plan(consumed)
            consumed += len(plan.rows)
            for rows in plan.micro_batches[self._dp_rank]:
                yield plan, self._pool.submit(self._build, rows)

    def _build(self, rows: tuple[int, ...]) -> PackedBatch:
        return _pack(
            [self._part(row) for row in rows],
            self._config,
            processing=self._dataset.meta.image_processing,
            videos=self._dataset.meta.video_processing,
            with_pixels=self._with_pixels,
            pad_to_tokens=self._pad_to_tokens,
            pad_to_patches=self._pad_to_patches,
            pad_token_id=self._dataset.meta.pad_token_id,
            loss_reduction=self._loss_reduction,
        )

    def _part(self, row: int) -> _Part:
        """Read and decode a row, or take it from the cache; what comes first stays, since every epoch visits every row once."""
        with self._row_locks[row % len(self._row_locks)]:  # a second thread that wants the row waits, and finds it
            part = self._cache.get(row)
            if part is None:
                decode = self._decoders.decode if self._with_pixels else None
                part = _part(self._dataset.row(row), self._config, self._dataset.meta.image_processing, decode)
                with self._cache_lock:
                    if part.num_bytes <= self._cache_bytes_left:
                        self._cache_bytes_left -= part.num_bytes
                        self._cache[row] = part
            return part


def total_weight(num_targets: npt.NDArray[np.int64], reduction: LossReduction) -> float:
    """Sum of the weights of all targets of samples with these numbers of targets."""
    return math.fsum(count * TARGET_WEIGHT[reduction](count) for count in num_targets.tolist() if count)


def build_batch(
    rows: Sequence[Row],
    config: Config,
    *,
    processing: ImageProcessing,
    videos: VideoProcessing | None = None,
    with_pixels: bool = True,
    pad_to_tokens: int | None = None,
    pad_to_patches: int | None = None,
    pad_token_id: int = 0,
) -> PackedBatch:
    """Pack samples end to end, decoding their images and videos here; `videos` may be left out where there are none.

    Padding is one more sample of pad tokens without targets, and one more image of zeros whose features no token takes.
    No rows and no padding give an empty batch (T = 0). Raises UnreadableMedia naming row and file, InvalidDataset when
    tokens and images of a row disagree or the batch is larger than what it shall be filled up to.
    """
    decode = partial(decode_medium, images=processing, videos=videos) if with_pixels else None
    return _pack(
        [_part(row, config, processing, decode) for row in rows],
        config,
        processing=processing,
        videos=videos,
        with_pixels=with_pixels,
        pad_to_tokens=pad_to_tokens,
        pad_to_patches=pad_to_patches,
        pad_token_id=pad_token_id,
    )


def _pack(
    rows: Sequence[_Part],
    config: Config,
    *,
    processing: ImageProcessing,
    videos: VideoProcessing | None,
    with_pixels: bool,
    pad_to_tokens: int | None,
    pad_to_patches: int | None,
    pad_token_id: int,
    loss_reduction: LossReduction = "token",
) -> PackedBatch:
    """Lay decoded rows end to end, and padding after them."""
    parts = list(rows)
    grids = [medium.grid for part in parts for medium in part.media]
    pixels = [
        patchify_medium(medium, frames, processing, videos)
        for part in parts
        for medium, frames in zip(part.media, part.frames, strict=bool(part.frames))
    ]
    if missing := _missing(sum(len(part.input_ids) for part in parts), pad_to_tokens, "tokens"):
        parts.append(_padding(missing, pad_token_id, config))
    if missing := _missing(sum(t * h * w for t, h, w in grids), pad_to_patches, "patches"):
        grids.append(padding_grid(missing, processing.merge_size))
        pixels += [np.zeros((missing, processing.patch_dim), np.float32)] if with_pixels else []
    return PackedBatch(
        input_ids_T=torch.from_numpy(np.concatenate([np.empty(0, np.int64), *(part.input_ids for part in parts)])),
        position_ids_3T=torch.cat([torch.empty(3, 0, dtype=torch.int64), *(part.positions for part in parts)], dim=1),
        targets_T=torch.from_numpy(np.concatenate([np.empty(0, np.int64), *(part.targets for part in parts)])),
        cu_seqlens=tuple(itertools.accumulate((len(part.input_ids) for part in parts), initial=0)),
        pixel_values_PD=torch.from_numpy(np.concatenate([np.empty((0, processing.patch_dim), np.float32), *pixels])),
        grid_thw=tuple(grids),
        rows=tuple(part.row for part in rows),
        weights_T=None if loss_reduction == "token" else _weights(parts, loss_reduction),
    )


def _weights(parts: Sequence[_Part], reduction: LossReduction) -> torch.Tensor:
    """Weight of each position's target, [T]; 0 in samples that have none."""
    lengths = [len(part.targets) for part in parts]
    counts = [int((part.targets != NO_TARGET).sum()) for part in parts]
    values = [TARGET_WEIGHT[reduction](count) if count else 0.0 for count in counts]
    return torch.from_numpy(np.repeat(np.array(values, np.float32), lengths))


def padding_grid(num_patches: int, merge_size: int) -> tuple[int, int, int]:
    """The (t, h, w) nearest to a square with that many patches, a multiple of merge_size²."""
    if num_patches % merge_size**2:
        raise InvalidDataset(f"{num_patches} patches of padding are not a multiple of merge_size² ({merge_size**2})")
    merged = num_patches // merge_size**2
    h = next(h for h in range(math.isqrt(merged), 0, -1) if merged % h == 0)
    return 1, h * merge_size, merged // h * merge_size


@dataclass(frozen=True)
class _Part:
    """One sample's share of a batch."""

    row: int
    """Its index in the split; -1 for padding."""
    input_ids: np.ndarray
    targets: np.ndarray
    positions: torch.Tensor
    """M-RoPE, [3, L]"""
    media: tuple[Medium, ...] = ()
    frames: tuple[list[Frame], ...] = ()
    """Of each image and video; none where pixels are left out."""

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        tokens = self.input_ids.nbytes + self.targets.nbytes + self.positions.nbytes
        return tokens + sum(frame.nbytes for frames in self.frames for frame in frames)


Decode = Callable[[Medium], list[Frame]]


def _part(row: Row, config: Config, processing: ImageProcessing, decode: Decode | None) -> _Part:
    """Without `decode` pixels are left out."""
    _check_media_tokens(row, config, processing)
    return _Part(
        row=row.index,
        input_ids=row.input_ids.astype(np.int64),
        targets=row.targets,
        positions=mrope_positions(row.input_ids.tolist(), row.grid_thw, config, row.seconds_per_grid),
        media=row.media,
        frames=() if decode is None else tuple(_frames(row, medium, decode) for medium in row.media),
    )


def _missing(size: int, wanted: int | None, unit: str) -> int:
    if wanted is not None and size > wanted:
        raise InvalidDataset(f"the batch has {size} {unit}, its budget is {wanted}")
    return 0 if wanted is None else wanted - size


def _padding(length: int, pad_token_id: int, config: Config) -> _Part:
    input_ids = np.full(length, pad_token_id, np.int64)
    return _Part(
        row=-1,
        input_ids=input_ids,
        targets=np.full(length, NO_TARGET, np.int64),
        positions=mrope_positions(input_ids.tolist(), (), config),
    )


def _check_media_tokens(row: Row, config: Config, processing: ImageProcessing) -> None:
    for kind, token_id in (("image", config.image_token_id), ("video", config.video_token_id)):
        in_text = int((row.input_ids == token_id).sum())
        grids = [medium.grid for medium in row.media if medium.is_video == (kind == "video")]
        from_media = sum(map(processing.num_tokens, grids))
        if in_text != from_media:
            raise InvalidDataset(
                f"row {row.source_row}: {in_text} {kind} tokens in the text, {from_media} by its {kind}s' sizes",
                hint="make the data set again with this model's folder as tokenizer",
            )


def _frames(row: Row, medium: Medium, decode: Decode) -> list[Frame]:
    try:
        return decode(medium)
    except MediaError as error:
        raise UnreadableMedia(
            f"row {row.source_row}: {medium}: {error}",
            hint="restore the file, or make the data set again: its check refuses such rows",
        ) from error
    except DecoderDied as error:
        raise DecoderDied(f"row {row.source_row}: {medium}: {error.message}") from error
