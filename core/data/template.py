"""Qwen2.5-VL's ChatML: turns → token ids, and which of them are learnt.

    <|im_start|>system\\n You are a helpful assistant. <|im_end|> \\n
    <|im_start|>user\\n <|vision_start|> <|image_pad|> × n <|vision_end|> What? <|im_end|> \\n
    <|im_start|>assistant\\n A dog. <|im_end|> \\n
                             ~~~~~~~~~~~~~~~~~ learnt: the assistant's text and its end mark; not the newline after it

The marks follow from the turns as they are written, nothing is searched for. Ids equal those of the tokenizer's own
chat template, except where the text would make them lie: special tokens spelt out in a text stay text, so that nobody
forges a turn or an image, and an answer that begins with a newline is cut from its header, as in generation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from core.data.formats import IMAGE, PLACEHOLDER, Message
from core.errors import InvalidModel

DEFAULT_SYSTEM = "You are a helpful assistant."


@dataclass(frozen=True)
class Encoded:
    """A sample as tokens."""

    input_ids: npt.NDArray[np.int32]
    """[L]"""
    trained: npt.NDArray[np.uint8]
    """[L]: 1 where the token is learnt."""


@dataclass(frozen=True)
class Segment:
    """A stretch of a preview."""

    text: str
    trained: bool


class ChatTemplate:
    """Encodes turns with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, digest: str = "") -> None:
        """`tokenizer` is changed: special tokens spelt out in a text become plain text from now on.

        Raises InvalidModel when it lacks one of the special tokens.
        """
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.digest = digest
        """SHA-256 of tokenizer.json."""
        self.im_start_id = self._special("<|im_start|>")
        self.im_end_id = self._special("<|im_end|>")
        self.vision_start_id = self._special("<|vision_start|>")
        self.vision_end_id = self._special("<|vision_end|>")
        self.image_token_id = self._special("<|image_pad|>")
        self.video_token_id = self._special("<|video_pad|>")
        self.pad_token_id = self._special("<|endoftext|>")
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        """One more than the largest id."""
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._newline = self.text_ids("\n")
        self._assistant_header = [self.im_start_id, *self.text_ids("assistant\n")]

    @classmethod
    def from_model_dir(cls, path: Path) -> ChatTemplate:
        """Read tokenizer.json of a model folder; raises InvalidModel."""
        file = Path(path) / "tokenizer.json"
        try:
            content = file.read_bytes()
        except OSError as error:
            raise InvalidModel(
                f"{file} cannot be read: {error.strerror}",
                hint="the tokenizer input must be a model folder with tokenizer.json",
            ) from error
        try:
            tokenizer = Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises plain Exception
            raise InvalidModel(f"{file} is not a tokenizer: {error}") from error
        return cls(tokenizer, hashlib.sha256(content).hexdigest())

    def encode(self, messages: Sequence[Message], media_tokens: Sequence[int]) -> Encoded:
        """Encode turns; the n-th IMAGE or VIDEO in them becomes `media_tokens[n]` image or video tokens."""
        pieces = list(self._pieces(messages, iter(media_tokens)))
        ids = np.concatenate([np.array(ids, np.int32) for ids, _ in pieces])
        trained = np.repeat(np.array([mark for _, mark in pieces], np.uint8), [len(ids) for ids, _ in pieces])
        return Encoded(ids, trained)

    def encode_prompt(self, messages: Sequence[Message], media_tokens: Sequence[int]) -> list[int]:
        """Encode turns that end with the user's, followed by the header of the answer to be generated."""
        pieces = self._pieces(messages, iter(media_tokens))
        return [token for ids, _ in pieces for token in ids] + self._assistant_header

    def text_ids(self, text: str) -> list[int]:
        """Ids of plain text; special tokens spelt out in it stay text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids) if text else []

    def is_special(self, token_id: int) -> bool:
        """True for the tokens that structure a conversation, which no text may contain."""
        return token_id in self._special_ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def preview(self, encoded: Encoded) -> list[Segment]:
        """Text with the learnt part marked, runs of image and video tokens shortened to `<|image_pad|>×n`."""
        segments = []
        cuts = np.flatnonzero(np.diff(encoded.trained)) + 1
        for ids, marks in zip(np.split(encoded.input_ids, cuts), np.split(encoded.trained, cuts), strict=True):
            segments.append(Segment("".join(self._shown(ids)), bool(marks[0])))
        return segments

    def _pieces(self, messages: Sequence[Message], media_tokens: Iterator[int]) -> Iterator[tuple[list[int], bool]]:
        """Token ids and whether they are learnt, turn by turn."""
        if not messages or messages[0].role != "system":
            messages = [Message("system", DEFAULT_SYSTEM), *messages]
        for message in messages:
            if message.role == "assistant":
                yield self._assistant_header, False
                yield [*self.text_ids(message.content), self.im_end_id], True
            else:
                yield [self.im_start_id], False
                first, *others = PLACEHOLDER.split(message.content)
                yield self.text_ids(f"{message.role}\n{first}"), False
                for mark, text in zip(others[::2], others[1::2], strict=True):
                    token_id = self.image_token_id if mark == IMAGE else self.video_token_id
                    medium = [token_id] * next(media_tokens)
                    yield [self.vision_start_id, *medium, self.vision_end_id, *self.text_ids(text)], False
                yield [self.im_end_id], False
            yield self._newline, False

    def _special(self, text: str) -> int:
        token_id = self._tokenizer.token_to_id(text)
        if token_id is None:
            raise InvalidModel(f"the tokenizer has no token {text}", hint="use the tokenizer of a Qwen2.5-VL model")
        return int(token_id)

    def _shown(self, ids: np.ndarray) -> Iterator[str]:
        names = {self.image_token_id: "<|image_pad|>", self.video_token_id: "<|video_pad|>"}
        kinds = np.where(np.isin(ids, list(names)), ids, -1)
        for run in np.split(ids, np.flatnonzero(np.diff(kinds)) + 1):
            if len(run) and run[0] in names:
                yield f"{names[int(run[0])]}×{len(run)}"
            else:
                yield str(self._tokenizer.decode(run.tolist(), skip_special_tokens=False))
