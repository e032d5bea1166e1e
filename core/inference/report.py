"""The report of an evaluation: scores and every answer side by side, as JSON and as one HTML page without outside parts.

report.json
    {"version": 1, "num_questions", "generation": {…}, "scores": {"exact_match": {"model": 0.93, "base": 0.11}, …},
     "models": {"model": {"artifact", "seconds", "num_tokens"}, "base": …},
     "answers": [{"row", "messages": [{"role", "content"}], "images": [path], "videos": [{path, frames, …}], "reference",
                  "model": {"text", "num_tokens", "finished", "exact_match"?, "rouge_l"?}, "base": …?}]}
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from core.data.formats import PLACEHOLDER
from core.data.media import MediaError, Medium, load_rgb
from core.data.video import first_picture

VERSION = 1
MAX_SHOWN = 1000
"""Answers that the page shows; report.json has all of them."""
THUMBNAIL_PIXELS = 168
TITLES = {"exact_match": "Exact match", "rouge_l": "ROUGE-L", "loss": "Loss"}
SIDES = {"base": "Base", "model": "Fine-tuned"}


def write_report(directory: Path, report: Mapping[str, Any], media: Sequence[Sequence[Medium]]) -> None:
    """Write report.json and report.html; `media` are each answer's images and videos, for thumbnails."""
    text = json.dumps(report, ensure_ascii=False, indent=1, allow_nan=False)
    (directory / "report.json").write_text(text + "\n", encoding="utf-8")
    with (directory / "report.html").open("w", encoding="utf-8") as page:
        page.writelines(_page(report, media))


def _page(report: Mapping[str, Any], media: Sequence[Sequence[Medium]]) -> Iterator[str]:
    sides = [side for side in SIDES if side in report["models"]]
    yield f"{_HEAD}<h1>Evaluation</h1>{_summary(report, sides)}{_filters(report, sides)}"
    for number, (answer, shown) in enumerate(zip(report["answers"][:MAX_SHOWN], media, strict=False), start=1):
        yield _answer(number, answer, shown, sides)
    left_out = len(report["answers"]) - MAX_SHOWN
    if left_out > 0:
        yield f"<p class=note>{left_out} more answers are in report.json.</p>"
    yield f"</main>{_SCRIPT}"


def _summary(report: Mapping[str, Any], sides: Sequence[str]) -> str:
    generation = ", ".join(f"{name} {value}" for name, value in report["generation"].items())
    cards = "".join(_score(name, values, sides) for name, values in report["scores"].items())
    speed = ", ".join(
        f"{SIDES[side]}: {report['models'][side]['num_tokens']} tokens in {report['models'][side]['seconds']:.1f} s"
        for side in sides
    )
    note = f"{report['num_questions']} questions · {generation} · {speed}"
    return f"<p class=note>{html.escape(note)}</p><div class=scores>{cards}</div>"


def _score(name: str, values: Mapping[str, float], sides: Sequence[str]) -> str:
    rows = []
    for side in sides:
        value = values[side]
        shown = f"{value:.4f}" if name == "loss" else f"{100 * value:.1f} %"
        bar = "" if name == "loss" else f"<div class=bar><i style='width:{100 * value:.1f}%'></i></div>"
        rows.append(f"<div class='side {side}'><span>{SIDES[side]}</span><b>{shown}</b></div>{bar}")
    return f"<section class=score><h2>{TITLES[name]}</h2>{''.join(rows)}</section>"


def _filters(report: Mapping[str, Any], sides: Sequence[str]) -> str:
    if "exact_match" not in report["scores"]:
        return ""
    kinds = {"all": "All", "right": "Right", "wrong": "Wrong"}
    if "base" in sides:
        kinds |= {"mended": "Mended by fine-tuning", "broken": "Broken by fine-tuning"}
    counts = {kind: sum(kind in _kinds(answer) for answer in report["answers"][:MAX_SHOWN]) for kind in kinds}
    buttons = "".join(
        f"<button data-kind={kind} aria-pressed={'true' if kind == 'all' else 'false'}>{title} <span>{counts[kind]}</span></button>"
        for kind, title in kinds.items()
    )
    return f"<nav>{buttons}</nav>"


def _kinds(answer: Mapping[str, Any]) -> list[str]:
    """Filters that show this answer."""
    right = answer["model"].get("exact_match")
    if right is None:
        return ["all"]
    kinds = ["all", "right" if right else "wrong"]
    before = answer.get("base", {}).get("exact_match")
    if before is not None and before != right:
        kinds.append("mended" if right else "broken")
    return kinds


def _answer(number: int, answer: Mapping[str, Any], media: Sequence[Medium], sides: Sequence[str]) -> str:
    row = f" · row {answer['row']}" if answer["row"] is not None else ""
    turns = "".join(
        f"<p class=turn><span>{html.escape(turn['role'])}</span>{_text(turn['content'])}</p>"
        for turn in answer["messages"]
    )
    pictures = "".join(_picture(medium) for medium in media)
    cells = ""
    if answer["reference"] is not None:
        cells = f"<div class=cell><h3>Reference</h3>{_text(answer['reference'])}</div>"
    cells += "".join(_cell(SIDES[side], answer[side]) for side in sides)
    return (
        f"<article data-kinds='{' '.join(_kinds(answer))}'><header>#{number}{row}</header>"
        f"<div class=ask><div class=pictures>{pictures}</div><div>{turns}</div></div><div class=cells>{cells}</div></article>\n"
    )


