"""`make demo`: the whole road through HTTP, on this machine, with a tiny model and real handwriting.

Exit code 0 only if every job succeeded, the fine-tuned model answers at least 90 % of the held-out images exactly, the base
no better than chance, and the downloaded checkpoint, loaded by plain transformers, answers as Temper's evaluation did.
"""

import argparse
import inspect
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from api import terminal
from api.client import Client, Job
from tests.digits import QUESTION, as_text, write_digits, write_model
from tests.road import digits_road, submit_road
from tests.services import REPOSITORY, Temper, kill_home

TRAIN_ITERS = 300
NEEDED = 0.90
CHANCE = 0.20
NUM_ASKED = 10
_SPARKS = "▁▂▃▄▅▆▇█"


@dataclass
class Places:
    """Where the demo keeps its things: all of it below one folder, made anew by each run."""

    folder: Path

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def data(self) -> Path:
        return self.folder / "digits"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def results(self) -> Path:
        return self.folder / "results"


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "demo", help="where everything is put; made anew")
    parser.add_argument("--iters", type=int, default=TRAIN_ITERS, help="training steps")
    parser.add_argument("--keep", action="store_true", help="leave the server running at the end, until Ctrl-C")
    options = parser.parse_args()
    console, places = Console(), Places(options.folder.resolve())
    begun = time.monotonic()
    prepare(places, console)
    server = Temper(places.home, allow_roots=[places.folder])
    with server, Client(server.url, server.admin_key) as client:
        console.print(f"Temper answers at [bold]{server.url}[/] after {time.monotonic() - begun:.1f} s")
        jobs, passed = walk(client, places, console, train_iters=options.iters)
        console.print(f"\nwhole road: {time.monotonic() - begun:.0f} s" if jobs else "")
        if options.keep and jobs:
            console.print(f"the server stays at {server.url} (key in {places.home / 'admin.key'}) until Ctrl-C")
            wait_for_interrupt()
    if not options.keep:
        console.print(f"look at it again: make serve ARGS='--home {places.home}'", soft_wrap=True)
    return 0 if passed else 1


def prepare(places: Places, console: Console) -> None:
    """A tiny random model and the digits, on disk."""
    kill_home(places.home)
    shutil.rmtree(places.folder, ignore_errors=True)
    places.folder.mkdir(parents=True)
    write_model(places.model)
    count = write_digits(places.data)
    console.print(f"made a tiny random Qwen2.5-VL in {places.model} and {count} scanned digits in {places.data}")


def walk(client: Client, places: Places, console: Console, *, train_iters: int) -> tuple[dict[str, Job], bool]:
    """The road itself; the finished jobs, and whether all that the demo promises held."""
    model = client.register("hf_model", places.model, name="tiny Qwen2.5-VL")
    with terminal.transfer_bar(console, "sending") as told:
        source = client.upload("dataset_source", places.data, name="digits", on_bytes=told)
    console.print(f"registered the model as {model.id}, uploaded the digits as {source.id}")
    submitted = submit_road(client, digits_road(model.id, source.id, train_iters=train_iters))
    console.print(f"submitted {len(submitted)} jobs, each waiting for what it needs\n")
    jobs: dict[str, Job] = {}
    with terminal.job_views(console) as progress:
        for station, job in submitted.items():
            jobs[station] = terminal.follow(client, job.id, console, progress, title=f"{station:<8}")
    if any(job.state != "succeeded" for job in jobs.values()):
        console.print("[red]not every job succeeded[/]; its log: temper logs ID")
        return jobs, False
    report = fetch_report(client, jobs["evaluate"], places.results)
    download = client.download(jobs["export"].outputs[0].artifact_id, places.checkpoint)
    asked = report.held_out(places)
    answers = answer_with_transformers(places.checkpoint, [question.image for question in asked])
    agreed = sum(answer == question.answer for answer, question in zip(answers, asked, strict=True))
    console.print()
    console.print(results_table(client, jobs, report))
    console.print(f"loss      {loss_curve(client, jobs['train'])}")
    console.print(
        f"export    {places.checkpoint}: {download.files} files, {decimal(download.size)}, every SHA-256 right"
    )
    console.print(f"report    {places.results / 'report.html'}")
    console.print(f"\n{as_text(asked[0].image)}", highlight=False)
    said = f"transformers says [bold]{answers[0]}[/], Temper said {asked[0].answer}, it is {asked[0].reference}"
    console.print(f"{QUESTION}  {said}; of {len(asked)} held-out images both answer {agreed} alike")
    learned = report.after >= NEEDED and report.before <= CHANCE
    passed = learned and agreed == len(asked) and not download.unverified
    console.print(
        "[green]all of it held[/]" if passed else f"[red]expected ≥ {NEEDED:.0%} after, ≤ {CHANCE:.0%} before[/]"
    )
    return jobs, passed


