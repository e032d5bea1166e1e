"""Runs an evaluation job: the base model and the fine-tuned one answer the same questions; the output is `report`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from core.conversion.load import load_stage, load_stage_from_hf
from core.data.dataset import TokenisedDataset
from core.data.media import ImageProcessing, Medium
from core.data.report import shown_video
from core.data.template import ChatTemplate
from core.data.video import VideoProcessing
from core.device import Accelerator, get_accelerator
from core.errors import InvalidDataset, UnsupportedOption
from core.inference.evaluate import Answer, Question, answer, held_out_questions, mean_loss, own_question
from core.inference.generate import Decoding
from core.inference.report import SIDES, VERSION, write_report
from core.inference.scoring import exact_match, rouge_l
from core.models.plan import whole
from core.models.qwen2_5_vl.model import Qwen2_5_VLStage
from core.models.registry import detect
from core.runners.context import InputArtifact, RunContext, Stopped
from core.specs.evaluation import EvaluationSpec
from core.specs.parallel import ParallelSpec
from core.storage.local import resolve_allowed

PROMPT_FRAMES = 64
"""Frames that are taken of a video in a user's own prompt: at Qwen's largest size, 768 tokens for two, as many as its own tools allow."""
ANSWER_SCORES = {"exact_match": exact_match, "rouge_l": rouge_l}
"""Metrics that each answer has; `loss` is the model's."""


def run(ctx: RunContext, spec: EvaluationSpec) -> None:
    """Answer, score, report. Only rank 0 works: a model is evaluated on one device."""
    if not ctx.is_main:
        return
    session = _Session(ctx, spec)
    questions = session.questions()
    sides: list[str] = [side for side in SIDES if side in ctx.inputs]
    ctx.log.info("%d questions for %s", len(questions), " and ".join(sides))
    results = {side: session.evaluate(side, questions, done=i, num_sides=len(sides)) for i, side in enumerate(sides)}
    report = session.report(questions, results)
    _publish(ctx, report, [question.media for question in questions])


