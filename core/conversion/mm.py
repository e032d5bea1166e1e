"""mm checkpoints: rank files written and read. The folder's layout is `core.models.mm_folder`'s, which needs no torch."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from core.conversion.apply import ITEM_SIZE, Bytes, Part, same_bytes
from core.conversion.files import HashingWriter, OutTensor, make_folder
from core.conversion.pt import PtFile, PtTensor, from_torch, write_pt
from core.errors import CorruptCheckpoint, IncompatiblePlan, UnknownWeights
from core.models.adapter import adapter_layouts, shapes_of_ranks
from core.models.config import Config
from core.models.hf_folder import listed
from core.models.layout import Block, RankLayout, TensorLayout, rank_layouts, tied_names
from core.models.mapping import Rename, Shape
from core.models.mm_folder import RANK_FILE, TRACKER, MMFolder, rank_dir
from core.models.plan import Split
from core.models.registry import get_family

if TYPE_CHECKING:
    import torch

__all__ = ["MMWeights", "rank_dir", "rank_tree", "write_rank_file", "write_tracker"]

_VIT, _LLM = "image_encoder.encoder.blocks.layers.", "text_decoder.decoder.layers."
CHECKPOINT_VERSION = 3.0
"""From this version on Megatron does not re-order qkv while loading."""


def rank_tree(chunks: tuple[Mapping[str, OutTensor], ...], **more: float) -> dict[str, Any]:
    """What a rank file holds: `model`, or `model0 … model{V-1}` with virtual chunks."""
    keys = ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]
    models = {key: dict(chunk) for key, chunk in zip(keys, chunks, strict=True)}
    return {"checkpoint_version": CHECKPOINT_VERSION, **more, **models}


def write_rank_file(path: Path, state_dict: Mapping[str, torch.Tensor], *, iteration: int | None = None) -> str:
    """Write the weights of one rank; `path` is the file. Those of virtual chunks are named `model0.…`, `model1.…`. Returns its SHA-256."""
    make_folder(path.parent)
    more = {} if iteration is None else {"iteration": iteration}
    chunks: dict[str, dict[str, OutTensor]] = defaultdict(dict)
    for name, tensor in state_dict.items():
        found = re.fullmatch(r"(?:(model\d+)\.)?(.+)", name)
        assert found is not None, "names are not empty"
        chunks[found[1] or "model"][found[2]] = from_torch(tensor)
    models = {key: chunks[key] for key in sorted(chunks, key=_natural)} or {"model": {}}
    return write_pt(path, {"checkpoint_version": CHECKPOINT_VERSION, **more, **models})


def _natural(key: str) -> tuple[int, str]:
    return len(key), key


def write_tracker(mm_dir: Path, iteration: int | None = None) -> None:
    """Write `latest_checkpointed_iteration.txt`, without a line end as upstream does."""
    with HashingWriter.open(mm_dir / TRACKER) as out:
        out.write(b"release" if iteration is None else str(iteration).encode())


class Warner(Protocol):
    """Hears of what the user should know."""

    def warn(self, code: str, message: str) -> None:
        """`code` for programs, `message` for people."""


@dataclass(frozen=True)
class _Piece:
    """A rectangle in HF coordinates and the tensor of a rank file that holds it, all of its columns."""

    block: Block
    tensor: PtTensor
    where: str


class MMWeights:
    """The weights of a checkpoint folder as a `WeightSource`, whatever its split.

    Opening it checks every rank file's names and shapes against the layout. Raises CorruptCheckpoint, UnknownWeights, and
    IncompatiblePlan when `parallel` is not how the checkpoint was split.
    """

    def __init__(self, folder: MMFolder, config: Config, parallel: Split) -> None:
        self._pieces: dict[str, list[_Piece]] = defaultdict(list)
        self._replicas: list[tuple[_Piece, _Piece]] = []
        self._tied_to = set(tied_names(config).values())
        files = {(pp_rank, tp_rank): file for pp_rank, tp_rank, file in folder.rank_files()}
        self._files = {rank: PtFile(file) for rank, file in files.items()}
        trees = {rank: file.tree for rank, file in self._files.items()}
        self.canonical = any(".q_proj." in name for tree in trees.values() for name in _all_names(tree))
        seen: dict[tuple[str, int, int], _Piece] = {}
        for rank in self._layouts(config, parallel, trees):
            file = files[rank.pp_rank, rank.tp_rank]
            try:
                models = _models(trees[rank.pp_rank, rank.tp_rank], rank, file, config)
            except IncompatiblePlan as error:
                raise IncompatiblePlan(error.message, hint=_layout_hint(trees)) from error
            for layouts, model in zip(rank.chunks, models, strict=True):
                for piece in _pieces(layouts, model, file):
                    self._add(piece, seen)
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece.block.source_row)

    def _layouts(self, config: Config, parallel: Split, _: Mapping[tuple[int, int], Any]) -> Iterable[RankLayout]:
        return rank_layouts(config, parallel, canonical=self.canonical)

    def _add(self, piece: _Piece, seen: dict[tuple[str, int, int], _Piece]) -> None:
        key = (piece.block.source, piece.block.source_row, piece.block.column)
        if key in seen:
            self._replicas.append((seen[key], piece))
        else:
            seen[key] = piece
            self._pieces[piece.block.source].append(piece)

    def blocks(self) -> Iterator[Block]:
        """Every rectangle that is held, replicas left out."""
        for pieces in self._pieces.values():
            yield from (piece.block for piece in pieces)

    def dtype(self, name: str) -> str:
        """float32, float16 or bfloat16."""
        dtypes = {piece.tensor.dtype for piece in self._pieces[name]}
        if len(dtypes) > 1 or not dtypes <= set(ITEM_SIZE):
            raise CorruptCheckpoint(f"the parts of {name} have types {', '.join(sorted(dtypes))}")
        return dtypes.pop()

    def parts(self, name: str, rows: tuple[int, int], columns: tuple[int, int]) -> Iterator[Part]:
        """The pieces of the rectangle that the ranks hold."""
        item = ITEM_SIZE[self.dtype(name)]
        for piece in self._pieces[name]:
            block = piece.block
            top, bottom = max(rows[0], block.source_row), min(rows[1], block.source_row + block.rows)
            left, right = max(columns[0], block.column), min(columns[1], block.column + block.columns)
            if top < bottom and left < right:
                piece.tensor.record.check()
                row, column = top + block.row - block.source_row, (left - block.column) * item
                data = piece.tensor.matrix[row : row + bottom - top, column : column + (right - left) * item]
                yield Part(name, top - rows[0], (left - columns[0]) * item, data)

    def release(self) -> None:
        """Free the memory that reading took."""
        for file in list(self._files.values()):
            file.release()

    def from_disk(self) -> None:
        """Have the files read from the disk itself from now on, not from the system's cache."""
        for file in self._files.values():
            file.drop_cache()

    def differing_replicas(self) -> tuple[list[str], list[str]]:
        """Weights that should be equal on several ranks and are not: (tied embeddings, others)."""
        tied: list[str] = []
        others: list[str] = []
        for number, (first, second) in enumerate(self._replicas):
            if number % 100 == 0:
                self.release()
            if not same_bytes(_rows(first), _rows(second)):
                for piece in (first, second):  # one that is damaged is no difference to warn of
                    piece.tensor.record.check()
                (tied if first.block.source in self._tied_to else others).append(second.where)
        self.release()
        return tied, others

    def warn_of_replicas(self, watch: Warner) -> None:
        """Say which replicas differ. Raises CorruptCheckpoint where one is a tied embedding."""
        tied, others = self.differing_replicas()
        if tied:
            raise CorruptCheckpoint(f"{listed(tied)} differs from the embedding, but config.json ties them")
        if others:
            watch.warn("replicas_differ", f"not equal on all tensor-parallel ranks, rank 0 is taken: {listed(others)}")


