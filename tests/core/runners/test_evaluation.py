"""Evaluation jobs from folder to report, on a tiny model and a real little data set."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from core.conversion.convert import hf_to_mm
from core.data.dataset import TokenisedDataset
from core.data.media import ImageProcessing, UnreadableMedia
from core.data.pipeline import Options, build
from core.data.video import VideoProcessing
from core.errors import ForbiddenPath
from core.models.hf_folder import inspect_hf_folder
from core.runners.context import InputArtifact, RunContext, Stopped
from core.runners.evaluation import run
from core.specs.evaluation import EvaluationSpec
from core.specs.parallel import ParallelSpec
from core.storage.local import Store
from tests.tiny import tiny_model
from tests.videos import pictures, write_animation

SIZES = ((60, 40), (28, 84), (90, 90))
ANYTHING = {"artifact": "art_01k0a2b3c4d5e6f7g8h9j0kmnp"}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, base/ (other weights), mm/ (model, split in two), source/ with images, dataset/ with all rows held out but one."""
    root = tmp_path_factory.mktemp("evaluation")
    tiny_model(root / "model", seed=1)
    tiny_model(root / "base", seed=2)
    (root / "mm").mkdir()
    hf_to_mm(inspect_hf_folder(root / "model"), root / "mm", PARALLEL)
    source = root / "source"
    (source / "images").mkdir(parents=True)
    for number, size in enumerate(SIZES):
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(source / "images" / f"{number}.png")
    write_animation(source / "images" / "a.gif", pictures(12, width=112, height=56))
    rows: list[dict[str, Any]] = [
        {
            "images": [f"{n}.png" for n in images],
            "videos": ["a.gif"] * turns[0]["content"].count("<video>"),
            "messages": turns,
            "split": "train" if index == 0 else "validation",
        }
        for index, (images, turns) in enumerate(ROWS)
    ]
    (source / "rows.json").write_text(json.dumps(rows))
    (root / "dataset").mkdir()
    build(
        Options(
            source=source,
            annotations="rows.json",
            media_root="images",
            tokenizer_dir=root / "model",
            processing=(processing := ImageProcessing.from_model_dir(root / "model")),
            videos=VideoProcessing.like(processing, max_pixels=56 * 112),
        ),
        root / "dataset",
        num_workers=0,
    )
    return root


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


ROWS: list[tuple[list[int], list[dict[str, str]]]] = [
    ([], turns("What is it?", "A dog.")),
    ([0], turns("<image>What is in the picture?", "A red circle.")),
    ([], turns("How many?", "Three.", "And large ones?", "One.")),
    ([1, 2], turns("<image><image>Describe the image.", "The picture shows a red circle.")),
    ([2], turns("<video>What is in the picture? <image>", "A photo of a dog.")),
]
PARALLEL = ParallelSpec(tp_size=1, llm_pp_layers=((0, 2),), vit_pp_layers=((2, 0),))


