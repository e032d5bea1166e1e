"""A conversion killed at any moment leaves no artifact, or the whole one; the next attempt makes what an undisturbed one makes."""

from __future__ import annotations

import json
import os
import random
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.models.hf_folder import inspect_hf_folder
from core.storage.local import Store
from tests.tiny import TinyShape, tiny_model

KILLS = 50
SHAPE = TinyShape(
    vision_layers=2, vision_hidden=128, vision_ffn=256, text_layers=6, hidden=512, heads=8, kv_heads=4, ffn=1024
)
PARALLEL = {"tp_size": 2, "llm_pp_layers": [[0, 2, 2, 2]], "vit_pp_layers": [[2, 0, 0, 0]]}


class Forks:
    """Starts attempts and kills them."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.core.runners.forked"]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._server.stdin
        assert self._server.stdout
        self._stdin, self._stdout = self._server.stdin, self._server.stdout
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._stdout, selectors.EVENT_READ)

    def run(self, attempt: Path, kill_after_s: float | None = None) -> tuple[int, float]:
        """Exit status (negative: the signal that ended it) and how long it took."""
        self._stdin.write(f"{attempt}\n".encode())
        self._stdin.flush()
        pid = int(self._line())
        begun = time.monotonic()
        if kill_after_s is not None and not self._selector.select(kill_after_s):
            os.kill(pid, signal.SIGKILL)
        return int(self._line()), time.monotonic() - begun

    def _line(self) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            self._selector.select()
            line += os.read(self._stdout.fileno(), 1)
        return line

    def close(self) -> None:
        self._stdin.close()
        self._server.wait()
        self._stdout.close()
        self._selector.close()


@pytest.fixture
def forks() -> Iterator[Forks]:
    server = Forks()
    yield server
    server.close()


def attempt_folder(store: Store, job: int, number: int, spec: dict[str, Any], source: Path) -> Path:
    job_id = f"job_{job:026d}"
    folder = store.attempt_dir(job_id, number)
    folder.mkdir(parents=True)
    inputs = {"source": {"artifact_id": None, "kind": "hf_model", "path": str(source), "metadata": {}}}
    (folder / "job.json").write_text(
        json.dumps(
            {
                "job_id": job_id,
                "attempt": number,
                "kind": "conversion",
                "spec": {"source": {"artifact": "art_" + "0" * 26}} | spec,
                "inputs": inputs,
                "store": str(store.root),
                "device": "cpu",
            }
        )
    )
    return folder


def published(store: Store) -> dict[str, dict[str, str | None]]:
    """Artifact -> its files' digests, as the manifest has them."""
    folders = [path for path in (store.root / "artifacts").glob("*") if path.name != ".tmp"]
    return {path.name: {entry.path: entry.sha256 for entry in store.manifest(path.name).files} for path in folders}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.slow
class TestKilled:
    def test_no_kill_leaves_a_wrong_artifact_and_the_retry_is_equal(self, tmp_path: Path, forks: Forks) -> None:
        source = tiny_model(tmp_path / "hf", shape=SHAPE)
        inspect_hf_folder(source)
        spec = {"operation": "hf_to_mm", "parallel": PARALLEL}
        calm = Store(tmp_path / "calm")
        status, undisturbed_s = forks.run(attempt_folder(calm, 0, 1, spec, source))
        assert status == 0
        (reference,) = published(calm).values()
        wanted = contents(calm.files_dir(next(iter(published(calm)))))

        dice = random.Random(0)
        kills = resumed = 0
        for job in range(10 * KILLS):
            store = Store(tmp_path / f"store{job}")
            number = 0
            while not published(store):
                number += 1
                folder = attempt_folder(store, job, number, spec, source)
                status, took_s = forks.run(folder, dice.uniform(0, 1.1 * undisturbed_s) if number < 6 else None)
                assert status in (0, -signal.SIGKILL), (folder / "logs/rank_0.log").read_text()
                kills += status != 0
                if status == 0:  # the machine may be busier than it was at first; then kills would all come too early
                    undisturbed_s = max(undisturbed_s, took_s)
                resumed += "going on after an earlier attempt" in log_of(folder)
                assert list(published(store).values()) in ([], [reference])
            assert contents(store.files_dir(next(iter(published(store))))) == wanted
            assert status != 0 or not list(store.job_dir(f"job_{job:026d}").glob("conversion/*"))
            shutil.rmtree(store.root)
            if kills >= KILLS and resumed >= KILLS // 10:
                return
        pytest.fail(f"{kills} kills and {resumed} resumed attempts in {job + 1} jobs")


def log_of(attempt: Path) -> str:
    file = attempt / "logs/rank_0.log"
    return file.read_text() if file.exists() else ""
