"""Rows with text, images and videos all the way: data set job, two steps of training, evaluation of what came out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from core.data.dataset import TokenisedDataset
from core.models.hf_folder import inspect_hf_folder
from core.runners import dataset, evaluation, training
from core.runners.context import InputArtifact, RunContext
from core.specs.dataset import DatasetSpec
from core.specs.evaluation import EvaluationSpec
from core.specs.training import TrainingSpec
from core.storage.local import Store
from tests.tiny import tiny_model
from tests.videos import pictures, write_animation, write_video

ANYTHING = {"artifact": "art_" + "0" * 26}
WHOLE = {"tp_size": 1, "llm_pp_layers": [[2]], "vit_pp_layers": [[2]]}


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def made(source: Path) -> list[dict[str, Any]]:
    """Rows of every kind, some of them mixed."""
    source.mkdir()
    write_video(source / "a.mp4", pictures(30))
    write_animation(source / "b.gif", pictures(9))
    for number in range(3):
        Image.fromarray(pictures(3)[number]).save(source / f"{number}.png")
    return [
        {"messages": turns("How many?", "Three.")},
        {"messages": turns("<image>What is it?", "A dog."), "images": ["0.png"]},
        {"messages": turns("<video>What is it?", "A cat."), "videos": ["a.mp4"]},
        {
            "messages": turns("<video>And <image>?", "A car."),
            "videos": [["0.png", "1.png", "2.png"]],
            "images": ["1.png"],
        },
        {
            "messages": turns("<image><video>", "A tree."),
            "videos": ["b.gif"],
            "images": ["2.png"],
            "split": "validation",
        },
    ]


def real(source: Path, data_dir: Path) -> list[dict[str, Any]]:
    """LLaMA-Factory's demo records, one of the videos held out."""
    demo = data_dir / "mllm_demo"
    shutil.copytree(demo, source)
    videos = json.loads((demo / "mllm_video_demo.json").read_text())
    text = {"messages": turns("你好", "你好！")}
    images = json.loads((demo / "mllm_demo.json").read_text())[:3]
    return [text, *images, *videos[:2], {**videos[2], "split": "validation"}]


class Road:
    """Jobs in one store, each on what the ones before have published."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = Store(root / "store")

    def run(self, kind: Any, spec: Any, **inputs: InputArtifact) -> dict[str, InputArtifact]:
        """Run a job; return its artifacts by name."""
        name = kind.__name__.rpartition(".")[2]
        attempt_dir = self.root / name
        attempt_dir.mkdir()
        ctx = RunContext(
            job_id=f"job_{name}", attempt=1, kind=name, spec=spec, inputs=inputs,
            job_dir=attempt_dir, attempt_dir=attempt_dir, store=self.store,
        )  # fmt: skip
        kind.run(ctx, spec)
        events = map(json.loads, (attempt_dir / "events.jsonl").read_text().splitlines())
        found = {}
        for event in events:
            if event["type"] == "artifact":
                folder = self.store.artifact_dir(event["artifact_id"])
                manifest = json.loads((folder / "manifest.json").read_text())
                found[event["name"]] = InputArtifact(None, manifest["kind"], folder / "files", manifest["metadata"])
        return found


@pytest.mark.parametrize("origin", ["made", "real"])
def test_from_videos_to_a_report(tmp_path: Path, origin: str, request: pytest.FixtureRequest) -> None:
    torch.set_num_threads(1)
    is_real = origin == "real"
    source = tmp_path / "source"
    rows = real(source, request.getfixturevalue("data_dir")) if is_real else made(source)
    (source / "rows.json").write_text(json.dumps(rows))
    folder = tiny_model(tmp_path / "model")
    model = InputArtifact(None, "hf_model", folder, inspect_hf_folder(folder).metadata)
    given = InputArtifact(None, "dataset_source", source, {})
    road = Road(tmp_path)

    spec: dict[str, Any] = {"source": ANYTHING, "annotations": "rows.json", "tokenizer": ANYTHING, "cutoff_len": 2048}
    data = road.run(dataset, DatasetSpec.model_validate(spec), source=given, tokenizer=model)["dataset"]
    expected = (7, 0, 3, 48) if is_real else (5, 0, 3, 6 + 3 + 4)
    assert tuple(data.metadata[f"num_{name}"] for name in ("rows", "refused", "videos", "frames")) == expected

    spec = {
        "model": ANYTHING,
        "dataset": ANYTHING,
        "parallel": WHOLE,
        "train_iters": 2,
        "global_batch_size": 4,
        "seq_length": 2048,
        "freeze": {"vision_encoder": False, "vision_projector": False},
        "precision": "fp32",
    }
    trained = road.run(training, TrainingSpec.model_validate(spec), model=model, dataset=data)["checkpoint"]

    spec = {"model": ANYTHING, "dataset": ANYTHING, "generation": {"max_new_tokens": 3}, "metrics": ["loss"]}
    report = road.run(evaluation, EvaluationSpec.model_validate(spec), model=trained, dataset=data)["report"].path
    (answer,) = json.loads((report / "report.json").read_text())["answers"]
    (shown,) = answer["videos"]
    medium = next(one for one in TokenisedDataset(data.path, "validation").row(0).media if one.is_video)
    assert (shown["frames"], shown["frames_taken"]) == (medium.num_frames, medium.num_taken)
    page = (report / "report.html").read_text()
    assert f"video, {medium.seconds:.1f} s: {medium.num_taken} of {medium.num_frames} frames" in page
    assert page.count("data:image/jpeg;base64,") == len(answer["images"]) + 1
