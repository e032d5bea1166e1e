"""`make bench-training`: the training engine against transformers' Trainer and TRL's SFTTrainer on this machine's CPU.

Prints tables; asserts that losses agree, and no times. Each part runs on its own: `make bench-training ARGS="-k equal"`.
"""

import json
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

from core.runners.__main__ import TORCH_SETTINGS
from tests.bench import reduction
from tests.bench.digits import train_digits
from tests.bench.engines import Options
from tests.bench.lockstep import Runner, machine, ratio, take_turns
from tests.bench.peers import peers_python
from tests.bench.samples import (
    QUARTER_3B,
    SLICE_3B,
    Sample,
    equal_rows,
    photo_rows,
    read_rows,
    write_dataset,
    write_model,
)
from tests.digits import write_digits
from tests.digits import write_model as write_digits_model

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]

THREADS = 2
TOLERANCE = 1e-4
GATE_STEPS = 10

Start = Callable[..., Runner]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts engines in a folder that is removed afterwards, the processes too."""
    runners: list[Runner] = []

    def start_one(engine: str, folder: Path, options: Options, *, name: str = "") -> Runner:
        python = peers_python() if engine in ("hf", "trl") else Path(sys.executable)
        command = [python, "-m", "tests.bench.engines", engine, folder, json.dumps(asdict(options))]
        log = tmp_path / f"{name or engine}.log"
        settings = TORCH_SETTINGS if engine in ("temper", "bare") else {}  # what `python -m core.runners` sets
        runners.append(Runner.start(name or engine, command, log=log, threads=options.threads, environment=settings))
        return runners[-1]

    yield start_one
    for runner in runners:
        runner.stop()
    shutil.rmtree(tmp_path, ignore_errors=True)


class TestAgainstPeers:
    def test_equal_rows(self, start: Start, tmp_path: Path) -> None:
        """(a) Real width, 512-token rows, vision frozen. No row is padded by anybody: what is measured is the computation."""
        steps, batch = GATE_STEPS, 1
        write_model(tmp_path, SLICE_3B)
        write_dataset(tmp_path, equal_rows(tmp_path, count=steps * batch))
        options = Options(global_batch_size=batch)
        runners = [start(engine, tmp_path, options) for engine in ("temper", "hf", "trl")]
        take_turns(runners, rounds=steps - 2)
        show(
            "(a) 3B width, 2 + 4 layers, 512-token rows, 128 of them learnt, vision frozen", runners, tmp_path, options
        )
        check_losses(runners)

    def test_photos(self, start: Start, data_dir: Path, tmp_path: Path) -> None:
        """(b) The same model on rows as they come. The peers pad a batch of 4, or compute one row at a time."""
        steps, batch = GATE_STEPS, 4
        write_model(tmp_path, SLICE_3B)
        samples = photo_rows(tmp_path, data_dir / "cc12m", count=steps * batch)
        write_dataset(tmp_path, samples)
        options = Options(global_batch_size=batch, micro_batch_size=2, seq_length=1024)
        runners = [
            start("temper", tmp_path, options),
            start("hf", tmp_path, Options(batch, 4), name="hf, rows of 4 padded"),
            start("hf", tmp_path, Options(batch, 1), name="hf, row by row"),
            start("trl", tmp_path, Options(batch, 4), name="trl, rows of 4 padded"),
        ]
        take_turns(runners, rounds=steps - 1, warmup=1)
        show(f"(b) photos and text, {describe(samples)}, vision frozen", runners, tmp_path, options)
        check_losses(runners)

    def test_gate_on_ten_steps_of_a_small_model_with_both_towers_trained(self, start: Start, tmp_path: Path) -> None:
        """Labels, order, clipping and AdamW are the same for everybody, also where everything is trained."""
        write_model(tmp_path, QUARTER_3B)
        write_dataset(tmp_path, equal_rows(tmp_path, count=GATE_STEPS * 2, num_tokens=300, num_targets=30))
        options = Options(global_batch_size=2, micro_batch_size=2, freeze_vision=False)
        runners = [start(engine, tmp_path, options) for engine in ("temper", "hf", "trl")]
        take_turns(runners, rounds=GATE_STEPS - 2)
        show("both towers trained, half the width, 4 + 4 layers, 300-token rows", runners, tmp_path, options)
        check_losses(runners)


class TestEngine:
    def test_recompute(self, start: Start, tmp_path: Path) -> None:
        """(c) What recompute costs and saves, both towers trained."""
        batch = 4
        write_model(tmp_path, QUARTER_3B)
        write_dataset(tmp_path, equal_rows(tmp_path, count=6 * batch))
        runners = []
        for policy in ("none", "selective", "full"):
            options = Options(batch, micro_batch_size=batch, freeze_vision=False, recompute=policy)
            runners.append(start("temper", tmp_path, options, name=policy))
        take_turns(runners, rounds=4)
        print(f"\n(c) recompute, both towers trained, half the width, 4 + 4 layers, {batch} × 512 tokens; {machine()}")
        print(f"{'policy':<12}{'step s':>9}{'speed':>18}{'by CPU':>8}{'peak MiB':>10}{'memory':>9}")
        for runner in runners:
            middle, low, high = ratio(runners[0].wall_s, runner.wall_s)
            cpu, _, _ = ratio(runners[0].cpu_s, runner.cpu_s)
            print(
                f"{runner.name:<12}{statistics.median(runner.wall_s):>9.2f}{middle:>8.2f} ({low:.2f}-{high:.2f})"
                f"{cpu:>8.2f}{runner.peak_bytes / 2**20:>10.0f}{runner.peak_bytes / runners[0].peak_bytes:>9.2f}"
            )
        check_losses(runners)

    def test_overhead(self, start: Start, tmp_path: Path) -> None:
        """(d) The engine against a loop that does nothing but forward, backward and optimizer on batches made before."""
        write_model(tmp_path, QUARTER_3B)
        write_dataset(tmp_path, equal_rows(tmp_path, count=20))
        options = Options(global_batch_size=2, micro_batch_size=2)
        bare, engine = (start(name, tmp_path, options) for name in ("bare", "temper"))
        take_turns([bare, engine], rounds=8)
        share, low, high = ratio(bare.wall_s, engine.wall_s)
        cpu, _, _ = ratio(bare.cpu_s, engine.cpu_s)
        print(f"\n(d) bare loop / engine: {share:.1%} ({low:.1%} to {high:.1%}), by CPU time {cpu:.1%}; {machine()}")
        check_losses([bare, engine])

    def test_last_layer(self, start: Start, tmp_path: Path) -> None:
        """How much of (a) comes from the last layer, which computes only what targets need: half of two layers here, 1/36 of 36."""
        write_model(tmp_path, SLICE_3B)
        write_dataset(tmp_path, equal_rows(tmp_path, count=5))
        trimmed = start("bare", tmp_path, Options(1))
        whole = start("bare", tmp_path, Options(1, every_position=True), name="every position")
        take_turns([trimmed, whole], rounds=4, warmup=1)
        gain, low, high = ratio(whole.wall_s, trimmed.wall_s)
        cpu, _, _ = ratio(whole.cpu_s, trimmed.cpu_s)
        print(
            f"\nlast layer for targets only, as (a): faster by {gain:.2f} ({low:.2f}-{high:.2f}), by CPU time {cpu:.2f}; {machine()}"
        )
        check_losses([trimmed, whole])

    def test_reduction(self) -> None:
        """Gradients sent while the backward pass goes on, and after it."""
        print(f"\ndata parallel on 2 processes: {reduction.report()}")

    def test_digits_on_two_processes(self, tmp_path: Path) -> None:
        """The demo's training, a model of half a million weights: what is measured is everything but arithmetic."""
        write_digits_model(tmp_path / "model")
        write_digits(tmp_path / "digits", limit=600)
        reading = train_digits(tmp_path, iterations=150)
        print(f"\ndigits on 2 processes: {reading}; {machine()}")


