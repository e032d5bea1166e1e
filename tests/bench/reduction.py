"""What it saves to send gradients while the backward pass goes on, and what each of two data-parallel ranks holds of the optimizer's state.

    python -m tests.bench.reduction [ROUNDS] [--rate 1gbit | --rate none]

Both ways of sending take turns step by step in the same processes (gloo, one thread each), so noise hits both alike: over loopback, and
over a wire of the given rate (`tests.bench.wire`; wants root). On a CPU the messages are copied by the cores that compute, so over
loopback, where that is all there is to it, nothing can be gained; a wire is waited for. Gloo has no reduce-scatter and sums everything,
so twice as much is sent as by NCCL or HCCL.
"""

from __future__ import annotations

import argparse
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
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
from tests.bench.wire import LOOPBACK, Place, run_at, wire
from tests.core.training.tiny import NOTHING_FROZEN

SETTING = Setting(hidden=512, ffn=1376, llm_layers=8, vocab=8192, lengths=(64, 64), image_side=8)
BUCKET_BYTES = 4 << 20
NUM_MICRO_BATCHES = 2
TIMEOUT_S = 900


@dataclass
class Times:
    """Of the steps of one way of sending, from the same start on both ranks."""

    computed_s: list[float] = field(default_factory=list)
    """Up to the end of the last backward pass."""
    summed_s: list[float] = field(default_factory=list)
    """Until the rank has the sums."""
    updated_s: list[float] = field(default_factory=list)
    """From there until it has all new weights."""

    @property
    def waited_s(self) -> list[float]:
        """From the end of the last backward pass until the rank has the sums."""
        return [summed - computed for summed, computed in zip(self.summed_s, self.computed_s, strict=True)]


@dataclass(frozen=True)
class Reading:
    """Of one rank."""

    early: Times
    afterwards: Times
    num_buckets: int
    num_sent_early: int
    state_bytes: int
    gradients_bytes: int


def measure(rounds: int) -> Reading:
    """Train some steps; of each round one step sends gradients early and one does not, in turns the first."""
    config, accelerator, mesh = SETTING.config(), CpuAccelerator(), build_mesh(pp_size=1, dp_size=2)
    model = Qwen2_5_VLStage(config, whole(config), accelerator=accelerator)
    freeze(model, NOTHING_FROZEN)
    optimizer = Optimizer(model, OptimizerSpec(), mesh, bucket_bytes=BUCKET_BYTES)
    head = Head(model, accelerator.device, mesh, targets_only=True)
    pipeline = build_pipeline([model], head, mesh, config, [whole(config)], NOTHING_FROZEN, accelerator)
    batches = [batch_of(SETTING, config, lengths=SETTING.lengths, side=SETTING.image_side)] * NUM_MICRO_BATCHES
    times = {True: Times(), False: Times()}
    num_sent_early = 0
    for turn in range(rounds + 1):  # the first warms up
        for is_early in (True, False) if turn % 2 else (False, True):
            optimizer.clear_gradients()
            dist.barrier()
            start = time.perf_counter()
            pipeline.run(batches, last_pass=optimizer.last_pass if is_early else nullcontext)
            computed = time.perf_counter()
            num_sent_early = max(num_sent_early, len(optimizer.buffer.under_way))
            optimizer.reduce_gradients()
            summed = time.perf_counter()
            head.take()
            dist.barrier()
            stepped = time.perf_counter()
            optimizer.step(learning_rate=1e-5, num_targets=1000, squared_norm=1.0)
            if turn:
                times[is_early].computed_s.append(computed - start)
                times[is_early].summed_s.append(summed - start)
                times[is_early].updated_s.append(time.perf_counter() - stepped)
    pieces = optimizer.state_dict().pieces.values()
    return Reading(
        times[True],
        times[False],
        len(optimizer.buffer.buckets),
        num_sent_early,
        sum(tensor.nbytes for piece in pieces for tensor in piece.tensors.values()),
        optimizer.buffer.gradients.nbytes,
    )


def readings_at(places: Sequence[Place], rounds: int) -> list[Reading]:
    """Measure with one rank at each of two places."""
    with tempfile.TemporaryDirectory() as folder:
        commands = [
            [sys.executable, "-m", "tests.bench.reduction", str(rounds), "--rank", str(rank), "--folder", folder]
            for rank in range(len(places))
        ]
        run_at(places, commands, timeout_s=TIMEOUT_S)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(len(places))]


def report(name: str, readings: Sequence[Reading]) -> str:
    """Tell; a step takes as long as its slower rank."""
    first = readings[0]

    def slower(of: Callable[[Reading], list[float]]) -> list[float]:
        return [max(pair) for pair in zip(*map(of, readings), strict=True)]

    early, late = slower(lambda r: r.early.summed_s), slower(lambda r: r.afterwards.summed_s)
    waiting, sending = slower(lambda r: r.early.waited_s), slower(lambda r: r.afterwards.waited_s)
    gain = statistics.median(slow / fast for slow, fast in zip(late, early, strict=True))
    update = statistics.median(slower(lambda r: [*r.early.updated_s, *r.afterwards.updated_s]))
    return (
        f"{name}: {first.num_sent_early} of {first.num_buckets} buckets sent during the backward pass, after which ranks wait "
        f"{statistics.median(waiting):.2f} s for the sums; with all sent afterwards {statistics.median(sending):.2f} s. Step up to the "
        f"sums {statistics.median(early):.2f} s and {statistics.median(late):.2f} s: faster by {gain:.2f}. Update and new weights "
        f"{update:.2f} s (medians of {len(early)}; {machine()})"
    )


def main() -> None:
    """Measure over loopback and, unless the rate is `none`, over a wire."""
    parser = argparse.ArgumentParser()
    parser.add_argument("rounds", nargs="?", type=int, default=10)
    parser.add_argument("--rate", default="1gbit")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        _measure_as(given.rank, given.folder, given.rounds)
        return
    readings = readings_at(LOOPBACK, given.rounds)
    states = ", ".join(f"{reading.state_bytes / 2**20:.0f}" for reading in readings)
    print(f"{readings[0].gradients_bytes / 2**20:.0f} MiB of gradients; AdamW's state {states} MiB on the two ranks")
    print(report("loopback", readings), flush=True)
    if given.rate != "none":
        with wire(given.rate) as ends:
            print(report(f"wire of {given.rate}", readings_at(ends, given.rounds)))


def _measure_as(rank: int, folder: Path, rounds: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT_S))
    (folder / str(rank)).write_bytes(pickle.dumps(measure(rounds)))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
