"""Worker processes that decode: what they give, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from core.data.decoding import DecoderDied, Decoders
from core.data.media import ImageProcessing, MediaError, Medium
from core.data.video import VideoProcessing, decode_medium
from tests.services import alive, wait_until
from tests.videos import pictures, write_animation, write_video

IMAGES = ImageProcessing()
VIDEOS = VideoProcessing.like(IMAGES, max_pixels=56 * 56)
LONG_S = 60.0

PARENT = """
import signal, sys
from pathlib import Path
from core.data.decoding import Decoders
from core.data.media import ImageProcessing, Medium
decoders = Decoders(ImageProcessing(), None)
decoders.decode(Medium((Path(sys.argv[1]),), (1, 4, 4)))
print(*decoders.pids, flush=True)
signal.pause()
"""


@pytest.fixture
def image(tmp_path: Path) -> Medium:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 50, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return Medium((tmp_path / "a.png",), (1, 4, 4))


@pytest.fixture
def decoders() -> Iterator[Decoders]:
    made = Decoders(IMAGES, VIDEOS)
    yield made
    made.close()


class TestDecode:
    def test_frames_are_those_decoded_here(self, decoders: Decoders, image: Medium, tmp_path: Path) -> None:
        turned = Image.open(image.paths[0])
        turned.getexif()[0x0112] = 6
        turned.save(tmp_path / "turned.png", exif=turned.getexif())
        paths = [write_video(tmp_path / "a.mp4", pictures(20)), write_animation(tmp_path / "a.gif", pictures(9))]
        videos = [VIDEOS.plan([path], VIDEOS.probe([path])) for path in paths]
        for medium in (image, Medium((tmp_path / "turned.png",), (1, 4, 4)), *videos):
            found, expected = decoders.decode(medium), decode_medium(medium, IMAGES, VIDEOS)
            assert len(found) == len(expected)
            assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
        assert len(decoders.pids) == 1

    def test_an_error_arrives_with_code_and_message(self, decoders: Decoders, image: Medium, tmp_path: Path) -> None:
        with pytest.raises(MediaError, match="the file does not exist") as missing:
            decoders.decode(Medium((tmp_path / "b.png",), (1, 4, 4)))
        assert missing.value.code == "missing_image"
        with pytest.raises(MediaError, match="now gives the grid") as changed:
            decoders.decode(Medium(image.paths, (1, 4, 8)))
        assert changed.value.code == "changed"
        assert len(decoders.decode(image)) == 1

    def test_the_process_has_no_torch_and_one_thread(self, decoders: Decoders, image: Medium) -> None:
        decoders.decode(image)
        (pid,) = decoders.pids
        libraries = Path(f"/proc/{pid}/maps").read_text()
        assert "numpy" in libraries
        assert "torch" not in libraries
        assert psutil.Process(pid).num_threads() == 1


class TestEnds:
    def test_one_that_is_killed_at_work_is_an_error(self, decoders: Decoders, image: Medium) -> None:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(decoders.decode, image).result()
            (pid,) = decoders.pids
            os.kill(pid, signal.SIGSTOP)
            waiting = thread.submit(decoders.decode, image)
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(DecoderDied, match="was killed by SIGKILL") as error:
                waiting.result(LONG_S)
        assert error.value.code == "decoder_died"

    def test_one_that_cannot_start_is_an_error(
        self, decoders: Decoders, image: Medium, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "executable", "/bin/false")
        with pytest.raises(DecoderDied, match="ended with exit code 1"):
            decoders.decode(image)

    def test_closing_does_not_wait_for_what_is_under_way(self, decoders: Decoders, image: Medium) -> None:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(decoders.decode, image).result()
            os.kill(decoders.pids[0], signal.SIGSTOP)
            waiting = thread.submit(decoders.decode, image)
            decoders.close()
            with pytest.raises(DecoderDied):
                waiting.result(LONG_S)
            with pytest.raises(DecoderDied):
                thread.submit(decoders.decode, image).result(LONG_S)

    def test_each_ends_with_its_thread(self, decoders: Decoders, image: Medium) -> None:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(decoders.decode, image).result()
            assert alive(decoders.pids[0])
        wait_until(lambda: not alive(decoders.pids[0]), timeout_s=LONG_S, what="the end of the decoder")

    def test_none_outlives_a_killed_parent(self, image: Medium) -> None:
        """Whatever it is at: here it is stopped, so that it cannot see the end of its input."""
        command = [sys.executable, "-c", PARENT, str(image.paths[0])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
            assert parent.stdout is not None
            pid = int(parent.stdout.readline())
            os.kill(pid, signal.SIGSTOP)
            assert alive(pid)
            parent.kill()
        wait_until(lambda: not alive(pid), timeout_s=LONG_S, what="the end of the decoder")

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_to_the_group_ends_none_not_even_one_that_starts(
        self, decoders: Decoders, image: Medium, number: signal.Signals
    ) -> None:
        def send_when_started() -> None:
            wait_until(lambda: bool(decoders.pids), timeout_s=LONG_S, what="the start", every_s=0)
            os.kill(decoders.pids[0], number)

        sender = threading.Thread(target=send_when_started)
        sender.start()
        first = decoders.decode(image)
        sender.join()
        os.kill(decoders.pids[0], number)
        assert np.array_equal(decoders.decode(image), first)
