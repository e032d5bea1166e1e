"""Answers questions with a model, and measures its loss on rows of a data set.

A question is a held-out row up to its last answer, or a prompt of the user's own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from core.data.dataset import NO_TARGET, Row, TokenisedDataset
from core.data.formats import IMAGE, PLACEHOLDER, VIDEO, Message
from core.data.loader import build_batch
from core.data.media import ImageProcessing, MediaError, Medium, UnreadableMedia
from core.data.template import ChatTemplate
from core.data.video import VideoProcessing, load_medium
from core.device.sending import send
from core.inference.generate import Decoding, Prompt, generate, plan_batches
from core.models.qwen2_5_vl.model import Qwen2_5_VLStage

TOKEN_BUDGET = 16384
"""Cache slots of one batch of questions, and tokens of one batch of rows whose loss is measured."""
PATCH_BUDGET = 16384
LOSS_CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class Question:
    """What is asked, as tokens for the model and as text for people."""

    input_ids: tuple[int, ...]
    """The turns before the answer and the header of the answer."""
    media: tuple[Medium, ...]
    """Images and videos in order of appearance."""
    messages: tuple[Message, ...]
    reference: str | None
    """The answer that the data set gives; None for a user's own prompt."""
    row: int | None
    """Row number in the user's annotation file, from 1; None for a user's own prompt."""

    @property
    def num_patches(self) -> int:
        return sum(medium.num_patches for medium in self.media)


@dataclass(frozen=True)
class Answer:
    """What the model said."""

    text: str
    num_tokens: int
    finished: bool
    """False when `max_new_tokens` cut it off."""


def held_out_questions(dataset: TokenisedDataset, *, max_samples: int | None = None) -> list[Question]:
    """The rows of a split, each with its last assistant turn as the reference."""
    count = len(dataset) if max_samples is None else min(max_samples, len(dataset))
    with (dataset.path / f"{dataset.split}.jsonl").open(encoding="utf-8") as lines:
        return [_held_out(dataset.row(index), json.loads(next(lines))["messages"]) for index in range(count)]


def own_question(
    text: str,
    images: Sequence[Path],
    videos: Sequence[Path],
    *,
    template: ChatTemplate,
    processing: ImageProcessing,
    video_processing: VideoProcessing,
) -> Question:
    """A user's prompt as one turn; what has no placeholder in the text comes before it. Raises UnreadableMedia."""
    marks = PLACEHOLDER.findall(text)
    missing = IMAGE * (len(images) - marks.count(IMAGE)) + VIDEO * (len(videos) - marks.count(VIDEO))
    messages = (Message("user", missing + text),)
    next_image, next_video = iter(images), iter(videos)
    media = [
        _planned_image(next(next_image), processing)
        if mark == IMAGE
        else _planned_video(next(next_video), video_processing)
        for mark in PLACEHOLDER.findall(messages[0].content)
    ]
    input_ids = template.encode_prompt(messages, [processing.num_tokens(medium.grid) for medium in media])
    return Question(tuple(input_ids), tuple(media), messages, None, None)


