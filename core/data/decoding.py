"""Images and videos decoded in processes of their own, which never hold the interpreter lock that a training's main thread needs.

    loader thread ── Medium, pickled ─────────────────────────────────► python -m core.data.decoding
                  ◄─ JSON: shape, then the bytes [F, H, W, 3]; or why not ─

A thread that decodes has a process of its own, started with its first image, so text starts none. It is started afresh (nothing is
forked, whatever device was initialised), imports no torch, and talks through a pair of sockets: no shared memory, which containers
limit. It ends with its thread, also when that is killed. Signals meant for the training do not reach it.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
from typing import Any

import numpy as np

from core.data.media import Frame, ImageProcessing, MediaError, Medium
from core.data.video import VideoProcessing, decode_medium
from core.errors import AppError
from core.processes import die_with_parent

_SIZE = struct.Struct("!Q")
_FOR_THE_TRAINING = (signal.SIGTERM, signal.SIGINT)
"""Sent to the whole process group; a training that is to stop still wants its batch."""


class DecoderDied(AppError):
    """A process that decoded ended without an answer."""

    code = "decoder_died"
    hint = "out of memory on the host is the usual cause; if it happens with this file again, take the file out of the data set"


class Decoders:
    """The worker processes of a loader's threads."""

    def __init__(self, images: ImageProcessing, videos: VideoProcessing | None) -> None:
        self._processing = images, videos
        self._own = threading.local()
        self._all: list[_Decoder] = []
        self._starting = threading.Lock()
        self._closed = False

    def decode(self, medium: Medium) -> list[Frame]:
        """As `decode_medium`, in this thread's process. Raises MediaError, and DecoderDied if the process ends meanwhile."""
        decoder: _Decoder | None = getattr(self._own, "decoder", None)
        if decoder is None:
            with self._starting:
                if self._closed:
                    raise DecoderDied("decoding has ended")
                decoder = self._own.decoder = _Decoder(*self._processing)
                self._all.append(decoder)
        return decoder.decode(medium)

    @property
    def pids(self) -> list[int]:
        """Return the processes that were started."""
        return [decoder.pid for decoder in self._all]

    def close(self) -> None:
        """End the processes, whatever they are at."""
        with self._starting:
            self._closed = True
        for decoder in self._all:
            decoder.close()


class _Decoder:
    """One process, and this end of its socket."""

    def __init__(self, images: ImageProcessing, videos: VideoProcessing | None) -> None:
        self._socket, theirs = socket.socketpair()
        self._in_use = threading.Lock()
        command = [sys.executable, "-m", "core.data.decoding", str(theirs.fileno())]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}  # numpy would start a thread for every core
        # A new process has its parent thread's mask.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_TRAINING)
        try:
            with theirs:
                self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env=env)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.pid = self._process.pid
        self._first: tuple[Any, ...] | None = (images, videos)

    def decode(self, medium: Medium) -> list[Frame]:
        with self._in_use:
            try:
                if self._first is not None:
                    _send(self._socket, pickle.dumps(self._first))
                    self._first = None
                _send(self._socket, pickle.dumps(medium))
                answer = json.loads(_receive(self._socket))
                if "code" in answer:
                    raise MediaError(answer["code"], answer["message"])
                pixels = np.empty(answer["shape"], np.uint8)
                _fill(self._socket, pixels.data.cast("B"))
            except (EOFError, OSError) as error:
                raise DecoderDied(f"the process that decoded it {self._end()}") from error
            return list(pixels)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        with self._in_use:  # a thread that waits for an answer learns of the end first
            self._socket.close()

    def _end(self) -> str:
        code = self._process.wait()
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def main(descriptor: int) -> None:
    """Be such a process: decode what is asked for, until the other side is gone."""
    die_with_parent()
    with socket.socket(fileno=descriptor) as connection:
        try:
            images, videos = pickle.loads(_receive(connection))  # noqa: S301 - from our own parent
            while True:
                _answer(connection, pickle.loads(_receive(connection)), images, videos)  # noqa: S301 - as above
        except (EOFError, ConnectionError):
            return


def _answer(connection: socket.socket, medium: Medium, images: ImageProcessing, videos: VideoProcessing | None) -> None:
    try:
        frames = decode_medium(medium, images, videos)
    except MediaError as error:
        _send(connection, json.dumps({"code": error.code, "message": str(error)}).encode())
        return
    _send(connection, json.dumps({"shape": [len(frames), *frames[0].shape]}).encode())
    for frame in frames:
        connection.sendall(np.ascontiguousarray(frame).data.cast("B"))


def _send(connection: socket.socket, message: bytes) -> None:
    connection.sendall(_SIZE.pack(len(message)) + message)


def _receive(connection: socket.socket) -> bytes:
    (size,) = _SIZE.unpack(_fill(connection, memoryview(bytearray(_SIZE.size))))
    return bytes(_fill(connection, memoryview(bytearray(size))))


def _fill(connection: socket.socket, view: memoryview) -> memoryview:
    """Read until `view` is full, in as few calls as may be: each takes the interpreter lock. Raises EOFError."""
    missing = view
    while missing:
        count = connection.recv_into(missing, 0, socket.MSG_WAITALL)
        if count == 0:
            raise EOFError
        missing = missing[count:]
    return view


if __name__ == "__main__":
    main(int(sys.argv[1]))
