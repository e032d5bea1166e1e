"""One training engine in a process of its own: `python -m tests.bench.engines ENGINE FOLDER OPTIONS`, in step with others (lockstep.py).

    temper   core.runners.training.run as a worker starts it, loader and all
    bare     forward, backward and optimizer of the same model, on batches made before: nothing else
    hf       transformers.Trainer with the collator that its documentation shows
    trl      trl.SFTTrainer with prompt/completion rows and its own collator

OPTIONS is JSON, the fields of `Options`. All train what is not frozen, with AdamW at a constant rate, in float32.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core.runners.__main__ import die_with_parent
from tests.bench.lockstep import Turns

LEARNING_RATE = 1e-5
NEVER = 1_000_000
"""Steps: the driver ends the process."""


@dataclass(frozen=True)
class Options:
    """How to train."""

    global_batch_size: int
    micro_batch_size: int = 1
    """Rows per forward pass of the peers; Temper's budget is this many times `seq_length` tokens."""
    seq_length: int = 512
    freeze_vision: bool = True
    recompute: str = "none"
    threads: int = 2
    every_position: bool = False
    """Of `bare`: have the last layer compute positions without a target too, as the peers do."""


def temper(folder: Path, options: Options, turns: Turns) -> None:
    """The engine as the service runs it."""
    from core.runners import training
    from core.runners.context import InputArtifact, RunContext
    from core.specs.events import MetricPoint, Progress
    from core.storage.local import Store

    class Context(RunContext):
        """Waits where a training tells that it is about to begin and that a step is done."""

        def emit(self, event: Any) -> None:
            super().emit(event)
            if isinstance(event, Progress) and event.done == 0:
                turns.wait()
            if isinstance(event, MetricPoint):
                turns.done(event.values["loss"])

    logging.basicConfig(level=logging.INFO)
    spec = training_spec(folder, options)
    store = Store(Path(tempfile.mkdtemp(dir=folder)))
    attempt_dir = store.attempt_dir("job_bench", 1)
    attempt_dir.mkdir(parents=True)
    inputs = {
        "model": InputArtifact(None, "hf_model", folder / "model", {}),
        "dataset": InputArtifact(None, "dataset", folder / "dataset", {}),
    }
    context = Context(
        job_id="job_bench", attempt=1, kind="training", spec=spec, inputs=inputs, job_dir=store.job_dir("job_bench"),
        attempt_dir=attempt_dir, store=store,
    )  # fmt: skip
    training.run(context, spec)


