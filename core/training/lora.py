"""LoRA training: which layers get an adapter, their first values, merging them at the end, and PEFT's folder of them.

    base weights (frozen, from the model input) ─┐
    A, B of each layer (trained) ────────────────┴─► forward ─► checkpoints hold A and B alone
                                                        └─► at the end  W + (alpha / r) B A ─► mm checkpoint
                                                                        A, B ────────────────► PEFT's folder

Adapters are of the compute dtype, with float32 master weights in the optimizer: small updates are not lost, and no layer casts its input.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from core.models.adapter import ADAPTER_CONFIG, ADAPTER_FILE, PREFIX, new_adapter_config
from core.models.batch import PackedBatch
from core.models.config import Config
from core.models.layers.lora import attach, is_adapter, merge
from core.models.lora import Layer, adapted_layers, adapter_names, peft_modules, with_adapters
from core.models.mapping import Shape, at_layer, new_name
from core.models.mm_folder import RANK_FILE, rank_dir
from core.models.plan import Plan, ShardRule, Stage, stages, whole
from core.parallel.collectives import gather_rows
from core.parallel.mesh import Mesh
from core.parallel.pipeline import Pipeline
from core.parallel.tensor import SEQUENCE_PARALLEL, Held, cut, held
from core.specs.parallel import ParallelSpec
from core.specs.training import TrainingSpec
from core.training.freeze import ParameterRow
from core.training.loss import target_positions
from core.training.together import Together
from core.training.wiring import Head

PROBED_POSITIONS = 256
"""Target positions whose logits are compared before and after merging."""


@dataclass(frozen=True)
class Site:
    """A layer with an adapter on a rank."""

    layer: Layer
    number: int
    """Of the transformer layer, in the model."""
    chunk: int
    """Which of the rank's stages holds it."""
    prefix: str
    """Of the chunk's names, as `wiring.join` gives them."""
    name: str
    """In its stage."""


def sites(layers: Sequence[Layer], own_stages: Sequence[Stage]) -> Iterator[Site]:
    """Every place of an adapter in a rank's stages."""
    for chunk, stage in enumerate(own_stages):
        prefix = f"model{chunk}." if len(own_stages) > 1 else ""
        for layer in layers:
            for local, number in enumerate(stage.layers(layer.place)):
                yield Site(layer, number, chunk, prefix, at_layer(layer.name, local))


