"""A LoRA training from inputs on disk to its artifacts, in one process and under torchrun."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration

from core.conversion.convert import mm_to_hf
from core.models.mm_folder import inspect_mm_folder
from core.runners import training
from core.runners.context import Stopped
from core.specs.parallel import ParallelSpec
from core.specs.training import TrainingSpec
from tests.core.runners.test_training import SPLIT, WHOLE, Bench, training_spec
from tests.tiny import tiny_model

torch.set_num_threads(1)

FROZEN = {"vision_encoder": True, "vision_projector": True}
ALL = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


def lora_spec(parallel: dict[str, Any] = WHOLE, **changes: Any) -> TrainingSpec:
    values: dict[str, Any] = {
        "lora": {"r": 4, "alpha": 8, "target_modules": ALL},
        "freeze": FROZEN,
        "optimizer": {"lr": 1e-2, "lr_warmup_fraction": 0.0},
    }
    return training_spec(parallel, **(values | changes))


@pytest.fixture(scope="module")
def untied_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("untied"))


@pytest.fixture
def bench(tmp_path: Path, untied_dir: Path) -> Bench:
    return Bench(tmp_path, untied_dir)


def metadata(bench: Bench, name: str, **which: Any) -> dict[str, Any]:
    return bench.store.manifest(bench.outputs(**which)[name].parent.name).metadata


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT asks transformers 5 for it
class TestRun:
    def test_publishes_the_merged_checkpoint_and_adapters_that_peft_loads(self, bench: Bench, tmp_path: Path) -> None:
        training.run(ctx := bench.context(spec := lora_spec()), spec)
        outputs = bench.outputs()
        assert set(outputs) == {"checkpoint", "adapter", "adapter-0000002", "tensorboard"}
        losses = bench.losses()
        assert losses[-1] < losses[0]
        told = metadata(bench, "checkpoint")["lora"]
        assert told == {name: value for name, value in metadata(bench, "adapter").items() if name in told}
        assert 0 < told["max_logit_difference"] < 1e-4 * told["max_logit"]
        assert "max_logit_difference" not in metadata(bench, "adapter-0000002")

        base = Qwen2_5_VLForConditionalGeneration.from_pretrained(bench.model.path, dtype=torch.float32)
        adapted = peft.PeftModel.from_pretrained(base, outputs["adapter"])
        layout = ParallelSpec.model_validate(WHOLE)
        merged_folder = inspect_mm_folder(outputs["checkpoint"], layout)
        mm_to_hf(merged_folder, bench.config, layout, tmp_path / "merged", hf_files=outputs["checkpoint"] / "hf")
        merged = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        ids = torch.arange(3, 40)[None]
        with torch.no_grad():
            found = merged(input_ids=ids).logits
            torch.testing.assert_close(adapted(input_ids=ids).logits, found, rtol=1e-4, atol=1e-5)
            with adapted.disable_adapter():
                assert (adapted(input_ids=ids).logits - found).abs().max() > 1e-3

        table = json.loads((ctx.attempt_dir / "parameters.json").read_text())
        trained = [row["name"] for row in table["stages"][0]["parameters"] if row["trained"]]
        assert len(trained) == 2 * 4 * 2
        assert all(".lora_" in name for name in trained)
        assert table["summary"]["vision_encoder"]["trained"] == 0

    def test_checkpoints_hold_adapters_alone_and_a_resume_is_exact(self, bench: Bench) -> None:
        training.run(bench.context(spec := lora_spec(precision="bf16"), job="job_b"), spec)
        ctx = bench.context(spec)
        ctx._stop.set()
        with pytest.raises(Stopped):
            training.run(ctx, spec)
        assert set(bench.outputs()) == {"adapter-0000001", "tensorboard"}
        file = ctx.job_dir / "checkpoints/iter_0000001/mp_rank_00/model_optim_rng.pt"
        held = torch.load(file, weights_only=True)["model"]
        assert all(".lora_" in name for name in held)
        training.run(bench.context(spec, attempt=2), spec)
        assert bench.losses() + bench.losses(attempt=2) == bench.losses(job="job_b")
        first, second = (
            load_file(outputs["adapter"] / "adapter_model.safetensors")
            for outputs in (bench.outputs(attempt=2), bench.outputs(job="job_b"))
        )
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
        told = metadata(bench, "adapter", attempt=2)
        assert told["max_logit_difference"] < 0.05 * told["max_logit"]

    def test_two_stages_train_as_one_process_does_though_one_has_no_adapter(self, bench: Bench) -> None:
        training.run(bench.context(spec := lora_spec(), job="job_b"), spec)
        result = bench.torchrun(lora_spec({**SPLIT, "nproc_per_node": 2}), 2)
        assert result.returncode == 0, result.stdout + result.stderr
        assert bench.losses() == pytest.approx(bench.losses(job="job_b"), rel=1e-4)
        assert "max |Δlogit|" in result.stdout
        inspect_mm_folder(bench.outputs()["checkpoint"], ParallelSpec.model_validate(SPLIT))
