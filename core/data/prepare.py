"""One row at a time: parse, locate and probe its images and videos, encode, check; here, or in worker processes that may die of it."""

from __future__ import annotations

import itertools
import multiprocessing
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from core.data.formats import IMAGE, BadRow, Format, MediaRoot, Record, Sample, parse_record
from core.data.media import ImageProcessing, MediaError, Medium, check_decodes, probe_size
from core.data.template import ChatTemplate, Encoded
from core.data.video import VideoProcessing
from core.errors import InvalidDataset
from core.processes import die_with_parent

CHUNK_ROWS = 64
"""Most rows that a worker process gets at a time; fewer of a small data set, whose rows may be long videos."""


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
    """Decode every image and video once, so that damage is found now and not in training, and the frames are counted."""
    videos: VideoProcessing | None = None
    """None: like images, with Qwen's own limits."""

    @property
    def video_processing(self) -> VideoProcessing:
        return self.videos or VideoProcessing.like(self.processing)


@dataclass(frozen=True)
class Prepared:
    """A row that can be trained on."""

    row: int
    sample: Sample
    encoded: Encoded
    media: tuple[Medium, ...]
    """In order of appearance, relative to the media root."""


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
        self._plan = lru_cache(maxsize=1 << 14)(self._plan_video)

    def prepare(self, record: Record) -> Prepared | Refused:
        """Parse, check and encode one row; never raises for what the row contains."""
        try:
            return self._prepare(record)
        except BadRow as verdict:
            return Refused(record.row, verdict.code, str(verdict))

    def _prepare(self, record: Record) -> Prepared:
        sample = parse_record(record.value, self._options.format)
        located = Sample(
            images=tuple(map(self._media.locate, sample.images)),
            videos=tuple(tuple(map(self._media.locate, paths)) for paths in sample.videos),
            messages=sample.messages,
            split=sample.split,
        )
        images = zip(sample.images, located.images, strict=True)
        videos = zip(sample.videos, located.videos, strict=True)
        media = tuple(
            self._image(*next(images)) if mark == IMAGE else self._video(*next(videos))
            for mark in sample.placeholders()
        )
        num_tokens = [self._options.processing.num_tokens(medium.grid) for medium in media]
        encoded = self._template.encode(sample.messages, num_tokens)
        length = len(encoded.input_ids)
        if length > self._options.cutoff_len:
            in_media = f"{sum(num_tokens)} of images{' and videos' if sample.videos else ''}"
            remedy = "; video_max_frames and video_max_pixels make videos shorter" if sample.videos else ""
            raise BadRow("too_long", f"{length} tokens ({in_media}), cutoff_len is {self._options.cutoff_len}{remedy}")
        if self._options.check_images:
            for given, path in zip(sample.images, located.images, strict=True):
                if damage := self._damage(path):
                    raise BadRow(damage[0], f"image {given!r}: {damage[1]}")
        return Prepared(record.row, located, encoded, media)

    def _image(self, given: str, path: str) -> Medium:
        try:
            return Medium((Path(path),), self._options.processing.grid(*self._size(path)))
        except MediaError as error:
            raise BadRow(error.code, f"image {given!r}: {error}{self._elsewhere(given, error.code)}") from error

    def _video(self, given: tuple[str, ...], paths: tuple[str, ...]) -> Medium:
        planned = self._plan(paths)
        if isinstance(planned, Medium):
            return planned
        code, message = planned
        name = repr(given[0]) + (f" and {len(given) - 1} more frames" if len(given) > 1 else "")
        raise BadRow(code, f"video {name}: {message}{self._elsewhere(given[0], code)}")

    def _plan_video(self, paths: tuple[str, ...]) -> Medium | tuple[str, str]:
        """The video with its frames counted, for counts in headers may be wrong; or code and message of why it cannot be used."""
        videos, files = self._options.video_processing, [self._media.path / path for path in paths]
        try:
            clip = videos.probe(files)
            if self._options.check_images or not clip.num_frames:
                clip = videos.check(files, clip)
            return videos.plan([Path(path) for path in paths], clip)
        except MediaError as error:
            return error.code, str(error)

    def _elsewhere(self, given: str, code: str) -> str:
        """A hint for the usual mistake: paths that already contain the media root."""
        inside = self._options.source / given
        if (
            code in ("missing_image", "missing_video")
            and self._options.media_root not in ("", ".")
            and inside.is_file()
        ):
            return f" under media_root {self._options.media_root!r}, but it does under the source itself: use media_root '.'"
        return ""

    def _find_damage(self, path: str) -> tuple[str, str] | None:
        try:
            check_decodes(self._media.path / path)
        except MediaError as error:
            return error.code, str(error)
        return None


def chunk_size(num_rows: int, num_workers: int) -> int:
    """Rows per chunk, so that every worker process gets several chunks if it can."""
    return max(1, min(CHUNK_ROWS, num_rows // (8 * max(1, num_workers))))


def prepare_all(
    options: Options, records: Iterable[Record], *, num_workers: int, chunk_rows: int = CHUNK_ROWS
) -> Iterator[Prepared | Refused]:
    """Prepare rows in order; in this process with `num_workers` 0, else in so many others, `chunk_rows` at a time."""
    if num_workers == 0:
        preparer = Preparer(options)
        yield from map(preparer.prepare, records)
        return
    pool = _Pool(options, num_workers)
    try:
        yield from pool.run(_chunks(records, chunk_rows))
    finally:
        pool.close()


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


def _chunks(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    source = iter(records)
    while chunk := list(itertools.islice(source, size)):
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

    def run(self, chunks: Iterator[list[Record]]) -> Iterator[Prepared | Refused]:
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
    die_with_parent()
    _worker = Preparer(options)


def _prepare_chunk(records: list[Record]) -> list[Prepared | Refused]:
    assert _worker is not None
    return [_worker.prepare(record) for record in records]
