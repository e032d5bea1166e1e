"""Event files hold what the metric events tell, and steps that are computed again replace the earlier ones."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from core.training.tensorboard import TAGS, TensorBoard
from tests.core.training.tiny import Case, Notes, Rank, make_trainer, steps, training_spec


def events(folder: Path) -> list[Event]:
    """Read TFRecords: length as uint64, its checksum, the event, its checksum."""
    found = []
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        rest = path.read_bytes()
        while rest:
            (length,) = struct.unpack_from("<Q", rest)
            found.append(Event.FromString(rest[12 : 12 + length]))
            rest = rest[12 + length + 4 :]
    return found


def shown(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows: tag -> step -> value; a session start takes back what came before from its step on."""
    series: dict[str, dict[int, float]] = {}
    for event in events(folder):
        if event.session_log.status == SessionLog.START:
            series = {tag: {s: v for s, v in points.items() if s < event.step} for tag, points in series.items()}
        for value in event.summary.value:
            points = series.setdefault(value.tag, {})
            assert event.step not in points, f"step {event.step} of {value.tag} twice"
            points[event.step] = value.simple_value
    return series


class TestTensorBoard:
    def test_holds_every_metric_of_every_step_under_its_tag(self, tmp_path: Path) -> None:
        rank, notes = Rank(Case()), Notes()
        trainer = make_trainer(rank, training_spec(train_iters=3), tmp_path / "job", notes)
        with TensorBoard(tmp_path / "tb", attempt=1, next_step=1) as trainer.tensorboard:
            trainer.train(steps(trainer, rank.config))
        found = shown(tmp_path / "tb")
        assert found.pop("batch-size") == dict.fromkeys((1, 2, 3), 4.0)
        assert {"lm loss", "learning-rate", "grad-norm", "iteration-time", "throughput"} <= set(found)
        told = {TAGS.get(name, (name, 1.0)): name for name in notes.metrics[1]}
        assert {tag for tag, _ in told} == set(found)
        for (tag, factor), name in told.items():
            for step, values in notes.metrics.items():
                assert found[tag][step] == pytest.approx(values[name] * factor, rel=1e-6)

    def test_an_attempt_that_goes_on_takes_back_the_steps_that_it_computes_again(self, tmp_path: Path) -> None:
        with TensorBoard(tmp_path, attempt=1, next_step=1) as first:
            for step in (1, 2, 3, 4):
                first.write(step, {"loss": 10.0 - step}, time=0.0)
        with TensorBoard(tmp_path, attempt=2, next_step=3) as second:
            for step in (3, 4, 5):
                second.write(step, {"loss": 1.0 * step}, time=0.0)
        assert len(list(tmp_path.iterdir())) == 2
        assert shown(tmp_path) == {"lm loss": {1: 9.0, 2: 8.0, 3: 3.0, 4: 4.0, 5: 5.0}}

    def test_a_value_that_is_not_finite_is_left_out(self, tmp_path: Path) -> None:
        with TensorBoard(tmp_path, attempt=1, next_step=1) as board:
            board.write(1, {"loss": math.nan, "grad_norm": 2.0}, time=0.0)
        assert shown(tmp_path) == {"grad-norm": {1: 2.0}}

    def test_a_point_is_on_disk_at_once(self, tmp_path: Path) -> None:
        with TensorBoard(tmp_path, attempt=1, next_step=1) as board:
            board.write(1, {"loss": 2.0}, time=0.0)
            assert shown(tmp_path) == {"lm loss": {1: 2.0}}
