"""`make bench ARGS="-k memory"`: predicted peak memory against the measured one of every rank, on CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from core.models.lora import Lora
from core.models.memory import LayerRecompute, Workload, activation_bytes, in_flight, training_memory
from core.models.plan import stages
from tests.bench.memory import LORA_RANK, Setting

pytestmark = [pytest.mark.bench, pytest.mark.timeout(600)]

FULL = {"granularity": "full", "method": "uniform", "num_layers": 1}
SELECTIVE = {"granularity": "selective"}
VIT, BOTH = ("vision_encoder",), ("vision_encoder", "vision_projector")
ALL = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
SHORT = Setting(lengths=(512,), image_side=16)
"""Where a CPU computes slowly: bfloat16 without instructions for it, several processes."""
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
    "short": SHORT,
    "bf16": Setting(precision="bf16"),
    "bf16, vision frozen": Setting(precision="bf16", frozen=BOTH),
    "bf16, full": replace(SHORT, precision="bf16", vision=FULL, text=FULL),
    "tp 2": Setting(tp=2),
    "tp 2, full": Setting(tp=2, vision=FULL, text=FULL),
    "tp 2, bf16, vision frozen": replace(SHORT, tp=2, precision="bf16", frozen=BOTH),
    "pp 2": Setting(pp=2),
    "pp 2, bf16, vision frozen": replace(SHORT, pp=2, precision="bf16", frozen=BOTH),
    "dp 2": Setting(dp=2),
    "dp 2, bf16": replace(SHORT, dp=2, precision="bf16"),
    "tp 2 pp 2": Setting(tp=2, pp=2),
    "tp 2 dp 2, bf16, full": replace(SHORT, tp=2, dp=2, precision="bf16", vision=FULL, text=FULL),
}
TOLERANCE = 0.15


def predicted(setting: Setting) -> list[int]:
    """Bytes of the ranks of each pipeline stage."""
    config, frozen = setting.config(), set(setting.frozen)
    lora = Lora(setting.adapted(config), LORA_RANK) if setting.lora else None
    tokens = sum(setting.lengths)
    peaks = []
    for rank, stage in enumerate(stages(config, setting.layout)):
        held = training_memory(
            config, stage, frozen=frozen, precision=setting.precision, tp_size=setting.tp, dp_size=setting.dp, lora=lora
        )
        work = Workload(
            tokens, len(setting.lengths) * setting.image_side**2, num_in_flight=in_flight(rank, setting.pp),
            has_fused_kernels=False, is_mixed=len(set(setting.lengths)) > 1,
        )  # fmt: skip
        activations = activation_bytes(
            config, stage, work, frozen=frozen, precision=setting.precision, tp_size=setting.tp, lora=lora,
            vision_recompute=LayerRecompute(**setting.vision), text_recompute=LayerRecompute(**setting.text),
        )  # fmt: skip
        peaks.append(activations + sum(value for name, value in held.items() if name.endswith("_bytes")))
    return peaks


def measured(setting: Setting, folder: Path) -> list[int]:
    """Bytes of the first rank of each pipeline stage; of one stage's ranks the peaks are alike."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "tests.bench.memory", json.dumps(asdict(setting))]
    with tempfile.TemporaryDirectory(dir=folder) as store:
        ranks = [
            subprocess.Popen([*command, str(rank), f"{store}/meet"], env=environment, stdout=subprocess.PIPE, text=True)
            for rank in range(setting.world_size)
        ]
        told = [process.communicate()[0] for process in ranks]
    assert all(process.returncode == 0 for process in ranks)
    return [int(text) for text in told[:: setting.tp * setting.dp]]


def test_predicted_peak_is_within_15_percent_of_the_measured_one(tmp_path: Path) -> None:
    errors = {}
    print(f"\n{'configuration':28} {'predicted MB':>12} {'measured MB':>12} {'error':>7}")
    for name, setting in SETTINGS.items():
        peaks = zip(predicted(setting), measured(setting, tmp_path), strict=True)
        for stage, (guess, found) in enumerate(peaks):
            label = name if setting.pp == 1 else f"{name}: stage {stage}"
            errors[label] = guess / found - 1
            print(f"{label:28} {guess / 1e6:12.1f} {found / 1e6:12.1f} {errors[label]:+7.1%}", flush=True)
    assert all(abs(error) <= TOLERANCE for error in errors.values()), errors
