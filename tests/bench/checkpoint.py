"""How long training waits for a checkpoint: `python -m tests.bench.checkpoint [FOLDER]`.

One rank with the weights of a slice in bfloat16 and AdamW's state of all of them, on FOLDER's disk. `waits` is what `save` takes, a copy
to host memory that was taken before; `complete` is until the checkpoint has its name: so long would a training wait that does not write
in the background.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from core.parallel.mesh import Mesh
from core.training.checkpoint import Checkpoints, Facts, Position
from core.training.contents import Contents
from core.training.optimizer import OptimizerState, Piece

SHAPES = {"embedding": (32_000, 2048)} | {
    f"layers.{layer}.{name}": shape
    for layer in range(2)
    for name, shape in (("qkv", (2560, 2048)), ("proj", (2048, 2048)), ("fc1", (22_016, 2048)), ("fc2", (2048, 11_008)))
}
"""65 million of an embedding, and two layers of the 3B model: 0.22 billion parameters."""
REPEATS = 5


def main(folder: Path) -> None:
    """Print both times, medians."""
    weights = {name: torch.rand(shape).bfloat16() for name, shape in SHAPES.items()}
    pieces = {
        name: Piece(0, tensor.numel(), {kind: torch.rand(tensor.numel()) for kind in ("exp_avg", "exp_avg_sq", "master")})
        for name, tensor in weights.items()
    }  # fmt: skip
    contents = Contents(weights, OptimizerState(1, pieces))
    checkpoints = Checkpoints(folder, Mesh(), rank_folder="mp_rank_00", keep_last=1)
    checkpoints.reserve(contents)
    checkpoints._end_reserving()
    waited_s, complete_s = [], []
    for iteration in range(1, REPEATS + 1):
        began = time.perf_counter()
        checkpoints.save(Facts(Position(iteration, iteration), {}, "bf16", 42, "", has_optimizer=True), contents)
        waited_s.append(time.perf_counter() - began)
        checkpoints.wait()
        complete_s.append(time.perf_counter() - began)
    waits, complete = statistics.median(waited_s), statistics.median(complete_s)
    print(
        f"{contents.size_bytes / 1e9:.2f} GB: training waits {waits:.2f} s, complete after {complete:.2f} s, "
        f"{complete / waits:.0f} times as long (medians of {REPEATS})"
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as temporary:
        main(Path(temporary))
