"""The embedded broker: kombu's file-system transport with whole files only.

Upstream writes a message in place and creates an exchange's table before locking it, so a reader in another process can
meet an empty or half-written file; Celery's worker then ends with a JSONDecodeError. Here everything appears by rename.
Source of the format: kombu/transport/filesystem.py (5.7).
"""

from __future__ import annotations

import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty
from typing import Any

from kombu.transport import filesystem
from kombu.utils.json import dumps, loads


class Channel(filesystem.Channel):
    """Messages are files `<time>_<uuid>.<queue>.msg`; an exchange's bindings are a file in the control folder."""

    def _put(self, queue: str, payload: Any, **_: Any) -> None:
        folder = Path(self.data_folder_out)
        _replace(folder / f"{time.time_ns()}_{uuid.uuid4().hex}.{queue}.msg", dumps(payload))

    def _get(self, queue: str) -> Any:
        folder = Path(self.data_folder_in)
        for name in sorted(os.listdir(folder)):  # noqa: PTH208  (names alone: this runs ten times a second)
            if name.partition(".")[2] != f"{queue}.msg":
                continue
            taken = folder / f"{name}.taken"
            try:
                (folder / name).rename(taken)
            except FileNotFoundError:
                continue  # another consumer was faster
            payload = taken.read_text(encoding="utf-8")
            taken.unlink()
            return loads(payload)
        raise Empty

    def _queue_bind(self, exchange: str, routing_key: str | None, pattern: str | None, queue: str | None) -> None:
        binding = filesystem.exchange_queue_t(routing_key or "", pattern or "", queue or "")
        with self._binding():
            bindings = self.get_table(exchange)
            if binding not in bindings:
                _replace(self._exchange_file(exchange), dumps([binding, *bindings]))

    @contextmanager
    def _binding(self) -> Iterator[None]:
        self.control_folder.mkdir(parents=True, exist_ok=True)
        with (self.control_folder / "bindings.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


class Transport(filesystem.Transport):
    """The transport, as named by `broker_transport`."""

    Channel = Channel


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(path)
