"""What decoding ahead costs the thread that dispatches kernels: `python -m tests.bench.decoding [DECODERS]`.

The main thread runs a loop as an accelerator's does, Python and operations on tensors so small that the call is all they cost. Meanwhile
photos of 2 megapixels become patches: not at all, in threads, or in the loader's worker processes. What the main thread waits for while
it neither runs nor could run is the interpreter lock. Rounds take turns; medians.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from core.data.decoding import Decoders
from core.data.loader import PREFETCH
from core.data.media import Frame, ImageProcessing, Medium
from core.data.video import decode_medium, patchify_medium

WIDTH, HEIGHT = 1632, 1224
PROCESSING = ImageProcessing()
ROUNDS = 5
ROUND_S = 4.0
Decode = Callable[[Medium], list[Frame]]


def photo(path: Path) -> Medium:
    """Write something as hard to decode as a photo: 0.5 MB."""
    coarse = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)
    Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(path, quality=90)
    return Medium((path,), PROCESSING.grid(HEIGHT, WIDTH))


class Ahead:
    """Threads that turn photos into patches, as the loader's do, while `is_on`."""

    def __init__(self, medium: Medium, decode: Decode, num_threads: int) -> None:
        self.medium, self.decode = medium, decode
        self.num_images = 0
        self.is_on, self._ended = threading.Event(), False
        self._threads = [threading.Thread(target=self._work) for _ in range(num_threads)]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        self.decode(self.medium)  # starts the process
        while self.is_on.wait() and not self._ended:
            patchify_medium(self.medium, self.decode(self.medium), PROCESSING, None)
            self.num_images += 1

    def end(self) -> None:
        self._ended = True
        self.is_on.set()
        for thread in self._threads:
            thread.join()


@contextmanager
def ways(medium: Medium, num_threads: int) -> Iterator[dict[str, Ahead | None]]:
    """The three ways, by name."""
    decoders = Decoders(PROCESSING, None)
    here = partial(decode_medium, images=PROCESSING, videos=None)
    aheads = {name: Ahead(medium, decode, num_threads) for name, decode in (("threads", here), ("processes", decoders.decode))}  # fmt: skip
    try:
        yield {"nothing": None, **aheads}
    finally:
        for ahead in aheads.values():
            ahead.end()
        decoders.close()


@dataclass(frozen=True)
class Round:
    """What one round of the loop gave."""

    steps_per_s: float
    lock_wait: float
    """Part of the time in which the main thread was not waiting for a core."""
    images_per_s: float


def dispatch(ahead: Ahead | None) -> Round:
    """Run the loop for a while."""
    x, weight = torch.ones(16), torch.full((16,), 0.999)
    before, num_steps = ahead.num_images if ahead else 0, 0
    if ahead:
        ahead.is_on.set()
    ran, queued = scheduled_s()
    began = time.perf_counter()
    while time.perf_counter() - began < ROUND_S:
        for _ in range(20):
            x = torch.relu(x * weight + 0.001)
        num_steps += 1
    seconds = time.perf_counter() - began
    ran, queued = (now - then for now, then in zip(scheduled_s(), (ran, queued), strict=True))
    images = ahead.num_images - before if ahead else 0
    if ahead:
        ahead.is_on.clear()
        time.sleep(0.2)  # for what is under way
    return Round(num_steps / seconds, max(0.0, seconds - queued - ran) / (seconds - queued), images / seconds)


def scheduled_s() -> tuple[float, float]:
    """Time that this thread has run, and waited for a core, since its start."""
    ran, queued, _ = Path("/proc/thread-self/schedstat").read_text().split()
    return int(ran) / 1e9, int(queued) / 1e9


def main(num_threads: int) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, ways(photo(Path(folder) / "a.jpg"), num_threads) as aheads:
        seen = [{name: dispatch(ahead) for name, ahead in aheads.items()} for _ in range(ROUNDS)]
    print(f"{num_threads} decoders, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; medians of {ROUNDS} rounds")
    for name in seen[0]:
        speed = statistics.median(found[name].steps_per_s / found["nothing"].steps_per_s for found in seen)
        wait = statistics.median(found[name].lock_wait for found in seen)
        images = statistics.median(found[name].images_per_s for found in seen)
        print(
            f"{name:>10}: the main thread waits {100 * wait:4.1f} % of its time for the lock, "
            f"its loop has {100 * speed:5.1f} % of its speed; {images:5.1f} images/s"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else PREFETCH)
