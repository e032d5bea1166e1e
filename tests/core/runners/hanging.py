"""`core.runners` on a file system that hangs: an image whose name `HANGS` gives is opened and never comes.

A pipe in the image's place is refused (core.data.media), so the call that opens it waits for a pipe instead.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from core.runners.__main__ import main


def open_or_hang(path: Path, *args: Any, **options: Any) -> Image.Image:
    if path.name == os.environ["HANGS"]:
        path.with_suffix(".pipe").open("rb")  # waits for a writer
    return _open(path, *args, **options)


if __name__ == "__main__":
    _open, Image.open = Image.open, open_or_hang  # type: ignore[assignment]
    sys.exit(main(Path(sys.argv[1])))
