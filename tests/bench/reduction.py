"""What it saves to send gradients while the backward pass goes on, and what each of two data-parallel ranks holds of the optimizer's state.

    python -m tests.bench.reduction [ROUNDS]

Both ways of sending take turns step by step in the same processes (gloo, one thread each), so noise hits both alike. On a CPU the
messages are carried by the cores that compute: an accelerator, whose messages need none of its cores, has more to gain.
"""

from __future__ import annotations

import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch.distributed as dist

from core.device.cpu import CpuAccelerator
from core.models.plan import whole
from core.models.qwen2_5_vl.model import Qwen2_5_VLStage
from core.parallel.mesh import build_mesh
from core.specs.training import OptimizerSpec
from core.training.freeze import freeze
from core.training.optimizer import Optimizer
from core.training.wiring import Head, build_pipeline
from tests.bench.lockstep import machine
from tests.bench.memory import Setting, batch_of
from tests.core.training.tiny import NOTHING_FROZEN
from tests.distributed import run

SETTING = Setting(hidden=512, ffn=1376, llm_layers=8, vocab=8192, lengths=(64, 64), image_side=8)
BUCKET_BYTES = 4 << 20
NUM_MICRO_BATCHES = 2


@dataclass(frozen=True)
class Reading:
    """Of one rank."""

    overlapped_s: list[float]
    """Each step, from the same start on both ranks until it has the sums."""
    afterwards_s: list[float]
    num_buckets: int
    num_sent_early: int
    state_bytes: int
    gradients_bytes: int


def measure(rank: int, rounds: int) -> Reading:
    """Train some steps; of each round one step sends gradients early and one does not, in turns the first."""
    config, accelerator, mesh = SETTING.config(), CpuAccelerator(), build_mesh(pp_size=1, dp_size=2)
    model = Qwen2_5_VLStage(config, whole(config), accelerator=accelerator)
    freeze(model, NOTHING_FROZEN)
    optimizer = Optimizer(model, OptimizerSpec(), mesh, bucket_bytes=BUCKET_BYTES)
    head = Head(model, accelerator.device, mesh, targets_only=True)
    pipeline = build_pipeline([model], head, mesh, config, [whole(config)], NOTHING_FROZEN, accelerator)
    batches = [batch_of(SETTING, config, lengths=SETTING.lengths, side=SETTING.image_side)] * NUM_MICRO_BATCHES
    seconds: dict[bool, list[float]] = {True: [], False: []}
    num_sent_early = 0
    for turn in range(rounds + 1):  # the first warms up
        for is_overlapped in (True, False) if turn % 2 else (False, True):
            optimizer.clear_gradients()
            dist.barrier()
            start = time.perf_counter()
            pipeline.run(batches, last_pass=optimizer.last_pass if is_overlapped else nullcontext)
            num_sent_early = max(num_sent_early, len(optimizer.buffer.under_way))
            optimizer.reduce_gradients()
            if turn:
                seconds[is_overlapped].append(time.perf_counter() - start)
            head.take()
            optimizer.step(learning_rate=1e-5, num_targets=1000, squared_norm=1.0)
    pieces = optimizer.state_dict().pieces.values()
    return Reading(
        seconds[True],
        seconds[False],
        len(optimizer.buffer.buckets),
        num_sent_early,
        sum(tensor.nbytes for piece in pieces for tensor in piece.tensors.values()),
        optimizer.buffer.gradients.nbytes,
    )


def report(rounds: int = 10) -> str:
    """Measure and tell; a step takes as long as its slower rank."""
    readings = run(measure, 2, rounds, timeout_s=600)
    overlapped, afterwards = (
        [max(pair) for pair in zip(*times, strict=True)]
        for times in ([reading.overlapped_s for reading in readings], [reading.afterwards_s for reading in readings])
    )
    first = readings[0]
    early, late = statistics.median(overlapped), statistics.median(afterwards)
    gain = statistics.median(slow / fast for slow, fast in zip(afterwards, overlapped, strict=True))
    states = ", ".join(f"{reading.state_bytes / 2**20:.0f}" for reading in readings)
    return (
        f"{first.gradients_bytes / 2**20:.0f} MiB of gradients in {first.num_buckets} buckets, {first.num_sent_early} of them sent during "
        f"the backward pass; step up to the sums {early:.2f} s, with all sent afterwards {late:.2f} s: faster by {gain:.2f} "
        f"(medians of {rounds}); AdamW's state {states} MiB on the two ranks; {machine()}"
    )


if __name__ == "__main__":
    print(report(*map(int, sys.argv[1:])))