class AdapterWeights(MMWeights):
    """The LoRA matrices of a checkpoint folder. Which modules have some, and of what rank, is read from the files."""

    shapes: dict[str, Shape]
    """HF name -> shape of the whole matrix."""

    def _layouts(self, config: Config, parallel: Split, trees: Mapping[tuple[int, int], Any]) -> Iterable[RankLayout]:
        pp_size = len(parallel.llm_pp_layers[0])
        found = []
        for (pp_rank, tp_rank), tree in sorted(trees.items()):
            if tp_rank == 0 and isinstance(tree, dict):
                keys = [f"model{chunk}" for chunk in range(len(parallel.llm_pp_layers))]
                models = [tree["model"]] if "model" in tree else [tree.get(key, {}) for key in keys]
                for chunk, model in enumerate(models):
                    tensors = {name: tensor for name, tensor in model.items() if isinstance(tensor, PtTensor)}
                    found += [(chunk * pp_size + pp_rank, name, tensor.shape) for name, tensor in tensors.items()]
        self.shapes = shapes_of_ranks(config, parallel, found)
        return adapter_layouts(config, parallel, self.shapes)


def _rows(piece: _Piece) -> Bytes:
    return piece.tensor.matrix[piece.block.row : piece.block.row + piece.block.rows]


