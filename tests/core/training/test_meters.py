"""Averages between log lines, and the line."""

from __future__ import annotations

import math
from datetime import datetime, timezone

import pytest

from core.models.flops import Work
from core.training.meters import LogLine, Meters


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def no_flops(_: Work) -> float:
    return 0.0


class TestMeters:
    def test_averages_over_the_steps_since_the_last_reading(self) -> None:
        clock = Clock()
        meters = Meters(clock, no_flops)
        for loss in (2.0, 4.0):
            clock.now += 0.5
            meters.add(loss=loss, work=Work(tokens=100))
        reading = meters.read()
        assert (reading.loss, reading.step_time_ms, reading.tokens_per_second) == (3.0, 500.0, 200.0)
        clock.now += 0.25
        meters.add(loss=1.0, work=Work(tokens=10))
        assert meters.read().step_time_ms == 250.0

    def test_a_skipped_step_counts_in_time_and_not_in_loss(self) -> None:
        meters = Meters(Clock(), no_flops)
        meters.add(loss=math.nan, work=Work(tokens=1))
        meters.add(loss=5.0, work=Work(tokens=1))
        reading = meters.read()
        assert (reading.loss, reading.num_skipped) == (5.0, 1)

    def test_writing_a_checkpoint_is_not_training_time(self) -> None:
        clock = Clock()
        meters = Meters(clock, no_flops)
        clock.now += 3
        meters.paused(2.0)
        meters.add(loss=1.0, work=Work(tokens=10))
        assert meters.read().step_time_ms == 1000.0

    def test_tells_targets_padding_images_and_waiting(self) -> None:
        clock = Clock()
        meters = Meters(clock, no_flops)
        clock.now += 2
        meters.add(loss=1.0, work=Work(tokens=100, targets=40), num_padded_tokens=120, num_images=6, wait_s=0.5)
        reading = meters.read()
        assert (reading.target_tokens_per_second, reading.padded_tokens_per_second) == (20.0, 60.0)
        assert (reading.images_per_second, reading.host_wait_fraction) == (3.0, 0.25)

    def test_tells_rates_of_all_devices_and_of_each(self) -> None:
        clock = Clock()
        meters = Meters(clock, lambda work: 1e6 * work.tokens)
        clock.now += 2
        meters.add(loss=1.0, work=Work(tokens=100, targets=40), num_padded_tokens=120, num_images=6)
        rates = meters.read().rates(4, 100e6)
        assert rates == {
            "tokens_per_second": 50.0, "tokens_per_second_per_device": 12.5,
            "target_tokens_per_second": 20.0, "target_tokens_per_second_per_device": 5.0,
            "padded_tokens_per_second": 60.0, "padded_tokens_per_second_per_device": 15.0,
            "model_flops_per_second": 50e6, "model_flops_per_second_per_device": 12.5e6,
            "mfu": 0.125, "images_per_second": 3.0,
        }  # fmt: skip

    def test_without_a_known_peak_there_is_no_mfu(self) -> None:
        meters = Meters(Clock(), no_flops)
        meters.add(loss=1.0, work=Work(tokens=1))
        assert "mfu" not in meters.read().rates(1, None)


def log_line(**changes: float) -> LogLine:
    values = {
        "iteration": 100, "train_iters": 10000, "consumed_samples": 800, "step_time_ms": 1250.51, "learning_rate": 1e-5,
        "global_batch_size": 8, "loss": 2.345, "grad_norm": 1.234,
    }  # fmt: skip
    return LogLine(**{**values, **changes})


class TestMindSpeedLine:
    NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)

    def test_is_megatrons(self) -> None:
        assert log_line().mindspeed(self.NOW) == (
            " [2026-01-02 03:04:05] iteration      100/   10000 | consumed samples:          800 | "
            "elapsed time per iteration (ms): 1250.5 | learning rate: 1.000000E-05 | global batch size:     8 | "
            "loss: 2.345000E+00 | loss scale: 1.0 | grad norm: 1.234 | number of skipped iterations:   0 | "
            "number of nan iterations:   0 |"
        )

    def test_a_loss_that_is_not_a_number_is_left_out(self) -> None:
        assert " loss:" not in log_line(loss=math.nan).mindspeed(self.NOW)


class TestLogLine:
    def test_is_the_usual_line(self) -> None:
        assert log_line().temper() == (
            "iteration 100/10000 | consumed samples 800 | elapsed time per iteration (ms) 1250.5 | "
            "learning rate 1.000E-05 | global batch size 8 | loss 2.345 | grad norm 1.234"
        )

    @pytest.mark.parametrize(("loss", "shown"), [(0.00012345, "1.234E-04"), (0.0, "0.000"), (math.nan, "nan")])
    def test_a_small_loss_does_not_read_zero(self, loss: float, shown: str) -> None:
        assert f"| loss {shown} |" in log_line(loss=loss).temper()