def show(title: str, runners: Sequence[Runner], folder: Path, options: Options) -> None:
    """Print a table of all engines; ratios are medians over the rounds, with the least and the greatest."""
    samples = read_rows(folder)
    batch = options.global_batch_size
    warmup = len(runners[0].losses) - len(runners[0].wall_s)
    tokens = [
        sum(sample.num_tokens for sample in samples[step * batch : (step + 1) * batch])
        for step in range(warmup, warmup + len(runners[0].wall_s))
    ]
    ours = runners[0]
    print(f"\n{title}; {batch} rows a step, {THREADS} threads; {machine()}")
    print(f"{'engine':<24}{'tokens/s':>9}{'step s':>8}{'CPU s':>7}{'ours faster by':>22}{'by CPU':>8}{'peak MiB':>10}")
    for runner in runners:
        speed = statistics.median(count / seconds for count, seconds in zip(tokens, runner.wall_s, strict=True))
        middle, low, high = ratio(runner.wall_s, ours.wall_s)
        cpu, _, _ = ratio(runner.cpu_s, ours.cpu_s)
        print(
            f"{runner.name:<24}{speed:>9.1f}{statistics.median(runner.wall_s):>8.2f}{statistics.median(runner.cpu_s):>7.2f}"
            f"{middle:>10.2f} ({low:.2f}-{high:.2f}){cpu:>8.2f}{runner.peak_bytes / 2**20:>10.0f}"
        )


def check_losses(runners: Sequence[Runner]) -> None:
    """The gate: the same loss at every step."""
    worst = max(
        abs(mine - other)
        for runner in runners[1:]
        for mine, other in zip(runners[0].losses, runner.losses, strict=True)
    )
    print(
        f"losses of {len(runners[0].losses)} steps agree to {worst:.1e}: {', '.join(f'{x:.4f}' for x in runners[0].losses)}"
    )
    assert worst <= TOLERANCE


def describe(samples: Sequence[Sample]) -> str:
    """Their lengths in words."""
    lengths = [sample.num_tokens for sample in samples]
    learnt = sum(sample.num_targets for sample in samples) / sum(lengths)
    return f"{min(lengths)} to {max(lengths)} tokens (mean {statistics.mean(lengths):.0f}), {learnt:.0%} learnt"
