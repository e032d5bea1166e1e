"""`make bench ARGS="-k memory"`: predicted peak memory against the measured one, on CPU in float32."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest

from core.models.lora import Lora
from core.models.memory import LayerRecompute, Workload, activation_bytes, training_memory
from core.models.plan import whole
from tests.bench.memory import LORA_RANK, Setting

pytestmark = [pytest.mark.bench, pytest.mark.timeout(600)]

FULL = {"granularity": "full", "method": "uniform", "num_layers": 1}
SELECTIVE = {"granularity": "selective"}
VIT, BOTH = ("vision_encoder",), ("vision_encoder", "vision_projector")
ALL = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
SETTINGS = {
    "all trained": Setting(),
    "vision encoder frozen": Setting(frozen=VIT),
    "vision frozen": Setting(frozen=BOTH),
    "text frozen": Setting(frozen=("text_decoder",)),
    "projector alone trained": Setting(frozen=("vision_encoder", "text_decoder")),
    "selective": Setting(vision=SELECTIVE, text=SELECTIVE),
    "full": Setting(vision=FULL, text=FULL),
    "full, units of 2": Setting(vision=FULL, text={**FULL, "num_layers": 2}, frozen=BOTH),
    "block 2": Setting(text={"granularity": "full", "method": "block", "num_layers": 2}, frozen=BOTH),
    "text only": Setting(image_side=0, frozen=BOTH),
    "mixed lengths": Setting(lengths=(1200, 500, 348), image_side=20, frozen=BOTH),
    "large vocabulary": Setting(vocab=16384, frozen=BOTH),
    "wide": Setting(hidden=512, ffn=1376, frozen=BOTH),
    "deep, full": Setting(llm_layers=8, text=FULL, frozen=BOTH),
    "LoRA qkv, proj": Setting(frozen=BOTH, lora=("linear_qkv", "linear_proj")),
    "LoRA all layers": Setting(frozen=BOTH, lora=ALL),
    "LoRA all layers, both towers": Setting(lora=ALL),
    "LoRA all layers, full": Setting(frozen=BOTH, lora=ALL, text=FULL),
    "LoRA all layers, wide": Setting(hidden=512, ffn=1376, frozen=BOTH, lora=ALL),
    "short": Setting(lengths=(512,), image_side=16),
}
TOLERANCE = 0.15


def predicted(setting: Setting) -> int:
    config = setting.config()
    stage, frozen = whole(config), set(setting.frozen)
    lora = Lora(setting.adapted(config), LORA_RANK) if setting.lora else None
    held = training_memory(config, stage, frozen=frozen, precision="fp32", lora=lora)
    tokens = sum(setting.lengths)
    work = Workload(
        tokens, len(setting.lengths) * setting.image_side**2, has_fused_attention=False, is_mixed=len(set(setting.lengths)) > 1
    )  # fmt: skip
    return activation_bytes(
        config, stage, work, frozen=frozen, precision="fp32", lora=lora,
        vision_recompute=LayerRecompute(**setting.vision), text_recompute=LayerRecompute(**setting.text),
    ) + sum(value for name, value in held.items() if name.endswith("_bytes"))  # fmt: skip


def test_predicted_peak_is_within_15_percent_of_the_measured_one() -> None:
    errors = {}
    print(f"\n{'configuration':26} {'predicted MB':>12} {'measured MB':>12} {'error':>7}")
    for name, setting in SETTINGS.items():
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
        command = [sys.executable, "-m", "tests.bench.memory", json.dumps(asdict(setting))]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        measured, guess = int(done.stdout), predicted(setting)
        errors[name] = guess / measured - 1
        print(f"{name:26} {guess / 1e6:12.1f} {measured / 1e6:12.1f} {errors[name]:+7.1%}")
    assert len(errors) >= 12
    assert all(abs(error) <= TOLERANCE for error in errors.values()), errors
