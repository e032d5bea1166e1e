"""What all engines train on: one model folder with random weights, one ordered list of samples, in everybody's own form.

FOLDER/model/          Hugging Face layout
FOLDER/rows.json       [{"prompt", "completion", "image", "num_tokens", "num_targets"}, …] in training order
FOLDER/images/         already of the size that the model takes, so that no resampling can make a difference
FOLDER/dataset/        the same tokens, labels and images in Temper's form
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from core.data.dataset import TokenWriter
from core.data.media import ImageProcessing, Medium
from core.data.plan import row_at
from core.models.config import Config
from core.models.hf_folder import read_config
from tests.tiny import CORPUS, TinyShape, tiny_model

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
SEED = 42
PATCH = 28
"""Side of a merged patch, that is of one image token, in pixels."""

SLICE_3B = TinyShape(
    vision_layers=4, vision_hidden=1280, vision_heads=16, vision_ffn=3420, text_layers=2, hidden=2048, heads=16, kv_heads=2,
    ffn=11008, window=112, tied=True,
)  # fmt: skip
"""Qwen2.5-VL-3B at its real width, cut to four vision and two language layers."""
QUARTER_3B = TinyShape(
    vision_layers=4, vision_hidden=640, vision_heads=8, vision_ffn=1710, text_layers=4, hidden=1024, heads=8, kv_heads=2,
    ffn=5504, window=112, tied=True,
)  # fmt: skip
"""Half the width, so that several configurations with both towers trained fit into one machine."""
VOCABULARY = 8192


@dataclass(frozen=True)
class Sample:
    """One question with its photo and the answer that is learnt."""

    prompt: str
    completion: str
    image: str
    num_tokens: int
    num_targets: int


def write_model(folder: Path, shape: TinyShape) -> Path:
    """The model folder, with weights of seed 0."""
    return tiny_model(
        folder / "model", shape=shape, vocab_size=VOCABULARY, max_pixels=1280 * PATCH * PATCH, corpus=CORPUS * 20
    )


def equal_rows(folder: Path, *, count: int, num_tokens: int = 512, num_targets: int = 128) -> list[Sample]:
    """Rows of one length with an image of 256 tokens and `num_targets` learnt tokens."""
    return _write_rows(folder, [((16, 16), num_tokens, num_targets)] * count)


def photo_rows(folder: Path, photos: Path, *, count: int) -> list[Sample]:
    """Rows of 50 to 1,000 tokens, as many between 50 and 100 as between 500 and 1,000: a photo, a question, an answer.

    Photos of 4 x 4 to 29 x 29 tokens, answers of 8 to 220 tokens. `photos` is a folder of .jpg files, or absent: then images of the same
    sizes are drawn.
    """
    random = np.random.default_rng(7)
    wanted = []
    for num_tokens in np.exp(random.uniform(np.log(50), np.log(1000), count)).astype(int).tolist():
        targets = int(np.clip(random.lognormal(3.2, 0.8), 8, min(220, num_tokens // 4)))
        area = max(16, int((num_tokens - targets - 22) * random.uniform(0.6, 0.95)))  # 22: the template's tokens
        height = int(np.clip(np.sqrt(area) * random.uniform(0.75, 1.33), 4, area // 4))
        wanted.append(((height, area // height), num_tokens, targets))
    return _write_rows(folder, wanted, sorted(photos.glob("*.jpg")) if photos.is_dir() else ())


def write_dataset(folder: Path, samples: Sequence[Sample]) -> Path:
    """The samples as Temper's data set, placed so that its first epoch visits them in their order."""
    tokenizer = Tokenizer.from_file(str(folder / "model" / "tokenizer.json"))
    config = Config.from_hf(read_config(folder / "model"))
    processing = ImageProcessing.from_model_dir(folder / "model")
    places = {row_at(position, len(samples), SEED): sample for position, sample in enumerate(samples)}
    path = folder / "dataset"
    with TokenWriter(path) as writer:
        for place in range(len(samples)):
            sample = places[place]
            with Image.open(folder / sample.image) as image:
                grid = processing.grid(image.height, image.width)
            prompt = tokenizer.encode(sample.prompt).ids
            at = prompt.index(config.image_token_id)
            prompt[at : at + 1] = [config.image_token_id] * processing.num_tokens(grid)
            completion = tokenizer.encode(sample.completion).ids
            assert (len(prompt) + len(completion), len(completion)) == (sample.num_tokens, sample.num_targets)
            trained = np.repeat(np.array([0, 1], np.uint8), [len(prompt), len(completion)])
            media = [Medium((Path(sample.image),), grid)]
            writer.add(np.array(prompt + completion), trained, media=media, source_row=place + 1)
        writer.finish(
            train=range(len(samples)), validation=[], media_root=folder, vocab_size=config.text.vocab_size,
            tokenizer_digest="", image_token_id=config.image_token_id, video_token_id=config.video_token_id, pad_token_id=0,
            image_processing=processing,
        )  # fmt: skip
    return path


def read_rows(folder: Path) -> list[Sample]:
    """The samples in training order."""
    return [Sample(**values) for values in json.loads((folder / "rows.json").read_text())]


def _write_rows(
    folder: Path, wanted: Iterable[tuple[tuple[int, int], int, int]], photos: Sequence[Path] = ()
) -> list[Sample]:
    """Rows of ((height, width) of the image in merged patches, tokens, learnt tokens)."""
    (folder / "images").mkdir(parents=True)
    random = np.random.default_rng(3)
    tokenizer = Tokenizer.from_file(str(folder / "model" / "tokenizer.json"))
    head, tail = f"<|im_start|>user\n{IMAGE}", "<|im_end|>\n<|im_start|>assistant\n"
    fixed = len(tokenizer.encode(head + tail).ids) - 1
    samples = []
    for number, ((h, w), num_tokens, num_targets) in enumerate(wanted):
        name = f"images/{number:04d}.jpg"
        size = (w * PATCH, h * PATCH)
        if photos:
            with Image.open(photos[number % len(photos)]) as photo:
                photo.convert("RGB").resize(size).save(folder / name, quality=90)
        else:
            noise = random.integers(0, 256, (h * 4, w * 4, 3), np.uint8)
            Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(folder / name, quality=90)
        question = " a" * (num_tokens - num_targets - h * w - fixed)  # every word here is one token
        answer = "".join(random.choice(WORDS, num_targets - 1)) + "<|im_end|>"
        samples.append(Sample(head + question + tail, answer, name, num_tokens, num_targets))
    (folder / "rows.json").write_text(json.dumps([asdict(sample) for sample in samples]))
    return samples


WORDS = (" red", " green", " blue", " circle", " square", " picture", " shapes", " white", " yellow", " star")
