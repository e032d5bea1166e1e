"""Data set jobs: annotations, images and videos in, a tokenised data set with its report out."""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict
from pathlib import Path

from core.data.media import ImageProcessing
from core.data.pipeline import Result, build
from core.data.prepare import Options
from core.data.video import VideoProcessing
from core.runners.context import RunContext, Stopped
from core.specs.dataset import DatasetSpec

MAX_WORKERS = 16
PROGRESS_INTERVAL_S = 0.5


def run(ctx: RunContext, spec: DatasetSpec) -> None:
    """Make the artifact `dataset`; raises InvalidDataset, InvalidModel, or Stopped."""
    if not ctx.is_main:
        return
    tokenizer_dir = tokenizer_folder(ctx.inputs["tokenizer"].path)
    images = ImageProcessing.from_model_dir(tokenizer_dir)
    options = Options(
        source=ctx.inputs["source"].path,
        annotations=spec.annotations,
        media_root=spec.media_root,
        tokenizer_dir=tokenizer_dir,
        processing=images.limited(min_pixels=spec.image_min_pixels, max_pixels=spec.image_max_pixels),
        videos=VideoProcessing.like(
            images,
            fps=spec.video_fps,
            max_frames=spec.video_max_frames,
            max_pixels=spec.video_max_pixels,
            min_pixels=spec.video_min_pixels,
        ),
        format=spec.format,
        cutoff_len=spec.cutoff_len,
        max_samples=spec.max_samples,
        on_bad_sample=spec.on_bad_sample,
        validation_fraction=spec.validation_fraction,
        seed=spec.seed,
    )
    with ctx.new_artifact("dataset", "dataset") as writer:
        started = time.monotonic()
        result = build(
            options,
            writer.path,
            num_workers=min(MAX_WORKERS, len(os.sched_getaffinity(0))),
            after_chunk=_Listener(ctx),
        )
        _log(ctx, result, time.monotonic() - started)
        writer.commit(metadata(result))


def tokenizer_folder(path: Path) -> Path:
    """Where a model folder keeps tokenizer and processor files: itself, or `hf/` in an mm checkpoint."""
    return path / "hf" if (path / "hf" / "tokenizer.json").exists() else path


def metadata(result: Result) -> dict[str, object]:
    """What the artifact's manifest says of the data set."""
    values = asdict(result.meta)
    return {**values, "num_refused": result.num_refused}


class _Listener:
    """Passes progress on at most every PROGRESS_INTERVAL_S, and at the end; stops the work when the job is to stop."""

    def __init__(self, ctx: RunContext) -> None:
        self._ctx = ctx
        self._last = -math.inf

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self._last >= PROGRESS_INTERVAL_S:
            self._last = now
            self._ctx.progress(done, total, "rows")
        if self._ctx.should_stop():
            raise Stopped


def _log(ctx: RunContext, result: Result, seconds: float) -> None:
    meta = result.meta
    ctx.log.info(
        "%d rows accepted (%d train, %d validation), %d refused, %d tokens, %d images, %d videos in %.1f s: %.0f rows/s",
        *(meta.num_rows, meta.num_train, meta.num_validation, result.num_refused),
        *(meta.num_tokens, meta.num_images, meta.num_videos),
        *(seconds, (meta.num_rows + result.num_refused) / max(seconds, 1e-9)),
    )
    for code, count in result.refused.items():
        ctx.log.info("refused: %s: %d", code, count)
    if result.num_refused:
        ctx.warn("rows_refused", f"{result.num_refused} rows were refused; report.json and refused.jsonl say why")
    if result.num_duplicates:
        ctx.warn(
            "duplicate_rows", f"{result.num_duplicates} rows are the same as an earlier one; report.json lists them"
        )
