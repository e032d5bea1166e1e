"""The stall guard."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict
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

    def test_of_ranks_at_the_same_place_it_is_the_one_that_does_not_answer(self) -> None:
        beats = [Beat(0, 5, "reduce", since=1.0, has_told=True), Beat(1, 5, "reduce", since=2.0)]
        assert culprit(beats).rank == 1


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

    def test_where_rank_0_is_stopped_the_next_one_tells(self, tmp_path: Path) -> None:
        told: list[AppError] = []
        ended: list[AppError] = []
        is_told = threading.Event()

        def fail(error: AppError) -> None:
            ended.append(error)
            is_told.set()

        stopped = Beat(0, 6, "reduce", rows=(5,), since=1.0)
        (tmp_path / "rank_0.json").write_text(json.dumps(asdict(stopped)))
        with Heartbeat(tmp_path, 1, fail=fail, tell=told.append, limit_s=0.2) as heartbeat:
            heartbeat.phase(7, "reduce", [3, 4])
            assert is_told.wait(60)
        assert "rank 0 is furthest behind, in step 6, reduce, rows 5" in told[0].message
        assert ended == told

    def test_while_rank_0_lives_the_verdict_is_its_own(self, tmp_path: Path) -> None:
        now, told_at = 0.0, {}
        beat_of_0 = tmp_path / "rank_0.json"

        def watch(rank: int) -> Heartbeat:
            return Heartbeat(
                tmp_path,
                rank,
                fail=lambda _: told_at.setdefault(rank, now),
                limit_s=1.0,
                interval_s=0.01,
                clock=lambda: now,
            )

        with watch(0) as first, watch(1) as second:
            first.phase(7, "save")  # for which it has four times the limit
            second.phase(7, "compute")
            wait_until(beat_of_0.is_file, timeout_s=60, what="the first beat")
            while len(told_at) < 2:
                written = beat_of_0.stat().st_mtime_ns

                def goes_on(written: int = written) -> bool:
                    return len(told_at) == 2 or beat_of_0.stat().st_mtime_ns != written

                wait_until(goes_on, timeout_s=60, what="a beat of rank 0, or the verdict")
                now += 0.25
        assert min(told_at.values()) >= 4.0
