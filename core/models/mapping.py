"""How the weights of a HF folder become the weights of an mm checkpoint: rule types, as data without tensors.

A family has one table of these rules (`family.py`), used in both directions. A rule says which rows of which HF tensors
make one mm tensor, before any tensor-parallel cut; `{layer}` in a name stands for the layer index. Sizes are names that
are looked up in `Config.dims()`.

    Rename          mm = hf
    FuseQKV         q, k, v (heads, groups, groups)  ->  q_0 k_0 v_0 q_1 k_1 v_1 …   one q_g holds heads/groups heads
    InterleaveQKV   qkv stacked as q, k, v           ->  q_0 k_0 v_0 q_1 k_1 v_1 …   one head each
    FuseGateUp      gate, up                         ->  gate above up
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

Dims = Mapping[str, int]
Shape = tuple[int, ...]


class Place(enum.Enum):
    """The part of the model that a weight belongs to; it decides the pipeline stage."""

    PATCH_EMBED = "patch_embed"
    VIT_LAYER = "vit_layer"
    PROJECTOR = "projector"
    EMBEDDING = "embedding"
    LLM_LAYER = "llm_layer"
    OUTPUT = "output"

    @property
    def tower(self) -> str:
        """`vision_encoder`, `vision_projector` or `text_decoder`, as a spec's `freeze` names them."""
        match self:
            case Place.PATCH_EMBED | Place.VIT_LAYER:
                return "vision_encoder"
            case Place.PROJECTOR:
                return "vision_projector"
            case Place.EMBEDDING | Place.LLM_LAYER | Place.OUTPUT:
                return "text_decoder"


TOWERS = tuple(dict.fromkeys(place.tower for place in Place))
"""In the order of the forward pass."""


@dataclass(frozen=True)
class Rows:
    """Rows `[row, row + count)` of an mm tensor are the rows from `source_row` on of `source`, a HF tensor."""

    row: int
    source: str
    source_row: int
    count: int


@dataclass(frozen=True)
class Rename:
    """The same tensor under another name. With tied embeddings `tied_to` stands in: HF stores nothing under `hf`."""

    hf: str
    mm: str
    place: Place
    shape: tuple[str, ...]
    tied_to: str | None = None

    def hf_shapes(self, dims: Dims) -> dict[str, Shape]:
        """HF name -> shape."""
        return {self.hf: resolve(self.shape, dims)}

    def mm_shape(self, dims: Dims) -> Shape:
        """Shape before any tensor-parallel cut."""
        return resolve(self.shape, dims)

    def rows(self, dims: Dims) -> Iterator[Rows]:
        """All rows, in order."""
        yield Rows(0, self.hf, 0, dims[self.shape[0]])


@dataclass(frozen=True)
class FuseQKV:
    """Grouped-query attention: `hf` is (q, k, v); each is cut in `groups` parts on dim 0, dealt out in turn."""

    hf: tuple[str, str, str]
    mm: str
    place: Place
    heads: str
    groups: str
    head_dim: str
    tail: tuple[str, ...] = ()

    def _parts(self, dims: Dims) -> tuple[int, int, int]:
        """Rows of one group in q, k and v."""
        head = dims[self.head_dim]
        return dims[self.heads] // dims[self.groups] * head, head, head

    def hf_shapes(self, dims: Dims) -> dict[str, Shape]:
        """HF name -> shape."""
        tail = resolve(self.tail, dims)
        return {name: (part * dims[self.groups], *tail) for name, part in zip(self.hf, self._parts(dims), strict=True)}

    def mm_shape(self, dims: Dims) -> Shape:
        """Shape before any tensor-parallel cut."""
        return (sum(self._parts(dims)) * dims[self.groups], *resolve(self.tail, dims))

    def rows(self, dims: Dims) -> Iterator[Rows]:
        """q_0 k_0 v_0 q_1 k_1 v_1 …"""
        row = 0
        for group in range(dims[self.groups]):
            for name, part in zip(self.hf, self._parts(dims), strict=True):
                yield Rows(row, name, group * part, part)
                row += part


@dataclass(frozen=True)
class InterleaveQKV:
    """One stacked (q, k, v) tensor: each third is cut in `heads` parts on dim 0, dealt out in turn."""

    hf: str
    mm: str
    place: Place
    heads: str
    head_dim: str
    tail: tuple[str, ...] = ()

    def hf_shapes(self, dims: Dims) -> dict[str, Shape]:
        """HF name -> shape."""
        return {self.hf: self.mm_shape(dims)}

    def mm_shape(self, dims: Dims) -> Shape:
        """Shape before any tensor-parallel cut."""
        return (3 * dims[self.heads] * dims[self.head_dim], *resolve(self.tail, dims))

    def rows(self, dims: Dims) -> Iterator[Rows]:
        """q_0 k_0 v_0 q_1 k_1 v_1 …"""
        heads, head = dims[self.heads], dims[self.head_dim]
        for index in range(heads):
            for third in range(3):
                yield Rows((3 * index + third) * head, self.hf, (third * heads + index) * head, head)


@dataclass(frozen=True)
class FuseGateUp:
    """The two inputs of a gated MLP: `hf` is (gate, up), stacked on dim 0; `width` is the rows of each."""

    hf: tuple[str, str]
    mm: str
    place: Place
    width: str
    tail: tuple[str, ...] = ()

    def hf_shapes(self, dims: Dims) -> dict[str, Shape]:
        """HF name -> shape."""
        return {name: resolve((self.width, *self.tail), dims) for name in self.hf}

    def mm_shape(self, dims: Dims) -> Shape:
        """Shape before any tensor-parallel cut."""
        return (2 * dims[self.width], *resolve(self.tail, dims))

    def rows(self, dims: Dims) -> Iterator[Rows]:
        """All of gate, then all of up."""
        width = dims[self.width]
        for index, name in enumerate(self.hf):
            yield Rows(index * width, name, 0, width)


Rule = Rename | FuseQKV | InterleaveQKV | FuseGateUp


def resolve(names: tuple[str, ...], dims: Dims) -> Shape:
    """The sizes behind dimension names."""
    return tuple(dims[name] for name in names)


def width(shape: Shape) -> int:
    """Elements per row: the product of all dimensions but the first."""
    return math.prod(shape[1:])


def at_layer(pattern: str, layer: int) -> str:
    """The name of one layer's weight; patterns without `{layer}` are names already."""
    return pattern.replace("{layer}", str(layer))


# transformers 4.52 renamed the parts of the model; what is saved to disk may carry either. Tables use the old names.
NEW_TO_OLD_PREFIX = {"model.language_model.": "model.", "model.visual.": "visual."}


def new_name(name: str) -> str:
    """The same key in the new form."""
    for new, old in reversed(NEW_TO_OLD_PREFIX.items()):
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def old_name(key: str) -> str:
    """A HF key in the old form (`visual.*`, `model.*`, `lm_head.*`), whichever form it came in."""
    for new, old in NEW_TO_OLD_PREFIX.items():
        if key.startswith(new):
            return old + key[len(new) :]
    return key