@dataclass(frozen=True)
class Question:
    """A held-out image, the right answer, and what the fine-tuned model answered in Temper's evaluation."""

    image: Path
    reference: str
    answer: str


@dataclass(frozen=True)
class Report:
    """What the evaluation found: `report.json` of its artifact."""

    content: dict[str, Any]

    @property
    def before(self) -> float:
        return float(self.content["scores"]["exact_match"]["base"])

    @property
    def after(self) -> float:
        return float(self.content["scores"]["exact_match"]["model"])

    def held_out(self, places: Places) -> list[Question]:
        return [
            Question(places.data / answer["images"][0], answer["reference"], answer["model"]["text"].strip())
            for answer in self.content["answers"][:NUM_ASKED]
        ]


def fetch_report(client: Client, job: Job, folder: Path) -> Report:
    client.download(job.outputs[0].artifact_id, folder)
    return Report(json.loads((folder / "report.json").read_text()))


def answer_with_transformers(checkpoint: Path, images: list[Path]) -> list[str]:
    """Ask the exported checkpoint about each image, with nothing of Temper in the way."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # transformers 5 has a class of its own for Pillow, and warns where the other falls back to it.
    processors = ("Qwen2VLImageProcessorPil", "Qwen2VLImageProcessor")
    processor = next(getattr(transformers, name) for name in processors if hasattr(transformers, name))
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    answers = []
    for image in images:
        with Image.open(image) as picture:
            vision = processor.from_pretrained(checkpoint)(images=[picture.convert("RGB")], return_tensors="pt")
        num_tokens = int(vision["image_grid_thw"].prod()) // 4  # 2 × 2 patches are merged
        ids = tokenizer(prompt.replace("<|image_pad|>", "<|image_pad|>" * num_tokens), return_tensors="pt")
        inputs = {**ids, **vision}
        if "mm_token_type_ids" in inspect.signature(model.forward).parameters:  # transformers 5
            inputs["mm_token_type_ids"] = (ids["input_ids"] == model.config.image_token_id).long()
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        answers.append(tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return answers


def results_table(client: Client, jobs: dict[str, Job], report: Report) -> Table:
    table = Table("station", "job", "time", "result", title="from Hugging Face weights to a fine-tuned checkpoint")
    table.columns[1].no_wrap = table.columns[2].no_wrap = True
    train = client.metrics(jobs["train"].id, names=["loss", "tokens_per_second"])
    losses = [value for _, _, value in train["loss"] if value is not None]
    speed = [value for _, _, value in train["tokens_per_second"] if value is not None]
    data = client.artifact(jobs["dataset"].outputs[0].artifact_id).metadata
    results = {
        "convert": "in mm layout, for a pipeline of two",
        "dataset": f"{data['num_train']:,} rows to train on, {data['num_validation']} held out",
        "train": f"loss {losses[0]:.2f} → {losses[-1]:.2f}, {sorted(speed)[len(speed) // 2]:,.0f} tokens/s",
        "evaluate": f"exact match {report.before:.1%} → [bold]{report.after:.1%}[/]",
        "export": "in Hugging Face layout",
    }
    for station, job in jobs.items():
        seconds = terminal.duration_s(job)
        table.add_row(station, job.id, f"{seconds:.1f} s" if seconds is not None else "", results.get(station, ""))
    return table


def loss_curve(client: Client, job: Job, *, width: int = 60) -> str:
    points = client.metrics(job.id, names=["loss"], max_points=width)["loss"]
    values = [value for _, _, value in points if value is not None]
    top = max(values) or 1.0
    return "".join(_SPARKS[min(int(value / top * 8), 7)] for value in values)


def wait_for_interrupt() -> None:
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        return


if __name__ == "__main__":
    sys.exit(main())