class Job:
    """An evaluation in a store of its own."""

    def __init__(self, tmp_path: Path, folder: Path, spec: dict[str, Any], kinds: dict[str, str] | None = None) -> None:
        self.spec = EvaluationSpec.model_validate({"model": ANYTHING, **spec})
        config = json.loads((folder / "model" / "config.json").read_text())
        metadata = {"config": config, "parallel": PARALLEL.model_dump(mode="json"), "canonical": False}
        inputs = {"model": "model"} | (kinds or {})
        kind_of = {"mm": "mm_checkpoint", "dataset": "dataset"}
        self.ctx = RunContext(
            job_id="job_01k0a2b3c4d5e6f7g8h9j0kmnp",
            attempt=1,
            kind="evaluation",
            spec=self.spec,
            inputs={
                field: InputArtifact(None, kind_of.get(name, "hf_model"), folder / name, metadata)
                for field, name in inputs.items()
            },
            job_dir=tmp_path,
            attempt_dir=tmp_path,
            store=Store(tmp_path / "store"),
            allow_roots=(folder / "source",),
        )

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = (self.ctx.attempt_dir / "events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["type"] == kind]

    def report(self) -> dict[str, Any]:
        run(self.ctx, self.spec)
        (artifact,) = self.events("artifact")
        files = self.ctx.store.files_dir(artifact["artifact_id"])
        assert (files / "report.html").stat().st_size > 1000
        return json.loads((files / "report.json").read_text())


def hf_answer(folder: Path, row: int, max_new_tokens: int) -> str:
    """The answer that plain transformers gives, from the row's messages on."""
    images, messages = ROWS[row]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "model")
    chat = [
        {
            "role": turn["role"],
            "content": [
                {"type": part[1:-1]} if part in ("<image>", "<video>") else {"type": "text", "text": part}
                for part in re.split("(<image>|<video>)", turn["content"])
            ],
        }
        for turn in messages[:-1]
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs: dict[str, torch.Tensor] = {}
    if images:
        process = Qwen2VLImageProcessorPil.from_pretrained(folder / "model")
        pictures = [Image.open(folder / "source" / "images" / f"{n}.png") for n in images]
        inputs = dict(process(images=pictures, return_tensors="pt"))
        for grid in inputs["image_grid_thw"]:
            text = text.replace("<|image_pad|>", "<|placeholder|>" * (int(grid.prod()) // 4), 1)
        text = text.replace("<|placeholder|>", "<|image_pad|>")
    if "<|video_pad|>" in text:
        dataset = TokenisedDataset(folder / "dataset", "validation")
        video = dataset.row(row - 1).media[0]
        inputs["pixel_values_videos"] = torch.from_numpy(dataset.meta.video_processing.load(video))
        inputs["video_grid_thw"] = torch.tensor([video.grid])
        inputs["second_per_grid_ts"] = torch.tensor([video.seconds_per_grid])
        text = text.replace("<|video_pad|>", "<|video_pad|>" * (video.num_patches // 4))
    ids = tokenizer(text, return_tensors="pt").input_ids
    if images:
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
        inputs["mm_token_type_ids"] += 2 * (ids == model.config.video_token_id).int()
    out = model.generate(input_ids=ids, **inputs, do_sample=False, max_new_tokens=max_new_tokens)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def hf_loss(folder: Path, held_out: list[int]) -> float:
    """Mean cross entropy of transformers' model over the trained tokens of held-out rows."""
    dataset = TokenisedDataset(folder / "dataset", "validation")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "model")
    losses = []
    for index in held_out:
        row = dataset.row(index)
        ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
        inputs: dict[str, Any] = {"input_ids": ids}
        if row.media:
            inputs["pixel_values"] = torch.from_numpy(
                np.concatenate([dataset.meta.image_processing.load(image.paths[0])[0] for image in row.media])
            )
            inputs["image_grid_thw"] = torch.tensor(row.grid_thw)
            inputs["mm_token_type_ids"] = (ids == dataset.meta.image_token_id).int()
        with torch.no_grad():
            logits = model(**inputs).logits[0]
        losses.append(F.cross_entropy(logits, torch.from_numpy(row.targets), reduction="none")[row.targets >= 0])
    return torch.cat(losses).mean().item()


class TestHeldOutRows:
    def test_answers_are_those_of_transformers(self, tmp_path: Path, folder: Path) -> None:
        spec = {"dataset": ANYTHING, "generation": {"max_new_tokens": 6}}
        report = Job(tmp_path, folder, spec, {"dataset": "dataset"}).report()
        assert [answer["model"]["text"] for answer in report["answers"]] == [
            hf_answer(folder, row, 6) for row in (1, 2, 3, 4)
        ]

    def test_both_models_stand_side_by_side_with_the_reference(self, tmp_path: Path, folder: Path) -> None:
        spec = {
            "dataset": ANYTHING,
            "base": ANYTHING,
            "metrics": ["exact_match", "rouge_l", "loss"],
            "generation": {"max_new_tokens": 4},
        }
        job = Job(tmp_path, folder, spec, {"dataset": "dataset", "base": "base"})
        report = job.report()
        assert [answer["reference"] for answer in report["answers"]] == [
            "A red circle.",
            "One.",
            "The picture shows a red circle.",
            "A photo of a dog.",
        ]
        assert [answer["row"] for answer in report["answers"]] == [2, 3, 4, 5]
        assert report["answers"][3]["images"] == ["2.png"]
        assert report["answers"][3]["videos"] == [{"path": "a.gif", "frames": 12, "frames_taken": 4, "seconds": 1.2}]
        assert report["answers"][2]["images"] == ["1.png", "2.png"]
        assert [turn["content"] for turn in report["answers"][1]["messages"]][-2:] == ["Three.", "And large ones?"]
        assert report["scores"].keys() == {"exact_match", "rouge_l", "loss"}
        assert report["scores"]["loss"]["model"] != report["scores"]["loss"]["base"]
        assert any(answer["model"]["text"] != answer["base"]["text"] for answer in report["answers"])
        assert job.events("progress")[-1]["done"] == job.events("progress")[-1]["total"] == 8
        assert job.events("metric")[-1]["values"].keys() == {
            f"{side}{metric}" for side in ("", "base_") for metric in report["scores"]
        }

    def test_loss_is_that_of_transformers(self, tmp_path: Path, folder: Path) -> None:
        spec = {"dataset": ANYTHING, "metrics": ["loss"], "max_samples": 2, "generation": {"max_new_tokens": 1}}
        job = Job(tmp_path, folder, spec, {"dataset": "dataset"})
        found = job.report()["scores"]["loss"]["model"]
        assert found == pytest.approx(hf_loss(folder, [0, 1]), rel=1e-5)

    def test_mm_weights_of_two_stages_answer_as_the_hf_folder_does(self, tmp_path: Path, folder: Path) -> None:
        spec = {"dataset": ANYTHING, "base": ANYTHING, "generation": {"max_new_tokens": 6}}
        report = Job(tmp_path, folder, spec, {"dataset": "dataset", "model": "mm", "base": "model"}).report()
        for answer in report["answers"]:
            assert answer["model"]["text"] == answer["base"]["text"]

    def test_max_samples_limits_the_rows(self, tmp_path: Path, folder: Path) -> None:
        spec = {"dataset": ANYTHING, "max_samples": 2, "generation": {"max_new_tokens": 1}}
        assert Job(tmp_path, folder, spec, {"dataset": "dataset"}).report()["num_questions"] == 2

    def test_stop_leaves_no_artifact(self, tmp_path: Path, folder: Path) -> None:
        job = Job(tmp_path, folder, {"dataset": ANYTHING}, {"dataset": "dataset"})
        job.ctx._stop.set()
        with pytest.raises(Stopped):
            run(job.ctx, job.spec)
        assert job.events("artifact") == []


class TestOwnPrompts:
    def test_prompts_are_answered_without_scores(self, tmp_path: Path, folder: Path) -> None:
        image = str(folder / "source" / "images" / "0.png")
        prompts = [{"text": "What is in the picture?", "images": [image]}, {"text": "How many?"}]
        spec = {"prompts": prompts, "generation": {"max_new_tokens": 6}}
        report = Job(tmp_path, folder, spec).report()
        assert report["scores"] == {}
        assert [answer["reference"] for answer in report["answers"]] == [None, None]
        assert report["answers"][0]["model"]["text"] == hf_answer(folder, 1, 6)

    def test_videos_stand_where_the_text_says(self, tmp_path: Path, folder: Path) -> None:
        video, image = str(folder / "source" / "images" / "a.gif"), str(folder / "source" / "images" / "2.png")
        prompts = [
            {"text": "<video>What is in the picture? <image>", "images": [image], "videos": [video]},
            {"text": "What is it?", "videos": [video]},
        ]
        report = Job(tmp_path, folder, {"prompts": prompts, "generation": {"max_new_tokens": 1}}).report()
        contents = [answer["messages"][0]["content"] for answer in report["answers"]]
        assert contents == ["<video>What is in the picture? <image>", "<video>What is it?"]
        assert [answer["videos"][0]["frames_taken"] for answer in report["answers"]] == [4, 4]

    def test_image_outside_the_allowed_roots_is_refused(self, tmp_path: Path, folder: Path) -> None:
        job = Job(tmp_path, folder, {"prompts": [{"text": "x", "images": [str(folder / "model" / "config.json")]}]})
        with pytest.raises(ForbiddenPath):
            run(job.ctx, job.spec)

    def test_unreadable_image_is_named(self, tmp_path: Path, folder: Path) -> None:
        broken = folder / "source" / "broken.png"
        broken.write_bytes(b"no image")
        for kind, message in (("images", r"image .*broken\.png"), ("videos", r"video .*broken\.png")):
            job = Job(tmp_path, folder, {"prompts": [{"text": "x", kind: [str(broken)]}]})
            with pytest.raises(UnreadableMedia, match=message):
                run(job.ctx, job.spec)
