"""Checks at submission: can this job run at all, and what would it need? Refusals say what would work.

Nothing here reads a weight or an image: what is known of an input comes from its manifest, or, for the output of a job that
has not run yet, from that job's spec.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field
from sqlalchemy import select
from sqlalchemy.orm import Session

from core.db.models import Artifact, Job, Node
from core.errors import AppError, Conflict, IncompatiblePlan, InvalidDataset, InvalidSpec, NotFound, UnsupportedOption
from core.jobs import repository
from core.jobs.fitting import (
    ASSUMED_DEVICE_BYTES,
    GIB,
    RankMemory,
    check_recompute,
    disk_bytes,
    lora_suggestion,
    memory_per_rank,
    suggestions,
)
from core.jobs.inspection import inspect_folder
from core.jobs.lifecycle import JobState
from core.jobs.principal import Principal
from core.jobs.resuming import check_resume, checkpoint_metadata
from core.models.config import Config
from core.models.layout import check_canonical
from core.models.plan import stages
from core.models.registry import detect, get_family
from core.scheduler.placement import Need, offers_devices
from core.settings import Settings
from core.specs import ConversionSpec, DatasetSpec, EvaluationSpec, JobSpec, TrainingSpec, parse_stored_spec
from core.specs.base import ArtifactRef, JobInputs
from core.specs.parallel import ParallelSpec
from core.storage.local import Store, resolve_allowed, resolve_inside

MODEL_KINDS = ("hf_model", "mm_checkpoint")
ADAPTER_KINDS = ("hf_adapter", "mm_adapter")

ACCEPTS: dict[tuple[str, str], tuple[str, ...]] = {
    ("conversion", "source"): (*MODEL_KINDS, *ADAPTER_KINDS),
    ("conversion", "hf_source"): ("hf_model",),
    ("dataset", "source"): ("dataset_source",),
    ("dataset", "tokenizer"): MODEL_KINDS,
    ("training", "model"): MODEL_KINDS,
    ("training", "dataset"): ("dataset",),
    ("training", "resume_from"): ("mm_checkpoint",),
    ("evaluation", "model"): MODEL_KINDS,
    ("evaluation", "base"): MODEL_KINDS,
    ("evaluation", "dataset"): ("dataset",),
}
"""Kinds of artifact that each input takes."""

SOURCES_OF_OPERATION = {
    "hf_to_mm": ("hf_model", "hf_adapter"),
    "mm_to_hf": ("mm_checkpoint", "mm_adapter"),
    "reshard": ("mm_checkpoint", "mm_adapter"),
}


class Resources(BaseModel):
    """What the job takes of the cluster while it runs."""

    nodes: int = Field(description="Hosts.")
    devices_per_node: int = Field(description="Devices on each host; 0 = runs beside the devices.")


class PlannedInput(BaseModel):
    """An input as far as it is known now."""

    field: str
    kind: str
    artifact_id: str | None
    job_id: str | None


class Plan(BaseModel):
    """What a job would do."""

    resources: Resources
    inputs: list[PlannedInput]
    steps: int | None = Field(None, description="Optimizer steps of a training.")
    disk_bytes: int | None = Field(
        None, description="Most space that what it writes takes at a time, where it can be told."
    )
    memory_per_rank: list[RankMemory] = []
    device_memory_bytes: int | None = Field(None, description="Memory of a device that `fits` is against.")
    suggestions: list[str] = Field([], description="Where a rank does not fit: changes of the spec with which all do.")
    warnings: list[str] = []
    risks: list[str] = Field([], description="Why it may fail when it runs; a job is accepted all the same.")


@dataclass(frozen=True)
class Subject:
    """What is known of an input: its kind, and what its manifest says or its job's spec foretells."""

    kind: str
    metadata: Mapping[str, Any]
    size_bytes: int | None = None
    artifact: Artifact | None = None
    job: Job | None = None
    path: str | None = None

    @property
    def config(self) -> Config | None:
        """The model's config, if it is known."""
        raw = self.metadata.get("config")
        return detect(raw).parse_config(raw) if raw else None

    @property
    def layout(self) -> ParallelSpec | None:
        """The mm layout, if it is known."""
        raw = self.metadata.get("parallel")
        return ParallelSpec.model_validate(raw) if raw else None


