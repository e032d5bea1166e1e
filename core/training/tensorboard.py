"""TensorBoard event files beside the log: the metric points under Megatron's tag names, where it has them.

    JOB_DIR/tensorboard/events.out.tfevents.<time>.<host>.<attempt>      one file per attempt

An attempt that goes on from a checkpoint begins its file with a session start at its first step, on which TensorBoard forgets what
earlier files have from that step on: no step is shown twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

TAGS = {
    "loss": ("lm loss", 1.0),
    "learning_rate": ("learning-rate", 1.0),
    "grad_norm": ("grad-norm", 1.0),
    "step_time_ms": ("iteration-time", 1e-3),  # seconds
    "global_batch_size": ("batch-size", 1.0),
    "model_flops_per_second_per_device": ("throughput", 1e-12),  # TFLOP/s per device
    "memory_peak_bytes": ("mem-max-allocated-bytes", 1.0),
}
"""Metric -> Megatron's tag, and the factor to its unit. Metrics that Megatron does not write keep their names."""


class TensorBoard:
    """An attempt's event file. Every point is on disk when `write` returns: a killed training loses none."""

    def __init__(self, folder: Path, *, attempt: int, next_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(folder / "events"), filename_suffix=f".{attempt}")
        self._events.write_event(Event(step=next_step, session_log=SessionLog(status=SessionLog.START)))
        self._events.flush()

    def write(self, step: int, values: Mapping[str, float], *, time: float) -> None:
        """Add the finite ones of a step's metrics; `time` is Unix time."""
        scalars = []
        for name, value in values.items():
            tag, factor = TAGS.get(name, (name, 1.0))
            if math.isfinite(value):
                scalars.append(Summary.Value(tag=tag, simple_value=value * factor))
        self._events.write_event(Event(wall_time=time, step=step, summary=Summary(value=scalars)))
        self._events.flush()

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *_: object) -> None:
        self._events.close()
