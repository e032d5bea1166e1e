"""Measures the peak of one training step on each rank, a process of its own: `python -m tests.bench.memory JSON [RANK FILE]` prints bytes.

The C library is told to give freed tensors back at once (MALLOC_MMAP_THRESHOLD_), so resident memory follows live tensors, and the
kernel's high-water mark is reset after a warm-up on a small model that loads libraries and starts threads. Ranks meet in FILE.
"""

from __future__ import annotations

import gc
import itertools
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from core.device.cpu import CpuAccelerator
from core.models.batch import PackedBatch
from core.models.config import Config
from core.models.layers.recompute import Recompute, RecomputePolicy
from core.models.lora import Layer, adapted_layers
from core.models.plan import stages
from core.models.positions import mrope_positions
from core.models.qwen2_5_vl.family import PLAN
from core.models.qwen2_5_vl.model import Qwen2_5_VLStage
from core.parallel.mesh import Mesh, build_mesh
from core.specs.parallel import ParallelSpec
from core.specs.training import FreezeSpec, OptimizerSpec
from core.training.freeze import freeze
from core.training.lora import Adapters
from core.training.optimizer import Optimizer
from core.training.wiring import Head, build_pipeline, shard_chunks
from tests.core.training.tiny import END, IMAGE, START, tiny_config

LORA_RANK = 8


@dataclass(frozen=True)
class Setting:
    """One configuration; widths are multiples of what `tiny_config` has."""

    hidden: int = 256
    ffn: int = 688
    vision_hidden: int = 160
    vision_ffn: int = 320
    llm_layers: int = 4
    vit_layers: int = 4
    vocab: int = 2048
    lengths: tuple[int, ...] = (1024, 1024)
    image_side: int = 32
    """patches along one side of each sample's image; 0 = no image"""
    frozen: tuple[str, ...] = ()
    lora: tuple[str, ...] = ()
    """`target_modules`; then the towers that are not frozen train adapters of rank 8 alone"""
    vision: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    precision: Literal["fp32", "bf16"] = "fp32"
    tp: int = 1
    pp: int = 1
    """The vision tower is on the first stage, with its share of the language layers."""
    dp: int = 1

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def layout(self) -> ParallelSpec:
        llm = (self.llm_layers // self.pp,) * self.pp
        vit = (self.vit_layers, *[0] * (self.pp - 1))
        return ParallelSpec(tp_size=self.tp, llm_pp_layers=(llm,), vit_pp_layers=(vit,))

    @property
    def num_batches(self) -> int:
        """Of a step: enough to fill the pipeline."""
        return 1 if self.pp == 1 else 2 * self.pp

    def config(self) -> Config:
        base = tiny_config(vit_layers=self.vit_layers, llm_layers=self.llm_layers)
        heads = self.hidden // 32
        text = replace(
            base.text, hidden_size=self.hidden, intermediate_size=self.ffn, num_attention_heads=heads,
            num_key_value_heads=heads // 4, vocab_size=self.vocab, mrope_section=(4, 6, 6),
        )  # fmt: skip
        vision = replace(
            base.vision, hidden_size=self.vision_hidden, intermediate_size=self.vision_ffn,
            num_heads=self.vision_hidden // 20, out_hidden_size=self.hidden,
        )  # fmt: skip
        return replace(base, text=text, vision=vision)

    def adapted(self, config: Config) -> tuple[Layer, ...]:
        """The layers that get an adapter."""
        return tuple(adapted_layers(config, self.lora, set(self.frozen)))


def batch_of(setting: Setting, config: Config, *, lengths: tuple[int, ...], side: int) -> PackedBatch:
    """Samples of these lengths, each beginning with one square image."""
    grid = (1, side, side)
    grids = [(grid,) if side else () for _ in lengths]
    image = [START, *[IMAGE] * (side * side // 4), END] if side else []
    rows = [image + [5] * (length - len(image)) for length in lengths]
    ids = torch.tensor([token for row in rows for token in row])
    positions = [mrope_positions(row, held, config) for row, held in zip(rows, grids, strict=True)]
    return PackedBatch(
        input_ids_T=ids,
        position_ids_3T=torch.cat(positions, dim=1),
        targets_T=torch.full_like(ids, 7),
        cu_seqlens=tuple(itertools.accumulate(lengths, initial=0)),
        pixel_values_PD=torch.randn(len(lengths) * side * side, config.vision.patch_dim),
        grid_thw=tuple(one for held in grids for one in held),
        rows=tuple(range(len(lengths))),
    )


def step(setting: Setting, config: Config, mesh: Mesh, *, lengths: tuple[int, ...], side: int) -> None:
    """Build this rank's stage and its optimizer, and train a step."""
    accelerator = CpuAccelerator()
    all_stages = stages(config, setting.layout)
    recompute = Recompute(RecomputePolicy(**setting.vision), RecomputePolicy(**setting.text))
    with torch.device("meta"):
        model = Qwen2_5_VLStage(config, all_stages[mesh.pp_rank], accelerator=accelerator, recompute=recompute)
    spec = FreezeSpec(
        vision_encoder="vision_encoder" in setting.frozen, vision_projector="vision_projector" in setting.frozen,
        text_decoder="text_decoder" in setting.frozen,
    )  # fmt: skip
    freeze(model, spec, all_weights=bool(setting.lora))
    held = shard_chunks([model], PLAN, mesh)
    if setting.lora:
        adapters = Adapters(config, setting.adapted(config), r=LORA_RANK, alpha=16, seed=0)
        held |= adapters.attach([model], [all_stages[mesh.pp_rank]], PLAN, mesh)[1]
    model.to(torch.float32 if setting.precision == "fp32" else torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.02)
    optimizer = Optimizer(model, OptimizerSpec(), mesh, held=held)
    head = Head(model, accelerator.device, mesh, targets_only=mesh.tp_group is None)
    pipeline = build_pipeline([model], head, mesh, config, all_stages, spec, accelerator)
    batch = batch_of(setting, config, lengths=lengths, side=side)
    optimizer.clear_gradients()
    pipeline.run([batch] * setting.num_batches, last_pass=optimizer.last_pass)
    optimizer.reduce_gradients()
    optimizer.step(learning_rate=1e-5, num_targets=len(batch.targets_T), squared_norm=1.0)


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def measure(setting: Setting, mesh: Mesh) -> int:
    """Peak bytes above what the process had after a warm-up on a small model."""
    small = replace(setting, hidden=128 * setting.tp, ffn=96, vision_hidden=40, vision_ffn=48, vocab=128)
    step(small, small.config(), mesh, lengths=(64,), side=8 if setting.image_side else 0)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step(setting, setting.config(), mesh, lengths=setting.lengths, side=setting.image_side)
    return _status("VmHWM") - before


def main(setting: Setting, rank: int, file: str | None) -> None:
    """Measure as one rank, and print it."""
    torch.set_num_threads(1)
    if setting.world_size > 1:
        store = dist.FileStore(file, setting.world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=setting.world_size)
    mesh = build_mesh(pp_size=setting.pp, dp_size=setting.dp, tp_size=setting.tp)
    print(measure(setting, mesh), flush=True)
    if setting.world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(sys.argv[1]).items()}
    main(Setting(**given), int(sys.argv[2]) if len(sys.argv) > 2 else 0, sys.argv[3] if len(sys.argv) > 3 else None)
