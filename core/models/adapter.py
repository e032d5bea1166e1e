"""LoRA adapters: PEFT's folder, and how its matrices lie in MindSpeed-MM's rank files (no torch).

    adapter_config.json            {"peft_type": "LORA", "r": …, "lora_alpha": …, "target_modules": […], …}
    adapter_model.safetensors      base_model.model.<module>.lora_A.weight [r, in], ….lora_B.weight [out, r]

    mm:  <canonical module>.lora_A.default.weight, ….lora_B.default.weight

A module that is cut by rows at tp > 1 has its B cut by rows; one that is cut by columns its A by columns; the other matrix is whole on
every rank. Only the canonical (unfused) names exist: a fused module would have one A where PEFT has two or three.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.errors import CorruptCheckpoint, IncompatiblePlan, InvalidModel, UnknownWeights
from core.models.config import Config
from core.models.hf_folder import TensorEntry, listed, read_header, read_json
from core.models.layout import Block, RankLayout, TensorLayout
from core.models.mapping import InterleaveQKV, Place, Rename, Shape, at_layer, new_name, old_name
from core.models.plan import Column, Split, Stage, stages, whole
from core.models.registry import get_family

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
_MATRIX = re.compile(r"(.+)\.lora_([AB])\.weight")
_MM_MATRIX = re.compile(r"(.+\.layers)\.(\d+)\.(.+)\.lora_([AB])\.default\.weight")
_PLAIN = {"use_dora": False, "use_rslora": False, "bias": "none", "modules_to_save": None, "fan_in_fan_out": False}
"""Options whose other values add weights, or change what the weights mean, in ways that MindSpeed-MM has no form for."""


@dataclass(frozen=True)
class Target:
    """A linear module that an adapter may sit on; `{layer}` in the names."""

    hf: str
    mm: str
    place: Place
    shape: tuple[int, int]
    """[out, in]"""
    by_columns: bool
    """How tensor parallelism cuts it; else by rows."""
    whole_only: bool
    """MindSpeed-MM's converter and its model disagree about its cut (the vision qkv), so there is none."""


@dataclass(frozen=True)
class AdapterFolder:
    """A checked folder. `tensors` goes by old names without PEFT's prefix."""

    path: Path
    config: Config
    config_json: dict[str, Any]
    tensors: dict[str, TensorEntry]
    tied_copies: dict[str, TensorEntry] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Name -> shape."""
        return {name: entry.shape for name, entry in self.tensors.items()}

    @property
    def keys(self) -> list[str]:
        """Keys as they came."""
        return [entry.key for entry in self.tensors.values()]


def targets(config: Config) -> list[Target]:
    """Every linear module of the model's layers. Raises InvalidModel for a family without a canonical form."""
    family, dims = get_family(config.family), config.dims()
    if family.canonical_mapping is None:
        raise InvalidModel(f"MindSpeed-MM has no LoRA for {config.family}")
    fused = {name: rule for rule in family.mapping for name in rule.hf_shapes(dims)}
    found = []
    for rule in family.canonical_mapping:
        shape = rule.mm_shape(dims)
        if isinstance(rule, Rename) and rule.place in (Place.VIT_LAYER, Place.LLM_LAYER) and len(shape) == 2:
            cut = family.plan[fused[rule.hf].mm]
            found.append(
                Target(
                    hf=rule.hf.removesuffix(".weight"),
                    mm=rule.mm.removesuffix(".weight"),
                    place=rule.place,
                    shape=(shape[0], shape[1]),
                    by_columns=isinstance(cut, Column),
                    whole_only=isinstance(fused[rule.hf], InterleaveQKV),
                )
            )
    return found


def inspect_adapter_folder(path: Path, config: Config) -> AdapterFolder:
    """Read and check a folder against the config of its base model. Raises InvalidModel, UnknownWeights."""
    config_json = read_adapter_config(path)
    tensors = {old_name(entry.key.removeprefix(PREFIX)): entry for entry in read_header(path / ADAPTER_FILE)}
    folder = AdapterFolder(path, config, config_json, tensors)
    check_adapter_shapes(config, folder.shapes)
    return folder


def read_adapter_config(path: Path) -> dict[str, Any]:
    """The config of a folder with PEFT's two files. Raises InvalidModel when one is missing, or for more than plain LoRA."""
    for name in (ADAPTER_CONFIG, ADAPTER_FILE):
        if not (path / name).is_file():
            raise InvalidModel(f"{path} has no {name}, so it is not an adapter's folder")
    config_json = read_json(path / ADAPTER_CONFIG)
    check_adapter_config(config_json)
    return config_json


def check_adapter_config(config_json: Mapping[str, Any]) -> None:
    """Only plain LoRA has a form in MindSpeed-MM."""
    if config_json.get("peft_type") != "LORA":
        raise InvalidModel(f"{ADAPTER_CONFIG}: peft_type is {config_json.get('peft_type')!r}; only LORA is converted")
    for name, plain in _PLAIN.items():
        if config_json.get(name, plain) not in (plain, None):
            raise InvalidModel(f"{ADAPTER_CONFIG}: {name} is {config_json[name]!r}; only {plain!r} can be converted")