def _all_names(tree: Any) -> Iterator[str]:
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(key, str) and re.fullmatch(r"model\d*", key) and isinstance(value, dict):
            yield from (str(name) for name in value)


def _models(tree: Any, rank: RankLayout, file: Path, config: Config) -> list[dict[str, PtTensor]]:
    """The weights of each virtual chunk, checked by name."""
    if not isinstance(tree, dict):
        raise CorruptCheckpoint(f"{file} does not hold a dictionary")
    wanted = ["model"] if len(rank.chunks) == 1 else [f"model{index}" for index in range(len(rank.chunks))]
    found = sorted(key for key in tree if isinstance(key, str) and re.fullmatch(r"model\d*", key))
    if found != sorted(wanted):
        raise IncompatiblePlan(
            f"{file} holds {', '.join(found) or 'no model'}, but the layout given makes it {', '.join(wanted)}"
        )
    models = []
    for key, layouts in zip(wanted, rank.chunks, strict=True):
        if not isinstance(tree[key], dict):
            raise CorruptCheckpoint(f"{file}: {key} is not a dictionary of tensors")
        model = {name: tensor for name, tensor in tree[key].items() if not _is_extra_state(name, tensor)}
        _check_names(model, layouts, f"{file}: {key}", config)
        models.append(model)
    return models


def _layout_hint(trees: Mapping[tuple[int, int], Any]) -> str | None:
    """What the rank files themselves say of their layout: the layers of each chunk of each pipeline rank."""
    first = [tree for (_, tp_rank), tree in sorted(trees.items()) if tp_rank == 0 and isinstance(tree, dict)]
    keys = sorted({key for tree in first for key in tree if re.fullmatch(r"model\d*", str(key))}, key=_natural)
    llm, vit = ([[_count_layers(tree.get(key, {}), tower) for tree in first] for key in keys] for tower in (_LLM, _VIT))
    return f"the rank files hold llm_pp_layers {llm}, vit_pp_layers {vit}" if keys else None


def _is_extra_state(name: object, value: object) -> bool:
    return str(name).endswith("_extra_state") and not isinstance(value, PtTensor)


def _check_names(model: Mapping[str, object], layouts: Mapping[str, TensorLayout], where: str, config: Config) -> None:
    for tower in (_VIT, _LLM):
        has, wants = _count_layers(model, tower), _count_layers(layouts, tower)
        if has != wants:
            raise IncompatiblePlan(f"{where} has {has} layers {tower}*, but the layout given makes it {wants}")
    optional = _tied_outputs(config)
    missing = [name for name in layouts if name not in model and name not in optional]
    unknown = [str(name) for name in model if name not in layouts and name not in optional]
    if missing or unknown:
        parts = [f"lacks {listed(missing)}"] if missing else []
        parts += [f"has {listed(unknown)}, which no rule matches"] if unknown else []
        raise UnknownWeights(f"{where} {' and '.join(parts)}")


def _tied_outputs(config: Config) -> set[str]:
    """mm names that a checkpoint may or may not store, because their tensor is stored elsewhere."""
    rules = get_family(config.family).mapping
    return {rule.mm for rule in rules if isinstance(rule, Rename) and rule.tied_to and config.tie_word_embeddings}


def _count_layers(names: Mapping[str, object], tower: str) -> int:
    return len({name[len(tower) :].split(".")[0] for name in names if str(name).startswith(tower)})


def _pieces(layouts: Mapping[str, TensorLayout], model: Mapping[str, object], file: Path) -> Iterator[_Piece]:
    for name, layout in layouts.items():
        tensor = model.get(name)
        if tensor is None:
            continue  # a tied output layer that was left out
        if not isinstance(tensor, PtTensor):
            raise CorruptCheckpoint(f"{file}: {name} is not a tensor")
        if tensor.shape != layout.shape:
            raise CorruptCheckpoint(
                f"{file}: {name} has shape {list(tensor.shape)}, but config and layout make it {list(layout.shape)}"
            )
        for block in layout.blocks:
            yield _Piece(block, tensor, f"{file.parent.name}/{RANK_FILE}: {name}")
