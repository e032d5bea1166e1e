"""What a data set job tells of its rows: counts, histograms, verdicts, duplicates, a preview of what is learnt."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from core.data.dataset import Meta
from core.data.media import Medium
from core.data.prepare import Options, Prepared, Refused
from core.data.template import ChatTemplate

log = logging.getLogger("temper.data")

MAX_LISTED = 1000
"""Refused rows and duplicates that report.json lists; refused.jsonl has all of the former."""
PREVIEW_ROWS = 20
LOGGED = 20
"""Refused rows that are logged as they come."""


class Tally:
    """Counts for the report; its size does not grow with the rows."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self.rows = 0
        self.codes: Counter[str] = Counter()
        self.listed: list[dict[str, object]] = []
        self.preview: list[dict[str, object]] = []
        self._lengths: Counter[int] = Counter()
        self._patches: Counter[int] = Counter()
        self._images: Counter[int] = Counter()
        self._videos: Counter[int] = Counter()
        self._trained = self._tokens = self._image_tokens = self._video_tokens = 0

    def add(self, outcome: Prepared | Refused) -> None:
        self.rows += 1
        if isinstance(outcome, Refused):
            self.codes[outcome.code] += 1
            if sum(self.codes.values()) <= LOGGED:
                log.warning("row %d refused: %s: %s", outcome.row, outcome.code, outcome.message)
            if len(self.listed) < MAX_LISTED:
                self.listed.append(asdict(outcome))
            return
        encoded = outcome.encoded
        self._lengths[_bucket(len(encoded.input_ids))] += 1
        self._patches[_bucket(sum(medium.num_patches for medium in outcome.media))] += 1
        self._images[len(outcome.sample.images)] += 1
        self._videos[len(outcome.sample.videos)] += 1
        self._tokens += len(encoded.input_ids)
        self._trained += int(encoded.trained.sum())
        self._image_tokens += int((encoded.input_ids == self._template.image_token_id).sum())
        self._video_tokens += int((encoded.input_ids == self._template.video_token_id).sum())
        if len(self.preview) < PREVIEW_ROWS:
            self.preview.append(self._previewed(outcome))

    def report(self, meta: Meta, options: Options, duplicates: dict[str, Any]) -> dict[str, object]:
        return {
            "rows": {
                "read": self.rows,
                "accepted": meta.num_rows,
                "refused": sum(self.codes.values()),
                "train": meta.num_train,
                "validation": meta.num_validation,
            },
            "tokens": {
                "total": self._tokens,
                "trained": self._trained,
                "image": self._image_tokens,
                "video": self._video_tokens,
                "longest_row": meta.max_length,
                "cutoff_len": options.cutoff_len,
            },
            "images": {"total": meta.num_images, "most_patches_in_a_row": meta.max_patches},
            "videos": {"total": meta.num_videos, "frames_taken": meta.num_frames},
            "histograms": {
                "tokens_per_row": _histogram(self._lengths),
                "patches_per_row": _histogram(self._patches),
                "images_per_row": [{"images": n, "rows": self._images[n]} for n in sorted(self._images)],
                "videos_per_row": [{"videos": n, "rows": self._videos[n]} for n in sorted(self._videos)],
            },
            "refused": {
                "by_code": dict(self.codes.most_common()),
                "listed": self.listed,
                "all_in": "refused.jsonl",
            },
            "duplicates": duplicates,
        }

    def _previewed(self, outcome: Prepared) -> dict[str, object]:
        return {
            "row": outcome.row,
            "images": list(outcome.sample.images),
            "videos": [shown_video(medium) for medium in outcome.media if medium.is_video],
            "num_tokens": len(outcome.encoded.input_ids),
            "num_trained": int(outcome.encoded.trained.sum()),
            "segments": [asdict(segment) for segment in self._template.preview(outcome.encoded)],
        }


def shown_video(video: Medium) -> dict[str, object]:
    """What people are told of a video."""
    return {
        "path": str(video.paths[0]) if len(video.paths) == 1 else [str(path) for path in video.paths],
        "frames": video.num_frames,
        "frames_taken": video.num_taken,
        "seconds": round(video.seconds, 3),
    }


def digest(line: str) -> int:
    return int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8).digest(), "little")


def duplicates(digests: Sequence[int], rows: Sequence[int]) -> dict[str, Any]:
    """Accepted rows that are the same as an earlier one, as {row, first}."""
    keys, numbers = np.array(digests, np.uint64), np.array(rows, np.int64)
    order = np.argsort(keys, kind="stable")
    starts = np.concatenate(([True], keys[order][1:] != keys[order][:-1]))
    firsts = order[np.flatnonzero(starts)[np.cumsum(starts) - 1]]
    again = np.sort(order[~starts])
    first_of = np.empty(len(keys), np.int64)
    first_of[order] = firsts
    listed = [{"row": int(numbers[i]), "first": int(numbers[first_of[i]])} for i in again[:MAX_LISTED]]
    return {"count": len(again), "listed": listed}


def _bucket(value: int) -> int:
    """Upper bound of the histogram bucket of `value`: four buckets per power of two."""
    if value <= 8:
        return value
    step = 1 << (value.bit_length() - 3)
    return -(-value // step) * step


def _histogram(counts: Counter[int]) -> list[dict[str, int]]:
    return [{"up_to": bound, "rows": counts[bound]} for bound in sorted(counts)]
