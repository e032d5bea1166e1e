"""The HTML page: nothing from outside, nothing unescaped."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from PIL import Image

from core.data.media import Medium
from core.inference.report import MAX_SHOWN, write_report

HOSTILE = "<script>alert(1)</script> & \"quoted\" 'single'"


def said(text: str, right: float) -> dict[str, Any]:
    return {"text": text, "num_tokens": 3, "finished": True, "exact_match": right, "rouge_l": 0.5}


def report(num_answers: int = 1) -> dict[str, Any]:
    answer = {
        "row": 4,
        "messages": [{"role": "user", "content": f"<image>{HOSTILE}"}],
        "images": ["a.png"],
        "reference": HOSTILE,
        "model": said(HOSTILE, 1.0),
        "base": said("", 0.0),
    }
    return {
        "version": 1,
        "num_questions": num_answers,
        "generation": {"max_new_tokens": 8, "temperature": 0.0},
        "scores": {"exact_match": {"base": 0.0, "model": 1.0}, "loss": {"base": 4.5, "model": 0.25}},
        "models": {side: {"artifact": None, "seconds": 1.0, "num_tokens": 3} for side in ("base", "model")},
        "answers": [answer] * num_answers,
    }


class TestWriteReport:
    def test_page_stands_alone_and_escapes_every_text(self, tmp_path: Path) -> None:
        picture = tmp_path / "x' onerror=alert(1) .png"
        Image.new("RGB", (400, 200), "red").save(picture)
        write_report(tmp_path, report(), [[Medium((picture,), (1, 2, 2))]])
        page = (tmp_path / "report.html").read_text()
        assert page.count("<script>") == 1, "only our own"
        assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;quoted&quot;" in page
        assert "' onerror" not in page
        assert "data:image/jpeg;base64," in page
        assert all(value.startswith("data:image/") for value in re.findall(r"src=\"(.*?)\"", page))
        assert "href" not in page
        assert "http" not in page

    def test_scores_of_both_models_are_shown(self, tmp_path: Path) -> None:
        write_report(tmp_path, report(), [[]])
        page = (tmp_path / "report.html").read_text()
        for shown in ("100.0 %", "0.0 %", "4.5000", "0.2500", "Mended by fine-tuning <span>1</span>", "(empty)"):
            assert shown in page

    def test_json_has_every_answer_and_the_page_says_what_it_leaves_out(self, tmp_path: Path) -> None:
        write_report(tmp_path, report(MAX_SHOWN + 2), [[]] * (MAX_SHOWN + 2))
        assert len(json.loads((tmp_path / "report.json").read_text())["answers"]) == MAX_SHOWN + 2
        page = (tmp_path / "report.html").read_text()
        assert page.count("<article") == MAX_SHOWN
        assert "2 more answers are in report.json" in page

    def test_an_image_that_is_gone_leaves_its_name(self, tmp_path: Path) -> None:
        write_report(tmp_path, report(), [[Medium((tmp_path / "gone.png",), (1, 2, 2))]])
        assert "gone.png" in (tmp_path / "report.html").read_text()
