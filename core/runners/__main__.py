"""`python -m core.runners ATTEMPT_DIR`: run the job that `job.json` there describes; the exit code is the outcome.

0 = succeeded, 75 = stopped as asked, 1 = failed (with an error event), anything else = crashed.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
from pathlib import Path

from core.errors import AppError
from core.processes import die_with_parent
from core.runners.context import EXIT_STOPPED, InputArtifact, RunContext, Stopped, unexpected
from core.specs import parse_stored_spec
from core.specs.events import JobFile
from core.storage.local import Store

TORCH_SETTINGS = {"THP_MEM_ALLOC_ENABLE": "1"}
"""Read by torch when it is imported. Large CPU tensors in huge pages: glibc maps each anew, and zeroing it page by page can take
longer than the operation that fills it."""


def main(attempt_dir: Path) -> int:
    """Run one rank; return its exit code."""
    die_with_parent()
    ctx = load_context(attempt_dir)
    ctx.install_signals()
    configure_logging(ctx)
    for name, value in TORCH_SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        runner = importlib.import_module(f"core.runners.{ctx.kind}")
        ctx.started()
        runner.run(ctx, ctx.spec)
    except Stopped:
        ctx.log.info("stopped as asked")
        return EXIT_STOPPED
    except AppError as error:
        ctx.log.error("%s: %s%s", error.code, error.message, f" ({error.hint})" if error.hint else "")
        ctx.failed(error)
        return 1
    except Exception as error:  # noqa: BLE001  the edge of the process: tell the user what is known, with the traceback in the log
        ctx.log.error("unexpected error\n%s", traceback.format_exc())
        ctx.failed(unexpected(error))
        return 1
    return 0


def load_context(attempt_dir: Path) -> RunContext:
    """Read `job.json` and the rank that torchrun gave this process."""
    job = JobFile.model_validate_json((attempt_dir / "job.json").read_bytes())
    store = Store(Path(job.store))
    return RunContext(
        job_id=job.job_id,
        attempt=job.attempt,
        kind=job.kind,
        spec=parse_stored_spec(job.kind, job.spec),
        inputs={
            name: InputArtifact(item.artifact_id, item.kind, Path(item.path), item.metadata)
            for name, item in job.inputs.items()
        },
        job_dir=store.job_dir(job.job_id),
        attempt_dir=attempt_dir,
        store=store,
        device=job.device,
        rank=int(os.environ.get("RANK", "0")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        allow_roots=tuple(Path(root) for root in job.allow_roots),
    )


def configure_logging(ctx: RunContext) -> None:
    """Log to stdout (the job's log; from ranks above 0 warnings only, marked) and to the rank's own file."""
    console = logging.StreamHandler(sys.stdout)
    console.setLevel(logging.INFO if ctx.is_main else logging.WARNING)
    console.setFormatter(
        logging.Formatter("%(message)s" if ctx.is_main else f"[rank {ctx.rank}] %(levelname)s %(message)s")
    )
    logs = ctx.attempt_dir / "logs"
    logs.mkdir(exist_ok=True)
    file = logging.FileHandler(logs / f"rank_{ctx.rank}.log")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[console, file])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