class _Session:
    """What both models share: device, tokenizer, image processing, the data set."""

    def __init__(self, ctx: RunContext, spec: EvaluationSpec) -> None:
        self.ctx = ctx
        self.spec = spec
        self.accelerator: Accelerator = get_accelerator(ctx.device, ctx.local_rank)
        files = model_files(ctx.inputs["model"])
        self.template = ChatTemplate.from_model_dir(files)
        self.dataset: TokenisedDataset | None = None
        self.processing = ImageProcessing.from_model_dir(files)
        self.videos = VideoProcessing.like(self.processing, max_frames=PROMPT_FRAMES)
        if "dataset" in ctx.inputs:
            self.dataset = TokenisedDataset(ctx.inputs["dataset"].path, "validation")
            self.processing, self.videos = self.dataset.meta.image_processing, self.dataset.meta.video_processing
            if len(self.dataset) == 0:
                raise InvalidDataset(
                    "the data set has no held-out rows", hint="build it with validation_fraction above 0"
                )
            if self.dataset.meta.tokenizer_digest != self.template.digest:
                ctx.warn("tokenizer_differs", "the data set was made with another tokenizer.json than the model has")

    def questions(self) -> list[Question]:
        if self.dataset is not None:
            return held_out_questions(self.dataset, max_samples=self.spec.max_samples)
        return [
            own_question(
                prompt.text,
                [resolve_allowed(image, self.ctx.allow_roots) for image in prompt.images],
                [resolve_allowed(video, self.ctx.allow_roots) for video in prompt.videos],
                template=self.template,
                processing=self.processing,
                video_processing=self.videos,
            )
            for prompt in self.spec.prompts or ()
        ]

    def evaluate(self, side: str, questions: Sequence[Question], *, done: int, num_sides: int) -> dict[str, Any]:
        """Answers, loss and time of one model, which is loaded for it and dropped after it."""
        ctx, spec = self.ctx, self.spec
        model = load_model(ctx.inputs[side], self.accelerator)
        if self.dataset is not None:
            self.dataset.check_model(model.config)
        total = len(questions) * num_sides
        finished = len(questions) * done
        ctx.progress(finished, total, "answers")

        def progress(count: int) -> None:
            nonlocal finished
            finished += count
            ctx.progress(finished, total, "answers")

        generation = spec.generation
        decoding = Decoding(
            max_new_tokens=generation.max_new_tokens,
            eos_token_ids=frozenset({self.template.im_end_id, self.template.pad_token_id}),
            temperature=generation.temperature,
            top_p=generation.top_p,
        )
        started = time.monotonic()
        answers = answer(
            model,
            questions,
            decoding,
            template=self.template,
            processing=self.processing,
            videos=self.videos,
            seed=generation.seed,
            progress=progress,
            should_stop=ctx.should_stop,
        )
        seconds = time.monotonic() - started
        loss = None
        if "loss" in spec.metrics and self.dataset is not None:
            loss = mean_loss(model, self.dataset, max_samples=spec.max_samples, should_stop=ctx.should_stop)
        if ctx.should_stop():
            raise Stopped
        del model
        self.accelerator.empty_cache()
        return {"answers": answers, "loss": loss, "seconds": seconds}

    def report(self, questions: Sequence[Question], results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        metrics = self.spec.metrics if self.dataset is not None else ()
        scored = {
            side: [
                _scored(said, question, metrics) for said, question in zip(result["answers"], questions, strict=True)
            ]
            for side, result in results.items()
        }
        return {
            "version": VERSION,
            "num_questions": len(questions),
            "generation": self.spec.generation.model_dump(mode="json"),
            "scores": {
                metric: {side: _score(metric, results[side], scored[side]) for side in results} for metric in metrics
            },
            "models": {
                side: {
                    "artifact": self.ctx.inputs[side].artifact_id,
                    "seconds": round(result["seconds"], 3),
                    "num_tokens": sum(said.num_tokens for said in result["answers"]),
                }
                for side, result in results.items()
            },
            "answers": [
                {
                    "row": question.row,
                    "messages": [{"role": turn.role, "content": turn.content} for turn in question.messages],
                    "images": [self._shown(medium.paths[0]) for medium in question.media if not medium.is_video],
                    "videos": [self._shown_video(medium) for medium in question.media if medium.is_video],
                    "reference": question.reference,
                    **{side: scored[side][index] for side in results},
                }
                for index, question in enumerate(questions)
            ],
        }

    def _shown_video(self, video: Medium) -> dict[str, object]:
        """What the report tells of a video."""
        return shown_video(replace(video, paths=tuple(Path(self._shown(path)) for path in video.paths)))

    def _shown(self, image: Path) -> str:
        """A path for the report: relative to the data set's media root, so that it says nothing of the host."""
        if self.dataset is not None and image.is_relative_to(self.dataset.media_root):
            return str(image.relative_to(self.dataset.media_root))
        return str(image)


def load_model(source: InputArtifact, accelerator: Accelerator) -> Qwen2_5_VLStage:
    """The whole model on the device: in its config's type on accelerators, in float32 on the CPU."""
    if source.metadata.get("canonical"):
        raise UnsupportedOption(
            "a canonical (unfused) checkpoint cannot be evaluated", hint="convert it with mm_to_hf first"
        )
    family = detect(source.metadata["config"])
    config = family.parse_config(source.metadata["config"])
    stage = whole(config)
    if source.kind == "hf_model":
        weights = load_stage_from_hf(source.path, config, stage)
    else:
        parallel = ParallelSpec.model_validate(source.metadata["parallel"])
        weights = load_stage(source.path, parallel, config, stage)
    with torch.device("meta"):
        model: Qwen2_5_VLStage = family.build(config, stage, accelerator=accelerator)
    dtype: torch.dtype = torch.float32 if accelerator.name == "cpu" else getattr(torch, config.dtype)
    state = {name: tensor.to(accelerator.device, dtype) for name, tensor in weights}
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def model_files(source: InputArtifact) -> Path:
    """Folder of the config, tokenizer and processor files that belong to the weights."""
    return source.path if source.kind == "hf_model" else source.path / "hf"


def _scored(said: Answer, question: Question, metrics: Sequence[str]) -> dict[str, Any]:
    entry: dict[str, Any] = {"text": said.text, "num_tokens": said.num_tokens, "finished": said.finished}
    for metric in metrics:
        if metric in ANSWER_SCORES and question.reference is not None:
            entry[metric] = ANSWER_SCORES[metric](said.text, question.reference)
    return entry


def _score(metric: str, result: Mapping[str, Any], scored: Sequence[Mapping[str, Any]]) -> float:
    value: float = result["loss"] if metric == "loss" else fmean(entry[metric] for entry in scored)
    return value


def _publish(ctx: RunContext, report: Mapping[str, Any], media: Sequence[Sequence[Medium]]) -> None:
    scores = report["scores"]
    for metric, values in scores.items():
        ctx.log.info("%s: %s", metric, ", ".join(f"{side} {value:.4f}" for side, value in values.items()))
    with ctx.new_artifact("report", "report") as output:
        write_report(output.path, report, media)
        output.commit({"num_questions": report["num_questions"], "scores": scores, "generation": report["generation"]})
    values = {f"base_{metric}": scores[metric]["base"] for metric in scores if "base" in scores[metric]}
    ctx.metric(0, **values, **{metric: scores[metric]["model"] for metric in scores})
