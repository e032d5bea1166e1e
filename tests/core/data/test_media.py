"""Image preprocessing against transformers, sizes from headers, and what becomes of damaged files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from core.data.media import ImageProcessing, MediaError, check_decodes, load_rgb, probe_size, smart_resize
from core.errors import InvalidModel

SIZES = [(28, 28), (8, 8), (640, 480), (333, 517), (1200, 90), (15, 220)]
MODES = ["RGB", "L", "RGBA", "LA", "P", "CMYK", "1"]


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 4), np.uint8)
    return (
        Image.fromarray(pixels, "RGBA").convert(mode)
        if mode != "1"
        else Image.fromarray(pixels).convert("L").convert("1")
    )


def reference(processing: ImageProcessing, image: Image.Image) -> tuple[np.ndarray, list[int]]:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(
        min_pixels=processing.min_pixels,
        max_pixels=processing.max_pixels,
        patch_size=processing.patch_size,
        temporal_patch_size=processing.temporal_patch_size,
        merge_size=processing.merge_size,
    )
    out = processor(images=[image], return_tensors="np")
    return out["pixel_values"], out["image_grid_thw"][0].tolist()


def damaged(path: Path) -> Path:
    noise(200, 100).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


class TestPatches:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize(
        "processing", [ImageProcessing(), ImageProcessing(max_pixels=262144), ImageProcessing(patch_size=4)]
    )
    def test_equal_transformers_bit_for_bit(
        self, size: tuple[int, int], processing: ImageProcessing, tmp_path: Path
    ) -> None:
        image = noise(*size)
        image.save(tmp_path / "image.png")
        ours, grid = processing.load(tmp_path / "image.png")
        theirs, their_grid = reference(processing, image)
        assert list(grid) == their_grid
        assert np.array_equal(ours, theirs)
        assert ours.shape == (grid[0] * grid[1] * grid[2], processing.patch_dim)

    @pytest.mark.parametrize("mode", MODES)
    def test_every_colour_mode_equals_transformers(self, mode: str) -> None:
        image = noise(90, 70, mode)
        from core.data.media import to_rgb

        ours, _ = ImageProcessing().patches(to_rgb(image))
        if "A" in mode:  # transformers before 5.21 drops the transparency, later ones put it on white as we do
            alpha = image.getchannel("A")
            image, opaque = Image.new("RGB", image.size, "white"), image.convert("RGB")
            image.paste(opaque, mask=alpha)
        theirs, _ = reference(ImageProcessing(), image)
        assert np.array_equal(ours, theirs)

    def test_real_photos_equal_transformers(self, data_dir: Path) -> None:
        processing = ImageProcessing(max_pixels=262144)
        photos = sorted((data_dir / "images").glob("*.jp*g"))[:3] + sorted((data_dir / "cc12m").glob("*.jpg"))[:5]
        for photo in photos:
            with Image.open(photo) as image:
                theirs, grid = reference(processing, image)
            ours, our_grid = processing.load(photo)
            assert list(our_grid) == grid
            assert np.array_equal(ours, theirs)


class TestSmartResize:
    @given(
        height=st.integers(1, 4000),
        width=st.integers(1, 4000),
        min_pixels=st.sampled_from([784, 3136, 50176]),
        max_pixels=st.sampled_from([50176, 262144, 12845056]),
    )
    def test_equals_transformers(self, height: int, width: int, min_pixels: int, max_pixels: int) -> None:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as theirs

        if max(height, width) / min(height, width) > 200:
            with pytest.raises(MediaError, match="aspect ratio"):
                smart_resize(height, width, 28, min_pixels=min_pixels, max_pixels=max_pixels)
            return
        ours = smart_resize(height, width, 28, min_pixels=min_pixels, max_pixels=max_pixels)
        assert ours == theirs(height, width, 28, min_pixels, max_pixels)

    def test_never_gives_an_empty_image(self) -> None:
        assert smart_resize(8, 8, 28, min_pixels=1, max_pixels=262144) == (28, 28)


class TestProbeSize:
    @pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "gif", "tif"])
    def test_agrees_with_decoding(self, suffix: str, tmp_path: Path) -> None:
        path = tmp_path / f"image.{suffix}"
        noise(60, 40).save(path)
        assert probe_size(path) == (40, 60)
        assert load_rgb(path).size == (60, 40)

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
    def test_turns_as_the_camera_says(self, suffix: str, orientation: int, tmp_path: Path) -> None:
        from PIL import ImageOps

        path = tmp_path / f"image.{suffix}"
        exif = Image.Exif()
        exif[0x0112] = orientation
        noise(60, 40).save(path, exif=exif)
        loaded = load_rgb(path)
        assert probe_size(path) == (loaded.height, loaded.width)
        with Image.open(path) as image:
            assert ImageOps.exif_transpose(image).convert("RGB").tobytes() == loaded.tobytes()

    def test_reads_the_header_only(self, tmp_path: Path) -> None:
        assert probe_size(damaged(tmp_path / "image.jpg")) == (100, 200)

    def test_a_missing_file_is_named_so(self, tmp_path: Path) -> None:
        with pytest.raises(MediaError) as caught:
            probe_size(tmp_path / "absent.jpg")
        assert caught.value.code == "missing_image"

    def test_a_pipe_or_folder_is_not_waited_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.jpg")
        (tmp_path / "folder.jpg").mkdir()
        for name in ("pipe.jpg", "folder.jpg"):
            with pytest.raises(MediaError, match="not a regular file"):
                probe_size(tmp_path / name)

    @pytest.mark.parametrize(
        "content", [b"", b"hello", b"\xff\xd8\xff", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x89PNG\r\n\x1a\n"]
    )
    def test_what_is_no_image_is_refused(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "image.jpg").write_bytes(content)
        with pytest.raises(MediaError) as caught:
            probe_size(tmp_path / "image.jpg")
        assert caught.value.code == "unreadable_image"

    def test_a_decompression_bomb_is_refused_unread(self, tmp_path: Path) -> None:
        Image.new("1", (12_000, 12_000)).save(tmp_path / "bomb.png")
        for use in (probe_size, check_decodes, load_rgb):
            with pytest.raises(MediaError) as caught:
                use(tmp_path / "bomb.png")
            assert caught.value.code == "image_too_large"


class TestCheckDecodes:
    @pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
    def test_finds_a_cut_file(self, suffix: str, tmp_path: Path) -> None:
        with pytest.raises(MediaError) as caught:
            check_decodes(damaged(tmp_path / f"image.{suffix}"))
        assert caught.value.code == "unreadable_image"

    def test_accepts_whole_files(self, tmp_path: Path) -> None:
        for suffix in ("jpg", "png", "webp", "gif"):
            noise(50, 50).save(tmp_path / f"image.{suffix}")
            check_decodes(tmp_path / f"image.{suffix}")


class TestImageProcessing:
    def test_reads_the_old_and_the_new_form_of_limits(self, tmp_path: Path) -> None:
        for values in ({"min_pixels": 784, "max_pixels": 9000}, {"size": {"shortest_edge": 784, "longest_edge": 9000}}):
            (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
            processing = ImageProcessing.from_model_dir(tmp_path)
            assert (processing.min_pixels, processing.max_pixels) == (784, 9000)

    def test_reads_the_merged_processor_config(self, tmp_path: Path) -> None:
        (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"patch_size": 4}}))
        assert ImageProcessing.from_model_dir(tmp_path).patch_size == 4

    def test_defaults_are_those_of_transformers(self, tmp_path: Path) -> None:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        Qwen2VLImageProcessorPil().save_pretrained(tmp_path)
        assert ImageProcessing.from_model_dir(tmp_path) == ImageProcessing()

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"patch_size": 0}, "patch_size must be a positive whole number, got 0"),
            ({"do_resize": False}, "do_resize must be true"),
            ({"image_mean": [0.5]}, "mean and std need 3 numbers"),
        ],
    )
    def test_names_what_it_cannot_use(self, values: dict[str, object], message: str, tmp_path: Path) -> None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
        with pytest.raises(InvalidModel, match=message):
            ImageProcessing.from_model_dir(tmp_path)

    def test_limits_of_the_job_win(self) -> None:
        processing = ImageProcessing().limited(min_pixels=0, max_pixels=1024)
        assert (processing.min_pixels, processing.max_pixels) == (1024, 1024)
