"""What an interrupted conversion leaves for the next attempt: the files that are finished, each with its digest.

    WORK/<attempt>/plan              digest of what is being made, and from what
    WORK/<attempt>/finished.jsonl    one line per finished file
    WORK/<attempt>/files/            the conversion's target, moved into the artifact in one rename

A new attempt takes the folder over by renaming it. One that was thought dead and still runs then finds its folder gone, and can neither
record nor publish. A file without a record, or one that is not what its record says, is written again.
"""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path

from core.conversion.files import disk_full_named, make_folder
from core.storage.manifest import hash_file

_PLAN, _FINISHED, _FILES = "plan", "finished.jsonl", "files"


@dataclass(frozen=True)
class Record:
    """A finished file, and what its values gave cause to warn of."""

    path: str
    size_bytes: int
    sha256: str
    non_finite: list[str] = field(default_factory=list)
    overflowing: list[str] = field(default_factory=list)


class Journal:
    """The work folder of one attempt."""

    def __init__(self, folder: Path, finished: dict[str, Record]) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self.finished = finished
        """By path below `target`; each was hashed again."""

    @classmethod
    def open(cls, work: Path, attempt: int, *, plan: str) -> Journal:
        """Begin, or go on with what an earlier attempt at the same `plan` finished."""
        folder = make_folder(work) / str(attempt)
        earlier = sorted((entry for entry in work.iterdir() if entry != folder), key=_number)
        if earlier and not folder.exists():
            earlier.pop().rename(folder)
        for entry in earlier:
            shutil.rmtree(entry)
        if folder.exists() and _read(folder / _PLAN) != plan:
            shutil.rmtree(folder)
        make_folder(folder / _FILES)
        (folder / _PLAN).write_text(plan)
        records = _read_records(folder / _FINISHED)
        finished = {path: record for path, record in records.items() if _is_sound(folder / _FILES / path, record)}
        for file in sorted((folder / _FILES).rglob("*"), reverse=True):
            if file.is_symlink() or not file.is_dir():
                if file.relative_to(folder / _FILES).as_posix() not in finished:
                    file.unlink()
            elif not any(file.iterdir()):
                file.rmdir()
        return cls(folder, finished)

    @property
    def target(self) -> Path:
        """The folder that the conversion writes."""
        return self._folder / _FILES

    def record(self, record: Record) -> None:
        """Note a file as finished. FileNotFoundError when another attempt has taken over."""
        line = json.dumps(vars(record)) + "\n"
        with (
            self._lock,
            disk_full_named(self._folder / _FINISHED),
            (self._folder / _FINISHED).open("a", encoding="utf-8") as stream,
        ):
            stream.write(line)

    def hand_over(self, destination: Path) -> None:
        """Move everything into an empty folder, and forget the work."""
        if self.target.stat().st_dev == destination.stat().st_dev:
            self.target.rename(destination)
        else:
            shutil.copytree(self.target, destination, dirs_exist_ok=True)
        self.discard()

    def discard(self) -> None:
        """Remove everything."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _number(entry: Path) -> int:
    return int(entry.name) if entry.name.isdecimal() else -1


def _read(file: Path) -> str | None:
    try:
        return file.read_text()
    except FileNotFoundError:
        return None


def _read_records(file: Path) -> dict[str, Record]:
    """All whole lines; a kill may have cut the last one, which is then removed."""
    text = _read(file) or ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole)
    records = [Record(**json.loads(line)) for line in whole.splitlines()]
    return {record.path: record for record in records}


def _is_sound(file: Path, record: Record) -> bool:
    return file.is_file() and file.stat().st_size == record.size_bytes and hash_file(file) == record.sha256