@dataclass(frozen=True)
class Adapters:
    """All adapters of a training, the same on every rank."""

    config: Config
    layers: tuple[Layer, ...]
    r: int
    alpha: float
    seed: int

    @classmethod
    def of(cls, spec: TrainingSpec, config: Config) -> Adapters | None:
        """Return what the spec asks for; None if it trains whole weights. Raises InvalidSpec."""
        if spec.lora is None:
            return None
        frozen = {tower for tower, is_frozen in spec.freeze if is_frozen}
        layers = adapted_layers(config, spec.lora.target_modules, frozen)
        return cls(config, tuple(layers), spec.lora.r, spec.lora.alpha, spec.seed)

    def attach(
        self, chunks: Sequence[nn.Module], own_stages: Sequence[Stage], plan: Plan, mesh: Mesh
    ) -> tuple[list[ParameterRow], dict[str, Held]]:
        """Give the layers of a rank's stages their adapters, after `shard_chunks`; return their rows of the table of parameters, whole,
        and what is held of each as `shard_chunks` does."""
        rows: list[ParameterRow] = []
        kinds: dict[str, Held] = {}
        plan = with_adapters(plan)
        for site in sites(self.layers, own_stages):
            module = chunks[site.chunk].get_submodule(site.name)
            in_sequence = site.name.startswith(SEQUENCE_PARALLEL)
            scale = self.alpha / self.r
            attach(module, site.layer, r=self.r, scale=scale, group=mesh.tp_group, sequence=in_sequence)
            for name, shape in zip(adapter_names(site.name), site.layer.adapter_shapes(self.r), strict=True):
                rows.append(ParameterRow(site.prefix + name, site.layer.place.tower, shape, trained=True))
                if mesh.tp_group is not None:
                    kinds[site.prefix + name] = held(name, plan)
        return rows, kinds

    def initial(self, own_stages: Sequence[Stage], mesh: Mesh) -> Iterator[tuple[str, Tensor]]:
        """Yield the first values of this rank's adapters.

        A is uniform as PEFT draws it, seeded by its layer's name so that it is the same for every layout; B is zero, so training starts
        from the model itself.
        """
        for site in sites(self.layers, own_stages):
            shape_a, shape_b = site.layer.adapter_shapes(self.r)
            seed = hashlib.sha256(f"{self.seed} {at_layer(site.layer.name, site.number)}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(seed[:7], "big"))
            bound = 1 / math.sqrt(shape_a[1])  # kaiming_uniform_ with a = sqrt(5)
            values = torch.empty(shape_a).uniform_(-bound, bound, generator=generator), torch.zeros(shape_b)
            for name, value, rule in zip(adapter_names(site.name), values, site.layer.adapter_cuts, strict=True):
                yield site.prefix + name, cut(value, rule, tp_size=mesh.tp_size, tp_rank=mesh.tp_rank)

    def write_peft(self, checkpoint: Path, parallel: ParallelSpec, target: Path, *, base_model: str | None) -> int:
        """Write PEFT's two files from the rank files of a checkpoint (its iteration folder); return the number of tensors."""
        tensors = self.peft_tensors(checkpoint, parallel)
        alpha = int(self.alpha) if float(self.alpha).is_integer() else self.alpha
        names = [key.removeprefix(PREFIX) for key in tensors]
        config_json = new_adapter_config(names, r=self.r, lora_alpha=alpha, base_model=base_model)
        save_file(tensors, target / ADAPTER_FILE, metadata={"format": "pt"})
        (target / ADAPTER_CONFIG).write_text(json.dumps(config_json, indent=2) + "\n", encoding="utf-8")
        return len(tensors)

    def peft_tensors(self, checkpoint: Path, parallel: ParallelSpec) -> dict[str, Tensor]:
        """Put the adapters of a checkpoint's rank files together, by PEFT's keys."""
        joined = self._joined(checkpoint, parallel)
        tensors: dict[str, Tensor] = {}
        for site in sites(self.layers, [whole(self.config)]):
            first, second = (joined[name] for name in adapter_names(site.name))
            for module, runs in peft_modules(site.layer):
                dealt = second.new_empty(sum(run.count for run in runs), self.r)
                for run in runs:
                    dealt[run.source_row : run.source_row + run.count] = second[run.row : run.row + run.count]
                key = PREFIX + new_name(at_layer(module, site.number))
                tensors |= {f"{key}.lora_A.weight": first.clone(), f"{key}.lora_B.weight": dealt}
        return tensors

    def _joined(self, checkpoint: Path, parallel: ParallelSpec) -> dict[str, Tensor]:
        """Whole matrices by the names that they have in a model of one stage."""
        joined: dict[str, Tensor] = {}
        all_stages, pp_size = stages(self.config, parallel), parallel.pp_size
        for pp_rank in range(pp_size):
            for tp_rank in range(parallel.tp_size):
                file = checkpoint / Path(rank_dir("release", tp_rank, pp_rank, pp_size)).name / RANK_FILE
                held_here = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
                for site in sites(self.layers, all_stages[pp_rank::pp_size]):
                    chunk = held_here[site.prefix.removesuffix(".") or "model"]
                    target = at_layer(site.layer.name, site.number)
                    shapes, rules = site.layer.adapter_shapes(self.r), site.layer.adapter_cuts
                    for source, name, shape, rule in zip(
                        adapter_names(site.name), adapter_names(target), shapes, rules, strict=True
                    ):
                        value = joined.setdefault(name, chunk[source].new_empty(shape))
                        _place(value, chunk[source], rule, parallel.tp_size, tp_rank)
        return joined


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """What a LoRA training keeps in its checkpoints: the base is read from the model input again."""
    return {name: tensor for name, tensor in model.state_dict().items() if is_adapter(name)}


@dataclass(frozen=True)
class Merging:
    """How far the merged model is from the base with its adapter, on a few rows of the training set."""

    max_logit_difference: float
    max_logit: float
    """Largest absolute logit, to compare with."""
    num_positions: int


def merge_and_compare(model: nn.Module, pipeline: Pipeline[PackedBatch], head: Head, batch: PackedBatch) -> Merging:
    """Merge the adapters into the weights of `model`, in float32 and rounded once; all ranks together.

    In float32 the logits differ by rounding alone. In bfloat16 the update is rounded to the weight's 8 bits, which base and adapter apart
    are not: about as much as any two orders of computing in bfloat16 differ.
    """
    before = _logits(pipeline, head, batch)
    merge(model)
    after = _logits(pipeline, head, batch)
    mine = (0.0, 0.0, 0)
    if before is not None and after is not None and before.numel():
        mine = float((before - after).abs().max()), float(before.abs().max()), len(before)
    differences, largest, counts = zip(*Together(head.mesh).gather(mine), strict=True)
    return Merging(max(differences), max(largest), max(counts))


class _Probe:
    """A pipeline's head that keeps the logits of the first target positions, [N, vocab] or this rank's columns of them."""

    def __init__(self, head: Head) -> None:
        self.head = head
        self.logits_NV: Tensor | None = None

    def __call__(self, hidden_TH: Tensor, batch: PackedBatch) -> None:
        group = self.head.mesh.tp_group
        if group is not None:  # sequence parallel: each rank has rows of its own
            hidden_TH = gather_rows(hidden_TH, group)
        if not self.head.targets_only:
            hidden_TH = hidden_TH.index_select(0, target_positions(batch.targets_T).to(hidden_TH.device))
        self.logits_NV = self.head.model.logits(hidden_TH[:PROBED_POSITIONS]).float()


def _logits(pipeline: Pipeline[PackedBatch], head: Head, batch: PackedBatch) -> Tensor | None:
    """Return the logits that this rank computes of a micro-batch; None but on the last stage."""
    probe = _Probe(head)
    with torch.no_grad():
        replace(pipeline, head=probe).run([batch])
    return probe.logits_NV


def _place(whole_matrix: Tensor, part: Tensor, rule: ShardRule, tp_size: int, tp_rank: int) -> None:
    """Put a rank's part of a matrix where it belongs."""
    shape: Shape = tuple(whole_matrix.shape)
    own, start = rule.cut(shape, tp_size, tp_rank), 0
    columns = slice(*(own.columns or (0, shape[1])))
    for first, last in own.rows:
        whole_matrix[first:last, columns] = part[start : start + last - first]
        start += last - first
