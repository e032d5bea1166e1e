"""`core.runners` on a file system that hangs: an image whose name `HANGS` gives never comes from the process that decodes it.

A pipe in the image's place is refused (core.data.media), so the call that waits for the process waits for a pipe instead.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from core.data.decoding import Decoders
from core.data.media import Frame, Medium
from core.runners.__main__ import main


def decode_or_hang(decoders: Decoders, medium: Medium) -> list[Frame]:
    if medium.paths[0].name == os.environ["HANGS"]:
        medium.paths[0].with_suffix(".pipe").open("rb")  # waits for a writer
    return _decode(decoders, medium)


if __name__ == "__main__":
    _decode, Decoders.decode = Decoders.decode, decode_or_hang  # type: ignore[method-assign]
    sys.exit(main(Path(sys.argv[1])))
