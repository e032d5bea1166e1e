"""A tiny Qwen2.5-VL, samples and one training step, for the tests of this folder. No files, no tokenizer."""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from core.conversion.mm import rank_dir
from core.data.loader import TARGET_WEIGHT, LoadedStep, LossReduction, total_weight
from core.data.plan import plan_step
from core.device import Accelerator
from core.device.cpu import CpuAccelerator
from core.models.batch import PackedBatch
from core.models.config import Config, TextConfig, VisionConfig
from core.models.flops import model_flops, work_of
from core.models.layers.recompute import Recompute
from core.models.lora import adapted_layers
from core.models.plan import Stage, stages, whole
from core.models.positions import mrope_positions
from core.models.qwen2_5_vl.family import PLAN
from core.models.qwen2_5_vl.model import Qwen2_5_VLStage
from core.parallel.data import all_reduce_rows
from core.parallel.mesh import Mesh, build_mesh
from core.parallel.tensor import local_name
from core.specs.parallel import ParallelSpec
from core.specs.training import FreezeSpec, OptimizerSpec, TrainingSpec
from core.training.checkpoint import Checkpoints, Facts, Position
from core.training.freeze import freeze
from core.training.lora import Adapters
from core.training.optimizer import Optimizer
from core.training.resume import Origin, load_weights
from core.training.trainer import Outcome, Trainer
from core.training.wiring import Head, build_pipeline, join, reads_pixels, shard_chunks

CPU = CpuAccelerator()
VOCAB = 96
IMAGE, VIDEO, START, END = 90, 91, 92, 93
PATCH_DIM = 3 * 2 * 14 * 14
SMOOTH = OptimizerSpec(lr=1e-2, adam_eps=1e-2)
"""With so large an epsilon one step of AdamW does not turn the rounding of a zero gradient into a whole step."""
SMALL_BUCKET = 1 << 15
"""Bytes; a decoder layer has about as much."""
NOTHING_FROZEN = FreezeSpec(vision_encoder=False, vision_projector=False, text_decoder=False)


def tiny_config(*, tied: bool = False, vit_layers: int = 4, llm_layers: int = 4) -> Config:
    return Config(
        family="qwen2_5_vl",
        text=TextConfig(
            num_hidden_layers=llm_layers,
            hidden_size=32,
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCAB,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            mrope_section=(2, 1, 1),
            max_position_embeddings=1024,
        ),
        vision=VisionConfig(
            depth=vit_layers,
            hidden_size=16,
            intermediate_size=24,
            num_heads=2,
            in_channels=3,
            patch_size=14,
            temporal_patch_size=2,
            spatial_merge_size=2,
            window_size=56,
            fullatt_block_indexes=(vit_layers - 1,),
            out_hidden_size=32,
            tokens_per_second=2,
            hidden_act="silu",
        ),
        tie_word_embeddings=tied,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        dtype="float32",
    )


@dataclass(frozen=True)
class Sample:
    """One row: tokens, which of them are learnt, and its images and videos."""

    row: int
    input_ids: tuple[int, ...]
    num_prompt: int
    grids: tuple[tuple[int, int, int], ...]

    @property
    def num_targets(self) -> int:
        return len(self.input_ids) - self.num_prompt


