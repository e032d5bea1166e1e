"""Runs a conversion job: opens the inputs, checks the disk, converts into a new artifact."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from core.conversion.convert import hf_to_mm, mm_to_hf, reshard
from core.errors import DiskFull, IncompatiblePlan, InvalidSpec
from core.models.hf_folder import inspect_hf_folder, read_config
from core.models.mm_folder import MMFolder, inspect_mm_folder
from core.models.qwen2_5_vl.family import Config
from core.models.registry import detect
from core.runners.context import InputArtifact, RunContext, Stopped
from core.specs.conversion import ConversionSpec
from core.specs.parallel import ParallelSpec

PROGRESS_INTERVAL_S = 0.5
SPARE_BYTES = 64 << 20
"""Room for the files that hold no weights."""


def run(ctx: RunContext, spec: ConversionSpec) -> None:
    """Convert `source`; the artifact is named `checkpoint` (mm_checkpoint) or `model` (hf_model)."""
    if spec.operation == "mm_to_hf":
        _to_hf(ctx, spec)
    else:
        _to_mm(ctx, spec)


def _to_mm(ctx: RunContext, spec: ConversionSpec) -> None:
    assert spec.parallel is not None, "the spec requires it with both operations"
    options: _MMOptions = {"canonical": spec.canonical, "dtype": spec.dtype, "allow_roots": ctx.allow_roots}
    output = ctx.new_artifact("checkpoint", "mm_checkpoint")
    watch = _Watch(ctx, output.path)
    try:
        if spec.operation == "hf_to_mm":
            folder = inspect_hf_folder(ctx.inputs["source"].path)
            ctx.log.info("%s: %d tensors, %d bytes", folder.path, len(folder.tensors), folder.total_bytes)
            written = hf_to_mm(folder, output.path, spec.parallel, watch=watch, **options)
        else:
            mm = _open_mm(ctx, spec)
            layouts = (mm.parallel, output.path, spec.parallel)
            written = reshard(mm.folder, mm.config, *layouts, hf_files=mm.hf_files, watch=watch, **options)
        config_json = read_config(output.path / "hf")
        metadata = {
            "family": detect(config_json).name,
            "config": config_json,
            "parallel": spec.parallel.model_dump(mode="json"),
            "canonical": spec.canonical,
            "dtype": written.dtypes[0] if len(written.dtypes) == 1 else None,
            "iteration": None,
        }
        output.commit(metadata, digests=written.digests)
    except BaseException:
        output.abort()
        raise


def _to_hf(ctx: RunContext, spec: ConversionSpec) -> None:
    mm = _open_mm(ctx, spec)
    output = ctx.new_artifact("model", "hf_model")
    try:
        written = mm_to_hf(
            mm.folder,
            mm.config,
            mm.parallel,
            output.path,
            hf_files=mm.hf_files,
            dtype=spec.dtype,
            max_shard_bytes=spec.max_shard_bytes,
            allow_roots=ctx.allow_roots,
            watch=_Watch(ctx, output.path),
        )
        result = inspect_hf_folder(output.path)
        ctx.log.info("checked: %d tensors, %d bytes", len(result.tensors), result.total_bytes)
        output.commit(result.metadata, digests=written.digests)
    except BaseException:
        output.abort()
        raise


class _MMOptions(TypedDict):
    canonical: bool
    dtype: str | None
    allow_roots: tuple[Path, ...]


@dataclass(frozen=True)
class _OpenedMM:
    folder: MMFolder
    parallel: ParallelSpec
    config: Config
    hf_files: Path


def _open_mm(ctx: RunContext, spec: ConversionSpec) -> _OpenedMM:
    """The source checkpoint, its layout and its config, from where they are written down."""
    source = ctx.inputs["source"]
    parallel = _source_parallel(source, spec)
    folder = inspect_mm_folder(source.path, parallel)
    if "hf_source" in ctx.inputs:
        hf_files = ctx.inputs["hf_source"].path
    elif folder.hf_dir is not None:
        hf_files = folder.hf_dir
    else:
        raise InvalidSpec(
            f"{source.path} has no hf/ folder with config and tokenizer; give hf_source",
            hint="hf_source is the Hugging Face folder that the checkpoint was made from",
        )
    config_json = read_config(hf_files)
    config = detect(config_json).parse_config(config_json)
    ctx.log.info("%s: tp %d x pp %d, %d bytes", folder.path, folder.tp_size, folder.pp_size, folder.total_bytes)
    return _OpenedMM(folder, parallel, config, hf_files)


def _source_parallel(source: InputArtifact, spec: ConversionSpec) -> ParallelSpec:
    recorded = source.metadata.get("parallel")
    if recorded is None:
        if spec.source_parallel is None:
            raise InvalidSpec(f"{source.path} does not record its layout; give source_parallel")
        return spec.source_parallel
    parallel = ParallelSpec.model_validate({name: recorded[name] for name in ParallelSpec.model_fields})
    if spec.source_parallel is not None and spec.source_parallel != parallel:
        raise IncompatiblePlan(
            f"source_parallel is {spec.source_parallel.model_dump(mode='json')}, but the checkpoint records "
            f"{parallel.model_dump(mode='json')}; leave it out"
        )
    return parallel


class _Watch:
    """Tells the job how the conversion goes on, and ends it when the job is to stop or the disk is too small."""

    def __init__(self, ctx: RunContext, target: Path) -> None:
        self._ctx, self._target = ctx, target
        self._total = self._done = 0
        self._told_at = 0.0

    def begin(self, total_bytes: int) -> None:
        """Check the free space."""
        free = shutil.disk_usage(self._target).free
        if total_bytes + SPARE_BYTES > free:
            raise DiskFull(f"the conversion writes {total_bytes + SPARE_BYTES} bytes, but {free} are free")
        self._total = total_bytes
        self._tell()

    def advance(self, num_bytes: int) -> None:
        """Report progress now and then."""
        self._done += num_bytes
        if self._ctx.should_stop():
            raise Stopped
        if self._done == self._total or time.monotonic() - self._told_at >= PROGRESS_INTERVAL_S:
            self._tell()

    def wrote(self, file: str, size_bytes: int) -> None:
        """Log the file."""
        self._ctx.log.info("wrote %s, %d bytes", file, size_bytes)

    def warn(self, code: str, message: str) -> None:
        """Pass it on."""
        self._ctx.warn(code, message)

    def _tell(self) -> None:
        self._told_at = time.monotonic()
        self._ctx.progress(self._done, self._total, "bytes")
