"""Runs a conversion job: opens the inputs, checks the disk, converts, and publishes the result as an artifact."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import core
from core.conversion.adapter import adapter_reshard, adapter_to_hf, adapter_to_mm
from core.conversion.convert import hf_to_mm, mm_to_hf, reshard
from core.conversion.journal import Journal
from core.conversion.output import Options, Written
from core.errors import DiskFull, IncompatiblePlan, InvalidSpec
from core.models.adapter import inspect_adapter_folder
from core.models.config import Config
from core.models.hf_folder import inspect_hf_folder, read_config
from core.models.mm_folder import MMFolder, inspect_mm_folder
from core.models.registry import detect
from core.runners.context import InputArtifact, RunContext, Stopped
from core.specs.conversion import ConversionSpec
from core.specs.parallel import ParallelSpec
from core.storage.manifest import walk_files

if TYPE_CHECKING:
    from core.conversion.logits import Side

PROGRESS_INTERVAL_S = 0.5
SPARE_BYTES = 64 << 20
"""Room for the files that hold no weights."""


def run(ctx: RunContext, spec: ConversionSpec) -> None:
    """Convert `source`; the artifact is named `checkpoint` (mm_checkpoint, mm_adapter) or `model` (hf_model, hf_adapter).

    What is finished when the process is killed or told to stop stays in the job's folder for its next attempt.
    """
    journal = Journal.open(ctx.job_dir / "conversion", ctx.attempt, plan=_plan_digest(ctx))
    if journal.finished:
        ctx.log.info("going on after an earlier attempt: %d files are finished", len(journal.finished))
    try:
        made = _convert(ctx, spec, journal)
        with ctx.new_artifact(made.name, made.kind) as output:
            journal.hand_over(output.path)
            output.commit(made.metadata, digests=made.digests)
    except Stopped:
        raise
    except BaseException:
        journal.discard()
        raise


@dataclass(frozen=True)
class _Made:
    """What the artifact will be."""

    name: str
    kind: str
    metadata: dict[str, Any]
    digests: dict[str, str]


def _convert(ctx: RunContext, spec: ConversionSpec, journal: Journal) -> _Made:
    options = Options(spec.dtype, bool(spec.verify), ctx.allow_roots, _Watch(ctx, journal.target), journal)
    if ctx.inputs["source"].kind in ("hf_adapter", "mm_adapter"):
        return _adapter(ctx, spec, journal.target, options)
    return (_to_hf if spec.operation == "mm_to_hf" else _to_mm)(ctx, spec, journal.target, options)


def _adapter(ctx: RunContext, spec: ConversionSpec, target: Path, options: Options) -> _Made:
    source = ctx.inputs["source"]
    config_json = (
        read_config(ctx.inputs["hf_source"].path) if "hf_source" in ctx.inputs else source.metadata.get("config")
    )
    if config_json is None:
        raise InvalidSpec(f"{source.path} does not record its model's config; give hf_source")
    family = detect(config_json)
    config = family.parse_config(config_json)
    metadata: dict[str, Any] = {"family": family.name, "config": config_json}
    if spec.operation == "hf_to_mm":
        assert spec.parallel is not None, "the spec requires it"
        written = adapter_to_mm(inspect_adapter_folder(source.path, config), target, spec.parallel, options)
    else:
        parallel = _source_parallel(source, spec)
        folder = inspect_mm_folder(source.path, parallel)
        if spec.operation == "mm_to_hf":
            written = adapter_to_hf(
                folder,
                config,
                parallel,
                target,
                options,
                lora_alpha=spec.lora_alpha,
                base_model=config_json.get("_name_or_path"),
            )
            return _Made("model", "hf_adapter", metadata | _verified(ctx, spec, written), written.digests)
        assert spec.parallel is not None, "the spec requires it"
        written = adapter_reshard(folder, config, parallel, target, spec.parallel, options)
    metadata |= {"parallel": spec.parallel.model_dump(mode="json"), "iteration": None}
    return _Made("checkpoint", "mm_adapter", metadata | _verified(ctx, spec, written), written.digests)


def _to_mm(ctx: RunContext, spec: ConversionSpec, target: Path, options: Options) -> _Made:
    assert spec.parallel is not None, "the spec requires it with both operations"
    if spec.operation == "hf_to_mm":
        folder = inspect_hf_folder(ctx.inputs["source"].path)
        config = folder.config
        ctx.log.info("%s: %d tensors, %d bytes", folder.path, len(folder.tensors), folder.total_bytes)
        written = hf_to_mm(folder, target, spec.parallel, options, canonical=spec.canonical)
    else:
        mm = _open_mm(ctx, spec)
        config = mm.config
        written = reshard(
            mm.folder,
            mm.config,
            mm.parallel,
            target,
            spec.parallel,
            options,
            hf_files=mm.hf_files,
            canonical=spec.canonical,
        )
    config_json = read_config(target / "hf")
    metadata = {
        "family": detect(config_json).name,
        "config": config_json,
        "parallel": spec.parallel.model_dump(mode="json"),
        "canonical": spec.canonical,
        "dtype": written.dtypes[0] if len(written.dtypes) == 1 else None,
        "iteration": None,
    }
    metadata |= _verified(ctx, spec, written)
    if spec.verify == "logits":
        from core.conversion.logits import HFSide, MMSide

        source = HFSide(folder) if spec.operation == "hf_to_mm" else MMSide(mm.folder, mm.config, mm.parallel)
        output = MMSide(inspect_mm_folder(target), config, spec.parallel)
        metadata |= _same_logits(ctx, options, source, output)
    return _Made("checkpoint", "mm_checkpoint", metadata, written.digests)


def _to_hf(ctx: RunContext, spec: ConversionSpec, target: Path, options: Options) -> _Made:
    mm = _open_mm(ctx, spec)
    written = mm_to_hf(
        mm.folder,
        mm.config,
        mm.parallel,
        target,
        options,
        hf_files=mm.hf_files,
        max_shard_bytes=spec.max_shard_bytes,
    )
    result = inspect_hf_folder(target)
    ctx.log.info("checked: %d tensors, %d bytes", len(result.tensors), result.total_bytes)
    metadata = result.metadata | _verified(ctx, spec, written)
    if spec.verify == "logits":
        from core.conversion.logits import HFSide, MMSide

        metadata |= _same_logits(ctx, options, MMSide(mm.folder, mm.config, mm.parallel), HFSide(result))
    return _Made("model", "hf_model", metadata, written.digests)


def _verified(ctx: RunContext, spec: ConversionSpec, written: Written) -> dict[str, Any]:
    """What the artifact's metadata says of the verification, which has raised if anything differed."""
    if not spec.verify:
        return {}
    ctx.log.info("verified: %d tensors were read back from the disk and equal their sources", written.num_tensors)
    return {"verified": True}


