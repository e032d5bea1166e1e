"""Where LoRA adapters may sit on the model that is trained, how their matrices are cut, and what PEFT calls them (no torch).

A linear layer W [out, in] gets A [r, in] and B [out, r] and computes W x + (alpha / r) B A x (Hu et al. 2021). Our linear layers are the
fused ones of the mm format, PEFT's those of transformers:

    mm      <layer>.lora_A.default.weight, <layer>.lora_B.default.weight        MindSpeed-MM's names
    PEFT    <module>.lora_A.weight, <module>.lora_B.weight                      q, k and v (gate and up) each get the fused layer's A, and
                                                                                those rows of its B that are their rows of W

At tp > 1 a layer that is cut by rows has its B cut like W and A whole on every rank; one cut by columns has A cut like W and B whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from core.errors import InvalidSpec
from core.models.config import Config
from core.models.mapping import TOWERS, Place, Rows
from core.models.plan import Column, Plan, Replicate, ShardRule, Stage
from core.models.registry import get_family

FUSED = {
    "q_proj": "linear_qkv", "k_proj": "linear_qkv", "v_proj": "linear_qkv", "qkv": "linear_qkv", "o_proj": "linear_proj",
    "proj": "linear_proj", "gate_proj": "linear_fc1", "up_proj": "linear_fc1", "down_proj": "linear_fc2",
}  # fmt: skip
"""PEFT's usual names for Qwen's modules -> our layer that holds them, for a hint."""


@dataclass(frozen=True)
class Layer:
    """A linear layer of the model, in each of the model's layers if `{layer}` is in its name."""

    name: str
    """As in an mm checkpoint, without `.weight`."""
    place: Place
    shape: tuple[int, int]
    """[out, in], before any tensor-parallel cut."""
    cut: ShardRule
    rows: tuple[Rows, ...]
    """Which rows are which rows of which HF weight."""

    @property
    def kind(self) -> str:
        """What `target_modules` calls it."""
        return self.name.rsplit(".", 1)[1]

    @property
    def adapter_cuts(self) -> tuple[ShardRule, ShardRule]:
        """How A and B are cut."""
        return adapter_cuts(self.cut)

    def adapter_shapes(self, r: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of A and B before any cut."""
        return (r, self.shape[1]), (self.shape[0], r)


def adapter_cuts(cut: ShardRule) -> tuple[ShardRule, ShardRule]:
    """How A and B of a layer are cut whose weight is cut so."""
    return (cut, Replicate()) if isinstance(cut, Column) else (Replicate(), cut)


def adapter_names(layer: str) -> tuple[str, str]:
    """Names of A and B of a layer."""
    return f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight"


def linear_layers(config: Config) -> list[Layer]:
    """Every linear layer of both towers and the projector; not the embedding and the output layer."""
    family, dims = get_family(config.family), config.dims()
    layers = []
    for rule in family.mapping:
        shape = rule.mm_shape(dims)
        if rule.place in (Place.VIT_LAYER, Place.PROJECTOR, Place.LLM_LAYER) and len(shape) == 2:
            name = rule.mm.removesuffix(".weight")
            layers.append(Layer(name, rule.place, (shape[0], shape[1]), family.plan[rule.mm], tuple(rule.rows(dims))))
    return layers


def adapted_layers(config: Config, target_modules: Iterable[str], frozen: AbstractSet[str]) -> list[Layer]:
    """The layers that get an adapter: those of the named kinds in towers that are not frozen.

    Raises InvalidSpec for a name that the model does not have or that is in frozen towers only, and for a trained tower without any.
    """
    every, named = linear_layers(config), list(target_modules)
    kinds = sorted({layer.kind for layer in every})
    unknown = [name for name in named if name not in kinds]
    if unknown:
        hints = [f"{name} is part of {FUSED[name]}" for name in unknown if name in FUSED]
        raise InvalidSpec(
            f"spec.lora.target_modules: {', '.join(unknown)} is no linear layer of {config.family}; it has {', '.join(kinds)}",
            hint="; ".join(hints) or None,
        )
    trained = [layer for layer in every if layer.place.tower not in frozen]
    found = [layer for layer in trained if layer.kind in named]
    for name in named:
        if all(layer.kind != name for layer in found):
            raise InvalidSpec(f"spec.lora.target_modules: {name} is in no tower that is trained (freeze)")
    for tower in TOWERS:
        if tower not in frozen and all(layer.place.tower != tower for layer in found):
            there = sorted({layer.kind for layer in trained if layer.place.tower == tower})
            raise InvalidSpec(
                f"spec.freeze.{tower} is false, but none of spec.lora.target_modules is in it",
                hint=f"add one of {', '.join(there)}, or freeze it: LoRA trains adapters and nothing else",
            )
    return found


def with_adapters(plan: Plan) -> Plan:
    """The shard plan, and in it the adapters that any of its weights may get."""
    more = {
        name: cut
        for weight, rule in plan.items()
        if weight.endswith(".weight")
        for name, cut in zip(adapter_names(weight.removesuffix(".weight")), adapter_cuts(rule), strict=True)
    }
    return {**plan, **more}


@dataclass(frozen=True)
class Lora:
    """Adapters of rank `r` on some layers, for predictions of memory."""

    layers: tuple[Layer, ...]
    r: int

    def parameters(self, stage: Stage, *, tp_size: int = 1) -> int:
        """Parameters of adapters that one tensor-parallel rank of the stage holds."""
        return sum(
            len(stage.layers(layer.place)) * cut.cut(shape, tp_size, 0).size(shape)
            for layer in self.layers
            for shape, cut in zip(layer.adapter_shapes(self.r), layer.adapter_cuts, strict=True)
        )

    def kinds(self, tower: str) -> frozenset[str]:
        """Kinds of layers of a tower that have an adapter."""
        return frozenset(layer.kind for layer in self.layers if layer.place.tower == tower)


def peft_modules(layer: Layer) -> Iterator[tuple[str, list[Rows]]]:
    """transformers' modules in a fused layer (`{layer}` in the name), each with its rows of B."""
    for source in dict.fromkeys(rows.source for rows in layer.rows):
        yield source.removesuffix(".weight"), [rows for rows in layer.rows if rows.source == source]
