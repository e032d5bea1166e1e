"""Annotations + images → a tokenised data set with a report: every row is used or refused with a reason.

    read_records ─ chunks of rows ─► worker processes: parse, locate and probe images, encode, check, decode images
                                       │ Prepared | Refused, in order
                                       ▼
                 this process: TokenWriter, records.jsonl, refused.jsonl, counts; then the split ─► train/validation.jsonl

Nothing is held per row but 17 bytes (digest, number, split); a worker that dies of an image costs that row only.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import logging
import multiprocessing
import signal
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from core.data.dataset import Grid, Meta, TokenWriter, check_fits
from core.data.formats import BadRow, Format, MediaRoot, Record, Sample, count_records, parse_record, read_records
from core.data.media import ImageError, ImageProcessing, check_decodes, probe_size
from core.data.plan import permute
from core.data.template import ChatTemplate, Encoded
from core.errors import InvalidDataset, InvalidModel
from core.models.registry import detect

log = logging.getLogger("temper.data")

CHUNK_ROWS = 64
MAX_LISTED = 1000
"""Refused rows and duplicates that report.json lists; refused.jsonl has all of the former."""
PREVIEW_ROWS = 20
LOGGED = 20
"""Refused rows that are logged as they come."""

_PR_SET_PDEATHSIG = 1
_NO_SPLIT, _TRAIN, _VALIDATION = 0, 1, 2
_SPLIT_CODES = {None: _NO_SPLIT, "train": _TRAIN, "validation": _VALIDATION}


@dataclass(frozen=True)
class Options:
    """What is done with each row; sent to the worker processes."""

    source: Path
    """The folder that everything lies in."""
    annotations: str
    media_root: str
    tokenizer_dir: Path
    processing: ImageProcessing
    format: Format = "auto"
    cutoff_len: int = 1024
    max_samples: int | None = None
    on_bad_sample: Literal["skip", "fail"] = "skip"
    validation_fraction: float = 0.0
    seed: int = 42
    check_images: bool = True
    """Decode every image once, so that damage is found now and not in training."""


@dataclass(frozen=True)
class Prepared:
    """A row that can be trained on."""

    row: int
    sample: Sample
    encoded: Encoded
    grids: tuple[Grid, ...]


@dataclass(frozen=True)
class Refused:
    """The verdict on a row that cannot."""

    row: int
    code: str
    message: str


class Preparer:
    """Takes rows one by one; everything that does not change between rows is loaded once."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._template = ChatTemplate.from_model_dir(options.tokenizer_dir)
        self._media = open_media_root(options)
        self._size = lru_cache(maxsize=1 << 14)(lambda path: probe_size(self._media.path / path))
        self._damage = lru_cache(maxsize=1 << 14)(self._find_damage)

    def prepare(self, record: Record) -> Prepared | Refused:
        """Parse, check and encode one row; never raises for what the row contains."""
        try:
            return self._prepare(record)
        except BadRow as verdict:
            return Refused(record.row, verdict.code, str(verdict))

    def _prepare(self, record: Record) -> Prepared:
        sample = parse_record(record.value, self._options.format)
        images = tuple(self._media.locate(image) for image in sample.images)
        processing = self._options.processing
        grids = tuple(self._grid(given, path) for given, path in zip(sample.images, images, strict=True))
        encoded = self._template.encode(sample.messages, [processing.num_tokens(grid) for grid in grids])
        length = len(encoded.input_ids)
        if length > self._options.cutoff_len:
            in_images = sum(processing.num_tokens(grid) for grid in grids)
            raise BadRow(
                "too_long", f"{length} tokens ({in_images} of images), cutoff_len is {self._options.cutoff_len}"
            )
        if self._options.check_images:
            for given, path in zip(sample.images, images, strict=True):
                if damage := self._damage(path):
                    raise BadRow(damage[0], f"image {given!r}: {damage[1]}")
        return Prepared(record.row, Sample(images, sample.messages, sample.split), encoded, grids)

    def _grid(self, given: str, path: str) -> Grid:
        try:
            return self._options.processing.grid(*self._size(path))
        except ImageError as error:
            raise BadRow(error.code, f"image {given!r}: {error}{self._elsewhere(given, error.code)}") from error

    def _elsewhere(self, given: str, code: str) -> str:
        """A hint for the usual mistake: paths that already contain the media root."""
        inside = self._options.source / given
        if code == "missing_image" and self._options.media_root not in ("", ".") and inside.is_file():
            return f" under media_root {self._options.media_root!r}, but it does under the source itself: use media_root '.'"
        return ""

    def _find_damage(self, path: str) -> tuple[str, str] | None:
        try:
            check_decodes(self._media.path / path)
        except ImageError as error:
            return error.code, str(error)
        return None


