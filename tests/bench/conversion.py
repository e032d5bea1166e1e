"""`make bench-conversion`: the three conversions as whole jobs against `cp -r` of the same bytes, in one run.

The model is a slice of Qwen2.5-VL 7B: its real layer shapes, four layers of each tower, a vocabulary of 32,000, bfloat16; 2.57 GB.
Each operation is a job's process as the worker starts it, from interpreter start to the published artifact: reading, permuting,
SHA-256 of every file, sync to disk, rename. Sources are in the page cache, for `cp` too. `--layers` and `--vocab` make larger models;
`--zeros` writes their values as holes of a sparse file. CPU seconds tell what an operation costs on a machine that is busy otherwise.

`--large` is about memory instead: 22.4 GB (40 layers of each tower, the whole vocabulary, a sparse source), once, without `cp`, with
`verify: logits`. It needs 45 GB of disk, and works in the folder that `--folder` names.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.models.hf_folder import inspect_hf_folder
from core.storage.local import Store
from core.storage.manifest import Manifest
from tests.tiny import TinyShape, tiny_config, weight_shapes

SLICE = TinyShape(
    vision_layers=4, vision_hidden=1280, vision_heads=16, vision_ffn=3420,
    text_layers=4, hidden=3584, heads=28, kv_heads=4, ffn=18944, window=112,
)  # fmt: skip
SHARD_BYTES = 1_400_000_000
IDS = {
    name: 31_990 + index
    for index, name in enumerate(
        ("<|endoftext|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    )
}


def write_model(folder: Path, shape: TinyShape, *, vocab_size: int, zeros: bool = False) -> int:
    """Write a HF folder without tokenizer, shard by shard, never holding a tensor; return the bytes of its weights.

    Values are one block of finite random numbers, repeated; with `zeros` nothing is written, and the files are sparse.
    """
    folder.mkdir(parents=True)
    config = tiny_config(shape, vocab_size=vocab_size, ids=IDS, dtype="bfloat16")
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    block = np.random.default_rng(0).standard_normal(1 << 21, dtype=np.float32).view(np.uint16)[1::2].tobytes()
    shards = list(_shards(weight_shapes(shape, vocab_size=vocab_size)))
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        _write_shard(folder / file, shard, block, zeros)
    total = sum(2 * math.prod(size) for shard in shards for size in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _shards(shapes: Iterator[tuple[str, tuple[int, ...]]]) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    filled = 0
    for name, size in shapes:
        if shard and filled + 2 * math.prod(size) > SHARD_BYTES:
            yield shard
            shard, filled = {}, 0
        shard[name] = size
        filled += 2 * math.prod(size)
    yield shard


def _write_shard(path: Path, shard: dict[str, tuple[int, ...]], block: bytes, zeros: bool) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, size in shard.items():
        stop = offset + 2 * math.prod(size)
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        if zeros:
            out.truncate(8 + len(text) + offset)
            return
        for begin in range(0, offset, len(block)):
            out.write(block[: min(len(block), offset - begin)])


@dataclass(frozen=True)
class Run:
    """One run of an operation. `written_s` is when every byte was written and hashed, `wall_s` when it was on the disk and published."""

    written_s: float
    wall_s: float
    cpu_s: float
    peak_bytes: int


@dataclass(frozen=True)
class Row:
    """An operation: its output's size and its runs."""

    name: str
    size_bytes: int
    runs: list[Run]

    def median(self, field: str) -> float:
        """Of one field of the runs."""
        return statistics.median(getattr(run, field) for run in self.runs)


class Bench:
    """Runs jobs one after another in one store."""

    def __init__(self, root: Path, repeat: int) -> None:
        self.root, self.repeat = root, repeat
        self.store = Store(root / "store")
        self.jobs = 0

    def copy(self, source: Path) -> Row:
        """`cp -r`, then a sync of what it wrote."""
        target = self.root / "copy"
        runs, size = [], 0
        for _ in range(self.repeat):
            os.sync()
            begun = time.monotonic()
            used = _run(["cp", "-r", str(source), str(target)])
            written = time.monotonic() - begun
            _run(["find", str(target), "-type", "f", "-exec", "sync", "{}", "+"])
            runs.append(Run(written, time.monotonic() - begun, used.ru_utime + used.ru_stime, 0))
            size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
            shutil.rmtree(target)
        return Row("cp -r", size, runs)

    def convert(
        self, name: str, spec: dict[str, Any], **inputs: tuple[Path, str, dict[str, Any]]
    ) -> tuple[Row, Manifest]:
        """A conversion job; the last run's artifact is kept."""
        runs: list[Run] = []
        made: Manifest | None = None
        for _ in range(self.repeat):
            if made is not None:
                self.store.delete(made.id)
            attempt = self.attempt(spec, inputs)
            os.sync()
            begun = time.time()
            used = _run([sys.executable, "-m", "core.runners", str(attempt)])
            wall = time.time() - begun
            events = [json.loads(line) for line in (attempt / "events.jsonl").read_text().splitlines()]
            written = max(event["time"] for event in events if "done" in event) - begun
            runs.append(Run(written, wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024))
            made = self.store.manifest(next(event["artifact_id"] for event in events if "artifact_id" in event))
        assert made is not None
        return Row(name, made.size_bytes, runs), made

    def attempt(self, spec: dict[str, Any], inputs: dict[str, tuple[Path, str, dict[str, Any]]]) -> Path:
        """The folder of a new job."""
        self.jobs += 1
        job_id = f"job_{self.jobs:026d}"
        attempt = self.store.attempt_dir(job_id, 1)
        attempt.mkdir(parents=True)
        references = {field: {"artifact": "art_" + "0" * 26} for field in inputs}
        job = {
            "job_id": job_id,
            "attempt": 1,
            "kind": "conversion",
            "spec": references | spec,
            "inputs": {
                field: {"artifact_id": None, "kind": kind, "path": str(path), "metadata": metadata}
                for field, (path, kind, metadata) in inputs.items()
            },
            "store": str(self.store.root),
            "device": "cpu",
        }
        (attempt / "job.json").write_text(json.dumps(job))
        return attempt


