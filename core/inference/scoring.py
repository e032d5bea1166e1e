"""Scores of an answer against its reference. No torch here."""

from __future__ import annotations

import re
from collections.abc import Sequence

_WORDS = re.compile(r"[^\W_]+")
_UNSPACED = re.compile(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")


def exact_match(answer: str, reference: str) -> float:
    """1 if both are the same text but for white space, else 0."""
    return float(answer.split() == reference.split())


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, in lower case without punctuation, as `rouge_score` has it.

    A character of a script that is written without spaces counts as a word.
    """
    answer_words, reference_words = words(answer), words(reference)
    if not answer_words or not reference_words:
        return float(answer_words == reference_words)
    common = _common_subsequence(answer_words, reference_words)
    return 2 * common / (len(answer_words) + len(reference_words))


def words(text: str) -> list[str]:
    """Words of `text` in lower case."""
    return _WORDS.findall(_UNSPACED.sub(r" \1 ", text.lower()))


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    lengths = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for column, other in enumerate(second, start=1):
            above = lengths[column]
            lengths[column] = diagonal + 1 if word == other else max(above, lengths[column - 1])
            diagonal = above
    return lengths[-1]
