"""The stall guard."""

from __future__ import annotations

import json
import threading
from functools import partial
from pathlib import Path

import pytest

from core.errors import AppError
from core.training.heartbeat import Beat, Heartbeat, culprit
from tests.services import wait_until


class TestCulprit:
    def test_it_is_the_rank_furthest_behind(self) -> None:
        beats = [Beat(0, 5, "reduce", since=1.0), Beat(1, 5, "data", since=3.0), Beat(2, 5, "compute", since=2.0)]
        assert culprit(beats).rank == 1
        assert culprit([*beats, Beat(3, 4, "save", since=9.0)]).rank == 3


class TestHeartbeat:
    def test_a_stall_is_told_with_step_phase_and_rows_and_stacks(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        told: list[AppError] = []
        is_told = threading.Event()

        def fail(error: AppError) -> None:
            told.append(error)
            is_told.set()

        with Heartbeat(tmp_path, 0, fail=fail, limit_s=0.2) as heartbeat:
            heartbeat.phase(7, "compute", [3, 4])
            assert is_told.wait(60)
        assert told[0].code == "stalled"
        assert "rank 0 is furthest behind, in step 7, compute, rows 3, 4" in told[0].message
        assert "test_heartbeat.py" in caplog.text

    def test_progress_is_no_stall(self, tmp_path: Path) -> None:
        told: list[AppError] = []
        file, now = tmp_path / "rank_0.json", 0.0

        def is_watched(step: int) -> bool:
            return file.is_file() and json.loads(file.read_bytes())["step"] == step

        with Heartbeat(tmp_path, 0, fail=told.append, limit_s=0.1, clock=lambda: now) as heartbeat:
            for step in range(15):
                heartbeat.phase(step, "compute")
                wait_until(partial(is_watched, step), timeout_s=60, what=f"a look at step {step}")
                now += 0.09
        assert told == []