def _run(command: list[str]) -> resource.struct_rusage:
    """Run to the end; return what it used."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said = process.stdout.read()
    process.stdout.close()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{said}")
    return usage


def _split(layers: tuple[int, int], tp: int, pp: int) -> dict[str, Any]:
    """Vision layers on the first stage; language layers in equal parts, the rest on the last."""
    vit, llm = layers
    share = [llm // pp] * pp
    share[-1] += llm % pp
    return {"tp_size": tp, "llm_pp_layers": [share], "vit_pp_layers": [[vit] + [0] * (pp - 1)]}


def measure(root: Path, options: argparse.Namespace) -> list[Row]:
    """All rows of the table."""
    shape = TinyShape(**{**vars(SLICE), "vision_layers": options.layers, "text_layers": options.layers})
    source = root / "hf"
    write_model(source, shape, vocab_size=options.vocab, zeros=options.zeros)
    bench = Bench(root, options.repeat)
    (tp, pp), (other_tp, other_pp) = ((4, 2), (1, 4)) if options.large else ((2, 2), (1, 2))
    layers = (options.layers, options.layers)
    first, second = _split(layers, tp, pp), _split(layers, other_tp, other_pp)
    _run(["sh", "-c", 'cat "$0"/*.safetensors > /dev/null', str(source)])  # into the page cache
    rows = [] if options.large else [bench.copy(source)]
    verify: dict[str, Any] = {"verify": "logits"} if options.large else {}
    more = ", verify: logits" if options.large else ""
    folder = (source, "hf_model", inspect_hf_folder(source).metadata)
    spec = {"operation": "hf_to_mm", "parallel": first} | verify
    row, mm = bench.convert(f"hf_to_mm, tp {tp} pp {pp}{more}", spec, source=folder)
    rows.append(row)
    checkpoint = (bench.store.files_dir(mm.id), mm.kind, mm.metadata)
    row, back = bench.convert(f"mm_to_hf, tp {tp} pp {pp}{more}", {"operation": "mm_to_hf"} | verify, source=checkpoint)
    rows.append(row)
    _check_equal(source, bench.store.files_dir(back.id))
    bench.store.delete(back.id)
    name = f"reshard, tp {tp} pp {pp} to tp {other_tp} pp {other_pp}"
    row, _ = bench.convert(name, {"operation": "reshard", "parallel": second}, source=checkpoint)
    return [*rows, row]


def _check_equal(source: Path, back: Path) -> None:
    for file in source.glob("*.safetensors"):
        subprocess.run(["cmp", str(file), str(back / file.name)], check=True)


def table(rows: list[Row]) -> str:
    """Markdown: seconds until all is written and hashed, seconds until it is on the disk too, ratios of both to those of `cp`."""
    copy = next((row for row in rows if row.name.startswith("cp")), None)
    fields = {"written_s": "written, s", "wall_s": "and synced, s"}
    heads = ["operation"]
    for field, title in fields.items():
        heads += [title] if copy is None else [f"{title} (limit {1.3 * copy.median(field) + 3:.1f})", "ratio to cp"]
    heads += ["CPU, s", "GB/s", "peak RSS, MiB"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [row.name]
        for field in fields:
            cells.append(f"{row.median(field):.2f}")
            cells += [] if copy is None else [f"{row.median(field) / copy.median(field):.2f}"]
        cells += [f"{row.median('cpu_s'):.2f}", f"{row.size_bytes / row.median('written_s') / 1e9:.2f}"]
        cells.append("" if row is copy else f"{max(run.peak_bytes for run in row.runs) / 2**20:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large", action="store_true", help="22.4 GB once, for the peak of memory")
    large = parser.parse_known_args()[0].large
    parser.add_argument("--layers", type=int, default=40 if large else 4, help="layers of each tower")
    parser.add_argument("--vocab", type=int, default=152_064 if large else 32_000)
    parser.add_argument("--zeros", action="store_true", default=large, help="a sparse source")
    parser.add_argument(
        "--repeat", type=int, default=1 if large else 3, help="runs of each row; the table shows medians"
    )
    parser.add_argument("--folder", type=Path, help="where to work; five times the model's size is needed")
    options = parser.parse_args()
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="temper-bench-") as folder:
        rows = measure(Path(folder), options)
    print(
        f"{rows[0].size_bytes / 1e9:.2f} GB, {os.cpu_count()} CPU cores, medians of {options.repeat}\n\n{table(rows)}"
    )
    for row in rows:
        print(f"  {row.name}: written {', '.join(f'{run.written_s:.2f}' for run in row.runs)}")


if __name__ == "__main__":
    main()
