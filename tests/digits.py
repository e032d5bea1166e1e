"""Real data that a Python package ships: 1,797 scans of handwritten digits (scikit-learn, from UCI's Optical Recognition
of Handwritten Digits), as LLaVA-Instruct records and PNG images; and a tiny model whose tokenizer knows the words.

    FOLDER/digits.json            [{"id", "image", "conversations": [{"from": "human", "value": "<image>\\n…"}, …]}, …]
    FOLDER/images/digit_0000.png  8 × 8 scans, enlarged to 56 × 56: 4 × 4 patches, 4 image tokens
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from tests.tiny import CORPUS, TinyShape, tiny_model

QUESTION = "What digit is this?"
SIDE = 56
# Four layers in each tower, so that a pipeline of two has something to split: [[2, 2]] and [[4, 0]].
SHAPE = TinyShape(vision_layers=4, vision_hidden=64, vision_heads=4, vision_ffn=128, text_layers=4, hidden=64, ffn=128)


def write_digits(folder: Path, *, limit: int | None = None) -> int:
    """Write records and images; the number of records. The order is the data set's own."""
    digits = load_digits()
    (folder / "images").mkdir(parents=True)
    records = []
    for number, (scan, label) in enumerate(zip(digits.images[:limit], digits.target[:limit], strict=True)):
        name = f"images/digit_{number:04d}.png"
        grey = Image.fromarray((scan / 16 * 255).astype(np.uint8))  # the scans count 0 to 16 dark pixels
        grey.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / name)
        question = {"from": "human", "value": f"<image>\n{QUESTION}"}
        answer = {"from": "gpt", "value": str(label)}
        records.append({"id": f"digit_{number:04d}", "image": name, "conversations": [question, answer]})
    (folder / "digits.json").write_text(json.dumps(records, indent=1))
    return len(records)


def write_model(folder: Path, *, seed: int = 0) -> Path:
    """A random Qwen2.5-VL of half a million weights in Hugging Face layout, in two shards."""
    turns = [f"system\nYou are a helpful assistant.\nuser\n{QUESTION}\nassistant\n{digit}" for digit in range(10)]
    return tiny_model(folder, shape=SHAPE, seed=seed, num_shards=2, corpus=(*CORPUS, *turns * 20))


def as_text(image: Path) -> str:
    """The scan, drawn for a terminal."""
    with Image.open(image) as picture:
        grey = np.asarray(picture.convert("L").resize((8, 8), Image.Resampling.BOX))
    return "\n".join("".join(" ░▒▓█"[min(int(value) // 52, 4)] * 2 for value in row) for row in grey)
