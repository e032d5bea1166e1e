"""What one rank puts into a checkpoint, its copy in host memory, and how the files of it are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from core.conversion.pt import from_torch
from core.training.optimizer import OptimizerState, Piece

OPTIMIZER_FILES = "temper_optim_*.pt"

Name = TypeVar("Name", bound=str)


@dataclass(frozen=True)
class Contents:
    """What one rank has to save."""

    weights: Mapping[str, Tensor]
    optimizer: OptimizerState | None = None
    rng: Mapping[str, Tensor] | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        pieces = self.optimizer.pieces.values() if self.optimizer else ()
        states = [tensor for piece in pieces for tensor in piece.tensors.values()]
        return sum(tensor.nbytes for tensor in (*self.weights.values(), *states, *(self.rng or {}).values()))

    def copied(self, into: Contents | None) -> Contents:
        """Copy everything to host memory: that of an earlier copy, which is much faster than memory never touched, or new."""
        into = into or Contents({})
        old_pieces = into.optimizer.pieces if into.optimizer else {}
        pieces = {
            name: replace(piece, tensors=_copied(piece.tensors, old_pieces[name].tensors if name in old_pieces else {}))
            for name, piece in (self.optimizer.pieces if self.optimizer else {}).items()
        }
        return Contents(
            _copied(self.weights, into.weights),
            replace(self.optimizer, pieces=pieces) if self.optimizer else None,
            self.rng,  # made anew each time it is asked for
        )


def load_file(path: Path) -> dict[str, Any]:
    """Read a file of tensors by memory map; plain containers only."""
    return torch.load(path, weights_only=True, mmap=True, map_location="cpu")


def load_optimizer(path: Path) -> OptimizerState:
    """Read one rank's file, by memory map."""
    tree = load_file(path)
    pieces = {name: Piece(piece.pop("start"), piece.pop("stop"), piece) for name, piece in tree["pieces"].items()}
    return OptimizerState(tree["num_steps"], pieces)


def tree_of(state: OptimizerState) -> dict[str, Any]:
    """What a file of optimizer state holds."""
    pieces = {
        name: {"start": piece.start, "stop": piece.stop, **{kind: from_torch(t) for kind, t in piece.tensors.items()}}
        for name, piece in state.pieces.items()
    }
    return {"num_steps": state.num_steps, "pieces": pieces}


def _copied(tensors: Mapping[Name, Tensor], into: Mapping[Name, Tensor]) -> dict[Name, Tensor]:
    out = {}
    for name, tensor in tensors.items():
        old = into.get(name)
        fits = old is not None and (old.shape, old.dtype) == (tensor.shape, tensor.dtype)
        target = old if old is not None and fits else torch.empty(tensor.shape, dtype=tensor.dtype)
        out[name] = target.copy_(tensor.detach())
    return out