def samples(count: int, *, with_images: bool = True) -> list[Sample]:
    """Rows of different lengths: one in three with an image, one in three with a video, each of another size."""
    generator = torch.Generator().manual_seed(11)
    made = []
    for row in range(count):
        grids: tuple[tuple[int, int, int], ...] = ()
        if with_images and row % 3 != 1:
            size = 4 + 2 * (row % 2)
            grids = ((1, 4, size),) if row % 3 == 0 else ((size // 2, 4, 2),)
        image = [START, *[IMAGE if grids[0][0] == 1 else VIDEO] * (math.prod(grids[0]) // 4), END] if grids else []
        text = torch.randint(0, IMAGE, (5 + row % 4,), generator=generator).tolist()
        ids = (*image, *text)
        made.append(Sample(row, ids, len(image) + 2, grids))
    return made


def pack(rows: Sequence[Sample], config: Config, reduction: LossReduction = "token") -> PackedBatch:
    """Pack rows end to end; pixels depend on the row alone."""
    targets, pixels = [], [torch.empty(0, PATCH_DIM)]
    weights = [TARGET_WEIGHT[reduction](sample.num_targets) for sample in rows for _ in sample.input_ids]
    for sample in rows:
        learnt = [token if position >= sample.num_prompt else -100 for position, token in enumerate(sample.input_ids)]
        targets += [*learnt[1:], -100]
        for t, h, w in sample.grids:
            pixels.append(torch.randn(t * h * w, PATCH_DIM, generator=torch.Generator().manual_seed(sample.row)))
    positions = [
        mrope_positions(list(sample.input_ids), sample.grids, config, [0.5] * len(sample.grids)) for sample in rows
    ]
    return PackedBatch(
        input_ids_T=torch.tensor([token for sample in rows for token in sample.input_ids], dtype=torch.int64),
        position_ids_3T=torch.cat([torch.empty(3, 0, dtype=torch.int64), *positions], dim=1),
        targets_T=torch.tensor(targets, dtype=torch.int64),
        cu_seqlens=tuple(itertools.accumulate((len(sample.input_ids) for sample in rows), initial=0)),
        pixel_values_PD=torch.cat(pixels),
        grid_thw=tuple(grid for sample in rows for grid in sample.grids),
        rows=tuple(sample.row for sample in rows),
        weights_T=None if reduction == "token" else torch.tensor(weights),
    )


def whole_model(config: Config, *, seed: int = 0, recompute: Recompute | None = None) -> Qwen2_5_VLStage:
    """The model in one piece with seeded weights; the output matrix is the embedding where they are tied."""
    torch.manual_seed(seed)
    return Qwen2_5_VLStage(config, whole(config), accelerator=CPU, recompute=recompute)


def global_name(name: str, stage: Stage) -> str:
    """Turn a stage's local parameter name into that of the whole model."""
    first = stage.vit_layers.start if name.startswith("image_encoder.") else stage.llm_layers.start
    return re.sub(r"layers\.(\d+)\.", lambda found: f"layers.{int(found[1]) + first}.", name)


def stage_model(
    config: Config, stage: Stage, *, recompute: Recompute | None = None, accelerator: Accelerator = CPU
) -> Qwen2_5_VLStage:
    """One stage with the weights that the whole model has there, on the host."""
    weights = dict(whole_model(config).state_dict())
    weights.setdefault("text_decoder.output_layer.weight", weights["text_decoder.embedding.word_embeddings.weight"])
    model = Qwen2_5_VLStage(config, stage, accelerator=accelerator, recompute=recompute)
    model.load_state_dict({name: weights[global_name(name, stage)] for name in model.state_dict()})
    return model


@dataclass(frozen=True)
class Case:
    """A layout and the work of one step: `micro_batches[dp rank]` are lists of rows."""

    llm: tuple[int, ...] = (4,)
    vit: tuple[int, ...] = (4,)
    micro_batches: tuple[tuple[tuple[int, ...], ...], ...] = (((0, 1, 2, 3, 4, 5, 6, 7),),)
    tied: bool = False
    frozen: FreezeSpec = NOTHING_FROZEN
    with_images: bool = True
    clip_grad: float = 0.0
    tp: int = 1
    vpp: int = 1
    """`llm` and `vit` count the layers of `vpp` stages per rank, in the order of the model"""
    recompute: Recompute | None = None
    dtype: torch.dtype = torch.float32
    loss_reduction: LossReduction = "token"
    lora: tuple[str, ...] = ()
    """`target_modules` of adapters of rank 4"""

    @property
    def pp(self) -> int:
        return len(self.llm) // self.vpp

    @property
    def world_size(self) -> int:
        return self.pp * len(self.micro_batches) * self.tp

    @property
    def layout(self) -> ParallelSpec:
        llm, vit = (
            tuple(counts[first : first + self.pp] for first in range(0, len(counts), self.pp))
            for counts in (self.llm, self.vit)
        )
        return ParallelSpec(tp_size=self.tp, llm_pp_layers=llm, vit_pp_layers=vit)


@dataclass(frozen=True)
class Step:
    """What one rank saw; gradients by the whole model's names, divided as the loss is."""

    loss: float
    norm: float
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    tp_rank: int = 0


class Rank:
    """One rank of a case, ready to step."""

    def __init__(
        self,
        case: Case,
        optimizer: OptimizerSpec | None = None,
        *,
        accelerator: Accelerator = CPU,
        move: Callable[[nn.Module], None] = lambda _: None,
    ) -> None:
        """`move` puts a model's parameters on the accelerator."""
        self.case, self.config, self.accelerator = case, tiny_config(tied=case.tied), accelerator
        self.stages = stages(self.config, case.layout)
        ends = [stage for stage in self.stages if stage.has_embedding or stage.has_output]
        self.mesh: Mesh = build_mesh(
            pp_size=case.pp,
            dp_size=len(case.micro_batches),
            tp_size=case.tp,
            tied_stages=[stage.index % case.pp for stage in ends] if case.tied else (),
        )
        self.own_stages = self.stages[self.mesh.pp_rank :: case.pp]
        chunks = [
            stage_model(self.config, stage, recompute=case.recompute, accelerator=accelerator).to(case.dtype)
            for stage in self.own_stages
        ]
        for chunk in chunks:
            move(chunk)
        self.model: nn.Module = join(chunks)
        freeze(self.model, case.frozen, all_weights=bool(case.lora))
        held = shard_chunks(chunks, PLAN, self.mesh)
        if case.lora:
            layers = adapted_layers(self.config, case.lora, {tower for tower, frozen in case.frozen if frozen})
            self.adapters = Adapters(self.config, tuple(layers), r=4, alpha=8, seed=3)
            held |= self.adapters.attach(chunks, self.own_stages, PLAN, self.mesh)[1]
            parameters = dict(self.model.named_parameters())
            for name, value in self.adapters.initial(self.own_stages, self.mesh):
                parameters[name].data.copy_(value)
        spec = optimizer or SMOOTH.model_copy(update={"clip_grad": case.clip_grad})
        self.optimizer = Optimizer(self.model, spec, self.mesh, held=held, bucket_bytes=SMALL_BUCKET)
        # The case of one rank, which the others are compared with, computes every position.
        trims = self.mesh.tp_group is None and (case.world_size > 1 or case.recompute is not None)
        self.head = Head(chunks[-1], accelerator.device, self.mesh, targets_only=trims)
        self.pipeline = build_pipeline(chunks, self.head, self.mesh, self.config, self.stages, case.frozen, accelerator)

    def global_name(self, name: str) -> str:
        """Turn a name of this rank's module into that of the whole model."""
        chunk = re.match(r"model(\d+)\.", name)
        return global_name(local_name(name), self.own_stages[int(chunk[1]) if chunk else 0])

    def fed(self, batch: PackedBatch) -> PackedBatch:
        """What the loader gives this rank of a batch: without pixels where others have them."""
        if reads_pixels(self.own_stages[0], self.mesh):
            return batch
        return replace(batch, pixel_values_PD=batch.pixel_values_PD[:0])

    def step(self) -> Step:
        case, mesh = self.case, self.mesh
        rows = samples(64, with_images=case.with_images)
        batches = [
            self.fed(pack([rows[i] for i in part], self.config, case.loss_reduction))
            for part in case.micro_batches[mesh.dp_rank]
        ]
        counts = [rows[i].num_targets for rank in case.micro_batches for part in rank for i in part]
        divisor = total_weight(np.array(counts), case.loss_reduction)
        self.optimizer.clear_gradients()
        self.pipeline.run([batch for batch in batches if batch.rows], last_pass=self.optimizer.last_pass)
        self.optimizer.reduce_gradients()
        buffer = self.optimizer.buffer
        for bucket in buffer.buckets:  # each rank has its shares
            buffer.start_gather(buffer.gradients, bucket).wait()
        gradients = {
            self.global_name(slot.name): slot.view(buffer.gradients).clone() / divisor for slot in buffer.slots
        }
        row = [sum(self.head.take()), self.optimizer.squared_norm()]
        device = torch.device("cpu")
        table = all_reduce_rows(row, rank=mesh.rank, world_size=mesh.world_size, group=mesh.world_group, device=device)
        loss_sum, squared_norm = table.sum(0).tolist()
        norm = self.optimizer.step(learning_rate=1e-2, num_targets=divisor, squared_norm=squared_norm)
        weights = {self.global_name(name): tensor.clone() for name, tensor in self.model.state_dict().items()}
        return Step(loss_sum / divisor, norm, gradients, weights, mesh.tp_rank)


def one_step(rank: int, case: Case) -> Step:
    """Run one step of a case as rank `rank`."""
    return Rank(case).step()


class Notes:
    """A reporter that keeps what it is told, and asks to stop after `stop_after` steps."""

    def __init__(self, *, stop_after: int | None = None) -> None:
        self.log = logging.getLogger("temper.test")
        self.metrics: dict[int, dict[str, float]] = {}
        self.warnings: list[tuple[str, str]] = []
        self.stop_after = stop_after
        self._steps = 0

    def progress(self, done: float, total: float | None, unit: str) -> None:
        """Forget it."""

    def metric(self, step: int, **values: float) -> None:
        """Keep it."""
        self.metrics[step] = values

    def warn(self, code: str, message: str) -> None:
        """Keep it."""
        self.warnings.append((code, message))

    def should_stop(self) -> bool:
        """Asked once per step."""
        self._steps += 1
        return self.stop_after is not None and self._steps >= self.stop_after


def training_spec(**changes: object) -> TrainingSpec:
    values: dict[str, object] = {
        "model": {"path": "/nowhere"},
        "dataset": {"path": "/nowhere"},
        "parallel": {"llm_pp_layers": [[4]], "vit_pp_layers": [[4]]},
        "train_iters": 6,
        "global_batch_size": 4,
        "optimizer": {"lr": 1e-2, "lr_warmup_fraction": 0},
        "freeze": {"vision_encoder": False, "vision_projector": False},
        "precision": "fp32",
        **changes,
    }
    return TrainingSpec.model_validate(values)


def make_trainer(
    rank: Rank, spec: TrainingSpec, folder: Path, notes: Notes, *, resume_from: Path | None = None
) -> Trainer:
    """A trainer of a case's rank; goes on from the newest checkpoint in `folder`, or from a given one, as the runner does."""
    mesh = rank.mesh
    checkpoints = Checkpoints(
        folder,
        mesh,
        rank_folder=Path(rank_dir("release", mesh.tp_rank, mesh.pp_rank, mesh.pp_size)).name,
        keep_last=spec.checkpoint.keep_last,
    )
    facts = Facts(
        Position(),
        spec.parallel.layout.model_dump(mode="json"),
        spec.precision,
        spec.seed,
        "",
        has_optimizer=spec.checkpoint.save_optim,
        has_rng=spec.checkpoint.save_rng,
        dp_size=spec.parallel.dp_size,
    )
    origin = Origin.find(checkpoints, resume_from)
    if origin is not None:
        facts = origin.resumed(facts, spec, notes)
        load_weights(rank.model, origin.weights(facts, rank.config, rank.own_stages, mesh))
        if origin.loads_optimizer(spec):
            origin.load_optimizer(rank.optimizer, facts, rank.config, rank.own_stages, mesh)
    return Trainer(
        spec=spec,
        mesh=mesh,
        accelerator=rank.accelerator,
        model=rank.model,
        pipeline=rank.pipeline,
        head=rank.head,
        optimizer=rank.optimizer,
        checkpoints=checkpoints,
        facts=facts,
        reporter=notes,
        flops=model_flops(rank.config),
    )


def steps(trainer: Trainer, config: Config, *, num_rows: int = 10) -> Iterator[LoadedStep]:
    """Endless steps over the samples from the trainer's position on, planned as in earnest."""
    rows, mesh, reduction = samples(num_rows), trainer.mesh, trainer.spec.loss_reduction
    lengths = np.array([len(row.input_ids) for row in rows])
    consumed = trainer.facts.position.consumed_samples
    while True:
        plan = plan_step(
            lengths,
            np.zeros_like(lengths),
            seed=trainer.spec.seed,
            consumed_samples=consumed,
            global_batch_size=trainer.spec.global_batch_size,
            dp_size=mesh.dp_size,
            token_budget=40,
            min_micro_batches=mesh.pp_size,
        )
        consumed += len(plan.rows)
        counts = [rows[i].num_targets for i in plan.rows]
        grids = [grid for i in plan.rows for grid in rows[i].grids]
        yield LoadedStep(
            plan=plan,
            num_samples=len(plan.rows),
            work=work_of(lengths[list(plan.rows)].tolist(), counts, grids, config.vision),
            num_images=len(grids),
            loss_weight=total_weight(np.array(counts), reduction),
            micro_batches=(
                pack([rows[i] for i in part], config, reduction) for part in plan.micro_batches[mesh.dp_rank]
            ),
        )


def train(rank_number: int, case: Case, spec: TrainingSpec, folder: Path, *, stop_after: int | None = None) -> Trained:
    """Train a case as rank `rank_number`, going on from what `folder` holds."""
    rank, notes = Rank(case, spec.optimizer), Notes(stop_after=stop_after)
    trainer = make_trainer(rank, spec, folder, notes)
    outcome = trainer.train(steps(trainer, rank.config))
    weights = {name: tensor.clone() for name, tensor in rank.model.state_dict().items()}
    return Trained(outcome, notes.metrics, weights)


@dataclass(frozen=True)
class Trained:
    """What a training left."""

    outcome: Outcome
    metrics: dict[int, dict[str, float]]
    weights: dict[str, Tensor]
