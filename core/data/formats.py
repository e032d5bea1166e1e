"""User annotation files → `Sample`: our own reader of JSON and JSONL, one verdict per bad row, nothing swapped or dropped silently.

llava, sharegpt   {"image": "a.jpg" | ["a.jpg", …], "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, …]}
                  also "images" for "image", and "system" beside "conversations"
messages          {"images": ["a.jpg"], "messages": [{"role": "user", "content": "<image>What?"}, …]}
                  or content as parts: [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "What?"}]
any of them       "video": "a.mp4", "videos": ["a.mp4", …] with <video> in the text, or a part {"type": "video", "video": "a.mp4"};
                  a list of image files in the place of a path is one video, its frames
                  "split": "train" | "validation" decides where the row goes
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Literal

from core.errors import InvalidDataset

IMAGE = "<image>"
"""Stands for the next image of the row in a message's text."""
VIDEO = "<video>"
"""Likewise for the next video."""
PLACEHOLDER = re.compile(f"({IMAGE}|{VIDEO})")

MAX_RECORD_BYTES = 64 << 20

Format = Literal["llava", "sharegpt", "messages", "auto"]

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_OTHER_MEDIA = ("audio", "audios")
_BLOCK = 1 << 20
_AFTER_VALUE = tuple(",] \t\r\n")


class BadRow(Exception):
    """Why a row cannot be used; `code` is stable, the message names field and value."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Message:
    """One turn; images stand in the content as IMAGE, videos as VIDEO."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Sample:
    """One row in our own form."""

    images: tuple[str, ...]
    """Paths as the user wrote them, in order of the placeholders."""
    messages: tuple[Message, ...]
    split: Literal["train", "validation"] | None = None
    videos: tuple[tuple[str, ...], ...] = ()
    """Likewise; each is one path, or those of its frames."""

    def placeholders(self) -> list[str]:
        """IMAGE or VIDEO for each image and video, in order of appearance."""
        return [mark for message in self.messages for mark in PLACEHOLDER.findall(message.content)]

    def to_json(self) -> str:
        """The normalised record, one line of train.jsonl: the form that MindSpeed-MM and LLaMA-Factory read too."""
        messages = [{"role": message.role, "content": message.content} for message in self.messages]
        videos = [paths[0] if len(paths) == 1 else list(paths) for paths in self.videos]
        media = {"images": list(self.images)} | ({"videos": videos} if videos else {})
        return json.dumps({**media, "messages": messages}, ensure_ascii=False)


@dataclass(frozen=True)
class Record:
    """A row as read: parsed JSON, or a line that is yet to be parsed."""

    row: int
    """From 1: the line of a JSONL file, the place in the list of a JSON file."""
    value: Any
    """bytes = a JSON text."""