def _ignore(done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class Result:
    """What `build` made."""

    meta: Meta
    refused: dict[str, int]
    """Refused rows by code, most frequent first."""
    num_duplicates: int

    @property
    def num_refused(self) -> int:
        """Refused rows."""
        return sum(self.refused.values())


def build(
    options: Options,
    output: Path,
    *,
    num_workers: int = 1,
    after_chunk: Callable[[int, int], None] = _ignore,
) -> Result:
    """Write the data set below `output`; see dataset.py for its files.

    `after_chunk` gets (rows done, rows in all), and may raise to give up. Raises InvalidDataset when the annotations
    cannot be read, when all rows are refused, or on the first bad row if `on_bad_sample` is "fail".
    """
    template = ChatTemplate.from_model_dir(options.tokenizer_dir)
    check_model_folder(options.tokenizer_dir, template, options.processing)
    media = open_media_root(options)
    annotations = inside(options.source, options.annotations, "annotations")
    total = count_records(annotations, options.max_samples)
    records = itertools.islice(read_records(annotations), options.max_samples)

    tally = _Tally(template)
    splits, digests, rows = array("b"), array("Q"), array("q")
    with (
        TokenWriter(output) as writer,
        (output / "records.jsonl").open("w", encoding="utf-8") as accepted,
        (output / "refused.jsonl").open("w", encoding="utf-8") as refused,
    ):
        for outcome in prepare_all(options, records, num_workers=num_workers):
            tally.add(outcome)
            if isinstance(outcome, Refused):
                if options.on_bad_sample == "fail":
                    raise _failed(outcome)
                refused.write(json.dumps(asdict(outcome), ensure_ascii=False) + "\n")
            else:
                line = outcome.sample.to_json()
                accepted.write(line + "\n")
                splits.append(_SPLIT_CODES[outcome.sample.split])
                digests.append(_digest(line))
                rows.append(outcome.row)
                writer.add(
                    outcome.encoded.input_ids,
                    outcome.encoded.trained,
                    images=outcome.sample.images,
                    grids=outcome.grids,
                    source_row=outcome.row,
                )
            if tally.rows % CHUNK_ROWS == 0 or tally.rows == total:
                after_chunk(tally.rows, total)
        if not writer.num_rows:
            raise _nothing_left(options, tally)
        validation = choose_validation(np.frombuffer(splits, np.int8), options.validation_fraction, options.seed)
        if validation.all():
            raise InvalidDataset(
                f"all {len(validation)} rows are for validation, none for training",
                hint='lower validation_fraction, or mark some rows with "split": "train"',
            )
        meta = writer.finish(
            train=np.flatnonzero(~validation),
            validation=np.flatnonzero(validation),
            media_root=media.path,
            vocab_size=template.vocab_size,
            tokenizer_digest=template.digest,
            image_token_id=template.image_token_id,
            pad_token_id=template.pad_token_id,
            image_processing=options.processing,
        )
    _split_records(output, validation)
    duplicates = _duplicates(digests, rows)
    _write_json(output / "report.json", tally.report(meta, options, duplicates))
    _write_json(output / "preview.json", {"rows": tally.preview})
    return Result(meta, dict(tally.codes.most_common()), duplicates["count"])


def prepare_all(options: Options, records: Iterable[Record], *, num_workers: int) -> Iterator[Prepared | Refused]:
    """Prepare rows in order; in this process with `num_workers` 0, else in so many others."""
    if num_workers == 0:
        preparer = Preparer(options)
        yield from map(preparer.prepare, records)
        return
    pool = _Pool(options, num_workers)
    try:
        yield from pool.run(records)
    finally:
        pool.close()


def choose_validation(splits: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which rows are held out, bool [rows]: those that say so, and `fraction` of those that say nothing, chosen by `seed`.

    `splits`: 0 = says nothing, 1 = train, 2 = validation.
    """
    held_out = splits == _VALIDATION
    free = np.flatnonzero(splits == _NO_SPLIT)
    count = round(len(free) * fraction)
    chosen = [permute(index, len(free), seed) for index in range(count)]
    held_out[free[chosen]] = True
    return held_out


def check_model_folder(path: Path, template: ChatTemplate, processing: ImageProcessing) -> None:
    """Refuse, before any work, a folder whose tokenizer and processor do not fit its config.json, if it has one."""
    file = path / "config.json"
    if not file.exists():
        return
    try:
        config_json = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidModel(f"{file} is not JSON: {error}") from error
    check_fits(
        detect(config_json).parse_config(config_json),
        image_token_id=template.image_token_id,
        vocab_size=template.vocab_size,
        image_processing=processing,
    )


def open_media_root(options: Options) -> MediaRoot:
    """The folder of the images; raises InvalidDataset."""
    path = inside(options.source, options.media_root, "media_root")
    if not path.is_dir():
        raise InvalidDataset(f"media_root {options.media_root!r} is not a folder of the source")
    return MediaRoot(path)


def inside(source: Path, relative: str, field: str) -> Path:
    """`relative` under `source`, links resolved; raises InvalidDataset when it leads outside."""
    root = source.resolve()
    path = (root / relative).resolve()
    if not path.is_relative_to(root):
        raise InvalidDataset(f"{field} {relative!r} leads outside the source")
    return path


class _Tally:
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
        self._trained = self._tokens = self._image_tokens = 0

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
        self._patches[_bucket(sum(t * h * w for t, h, w in outcome.grids))] += 1
        self._images[len(outcome.grids)] += 1
        self._tokens += len(encoded.input_ids)
        self._trained += int(encoded.trained.sum())
        self._image_tokens += int((encoded.input_ids == self._template.image_token_id).sum())
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
                "longest_row": meta.max_length,
                "cutoff_len": options.cutoff_len,
            },
            "images": {"total": meta.num_images, "most_patches_in_a_row": meta.max_patches},
            "histograms": {
                "tokens_per_row": _histogram(self._lengths),
                "patches_per_row": _histogram(self._patches),
                "images_per_row": [{"images": n, "rows": self._images[n]} for n in sorted(self._images)],
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
            "num_tokens": len(outcome.encoded.input_ids),
            "num_trained": int(outcome.encoded.trained.sum()),
            "segments": [asdict(segment) for segment in self._template.preview(outcome.encoded)],
        }


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    source = iter(records)
    while chunk := list(itertools.islice(source, CHUNK_ROWS)):
        yield chunk


class _Pool:
    """Worker processes that outlive an image which kills one of them.

    When one dies, all chunks in flight are lost with the pool: they are done again row by row, and a row that kills its
    worker again is refused.
    """

    def __init__(self, options: Options, num_workers: int) -> None:
        self._options = options
        self._num_workers = num_workers
        self._executor = self._start()

    def run(self, records: Iterable[Record]) -> Iterator[Prepared | Refused]:
        chunks = _chunks(records)
        in_flight: deque[tuple[list[Record], Future[list[Prepared | Refused]]]] = deque()
        while True:
            while len(in_flight) < 4 * self._num_workers and (chunk := next(chunks, None)):
                in_flight.append((chunk, self._executor.submit(_prepare_chunk, chunk)))
            if not in_flight:
                return
            chunk, future = in_flight.popleft()
            try:
                yield from future.result()
            except BrokenProcessPool:
                lost = [chunk, *(waiting for waiting, _ in in_flight)]
                in_flight.clear()
                self._restart()
                for record in itertools.chain.from_iterable(lost):
                    yield self._alone(record)

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _alone(self, record: Record) -> Prepared | Refused:
        try:
            return self._executor.submit(_prepare_chunk, [record]).result()[0]
        except BrokenProcessPool:
            self._restart()
            return Refused(record.row, "crashed", "the process that read this row died of it; look at its images")

    def _restart(self) -> None:
        self.close()
        self._executor = self._start()
        self._executor.submit(_prepare_chunk, []).result()  # raises if workers cannot even start

    def _start(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            self._num_workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(self._options,),
        )


_worker: Preparer | None = None
"""In a worker process: what `_start_worker` has loaded."""


def _start_worker(options: Options) -> None:
    global _worker
    for number in (signal.SIGTERM, signal.SIGINT):  # sent to the whole group; the parent decides
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "SIGKILL") and (prctl := getattr(ctypes.CDLL(None), "prctl", None)):
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _worker = Preparer(options)


def _prepare_chunk(records: list[Record]) -> list[Prepared | Refused]:
    assert _worker is not None
    return [_worker.prepare(record) for record in records]


def _failed(refused: Refused) -> InvalidDataset:
    return InvalidDataset(
        f"row {refused.row}: {refused.message} ({refused.code})",
        hint="correct the row, or set on_bad_sample to skip to leave such rows out",
    )


def _nothing_left(options: Options, tally: _Tally) -> InvalidDataset:
    if not tally.rows:
        return InvalidDataset(f"annotations {options.annotations!r} have no rows")
    reasons = ", ".join(f"{code} {count}" for code, count in tally.codes.most_common(5))
    first = tally.listed[0]
    return InvalidDataset(
        f"all {tally.rows} rows were refused ({reasons}); the first: row {first['row']}: {first['message']}",
        hint="check media_root, format and cutoff_len",
    )


def _digest(line: str) -> int:
    return int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8).digest(), "little")


def _duplicates(digests: Sequence[int], rows: Sequence[int]) -> dict[str, Any]:
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


def _split_records(output: Path, validation: np.ndarray) -> None:
    """Deal the lines of records.jsonl to train.jsonl and validation.jsonl."""
    records = output / "records.jsonl"
    with (
        records.open("rb") as lines,
        (output / "train.jsonl").open("wb") as train,
        (output / "validation.jsonl").open("wb") as held_out,
    ):
        for line, is_held_out in zip(lines, validation, strict=True):
            (held_out if is_held_out else train).write(line)
    records.unlink()


def _bucket(value: int) -> int:
    """Upper bound of the histogram bucket of `value`: four buckets per power of two."""
    if value <= 8:
        return value
    step = 1 << (value.bit_length() - 3)
    return -(-value // step) * step


def _histogram(counts: Counter[int]) -> list[dict[str, int]]:
    return [{"up_to": bound, "rows": counts[bound]} for bound in sorted(counts)]


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
