"""Which frames of a video are taken, patches against transformers' layout, and what becomes of damaged and hostile files."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core.data import video
from core.data.media import ImageProcessing, MediaError, Medium, load_rgb
from core.data.video import Clip, VideoProcessing, first_picture, load_medium
from tests.videos import pictures, write_animation, write_video

IMAGES = ImageProcessing()
VIDEOS = VideoProcessing.like(IMAGES, max_frames=16, max_pixels=3136)


def refusal(path: Path, processing: VideoProcessing = VIDEOS) -> MediaError:
    with pytest.raises(MediaError) as caught:
        processing.check([path], processing.probe([path]))
    return caught.value


def planned(processing: VideoProcessing, *paths: Path) -> Medium:
    return processing.plan(paths, processing.check(paths, processing.probe(paths)))


def sampled_by_transformers(total: int, rate: float, *, fps: float, most: int) -> list[int]:
    """`Qwen2VLVideoProcessor.sample_frames` with min_frames 4 and temporal_patch_size 2."""
    limit = math.floor(min(most, total) / 2) * 2
    count = math.floor(min(max(total / rate * fps, 4), limit, total) / 2) * 2
    return torch.arange(0, total, total / count).int().tolist()


def patched_by_transformers(frames: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Resized, normalised and laid out as `Qwen2VLVideoProcessor` does, with Pillow's bicubic filter."""
    resized = [Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC) for pixels in frames]
    mean, std = torch.tensor(IMAGES.mean).view(3, 1, 1), torch.tensor(IMAGES.std).view(3, 1, 1)
    pixels = [(torch.from_numpy(np.array(one)).permute(2, 0, 1) / 255 - mean) / std for one in resized]
    videos = torch.stack(pixels)[None]
    h, w = size[1] // 14, size[0] // 14
    blocks = videos.view(1, len(frames) // 2, 2, 3, h // 2, 2, 14, w // 2, 2, 14)
    return blocks.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(-1, 3 * 2 * 14 * 14).numpy()


class TestPlan:
    @pytest.mark.parametrize("total", [2, 3, 5, 24, 96, 243, 3000, 86400])
    @pytest.mark.parametrize("rate", [1.0, 12.5, 24.0, 30000 / 1001])
    @pytest.mark.parametrize("fps", [0.5, 2.0])
    def test_count_and_interval_are_those_of_transformers(self, total: int, rate: float, fps: float) -> None:
        processing = VideoProcessing.like(IMAGES, fps=fps)
        medium = processing.plan([Path("a.mp4")], Clip(480, 640, total, rate))
        expected = len(sampled_by_transformers(total, rate, fps=fps, most=768))
        assert (medium.num_taken, medium.grid[0]) == (expected, expected // 2)
        assert medium.seconds_per_grid == 2 / (expected / total * rate)  # VideoMetadata.sampled_fps

    def test_no_more_frames_than_allowed(self) -> None:
        medium = VIDEOS.plan([Path("a.mp4")], Clip(48, 64, 1000, 25.0))
        assert (medium.num_taken, medium.grid[0], medium.seconds) == (16, 8, pytest.approx(40))

    def test_frames_that_the_user_chose_are_all_taken(self) -> None:
        medium = VIDEOS.plan([Path("a.png")] * 5, Clip(48, 64, 5, 2.0, chosen=True))
        assert (medium.num_taken, medium.grid[0], medium.seconds_per_grid) == (5, 3, 1.0)

    def test_a_smaller_maximum_puts_qwens_minimum_out_of_force(self) -> None:
        assert VideoProcessing.like(IMAGES).frames.min_pixels == 128 * 28 * 28
        assert VideoProcessing.like(IMAGES, max_pixels=16384).frames.grid(112, 112)[1:] == (8, 8)


class TestLoad:
    @pytest.mark.parametrize("name", ["a.mkv", "a.png", "a.webp"])
    def test_patches_are_those_of_the_frames_that_transformers_takes(self, tmp_path: Path, name: str) -> None:
        frames = pictures(23)
        write = write_animation if Path(name).suffix in (".png", ".webp") else write_video
        path = write(tmp_path / name, frames, **({"lossless": True} if write is write_video else {}))
        medium = planned(VIDEOS, path)
        taken = sampled_by_transformers(23, 10.0, fps=2.0, most=16)
        assert (medium.num_frames, medium.grid) == (23, (len(taken) // 2, 4, 4))
        expected = patched_by_transformers([frames[index] for index in taken], (56, 56))
        np.testing.assert_allclose(load_medium(medium, IMAGES, VIDEOS), expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.ts", "a.gif"])
    def test_every_container_has_its_frames_in_order(self, tmp_path: Path, name: str) -> None:
        write = write_animation if name.endswith(".gif") else write_video
        medium = planned(VIDEOS, write(tmp_path / name, pictures(20)))
        assert (medium.num_frames, medium.num_taken) == (20, 4)
        brightness = VIDEOS.load(medium).reshape(2, 16, 3, 2, 196).mean(axis=(1, 2, 4)).flatten()
        assert (np.diff(brightness) > 0.5).all(), "50 of 255 brighter from one to the next"

    def test_a_list_of_images_is_a_video(self, tmp_path: Path) -> None:
        frames = pictures(5)
        paths = [tmp_path / f"{number}.png" for number in range(5)]
        for path, pixels in zip(paths, frames, strict=True):
            Image.fromarray(pixels).save(path)
        medium = planned(VIDEOS, *paths)
        assert medium.grid[0] == 3
        expected = patched_by_transformers([*frames, frames[-1]], (56, 56))
        np.testing.assert_allclose(VIDEOS.load(medium), expected, rtol=0, atol=1e-6)

    def test_one_picture_is_a_video_of_one_frame(self, tmp_path: Path) -> None:
        Image.fromarray(pictures(1)[0]).save(tmp_path / "a.jpg")
        medium = planned(VIDEOS, tmp_path / "a.jpg")
        still, grid = VIDEOS.frames.load(tmp_path / "a.jpg")
        assert (medium.num_frames, medium.grid) == (1, grid)
        assert np.array_equal(VIDEOS.load(medium), still)

    @pytest.mark.parametrize("rotation", [90, -90, 180])
    def test_a_turned_video_comes_upright(self, tmp_path: Path, rotation: int) -> None:
        path = write_video(tmp_path / "a.mp4", pictures(4), rotation=rotation)
        picture = first_picture([path])
        columns = np.asarray(picture).mean(axis=(1, 2) if rotation in (90, -90) else (0, 2))
        assert picture.size == ((48, 64) if abs(rotation) == 90 else (64, 48))
        rises = columns[-5:].mean() > columns[:5].mean()
        assert rises == (rotation == -90), "the ramp rises to the right; turned clockwise it rises downwards"
        assert planned(VIDEOS, path).grid[1:] == VIDEOS.frames.grid(picture.height, picture.width)[1:]

    def test_a_stream_that_changes_its_size_is_scaled_to_the_first(self, tmp_path: Path) -> None:
        parts = [write_video(tmp_path / f"{width}.ts", pictures(10, width=width)) for width in (64, 160)]
        (tmp_path / "both.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
        medium = planned(VIDEOS, tmp_path / "both.ts")
        assert (medium.num_frames, medium.grid) == (20, (2, 4, 4))
        assert len(VIDEOS.load(medium)) == medium.num_patches

    def test_an_image_is_loaded_as_ever(self, tmp_path: Path) -> None:
        Image.fromarray(pictures(1)[0]).save(tmp_path / "a.png")
        pixels, grid = IMAGES.load(tmp_path / "a.png")
        assert np.array_equal(load_medium(Medium((tmp_path / "a.png",), grid), IMAGES, VIDEOS), pixels)

    def test_a_video_that_changed_is_named(self, tmp_path: Path) -> None:
        medium = planned(VIDEOS, write_video(tmp_path / "a.mp4", pictures(20)))
        write_video(tmp_path / "a.mp4", pictures(20, width=160))
        with pytest.raises(MediaError, match=r"now gives the grid \(2, 2, 6\), the data set was made with \(2, 4, 4\)"):
            VIDEOS.load(medium)
        write_video(tmp_path / "a.mp4", pictures(8))
        with pytest.raises(MediaError, match="ends before frame 10 of 20"):
            VIDEOS.load(medium)


class TestCheck:
    def test_counts_what_the_header_does_not_tell(self, tmp_path: Path) -> None:
        """A header that announces another number: the loader's count is the one that holds."""
        path = write_video(tmp_path / "a.avi", pictures(30))
        content = bytearray(path.read_bytes())
        for chunk, offset in ((b"avih", 8 + 16), (b"strh", 8 + 32)):  # dwTotalFrames, dwLength
            at = content.index(chunk) + offset
            assert int.from_bytes(content[at : at + 4], "little") == 30
            content[at : at + 4] = (29).to_bytes(4, "little")
        path.write_bytes(content)
        clip = VIDEOS.probe([path])
        assert (clip.num_frames, VIDEOS.check([path], clip).num_frames) == (29, 30)

    def test_a_stream_without_a_length_is_counted(self, tmp_path: Path) -> None:
        with (tmp_path / "a.mkv").open("wb") as file:
            import av

            class Pipe:
                """Cannot be sought, so that no length is written, as browsers record."""

                def write(self, data: bytes) -> int:
                    return file.write(data)

            with av.open(Pipe(), "w", format="matroska") as container:
                stream = container.add_stream("mpeg4", rate=10)
                stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
                for pixels in pictures(12):
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
                container.mux(stream.encode(None))
        clip = VIDEOS.probe([tmp_path / "a.mkv"])
        assert (clip.num_frames, clip.rate) == (0, 10.0)
        assert planned(VIDEOS, tmp_path / "a.mkv").num_frames == 12

    @pytest.mark.parametrize("name", ["a.avi", "a.mkv", "a.gif", "a.webp", "a.mp4"])
    def test_a_file_that_is_cut_off_is_refused(self, tmp_path: Path, name: str) -> None:
        write = write_animation if name in ("a.gif", "a.webp") else write_video
        path = write(tmp_path / name, pictures(30))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert refusal(path).code.startswith("unreadable_")

    @pytest.mark.parametrize(
        "content", [b"", b"no video", b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n", b"ffconcat version 1.0\nfile a.mp4\n"]
    )
    def test_what_is_no_video_is_refused(self, tmp_path: Path, content: bytes) -> None:
        write_video(tmp_path / "a.mp4", pictures(4))
        (tmp_path / "b.mp4").write_bytes(content)
        error = refusal(tmp_path / "b.mp4")
        assert (error.code, "b.mp4" in str(error)) == ("unreadable_video", False)

    def test_missing_files_and_pipes_are_refused(self, tmp_path: Path) -> None:
        assert refusal(tmp_path / "absent.mp4").code == "missing_video"
        os.mkfifo(tmp_path / "pipe.mp4")
        assert "not a regular file" in str(refusal(tmp_path / "pipe.mp4"))

    def test_frames_of_different_sizes_are_refused(self, tmp_path: Path) -> None:
        for number, width in enumerate((64, 65)):
            Image.new("RGB", (width, 48)).save(tmp_path / f"{number}.png")
        with pytest.raises(MediaError, match="frame 1 differs in size"):
            VIDEOS.probe([tmp_path / "0.png", tmp_path / "1.png"])

    def test_without_pyav_the_extra_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write_video(tmp_path / "a.mp4", pictures(4))
        monkeypatch.setitem(sys.modules, "av", None)  # as if it were not installed
        error = refusal(path)
        assert (error.code, "temper[video]" in str(error)) == ("no_video_decoder", True)
        assert planned(VIDEOS, write_animation(tmp_path / "a.gif", pictures(4))).num_frames == 4


class TestLimits:
    """With limits lowered to the size of tiny files."""

    def test_a_large_file_is_not_opened(self, tmp_path: Path) -> None:
        with (tmp_path / "a.mp4").open("wb") as file:
            file.truncate(video.MAX_FILE_BYTES + 1)
        assert refusal(tmp_path / "a.mp4").code == "video_too_large"

    @pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
    @pytest.mark.parametrize("limit", ["MAX_FRAME_PIXELS", "MAX_DECODED_PIXELS", "MAX_ANIMATION_PIXELS"])
    def test_more_pixels_than_allowed_are_not_decoded(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, limit: str
    ) -> None:
        write = write_animation if name == "a.gif" else write_video
        path = write(tmp_path / name, pictures(4))
        monkeypatch.setattr(video, limit, 64 * 48 * (1 if limit == "MAX_FRAME_PIXELS" else 4) - 1)
        concerned = limit != ("MAX_DECODED_PIXELS" if name == "a.gif" else "MAX_ANIMATION_PIXELS")
        if concerned:
            assert refusal(path).code == "video_too_large"
        else:
            assert planned(VIDEOS, path).num_frames == 4

    def test_a_header_that_tells_too_few_frames_does_not_get_round_the_limit(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = write_video(tmp_path / "a.mp4", pictures(8))
        clip = VIDEOS.probe([path])
        monkeypatch.setattr(video, "_check_size", lambda *_: None)
        monkeypatch.setattr(video, "MAX_DECODED_PIXELS", 4 * 64 * 48)
        with pytest.raises(MediaError, match="are not decoded"):
            VIDEOS.check([path], clip)

    def test_frame_rates_that_cannot_be_are_refused(self) -> None:
        for rate in (0.0, 1e-9, 1e6):
            with pytest.raises(MediaError, match="is not believed"):
                video._believed(rate)


class TestRealVideos:
    def test_are_read_whole(self, data_dir: Path) -> None:
        folder = data_dir / "mllm_demo" / "mllm_demo_data"
        processing = VideoProcessing.like(IMAGES, max_frames=64, max_pixels=16384)
        grids = {}
        for name in ("1.mp4", "2.avi", "3.mp4", "4.mp4"):
            medium = planned(processing, folder / name)
            grids[name] = (medium.num_frames, medium.grid)
            assert len(processing.load(medium)) == medium.num_patches
            assert replace(medium, paths=()) == replace(
                processing.plan([], processing.probe([folder / name])), paths=()
            ), "their headers tell the truth"
        assert grids == {
            "1.mp4": (243, (9, 6, 12)),
            "2.avi": (270, (9, 6, 10)),
            "3.mp4": (146, (6, 6, 12)),
            "4.mp4": (150, (5, 8, 8)),
        }
        assert first_picture([folder / "1.mp4"]).size == (640, 360)
        assert load_rgb(folder / "1.jpg").mode == "RGB"