@dataclass(frozen=True)
class Planner:
    """Plans specs for one caller."""

    session: Session
    settings: Settings
    store: Store
    principal: Principal
    get_artifact: Callable[[str], Artifact]
    get_job: Callable[[str], Job]

    def plan(self, kind: str, spec: JobSpec) -> Plan:
        """Refuse what cannot run; else say what it needs."""
        subjects = {name: self._subject(kind, name, ref) for name, ref in spec.references()}
        resources = Resources(nodes=(need := need_of(spec)).num_nodes, devices_per_node=need.devices_per_node)
        plan = Plan(
            resources=resources,
            inputs=[
                PlannedInput(
                    field=name,
                    kind=s.kind,
                    artifact_id=s.artifact.id if s.artifact else None,
                    job_id=s.job.id if s.job else None,
                )
                for name, s in subjects.items()
            ],
        )
        self._check_capacity(plan)
        match spec:
            case ConversionSpec():
                self._conversion(spec, subjects, plan)
            case DatasetSpec():
                self._dataset(spec, subjects)
            case TrainingSpec():
                self._training(spec, subjects, plan)
            case EvaluationSpec():
                self._evaluation(spec, subjects)
        if plan.disk_bytes is not None and plan.disk_bytes > (free := self.store.free_bytes()):
            plan.risks.append(f"it writes {plan.disk_bytes} bytes at its peak, {free} are free in the store")
        return plan

    def _subject(self, kind: str, name: str, ref: ArtifactRef) -> Subject:
        try:
            subject = self._look_up(ref)
        except AppError as error:
            raise type(error)(f"spec.{name}: {error.message}", hint=error.hint, code=error.code) from error
        accepted = ACCEPTS[kind, name]
        if subject.kind not in accepted:
            raise InvalidSpec(
                f"spec.{name}: an artifact of kind {subject.kind} was given; {' or '.join(accepted)} is needed",
                code="wrong_artifact_kind",
            )
        return subject

    def _look_up(self, ref: ArtifactRef) -> Subject:
        if ref.artifact:
            return of_artifact(self.get_artifact(ref.artifact))
        if ref.path:
            real = resolve_allowed(ref.path, self.settings.allow_roots)
            kind, metadata, size = inspect_folder(real, roots=self.settings.allow_roots)
            return Subject(kind, metadata, size, path=str(real))
        job = self.get_job(ref.job or "")
        return self._of_job(job, ref.output)

    def _of_job(self, job: Job, output: str | None) -> Subject:
        state = JobState(job.state)
        name = output or main_output(job.kind, job.spec)
        if state is JobState.SUCCEEDED:
            artifact = repository.output(self.session, job, name)
            if artifact is None:
                made = (
                    ", ".join(item.name for item in repository.outputs(self.session, job.id))
                    or "nothing that still exists"
                )
                raise NotFound(f"job {job.id} has no output {name!r}; it made {made}")
            return of_artifact(artifact)
        if state in (JobState.FAILED, JobState.CANCELLED):
            raise Conflict(f"job {job.id} is {state.value}, its output will not come", hint="retry that job first")
        if name != main_output(job.kind, job.spec) and not _is_side_output(job, name):
            raise NotFound(
                f"job {job.id} will have no output {name!r}; its main output is {main_output(job.kind, job.spec)!r}"
            )
        return self._foretell(job, name)

    def _foretell(self, job: Job, name: str) -> Subject:
        """What a job that has not finished will make under this name."""
        spec = parse_stored_spec(job.kind, job.spec)
        match spec:
            case ConversionSpec():
                source = self._look_up(spec.source)
                config = (self._look_up(spec.hf_source) if spec.hf_source else source).metadata.get("config")
                adapter = source.kind in ADAPTER_KINDS
                if spec.operation == "mm_to_hf":
                    kind = "hf_adapter" if adapter else "hf_model"
                    return Subject(kind, {"config": config}, source.size_bytes, job=job)
                metadata = {
                    "config": config,
                    "parallel": _dump(spec.parallel),
                    "canonical": spec.canonical,
                }
                return Subject("mm_adapter" if adapter else "mm_checkpoint", metadata, source.size_bytes, job=job)
            case TrainingSpec():
                if name.startswith("adapter"):
                    return Subject("hf_adapter", {}, job=job)
                model = self._look_up(spec.model)
                iteration = int(name.rpartition("-")[2]) if "-" in name else spec.train_iters
                metadata = {"config": model.metadata.get("config"), **checkpoint_metadata(spec), "iteration": iteration}
                if spec.lora is not None:
                    metadata["lora"] = spec.lora.model_dump(mode="json")
                return Subject("mm_checkpoint", metadata, model.size_bytes, job=job)
            case DatasetSpec():
                return Subject("dataset", {"cutoff_len": spec.cutoff_len}, job=job)
            case EvaluationSpec():
                return Subject("report", {}, job=job)

    def _check_capacity(self, plan: Plan) -> None:
        need, most = plan.resources, self.settings.max_user_devices
        if most is not None and need.nodes * need.devices_per_node > most:
            raise IncompatiblePlan(
                f"needs {need.nodes * need.devices_per_node} devices; one user may hold {most} at once",
                hint="ask for fewer devices; an operator sets the limit (TEMPER_MAX_USER_DEVICES)",
                code="over_limit",
            )
        nodes = self._device_hosts() if need.devices_per_node else self.session.scalars(select(Node)).all()
        if not nodes:
            plan.warnings.append("no worker has registered yet; the job waits for one")
            return
        fitting = [node for node in nodes if len(node.devices) >= need.devices_per_node]
        if len(fitting) < need.nodes:
            have = ", ".join(f"{node.name}: {len(node.devices)} {node.device_kind}" for node in nodes)
            raise IncompatiblePlan(
                f"needs {need.nodes} host(s) with {need.devices_per_node} device(s) each; the cluster has {have}",
                hint=f"ask for at most {max(len(node.devices) for node in nodes)} device(s) per host and {len(nodes)} host(s)",
                code="not_enough_devices",
            )

        if len(fitting) - len(drained := [node.name for node in fitting if node.drained]) < need.nodes:
            plan.warnings.append(f"the job waits until enough hosts are in service; drained: {', '.join(drained)}")

    def _device_hosts(self) -> Sequence[Node]:
        """The hosts that jobs with devices may run on."""
        nodes = self.session.scalars(select(Node).order_by(Node.name)).all()
        kinds = {node.device_kind for node in nodes}
        return [node for node in nodes if offers_devices(node.device_kind, kinds)]

    def _conversion(self, spec: ConversionSpec, subjects: Mapping[str, Subject], plan: Plan) -> None:
        source = subjects["source"]
        wanted = SOURCES_OF_OPERATION[spec.operation]
        if source.kind not in wanted:
            raise InvalidSpec(
                f"spec.source: {spec.operation} reads an artifact of kind {' or '.join(wanted)}, {source.kind} was given",
                code="wrong_artifact_kind",
            )
        _check_adapter_fields(spec, source.kind)
        plan.disk_bytes = source.size_bytes
        if "hf_source" in subjects:
            source = replace(
                source, metadata={**source.metadata, "config": subjects["hf_source"].metadata.get("config")}
            )
        _check_verify(spec, source)
        if source.kind in ("mm_checkpoint", "mm_adapter"):
            self._source_layout(spec, source)
            if source.config is None and source.job is None:
                raise InvalidSpec(
                    "spec.hf_source: the source carries no config.json; name the Hugging Face folder it came from"
                )
        if source.config is not None and spec.parallel is not None:
            stages(source.config, spec.parallel)
            check_canonical(source.config.family, spec.parallel, canonical=spec.canonical)

    def _source_layout(self, spec: ConversionSpec, source: Subject) -> None:
        known = source.layout
        if known is None and spec.source_parallel is None:
            raise InvalidSpec(
                "spec.source_parallel: the source does not record its layout; give tp_size, llm_pp_layers, vit_pp_layers"
            )
        if known is not None and spec.source_parallel not in (None, known):
            raise InvalidSpec(
                f"spec.source_parallel differs from the layout that the source records: {_dump(known)}; leave it out"
            )
        if known is None and spec.source_parallel is not None:
            wanted, there = (spec.source_parallel.tp_size, spec.source_parallel.pp_size), _ranks(source)
            if there not in (None, wanted):
                raise IncompatiblePlan(
                    f"spec.source_parallel makes it tp {wanted[0]} x pp {wanted[1]}, "
                    f"but the source has rank files of tp {there[0]} x pp {there[1]}"
                )
            if source.config is not None:
                stages(source.config, spec.source_parallel)

    def _dataset(self, spec: DatasetSpec, subjects: Mapping[str, Subject]) -> None:
        source = subjects["source"]
        root = Path(source.path or (source.artifact.path if source.artifact else ""))
        try:
            resolve_inside(root, spec.annotations)
        except NotFound:
            by_size = sorted(root.glob("*.json*"), key=lambda path: (-path.stat().st_size, path.name))
            there = ", ".join(path.name for path in by_size[:8]) or "no JSON file at its top"
            raise InvalidDataset(
                f"spec.annotations: {spec.annotations!r} is not in the source, which has {there}"
            ) from None
        if not (root / spec.media_root).resolve().is_dir():
            raise InvalidDataset(f"spec.media_root: {spec.media_root!r} is not a folder of the source")

    def _training(self, spec: TrainingSpec, subjects: Mapping[str, Subject], plan: Plan) -> None:
        model, data = subjects["model"], subjects["dataset"]
        plan.steps = spec.train_iters
        if model.metadata.get("canonical"):
            raise UnsupportedOption(
                "spec.model: a canonical (unfused) checkpoint cannot be trained; convert it with canonical false"
            )
        longest = data.metadata.get("max_length")
        if longest is not None and longest > spec.seq_length:
            raise IncompatiblePlan(
                f"spec.seq_length ({spec.seq_length}) is shorter than the longest row of the data set ({longest} tokens)",
                hint=f"set seq_length to at least {longest}, or build the data set with a smaller cutoff_len",
            )
        cutoff = data.metadata.get("cutoff_len")
        if longest is None and cutoff is not None and cutoff > spec.seq_length:
            plan.risks.append(
                f"seq_length ({spec.seq_length}) is below the data set's cutoff_len ({cutoff}): the training fails if a row is longer"
            )
        if data.metadata.get("num_train") == 0:
            raise InvalidDataset("spec.dataset has no training rows")
        if "resume_from" in subjects:
            plan.warnings += check_resume(spec, subjects["resume_from"].metadata, model.metadata)
        config = model.config
        if config is None:
            return
        _require_model("spec.model", config)
        stages(config, spec.parallel)
        check_recompute(spec, config)
        self._memory(spec, config, plan)
        plan.disk_bytes = disk_bytes(spec, plan.memory_per_rank)

    def _memory(self, spec: TrainingSpec, config: Config, plan: Plan) -> None:
        """Predict each rank's peak, and say what would fit if it does not."""
        nodes = [node for node in self._device_hosts() if node.devices]
        known = [size for node in nodes for device in node.devices if (size := device.get("memory_bytes"))]
        plan.device_memory_bytes = min(known, default=ASSUMED_DEVICE_BYTES)
        fused = not nodes or any(node.device_kind == "npu" for node in nodes)
        if not known:
            plan.warnings.append("no device tells its memory; fits is against an assumed 64 GiB")
        plan.memory_per_rank = memory_per_rank(spec, config, plan.device_memory_bytes, fused=fused)
        if not all(rank.fits for rank in plan.memory_per_rank):
            plan.suggestions = suggestions(
                spec, config, plan.device_memory_bytes, hosts=[len(node.devices) for node in nodes], fused=fused
            )
            plan.suggestions += lora_suggestion(spec, config, plan.device_memory_bytes, fused=fused)
            worst = max(plan.memory_per_rank, key=lambda rank: rank.total_bytes)
            plan.risks.append(
                f"pipeline rank {worst.pipeline_rank} needs about {worst.total_bytes / GIB:.1f} GiB, a device has "
                f"{plan.device_memory_bytes / GIB:.1f} GiB: "
                + ("; or ".join(plan.suggestions) or "no simple change makes it fit on the devices that there are")
            )

    def _evaluation(self, spec: EvaluationSpec, subjects: Mapping[str, Subject]) -> None:
        data = subjects.get("dataset")
        if data is not None and data.metadata.get("num_validation") == 0:
            raise InvalidDataset("spec.dataset has no held-out rows", hint="build it with validation_fraction above 0")
        for name in ("model", "base"):
            if name in subjects and (config := subjects[name].config) is not None:
                _require_model(f"spec.{name}", config)
            if name in subjects and subjects[name].metadata.get("canonical"):
                raise UnsupportedOption(
                    f"spec.{name}: a canonical (unfused) checkpoint cannot be evaluated; convert it with mm_to_hf first"
                )
        for index, prompt in enumerate(spec.prompts or ()):
            for kind, paths in (("image", prompt.images), ("video", prompt.videos)):
                count = prompt.text.count(f"<{kind}>")
                if count not in (0, len(paths)):
                    raise InvalidSpec(
                        f"spec.prompts[{index}].text has {count} <{kind}> placeholders for {len(paths)} {kind}s"
                    )
                for path in paths:
                    resolve_allowed(path, self.settings.allow_roots)