def _same_logits(ctx: RunContext, options: Options, source: Side, output: Side) -> dict[str, Any]:
    """Compare what both forms of the model compute; what is found goes into the artifact's metadata."""
    from core.conversion.logits import compare_logits

    report = compare_logits(source, output, dtype=options.dtype, tick=lambda: _stop_if_told(ctx))
    ctx.log.info(
        "verified: logits of vision layers %s and language layers %s differ by %.1e at most, the largest is %.1e",
        report.vision_layers,
        report.language_layers,
        report.difference,
        report.largest,
    )
    return {"verified_logits": asdict(report)}


def _stop_if_told(ctx: RunContext) -> None:
    if ctx.should_stop():
        raise Stopped


def _plan_digest(ctx: RunContext) -> str:
    """Changes when the files of an earlier attempt may not be those that this one would make."""
    sources = [
        (str(file), file.stat().st_size, file.stat().st_mtime_ns)
        for _, item in sorted(ctx.inputs.items())
        for _, file in walk_files(item.path)
    ]
    plan = [core.__version__, ctx.spec.model_dump(mode="json"), sources]
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


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

    def begin(self, total_bytes: int, *, to_write: int) -> None:
        """Check the free space."""
        free = shutil.disk_usage(self._target).free
        if to_write + SPARE_BYTES > free:
            raise DiskFull(
                f"the conversion writes {to_write + SPARE_BYTES} bytes, but {free} are free in {self._target}",
                hint="free some, or have TEMPER_STORE on a larger disk",
            )
        self._total = total_bytes
        self._tell()

    def advance(self, num_bytes: int) -> None:
        """Report progress now and then."""
        self._done += num_bytes
        _stop_if_told(self._ctx)
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
