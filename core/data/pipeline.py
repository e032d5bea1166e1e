"""Annotations + images and videos → a tokenised data set with a report: every row is used or refused with a reason.

    read_records ─ chunks of rows ─► worker processes: parse, locate and probe images and videos, encode, check, decode
                                       │ Prepared | Refused, in order
                                       ▼
                 this process: TokenWriter, records.jsonl, refused.jsonl, counts; then the split ─► train/validation.jsonl

Nothing is held per row but 17 bytes (digest, number, split); a worker that dies of an image costs that row only.
"""

from __future__ import annotations

import itertools
import json
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from core.data.dataset import Meta, TokenWriter, check_fits
from core.data.formats import count_records, read_records
from core.data.media import ImageProcessing
from core.data.plan import permute
from core.data.prepare import Options, Refused, chunk_size, inside, open_media_root, prepare_all
from core.data.report import Tally, digest, duplicates
from core.data.template import ChatTemplate
from core.errors import InvalidDataset, InvalidModel
from core.models.registry import detect

_NO_SPLIT, _TRAIN, _VALIDATION = 0, 1, 2
_SPLIT_CODES = {None: _NO_SPLIT, "train": _TRAIN, "validation": _VALIDATION}


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
    chunk_rows = chunk_size(total, num_workers)

    tally = Tally(template)
    splits, digests, rows = array("b"), array("Q"), array("q")
    with (
        TokenWriter(output) as writer,
        (output / "records.jsonl").open("w", encoding="utf-8") as accepted,
        (output / "refused.jsonl").open("w", encoding="utf-8") as refused,
    ):
        for outcome in prepare_all(options, records, num_workers=num_workers, chunk_rows=chunk_rows):
            tally.add(outcome)
            if isinstance(outcome, Refused):
                if options.on_bad_sample == "fail":
                    raise _failed(outcome)
                refused.write(json.dumps(asdict(outcome), ensure_ascii=False) + "\n")
            else:
                line = outcome.sample.to_json()
                accepted.write(line + "\n")
                splits.append(_SPLIT_CODES[outcome.sample.split])
                digests.append(digest(line))
                rows.append(outcome.row)
                writer.add(
                    outcome.encoded.input_ids,
                    outcome.encoded.trained,
                    media=outcome.media,
                    source_row=outcome.row,
                )
            if tally.rows % chunk_rows == 0 or tally.rows == total:
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
            video_token_id=template.video_token_id,
            pad_token_id=template.pad_token_id,
            image_processing=options.processing,
            video_processing=options.video_processing,
        )
    _split_records(output, validation)
    repeated = duplicates(digests, rows)
    _write_json(output / "report.json", tally.report(meta, options, repeated))
    _write_json(output / "preview.json", {"rows": tally.preview})
    return Result(meta, dict(tally.codes.most_common()), repeated["count"])


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
        video_token_id=template.video_token_id,
        vocab_size=template.vocab_size,
        image_processing=processing,
    )


def _failed(refused: Refused) -> InvalidDataset:
    return InvalidDataset(
        f"row {refused.row}: {refused.message} ({refused.code})",
        hint="correct the row, or set on_bad_sample to skip to leave such rows out",
    )


def _nothing_left(options: Options, tally: Tally) -> InvalidDataset:
    if not tally.rows:
        return InvalidDataset(f"annotations {options.annotations!r} have no rows")
    reasons = ", ".join(f"{code} {count}" for code, count in tally.codes.most_common(5))
    first = tally.listed[0]
    return InvalidDataset(
        f"all {tally.rows} rows were refused ({reasons}); the first: row {first['row']}: {first['message']}",
        hint="check media_root, format and cutoff_len",
    )


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


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