def need_of(spec: JobInputs) -> Need:
    """Hosts and devices that a job takes."""
    match spec:
        case TrainingSpec():
            return Need(spec.parallel.nnodes, spec.parallel.nproc_per_node)
        case EvaluationSpec():
            return Need(1, 1)
        case _:
            return Need(1, 0)


def main_output(kind: str, spec: Mapping[str, Any]) -> str:
    """Name of the output that a reference without `output` means."""
    match kind:
        case "conversion":
            return "model" if spec["operation"] == "mm_to_hf" else "checkpoint"
        case "dataset":
            return "dataset"
        case "training":
            return "checkpoint"
        case _:
            return "report"


def of_artifact(artifact: Artifact) -> Subject:
    """What an artifact's row says."""
    return Subject(artifact.kind, artifact.meta, artifact.size_bytes, artifact=artifact)


def _is_side_output(job: Job, name: str) -> bool:
    """Whether a job may come to have this output beside its main one."""
    if job.kind != "training":
        return False
    return re.fullmatch(r"adapter(-\d{7})?" if job.spec.get("lora") else r"checkpoint-\d{7}", name) is not None


def _check_adapter_fields(spec: ConversionSpec, kind: str) -> None:
    """Options that go with an adapter only, or never do."""
    if kind in ADAPTER_KINDS:
        for name in ("canonical", "max_shard_bytes"):
            if getattr(spec, name):
                raise InvalidSpec(f"spec.{name} has no effect on an adapter; leave it out")
        if kind == "hf_adapter" and spec.hf_source is None:
            raise InvalidSpec("spec.hf_source: name the Hugging Face folder of the model that the adapter belongs to")
        return
    if spec.lora_alpha is not None:
        raise InvalidSpec(f"spec.lora_alpha has no effect: the source is no adapter but of kind {kind}")
    if kind == "hf_model" and spec.hf_source is not None:
        raise InvalidSpec("spec.hf_source has no effect: the source is a Hugging Face folder itself")


def _ranks(source: Subject) -> tuple[int, int] | None:
    """(tp, pp) of the rank files, where they have been looked at."""
    if "tp_size" not in source.metadata:
        return None
    return source.metadata["tp_size"], source.metadata["pp_size"]


def _check_verify(spec: ConversionSpec, source: Subject) -> None:
    """Both forms must be of a model that Temper can run."""
    if spec.verify != "logits":
        return
    reason = None
    if source.kind in ADAPTER_KINDS:
        reason = "an adapter has none by itself"
    elif spec.canonical or source.metadata.get("canonical"):
        reason = "Temper runs the fused layout, not the canonical one"
    elif source.config is not None and get_family(source.config.family).model is None:
        reason = f"this version only converts {source.config.family} and cannot run it"
    if reason:
        raise UnsupportedOption(
            f"spec.verify: no logits to compare: {reason}", hint="verify: true compares every weight"
        )


def _require_model(field: str, config: Config) -> None:
    if get_family(config.family).model is None:
        raise UnsupportedOption(
            f"{field}: this version only converts {config.family}; it neither trains nor evaluates it"
        )


def _dump(parallel: ParallelSpec | None) -> dict[str, Any] | None:
    return parallel.model_dump(mode="json") if parallel else None