def read_records(path: Path) -> Iterator[Record]:
    """Read a JSON list or JSONL file row by row, in bounded memory.

    Lines of JSONL come unparsed, so that a bad one costs only its row. Raises InvalidDataset naming the byte or row where
    a JSON list breaks: nothing after it can be told apart.
    """
    try:
        with path.open("rb") as file:
            first = _first_byte(file)
            if first == b"[":
                with path.open(encoding="utf-8-sig") as text:
                    yield from _read_list(text, path)
            elif first:
                yield from _read_lines(file, path)
    except FileNotFoundError:
        raise InvalidDataset(f"annotations {path.name!r} do not exist in the source") from None
    except (IsADirectoryError, PermissionError) as error:
        raise InvalidDataset(f"annotations {path.name!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidDataset(f"annotations {path.name!r} are not UTF-8: {error}") from error


def count_records(path: Path, at_most: int | None = None) -> int:
    """Number of rows, read at the speed of the reader; stops at `at_most`."""
    count = 0
    for _ in read_records(path):
        count += 1
        if at_most is not None and count >= at_most:
            break
    return count


def parse_record(value: Any, format: Format = "auto") -> Sample:
    """Turn a row into a Sample; raises BadRow."""
    if isinstance(value, bytes):
        value = _parse_line(value)
    if not isinstance(value, dict):
        raise BadRow("not_an_object", f"the row must be a JSON object, got {_shown(value)}")
    for field in _OTHER_MEDIA:
        if value.get(field):
            raise BadRow(
                "unsupported_media",
                f"field {field!r} has {_shown(value[field])}: this version trains on images and videos only",
            )
    field = (
        "messages" if format == "messages" or (format == "auto" and "conversations" not in value) else "conversations"
    )
    if field not in value:
        wanted = "'conversations' or 'messages'" if format == "auto" else f"{field!r} (format {format})"
        raise BadRow(
            "missing_field", f"field {wanted} is missing; the row has {', '.join(map(repr, value)) or 'no fields'}"
        )
    images = [path for paths in _media(value, "image") for path in paths]
    videos = _media(value, "video")
    parts = _Parts()
    turns = _turns(value, field, parts)
    for kind, given, found in (("image", images, parts.images), ("video", videos, parts.videos)):
        if given and found:
            raise BadRow(
                f"{kind}s_twice", f"{kind}s are listed both in the row and inside the messages; use one of the two"
            )
    sample = Sample(
        images=tuple(parts.images or images),
        videos=tuple(parts.videos or videos),
        messages=tuple(_video_marks(turns, images, videos)),
        split=_split(value),
    )
    check_turns(sample.messages)
    _check_placeholders(sample)
    return sample


def check_turns(messages: tuple[Message, ...]) -> None:
    """Refuse anything but an optional system turn, then user and assistant in turns; raises BadRow."""
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    if not turns:
        raise BadRow("no_turns", "the row has no user and assistant turns")
    first = len(messages) - len(turns)
    for number, message in enumerate(turns, start=first):
        expected = "user" if (number - first) % 2 == 0 else "assistant"
        if message.role != expected:
            raise BadRow("role_order", f"turn {number} has the role {message.role!r}, expected {expected!r}")
        if message.role == "assistant" and not message.content.strip():
            raise BadRow("empty_answer", f"turn {number}: the assistant's text is empty, there is nothing to learn")
    if len(turns) % 2:
        raise BadRow("no_answer", f"the last turn ({len(messages) - 1}) is the user's: an assistant turn must follow")


class MediaRoot:
    """The folder that paths of images and videos start from, and the wall that none may climb."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self._root = str(self.path)
        self._resolved_folder = lru_cache(maxsize=4096)(os.path.realpath)

    def locate(self, given: str) -> str:
        """Path of an image or video relative to the root, links resolved; raises BadRow when it leads outside.

        Whether the file exists is not looked at.
        """
        if "://" in given or given.startswith("data:"):
            raise BadRow(
                "remote_image", f"{_shown(given)} is not a path: images and videos are read from media_root only"
            )
        if "\0" in given:
            raise BadRow("bad_path", f"path {_shown(given)} has a NUL character")
        # Once per image, so by os.path: pathlib takes several times as long.
        folder, name = os.path.split(os.path.join(self._root, given))  # noqa: PTH118
        resolved = os.path.join(self._resolved_folder(folder), name)  # noqa: PTH118
        if name in ("", ".", "..") or os.path.islink(resolved):  # noqa: PTH114
            resolved = os.path.realpath(resolved)
        if not resolved.startswith(self._root.rstrip("/") + "/"):
            raise BadRow("path_outside", f"path {_shown(given)} leads outside media_root")
        return os.path.relpath(resolved, self._root)


def _first_byte(file: IO[bytes]) -> bytes:
    """First byte that is neither white space nor a byte order mark; the file is left at its start."""
    start = file.read(4096)
    while start and not start.lstrip(b"\xef\xbb\xbf \t\r\n"):
        start = file.read(4096)
    file.seek(0)
    return start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]


def _read_lines(file: IO[bytes], path: Path) -> Iterator[Record]:
    row = 0
    while line := file.readline(MAX_RECORD_BYTES + 1):
        row += 1
        if len(line) > MAX_RECORD_BYTES:
            raise InvalidDataset(f"{path.name}: row {row} is longer than {MAX_RECORD_BYTES} bytes")
        line = line.removeprefix(b"\xef\xbb\xbf") if row == 1 else line
        if line := line.strip():
            yield Record(row, line)


def _read_list(file: IO[str], path: Path) -> Iterator[Record]:
    """Elements of a JSON list; the buffer holds what is read and not yet yielded.

    An element that does not end inside the buffer is tried again after the buffer has at least doubled.
    """
    buffer = _ListBuffer(file)
    decoder = json.JSONDecoder()
    buffer.expect("[", path, 0)
    row = 0
    if buffer.peek() == "]":
        return
    while True:
        row += 1
        buffer.peek()  # drops white space
        while True:
            try:
                value, end = decoder.raw_decode(buffer.text, buffer.at)
            except (json.JSONDecodeError, RecursionError) as error:
                if not buffer.grow():
                    raise InvalidDataset(f"{path.name}: row {row} is not JSON: {error}") from error
                continue
            if buffer.text[end : end + 1] in _AFTER_VALUE or not buffer.grow():  # a number may go on in the next block
                break
        buffer.at = end
        yield Record(row, value)
        if buffer.peek() == "]":
            return
        buffer.expect(",", path, row)


class _ListBuffer:
    """A window on a text file."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self.text = ""
        self.at = 0

    def grow(self) -> bool:
        """Drop what was used and read as much again as is left, at least a block; False at the end of the file."""
        rest = self.text[self.at :]
        if len(rest) > MAX_RECORD_BYTES:
            return False
        more = self._file.read(max(_BLOCK, len(rest)))
        self.text, self.at = rest + more, 0
        return bool(more)

    def peek(self) -> str:
        """Next character that is not white space, "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.grow():
                return ""

    def expect(self, character: str, path: Path, row: int) -> None:
        found = self.peek()
        if found != character:
            where = "the end of the file" if not found else repr(found)
            raise InvalidDataset(
                f"{path.name}: {where} after row {row}, expected {character!r}", hint="is the file cut off?"
            )
        self.at += 1


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRow("not_json", f"the line is not JSON: {error}") from error


def _media(value: Mapping[str, Any], kind: str) -> list[tuple[str, ...]]:
    """The paths of each image or video that the row lists; several only for a video given as frames."""
    given = [(name, value[name]) for name in (kind, f"{kind}s") if value.get(name)]
    if len(given) > 1:
        raise BadRow(f"{kind}s_twice", f"the row has both '{kind}' and '{kind}s'; use one of the two")
    if not given:
        return []
    name, media = given[0]
    media = [media] if isinstance(media, str) else media
    if not isinstance(media, list):
        raise BadRow("bad_field", f"field {name!r} must be a path or a list of paths, got {_shown(media)}")
    return [_paths(medium, f"{name}[{number}]", kind) for number, medium in enumerate(media)]


def _paths(value: Any, where: str, kind: str) -> tuple[str, ...]:
    """A path, or the frames of a video."""
    paths = value if isinstance(value, list) and value and kind == "video" else [value]
    for path in paths:
        if not isinstance(path, str) or not path:
            raise BadRow("bad_field", f"field '{where}' must be a path, got {_shown(path)}")
        _check_text(path, where)
    return tuple(paths)


def _video_marks(turns: list[Message], images: list[str], videos: list[tuple[str, ...]]) -> list[Message]:
    """LLaVA-Video's files write <image> for a video: read as <video> in a row that lists videos only and has none."""
    if not videos or images or any(VIDEO in turn.content for turn in turns):
        return turns
    return [Message(turn.role, turn.content.replace(IMAGE, VIDEO)) for turn in turns]


@dataclass
class _Parts:
    """Images and videos that stood among the content parts of messages."""

    images: list[str] = dataclasses.field(default_factory=list)
    videos: list[tuple[str, ...]] = dataclasses.field(default_factory=list)


def _turns(value: Mapping[str, Any], field: str, parts: _Parts) -> list[Message]:
    """Messages; what stands among their content parts is added to `parts`."""
    raw = value[field]
    role_key, text_key = ("role", "content") if field == "messages" else ("from", "value")
    if not isinstance(raw, list):
        raise BadRow("bad_field", f"field {field!r} must be a list of turns, got {_shown(raw)}")
    turns: list[Message] = []
    if value.get("system"):
        if not isinstance(value["system"], str):
            raise BadRow("bad_field", f"field 'system' must be a text, got {_shown(value['system'])}")
        turns.append(_message("system", value["system"], "system"))
    for number, turn in enumerate(raw):
        where = f"{field}[{number}]"
        if not isinstance(turn, dict) or role_key not in turn or text_key not in turn:
            raise BadRow("bad_field", f"field '{where}' must have {role_key!r} and {text_key!r}, got {_shown(turn)}")
        role = _ROLES.get(turn[role_key]) if isinstance(turn[role_key], str) else None
        if role is None:
            raise BadRow(
                "unknown_role", f"field '{where}.{role_key}' is {_shown(turn[role_key])}, known are {', '.join(_ROLES)}"
            )
        text = _content(turn[text_key], f"{where}.{text_key}", parts)
        turns.append(_message(role, text, f"{where}.{text_key}"))
    return turns


def _message(role: Any, text: str, where: str) -> Message:
    _check_text(text, where)
    return Message(role, text)


def _content(content: Any, where: str, parts: _Parts) -> str:
    """Text with placeholders; images and videos among content parts are added to `parts`."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRow("bad_field", f"field '{where}' must be a text or a list of parts, got {_shown(content)}")
    text = ""
    for number, part in enumerate(content):
        part_where = f"{where}[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            piece = part.get("text", part.get("value"))
            if not isinstance(piece, str):
                raise BadRow("bad_field", f"field '{part_where}.text' must be a text, got {_shown(piece)}")
            if mark := PLACEHOLDER.search(piece):
                raise BadRow(
                    "placeholder_count",
                    f"field '{part_where}.text' has {mark[0]}, but images and videos are parts of their own here",
                )
            text += piece
        elif kind in ("image", "image_url"):
            parts.images += _part_paths(part, "image", part_where)
            text += IMAGE
        elif kind in ("video", "video_url"):
            parts.videos.append(_part_paths(part, "video", part_where))
            text += VIDEO
        else:
            raise BadRow(
                "unsupported_media",
                f"field '{part_where}.type' is {_shown(kind)}, known are 'text', 'image' and 'video'",
            )
    return text


def _part_paths(part: Mapping[str, Any], kind: str, where: str) -> tuple[str, ...]:
    value = part.get(kind, part.get(f"{kind}_url", part.get("path", part.get("value"))))
    value = value.get("url") if isinstance(value, dict) else value
    if not value or not isinstance(value, (str, list)):
        raise BadRow("bad_field", f"field '{where}' must name the path of its {kind}, got {_shown(part)}")
    return _paths(value, where, kind)


def _split(value: Mapping[str, Any]) -> Any:
    split = value.get("split")
    if split not in (None, "train", "validation"):
        raise BadRow("bad_field", f"field 'split' must be 'train' or 'validation', got {_shown(split)}")
    return split


def _check_placeholders(sample: Sample) -> None:
    for number, message in enumerate(sample.messages):
        if message.role == "assistant" and (marks := PLACEHOLDER.findall(message.content)):
            raise BadRow("placeholder_in_answer", f"turn {number}: {marks[0]} in the assistant's text, which is learnt")
    marks = sample.placeholders()
    for mark, media, name in ((IMAGE, sample.images, "images"), (VIDEO, sample.videos, "videos")):
        if marks.count(mark) != len(media):
            raise BadRow("placeholder_count", f"{marks.count(mark)} {mark} placeholders for {len(media)} {name}")


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow("bad_text", f"field '{where}' has half a surrogate pair at character {error.start}") from error


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