def answer(
    model: Qwen2_5_VLStage,
    questions: Sequence[Question],
    decoding: Decoding,
    *,
    template: ChatTemplate,
    processing: ImageProcessing,
    videos: VideoProcessing | None = None,
    seed: int = 0,
    progress: Callable[[int], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Answer]:
    """Answer every question; `progress` gets how many more are done; `videos` may be left out where there are none.
    Raises UnreadableMedia.

    Images and videos of a batch are decoded while the one before is being answered. After `should_stop` the rest stays empty.
    """
    answers = [Answer("", 0, finished=False)] * len(questions)
    loading = processing, videos
    generator = torch.Generator().manual_seed(seed)
    batches = plan_batches(
        [len(question.input_ids) for question in questions],
        [question.num_patches for question in questions],
        max_new_tokens=decoding.max_new_tokens,
        token_budget=TOKEN_BUDGET,
        patch_budget=PATCH_BUDGET,
    )
    with ThreadPoolExecutor(1, thread_name_prefix="images") as pool:
        upcoming = iter(batches)
        first = next(upcoming, None)
        ahead = None if first is None else (first, pool.submit(_prompts, questions, first, *loading))
        while ahead is not None and not should_stop():
            batch, future = ahead
            prompts = future.result()
            following = next(upcoming, None)
            ahead = None if following is None else (following, pool.submit(_prompts, questions, following, *loading))
            tokens = generate(model, prompts, decoding, generator=generator, should_stop=should_stop)
            for index, ids in zip(batch, tokens, strict=True):
                finished = len(ids) < decoding.max_new_tokens
                answers[index] = Answer(template.decode(ids).strip(), len(ids), finished)
            progress(len(batch))
    return answers


def mean_loss(
    model: Qwen2_5_VLStage,
    dataset: TokenisedDataset,
    *,
    max_samples: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> float:
    """Cross entropy per target token over the rows of a split: what training minimises, on rows it did not see."""
    total, count = 0.0, 0
    meta = dataset.meta
    for rows in _row_batches(dataset, max_samples):
        if should_stop():
            break
        batch = build_batch(
            [dataset.row(row) for row in rows],
            model.config,
            processing=meta.image_processing,
            videos=meta.video_processing,
        )
        # On the host, where nothing waits for its size.
        positions_N = (batch.targets_T != NO_TARGET).nonzero().squeeze(1)
        batch, sums = batch.to(model.accelerator.device), []
        with torch.no_grad():
            hidden_TH = model(batch)
            for positions_C in send(positions_N, model.accelerator.device).split(LOSS_CHUNK_TOKENS):
                logits_CV = model.logits(hidden_TH.index_select(0, positions_C)).float()
                targets_C = batch.targets_T.index_select(0, positions_C)
                sums.append(F.cross_entropy(logits_CV, targets_C, reduction="sum"))
        total += math.fsum(torch.stack(sums).tolist())
        count += len(positions_N)
    return total / max(count, 1)


def _held_out(row: Row, messages: Sequence[dict[str, Any]]) -> Question:
    learnt = np.flatnonzero(row.targets != NO_TARGET)
    breaks = np.flatnonzero(np.diff(learnt) > 1)
    start = int(learnt[breaks[-1] + 1] if len(breaks) else learnt[0]) + 1
    *asked, reference = (Message(**message) for message in messages)
    return Question(
        input_ids=tuple(row.input_ids[:start].tolist()),
        media=row.media,
        messages=tuple(asked),
        reference=reference.content,
        row=row.source_row,
    )


def _prompts(
    questions: Sequence[Question], batch: Sequence[int], images: ImageProcessing, videos: VideoProcessing | None
) -> list[Prompt]:
    return [_prompt(questions[index], images, videos) for index in batch]


def _prompt(question: Question, images: ImageProcessing, videos: VideoProcessing | None) -> Prompt:
    pixels = [np.empty((0, images.patch_dim), np.float32)]
    for medium in question.media:
        try:
            pixels.append(load_medium(medium, images, videos))
        except MediaError as error:
            row = "" if question.row is None else f"row {question.row}: "
            raise UnreadableMedia(f"{row}{medium}: {error}") from error
    return Prompt(
        question.input_ids,
        torch.from_numpy(np.concatenate(pixels)),
        tuple(medium.grid for medium in question.media),
        tuple(medium.seconds_per_grid for medium in question.media),
    )


def _planned_image(path: Path, processing: ImageProcessing) -> Medium:
    """An image of a user's own prompt, decoded once to find damage early."""
    try:
        return Medium((path,), processing.load(path)[1])
    except MediaError as error:
        raise UnreadableMedia(f"image {path}: {error}") from error


def _planned_video(path: Path, processing: VideoProcessing) -> Medium:
    """A video likewise, decoded once to count its frames."""
    try:
        return processing.plan([path], processing.check([path], processing.probe([path])))
    except MediaError as error:
        raise UnreadableMedia(f"video {path}: {error}") from error


def _row_batches(dataset: TokenisedDataset, max_samples: int | None) -> Iterator[list[int]]:
    """Rows in order, as many at a time as the budgets allow, at least one."""
    batch: list[int] = []
    tokens = patches = 0
    for row in range(len(dataset) if max_samples is None else min(max_samples, len(dataset))):
        more_tokens, more_patches = int(dataset.lengths[row]), int(dataset.patches[row])
        if batch and (tokens + more_tokens > TOKEN_BUDGET or patches + more_patches > PATCH_BUDGET):
            yield batch
            batch, tokens, patches = [], 0, 0
        batch.append(row)
        tokens, patches = tokens + more_tokens, patches + more_patches
    if batch:
        yield batch
