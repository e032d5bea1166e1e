"""Runs attempts one after another, each in a fresh process of its own: a path per line comes in, `pid` and then `status` go out.

The processes are forked off this one, which has everything imported, so that a test can afford many of them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import core.runners.conversion  # noqa: F401 - imported here, so that the children need not
from core.runners.__main__ import main


def serve() -> None:
    """Until the input ends."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os._exit(main(Path(line.strip())))
        print(pid, flush=True)  # noqa: T201 - this is how it answers
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)  # noqa: T201


if __name__ == "__main__":
    serve()
