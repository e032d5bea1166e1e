"""Scores on answers whose value is known."""

from __future__ import annotations

import pytest

from core.inference.scoring import exact_match, rouge_l, words


class TestExactMatch:
    @pytest.mark.parametrize(
        ("answer", "reference", "expected"),
        [("7", "7", 1), (" a  dog\n", "a dog", 1), ("A dog", "a dog", 0), ("", "a", 0), ("a", "", 0)],
    )
    def test_only_white_space_is_forgiven(self, answer: str, reference: str, expected: float) -> None:
        assert exact_match(answer, reference) == expected


class TestRougeL:
    @pytest.mark.parametrize(
        ("answer", "reference", "expected"),
        [
            ("the cat sat", "the cat sat", 1),
            ("police kill the gunman", "police killed the gunman", 3 / 4),
            ("the gunman kill police", "police killed the gunman", 2 / 4),
            ("A dog.", "a DOG!", 1),
            ("nothing alike", "some words", 0),
            ("", "words", 0),
            ("", "", 1),
        ],
    )
    def test_f1_of_the_longest_common_subsequence(self, answer: str, reference: str, expected: float) -> None:
        assert rouge_l(answer, reference) == pytest.approx(expected)

    def test_characters_without_spaces_between_count_as_words(self) -> None:
        assert words("一只cat。狗") == ["一", "只", "cat", "狗"]
        assert rouge_l("一只狗", "一只猫") == pytest.approx(2 / 3)