def _cell(title: str, said: Mapping[str, Any]) -> str:
    right = said.get("exact_match")
    mark = "" if right is None else (" right" if right else " wrong")
    facts = f" · ROUGE-L {100 * said['rouge_l']:.0f} %" if "rouge_l" in said else ""
    cut = "" if said["finished"] else " <em>cut off</em>"
    return f"<div class='cell{mark}'><h3>{title}<small>{facts}</small></h3>{_text(said['text'])}{cut}</div>"


def _text(text: str) -> str:
    shown = html.escape(PLACEHOLDER.sub("", text).strip())
    return f"<span class=text>{shown}</span>" if shown else "<span class=empty>(empty)</span>"


def _picture(medium: Medium) -> str:
    """The image, or the first frame of the video and how many there are."""
    source = _thumbnail(medium.paths, medium.is_video)
    name = html.escape(medium.paths[0].name, quote=True)
    picture = f'<img alt="{name}" title="{name}" src="{source}">' if source else f"<span class=empty>{name}</span>"
    if not medium.is_video:
        return picture
    facts = f"video, {medium.seconds:.1f} s: {medium.num_taken} of {medium.num_frames} frames"
    return f"<figure>{picture}<figcaption>{facts}</figcaption></figure>"


@lru_cache(maxsize=256)
def _thumbnail(paths: tuple[Path, ...], is_video: bool) -> str | None:
    """A small copy as a data URI, or None when the file cannot be read any more."""
    try:
        image = first_picture(paths) if is_video else load_rgb(paths[0])
    except MediaError:
        return None
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


_HEAD = """<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1">
<title>Evaluation report</title><style>
:root{--ink:#1c2430;--soft:#667085;--line:#e4e7ec;--page:#f7f8fa;--card:#fff;--right:#067647;--wrong:#b42318;--bar:#3b6fe0}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ee;--soft:#98a2b3;--line:#2b323d;--page:#12161c;--card:#1a2029}
:root{--right:#47cd89;--wrong:#f97066;--bar:#6d97f0}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:32px 20px}
h1{margin:0;font-size:26px}
h2{margin:0 0 10px;font-size:14px;color:var(--soft)}
h3{margin:0 0 4px;font-size:12px;color:var(--soft);font-weight:600}
small{font-weight:400}
.note{color:var(--soft);margin:6px 0 20px}
.scores{display:flex;flex-wrap:wrap;gap:14px}
.score,article{background:var(--card);border:1px solid var(--line);border-radius:10px}
.score{padding:16px;min-width:230px;flex:1}
.side{display:flex;justify-content:space-between;align-items:baseline}
.side b{font-size:22px}
.side.base b{color:var(--soft)}
.bar{height:6px;border-radius:3px;background:var(--line);margin:2px 0 10px}
.bar i{display:block;height:100%;border-radius:3px;background:var(--bar)}
.base+.bar i{background:var(--soft)}
nav{display:flex;flex-wrap:wrap;gap:8px;margin:20px 0 4px}
button{font:inherit;color:inherit;background:var(--card);padding:4px 12px;border:1px solid var(--line);border-radius:16px}
button{cursor:pointer}
button span{color:var(--soft)}
button[aria-pressed=true]{border-color:var(--bar);box-shadow:0 0 0 1px var(--bar)}
article{margin:14px 0;overflow:hidden}
header{padding:8px 16px;color:var(--soft);font-size:13px}
.ask{display:flex;gap:16px;padding:0 16px 12px}
.pictures{display:flex;flex-wrap:wrap;gap:6px;align-content:flex-start}
.pictures img{max-height:112px;border-radius:6px;display:block}
.pictures:empty{display:none}
figure{margin:0}
figcaption{color:var(--soft);font-size:12px;max-width:168px}
.turn{margin:0 0 6px}
.turn>span:first-child{color:var(--soft);font-size:12px;margin-right:8px}
.cells{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));border-top:1px solid var(--line)}
.cell{padding:10px 16px 14px;border-left:1px solid var(--line);margin-left:-1px;overflow-wrap:anywhere}
.cell.right{box-shadow:inset 0 3px var(--right)}
.cell.wrong{box-shadow:inset 0 3px var(--wrong)}
.text{white-space:pre-wrap}
.empty,em{color:var(--soft);font-style:italic}
</style><main>"""

_SCRIPT = """<script>
document.querySelectorAll("nav button").forEach(button => button.onclick = () => {
  document.querySelectorAll("nav button").forEach(other => other.setAttribute("aria-pressed", other === button));
  document.querySelectorAll("article").forEach(article => {
    article.hidden = !article.dataset.kinds.split(" ").includes(button.dataset.kind);
  });
});
</script></html>
"""