def new_adapter_config(names: Iterable[str], *, r: int, lora_alpha: float, base_model: str | None) -> dict[str, Any]:
    """A PEFT config for an adapter of these weights (names without PEFT's prefix)."""
    return {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": lora_alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": r,
        # In full: PEFT matches by ending, and both towers have a gate_proj.
        "target_modules": sorted({new_name(old_name(name)).rsplit(".", 2)[0] for name in names}),
        "task_type": "CAUSAL_LM",
    }


def check_adapter_shapes(config: Config, shapes: Mapping[str, Shape]) -> None:
    """Every matrix belongs to a module of the model, comes with its other half, and fits."""
    modules = {at_layer(target.hf, layer): target for target, layer in _modules(config)}
    unknown = [name for name in shapes if not (found := _MATRIX.fullmatch(name)) or found[1] not in modules]
    if unknown:
        raise UnknownWeights(f"{len(unknown)} weights are no LoRA matrices of this model: {listed(unknown)}")
    if not shapes:
        raise UnknownWeights("the adapter has no weights")
    for name in sorted({name.rsplit(".", 2)[0] for name in shapes}):
        first, second = (shapes.get(f"{name}.lora_{matrix}.weight") for matrix in "AB")
        if first is None or second is None:
            raise UnknownWeights(f"{name} has lora_{'B' if first is None else 'A'}, but not its other half")
        rows, columns = modules[name].shape
        if len(first) != 2 or first[1] != columns or second != (rows, first[0]):
            raise InvalidModel(
                f"{name}: lora_A {list(first)} and lora_B {list(second)} do not fit a module of {rows} x {columns}"
            )


def _modules(config: Config) -> Iterator[tuple[Target, int]]:
    everything = whole(config)
    for target in targets(config):
        for layer in everything.layers(target.place):
            yield target, layer


def adapter_layouts(config: Config, parallel: Split, shapes: Mapping[str, Shape]) -> list[RankLayout]:
    """Every rank file. Raises IncompatiblePlan for an impossible split."""
    pp_size = len(parallel.llm_pp_layers[0])
    all_stages = stages(config, parallel)
    return [
        RankLayout(
            tp_rank=tp_rank,
            pp_rank=pp_rank,
            chunks=tuple(
                _stage_layout(config, stage, shapes, parallel.tp_size, tp_rank)
                for stage in all_stages[pp_rank::pp_size]
            ),
        )
        for pp_rank in range(pp_size)
        for tp_rank in range(parallel.tp_size)
    ]


def _stage_layout(
    config: Config, stage: Stage, shapes: Mapping[str, Shape], tp_size: int, tp_rank: int
) -> dict[str, TensorLayout]:
    layouts = {}
    for target in targets(config):
        for local, layer in enumerate(stage.layers(target.place)):
            for matrix in "AB":
                source = f"{at_layer(target.hf, layer)}.lora_{matrix}.weight"
                if source in shapes:
                    name = f"{at_layer(target.mm, local)}.lora_{matrix}.default.weight"
                    layouts[name] = _cut(target, matrix, source, shapes[source], tp_size, tp_rank)
    return layouts


def _cut(target: Target, matrix: str, source: str, shape: Shape, tp_size: int, tp_rank: int) -> TensorLayout:
    if target.whole_only and tp_size > 1:
        raise IncompatiblePlan(f"an adapter on {target.hf} has tp_size=1 only, not {tp_size}")
    rows, columns = shape
    if matrix == "A" and target.by_columns:
        part = columns // tp_size
        return TensorLayout((rows, part), (Block(0, rows, source, 0, tp_rank * part, part),))
    if matrix == "B" and not target.by_columns:
        part = rows // tp_size
        return TensorLayout((part, columns), (Block(0, part, source, tp_rank * part, 0, columns),))
    return TensorLayout((rows, columns), (Block(0, rows, source, 0, 0, columns),))


def shapes_of_ranks(config: Config, parallel: Split, tensors: Iterable[tuple[int, str, Shape]]) -> dict[str, Shape]:
    """The whole matrices behind what tensor-parallel rank 0 holds: (stage, mm name, shape) of each tensor."""
    all_stages = stages(config, parallel)
    by_mm = {target.mm: target for target in targets(config)}
    shapes: dict[str, Shape] = {}
    for index, name, shape in tensors:
        found = _MM_MATRIX.fullmatch(name)
        target = by_mm.get(f"{found[1]}.{{layer}}.{found[3]}") if found else None
        if found is None or target is None:
            raise UnknownWeights(f"stage {index} has {name}, which is no LoRA matrix of this model")
        layers = all_stages[index].layers(target.place)
        if int(found[2]) >= len(layers):
            raise IncompatiblePlan(f"stage {index} has {name}, but the layout given makes it {len(layers)} such layers")
        if len(shape) != 2:
            raise CorruptCheckpoint(f"stage {index}: {name} has shape {list(shape)}")
        source = f"{at_layer(target.hf, layers[int(found[2])])}.lora_{found[4]}.weight"
        shapes[source] = (shape[0], target.shape[1]) if found[4] == "A" else (target.shape[0], shape[1])
    return shapes
