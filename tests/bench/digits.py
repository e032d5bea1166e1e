"""The demo's training on two processes, started as a worker starts it; steps per second from its own events."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from core.specs.events import InputArtifact, JobFile
from core.storage.local import Store
from tests.bench.lockstep import REPOSITORY
from tests.road import digits_road

WARMUP_STEPS = 20


def train_digits(folder: Path, *, iterations: int) -> str:
    """Make the data set of FOLDER/digits, train FOLDER/model on it, and tell how fast."""
    store = Store(folder / "store")
    road = digits_road("", "", train_iters=iterations)
    model = (folder / "model", "hf_model")
    dataset_job = _run(
        store, "job_dataset", *road["dataset"], source=(folder / "digits", "dataset_source"), tokenizer=model
    )
    artifact = next(event for event in dataset_job if event["type"] == "artifact")
    dataset = (store.files_dir(artifact["artifact_id"]), "dataset")
    events = _run(store, "job_train", *road["train"], processes=2, model=model, dataset=dataset)
    points = [event for event in events if event["type"] == "metric"][WARMUP_STEPS:]
    steps_per_s = (len(points) - 1) / (points[-1]["time"] - points[0]["time"])
    middle = statistics.median(point["values"]["step_time_ms"] for point in points)
    return f"{steps_per_s:.1f} steps/s of 32 samples (median step {middle:.1f} ms), loss {points[-1]['values']['loss']:.3f}"


def _run(
    store: Store, job: str, kind: str, spec: dict[str, Any], *, processes: int = 1, **inputs: tuple[Path, str]
) -> list[dict[str, Any]]:
    """Run a job's only attempt; return its events."""
    attempt_dir = store.attempt_dir(job, 1)
    attempt_dir.mkdir(parents=True)
    given = {name: {"path": str(path)} for name, (path, _) in inputs.items()}
    description = JobFile.model_validate(
        {
            "job_id": job, "attempt": 1, "kind": kind, "spec": {**spec, **given}, "store": str(store.root), "device": "cpu",
            "inputs": {
                name: InputArtifact(artifact_id=None, kind=input_kind, path=str(path))
                for name, (path, input_kind) in inputs.items()
            },
        }
    )  # fmt: skip
    (attempt_dir / "job.json").write_text(description.model_dump_json())
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr=localhost",
        f"--nproc-per-node={processes}",
    ]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "core.runners", str(attempt_dir)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{kind} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return [json.loads(line) for line in (attempt_dir / "events.jsonl").read_text().splitlines()]