def bare(folder: Path, options: Options, turns: Turns) -> None:
    """A loop around the engine's model, loss and optimizer that does nothing but those."""
    from core.conversion.load import load_stage_from_hf
    from core.data.dataset import TokenisedDataset
    from core.data.loader import build_batch
    from core.data.plan import plan_step
    from core.device import get_accelerator
    from core.models.config import Config
    from core.models.plan import stages
    from core.models.registry import detect
    from core.parallel.mesh import build_mesh
    from core.training.freeze import freeze
    from core.training.loss import loss_and_gradient, target_positions
    from core.training.optimizer import Optimizer
    from core.training.resume import load_weights

    spec = training_spec(folder, options)
    config_json = json.loads((folder / "model" / "config.json").read_text())
    family, config = detect(config_json), Config.from_hf(config_json)
    (stage,) = stages(config, spec.parallel)
    with torch.device("meta"):
        model = family.build(config, stage, accelerator=get_accelerator("cpu"))
    model = model.to_empty(device="cpu")
    load_weights(model, load_stage_from_hf(folder / "model", config, stage))
    freeze(model, spec.freeze)
    optimizer = Optimizer(model, spec.optimizer, build_mesh(pp_size=1, dp_size=1))
    dataset = TokenisedDataset(folder / "dataset")

    def batches_of(step: int) -> list[Any]:
        plan = plan_step(
            dataset.lengths, dataset.patches, seed=spec.seed, consumed_samples=step * spec.global_batch_size,
            global_batch_size=spec.global_batch_size, dp_size=1, token_budget=spec.micro_batch_size * spec.seq_length,
        )  # fmt: skip
        rows = [[dataset.row(row) for row in micro_batch] for micro_batch in plan.micro_batches[0]]
        return [build_batch(group, config, processing=dataset.meta.image_processing) for group in rows]

    prepared = [batches_of(step) for step in range(len(dataset) // spec.global_batch_size)]
    turns.wait()
    for step in range(NEVER):
        optimizer.clear_gradients()
        loss, num_targets = 0.0, 0
        for batch in prepared[step % len(prepared)]:
            positions_N = target_positions(batch.targets_T)
            targets, asked = batch.targets_T, positions_N
            if not options.every_position:
                targets, asked = targets[positions_N], torch.arange(len(positions_N))
            hidden = model(batch, rows_N=None if options.every_position else positions_N)
            result = loss_and_gradient(hidden, targets, asked, model.logits)
            hidden.backward(result.gradient_TH)
            loss += float(result.loss_sum)
            num_targets += result.num_targets
        optimizer.step(learning_rate=LEARNING_RATE, num_targets=num_targets, squared_norm=optimizer.squared_norm())
        turns.done(loss / num_targets)


def training_spec(folder: Path, options: Options) -> Any:
    """The options as a training job's spec."""
    from core.models.config import Config
    from core.specs.training import TrainingSpec
    from tests.bench.samples import SEED

    config = Config.from_hf(json.loads((folder / "model" / "config.json").read_text()))
    policy = {
        "none": None,
        "selective": {"recompute_granularity": "selective"},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }[options.recompute]
    values = {
        "model": {"path": str(folder / "model")},
        "dataset": {"path": str(folder / "dataset")},
        "parallel": {
            "llm_pp_layers": [[config.text.num_hidden_layers]], "vit_pp_layers": [[config.vision.depth]],
        },
        "train_iters": NEVER,
        "global_batch_size": options.global_batch_size,
        "micro_batch_size": options.micro_batch_size,
        "seq_length": options.seq_length,
        "optimizer": {"lr": LEARNING_RATE, "lr_decay_style": "constant", "lr_warmup_fraction": 0},
        "freeze": {"vision_encoder": options.freeze_vision, "vision_projector": options.freeze_vision},
        "recompute": {"vision_encoder": policy, "text_decoder": policy},
        "seed": SEED,
        "precision": "fp32",
    }  # fmt: skip
    return TrainingSpec.model_validate(values)


def hf(folder: Path, options: Options, turns: Turns) -> None:
    """transformers' Trainer on rows of text and photo, collated by the processor."""
    from PIL import Image
    from transformers import Trainer, TrainingArguments

    from tests.bench.samples import read_rows

    model, processor = load_peer_model(folder, options)
    samples = read_rows(folder)

    def collate(rows: list[Any]) -> dict[str, Any]:
        images = [[Image.open(folder / row.image).convert("RGB")] for row in rows]
        texts = [row.prompt + row.completion for row in rows]
        batch = processor(images=images, text=texts, padding=True, padding_side="right", return_tensors="pt")
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        labels = torch.full_like(batch["input_ids"], -100)
        for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            learnt = slice(length - row.num_targets, length)
            labels[number, learnt] = batch["input_ids"][number, learnt]
        return {**batch, "labels": labels}

    arguments = TrainingArguments(**peer_arguments(options))
    trainer = in_turns(Trainer)(
        model=model, args=arguments, train_dataset=samples, data_collator=collate, turns=turns
    )  # fmt: skip
    # The model class says that it takes no count of the global batch's targets, and Trainer would weigh micro-batches alike whatever their
    # targets; its forward takes one all the same. Without this the losses of accumulated steps are not comparable.
    trainer.model_accepts_loss_kwargs = True
    trainer.train()


def trl(folder: Path, options: Options, turns: Turns) -> None:
    """TRL's SFTTrainer on the same rows as prompt and completion, so that it learns the completion only."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    from tests.bench.samples import read_rows

    model, processor = load_peer_model(folder, options)
    samples = read_rows(folder)
    rows = datasets.Dataset.from_dict(
        {
            "prompt": [sample.prompt for sample in samples],
            "completion": [sample.completion for sample in samples],
            "images": [[str(folder / sample.image)] for sample in samples],
        }
    ).cast_column("images", datasets.List(datasets.Image()))
    arguments = SFTConfig(**peer_arguments(options), gradient_checkpointing=False, max_length=None)
    in_turns(SFTTrainer)(
        model=model, args=arguments, train_dataset=rows, processing_class=processor, turns=turns
    ).train()  # fmt: skip


def load_peer_model(folder: Path, options: Options) -> tuple[Any, Any]:
    """The model as transformers loads it, its vision tower and merger frozen where asked; and its processor."""
    from transformers import AutoImageProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    class Processor(Qwen2_5_VLProcessor):
        """Without the video part, which would need torchvision."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return type(argument)

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="sdpa"
    )
    model.config.use_cache = False
    model.model.visual.requires_grad_(not options.freeze_vision)
    images = AutoImageProcessor.from_pretrained(folder / "model", backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    return model, Processor(image_processor=images, tokenizer=tokenizer, video_processor=object())


def peer_arguments(options: Options) -> dict[str, Any]:
    """The peers' own names for the same training; their AdamW is the fused one (transformers' default)."""
    assert options.global_batch_size % options.micro_batch_size == 0
    return {
        "output_dir": tempfile.mkdtemp(), "per_device_train_batch_size": options.micro_batch_size,
        "gradient_accumulation_steps": options.global_batch_size // options.micro_batch_size, "max_steps": NEVER,
        "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused", "use_cpu": True, "bf16": False, "fp16": False, "report_to": "none",
        "save_strategy": "no", "logging_steps": NEVER, "disable_tqdm": True, "remove_unused_columns": False,
        "train_sampling_strategy": "sequential", "dataloader_num_workers": 0,
    }  # fmt: skip


def in_turns(trainer_class: Any) -> Any:
    """The trainer, waiting for its turn after each optimizer step."""
    from transformers import TrainerCallback

    class InTurns(trainer_class):  # type: ignore[misc]
        def __init__(self, *args: Any, turns: Turns, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.losses: list[torch.Tensor] = []
            trainer = self

            class Steps(TrainerCallback):
                def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                    turns.wait()

                def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                    turns.done(math.fsum(float(loss) for loss in trainer.losses))
                    trainer.losses.clear()

            self.add_callback(Steps())

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(*args, **kwargs)
            self.losses.append(loss)
            return loss

    return InTurns


def main() -> None:
    """Run one engine until the driver ends the process."""
    engine, folder, options = sys.argv[1], Path(sys.argv[2]), Options(**json.loads(sys.argv[3]))
    die_with_parent()
    torch.set_num_threads(options.threads)
    {"temper": temper, "bare": bare, "hf": hf, "trl": trl}[engine](folder, options, Turns())


if __name__ == "__main__":
    main()
