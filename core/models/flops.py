"""Floating-point operations that a training step needs of the model, and what devices could do: MFU by the published formula.

MFU (PaLM, Chowdhery et al. 2022, appendix B) = operations that the model needs per second / peak of all devices. What the model needs does
not depend on how it is computed: nothing is counted for padding, recompute, or positions that no loss asks for, and a causal attention
counts the pairs that may see one another. Matrix products alone count, 2 per multiplication and addition:

    forward   1      of every product
    backward  + 1    for the gradient of its input, where something before it is trained      (attention, with two inputs: + 2)
              + 1    for the gradient of its weight, if that is trained

So a trained tower counts 3, a frozen one 1 before all that is trained and 2 after it, and so does one with LoRA, whose adapters count 3.
No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from core.models.config import Config, VisionConfig
from core.models.lora import Lora

Grid = tuple[int, int, int]
Unit = Literal["tokens", "targets", "token_pairs", "patches", "window_pairs", "frame_pairs"]

PEAK_FLOPS_BF16 = {
    "Ascend910B": 354e12,  # 910B1 to B4 differ by clock and cores; what VeOmni and Index-1.9B's report divide by
    "Ascend910_93": 354e12,  # one of the two dies of a 910C (VeOmni)
    "A100": 312e12,  # NVIDIA's data sheets from here on, dense
    "A800": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "H200": 989e12,
    "H20": 148e12,
    "L40S": 362e12,
}
"""Dense bfloat16 operations per second of one device, by what its name contains."""


@dataclass(frozen=True)
class Work:
    """What the model has to do for some samples, without padding; additive."""

    tokens: int = 0
    targets: int = 0
    """Positions with a loss."""
    token_pairs: int = 0
    """Pairs (query, key) of causal attention: length * (length + 1) / 2 of each sample."""
    patches: int = 0
    window_pairs: int = 0
    """Pairs of patches in one window."""
    frame_pairs: int = 0
    """Pairs of patches in one frame."""


@dataclass(frozen=True)
class ModelFlops:
    """Operations of forward and backward per unit of work."""

    per_unit: dict[Unit, float]

    def of(self, work: Work) -> float:
        """Return the operations that this work takes."""
        return sum(cost * float(getattr(work, unit)) for unit, cost in self.per_unit.items())


def work_of(lengths: Sequence[int], num_targets: Sequence[int], grids: Iterable[Grid], vision: VisionConfig) -> Work:
    """Return the work of samples of these lengths and numbers of targets, with images or videos of these grids (t, h, w in patches)."""
    grids = list(grids)
    pairs = [_vision_pairs(grid, vision.spatial_merge_size, vision.window_size // vision.patch_size) for grid in grids]
    return Work(
        tokens=sum(lengths),
        targets=sum(num_targets),
        token_pairs=sum(length * (length + 1) // 2 for length in lengths),
        patches=sum(t * h * w for t, h, w in grids),
        window_pairs=sum(in_windows for in_windows, _ in pairs),
        frame_pairs=sum(in_frames for _, in_frames in pairs),
    )


def model_flops(config: Config, *, frozen: AbstractSet[str] = frozenset(), lora: Lora | None = None) -> ModelFlops:
    """Count what one unit of each kind of work costs. `frozen` names towers; with `lora` the others train these alone."""
    total: dict[Unit, float] = {}
    is_reached = False  # whether something before the product is trained
    for product in _products(config):
        is_frozen = product.tower in frozen
        times = 1 + is_reached * (2 if product.kind == "attention" else 1)
        flops = 2.0 * product.rows * product.inputs * product.outputs
        if lora is None:
            trains = not is_frozen and product.kind != "attention"
            total[product.unit] = total.get(product.unit, 0.0) + flops * (times + trains)
        else:
            trains = not is_frozen and product.kind in lora.kinds(product.tower)
            values = product.inputs * (times + 1) + product.outputs * 3
            extra = 2.0 * product.rows * lora.r * values if trains else 0.0
            total[product.unit] = total.get(product.unit, 0.0) + flops * times + extra
        is_reached = is_reached or trains
    return ModelFlops(total)


def peak_flops(device_name: str, precision: Literal["bf16", "fp32"]) -> float | None:
    """Return what a device could do per second; None where it is not known: another device, or float32."""
    if precision != "bf16":
        return None
    return next((peak for name, peak in PEAK_FLOPS_BF16.items() if name in device_name), None)


@dataclass(frozen=True)
class _Product:
    """A product of each unit's row with a weight [outputs, inputs]; of attention, of a query with a key and of its weight with a value.

    A weight that is only looked up or multiplied element by element (an embedding, a norm) has no outputs.
    """

    tower: str
    kind: str
    unit: Unit
    inputs: int = 0
    outputs: int = 0
    rows: float = 1.0
    """Per unit: the projector has one for every merge * merge patches."""


def _products(config: Config) -> Iterator[_Product]:
    """All products, in the order of the forward pass."""
    vision, text = config.vision, config.text
    width, merged = vision.hidden_size, vision.merged_size
    yield _Product("vision_encoder", "patch_embed", "patches", vision.patch_dim, width)
    for index in range(vision.depth):
        pairs: Unit = "frame_pairs" if index in vision.fullatt_block_indexes else "window_pairs"
        yield from _layer(
            "vision_encoder", width, 3 * width, width, vision.intermediate_size, "patches", pairs, "patches"
        )
    share = 1 / vision.spatial_merge_size**2
    yield _Product("vision_projector", "norm", "patches")
    yield _Product("vision_projector", "linear_fc1", "patches", merged, merged, share)
    yield _Product("vision_projector", "linear_fc2", "patches", merged, vision.out_hidden_size, share)

    query, key = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    hidden, ffn, last = text.hidden_size, text.intermediate_size, text.num_hidden_layers - 1
    yield _Product("text_decoder", "embedding", "tokens")
    for index in range(text.num_hidden_layers):
        after: Unit = "targets" if index == last else "tokens"  # the last layer is asked for target positions only
        yield from _layer("text_decoder", hidden, query + 2 * key, query, ffn, "tokens", "token_pairs", after)
    yield _Product("text_decoder", "norm", "targets")
    yield _Product("text_decoder", "output_layer", "targets", hidden, text.vocab_size)


def _layer(
    tower: str, hidden: int, qkv: int, query: int, ffn: int, unit: Unit, pairs: Unit, after: Unit
) -> Iterator[_Product]:
    """A transformer layer; `after` attention it goes on with these rows."""
    yield _Product(tower, "norm", unit)
    yield _Product(tower, "linear_qkv", unit, hidden, qkv)
    yield _Product(tower, "attention", pairs, query, 2)
    yield _Product(tower, "linear_proj", after, query, hidden)
    yield _Product(tower, "norm", after)
    yield _Product(tower, "linear_fc1", after, hidden, 2 * ffn)
    yield _Product(tower, "linear_fc2", after, ffn, hidden)


@lru_cache(maxsize=4096)
def _vision_pairs(grid: Grid, merge: int, window: int) -> tuple[int, int]:
    """Pairs of patches in one window and in one frame; a window is `window` patches wide, cut off at the image's edges."""
    frames, height, width = grid
    side = window // merge * merge

    def squares(length: int) -> int:
        return length // side * side**2 + (length % side) ** 2

    return frames * squares(height) * squares(width), frames * (height * width) ** 2
