"""Conversion jobs from spec to artifact."""

from __future__ import annotations

import json
import logging
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest

from core.conversion.files import HashingWriter
from core.conversion.journal import Journal, Record
from core.conversion.verify import VerificationFailed
from core.errors import AppError, DiskFull, IncompatiblePlan, InvalidSpec
from core.jobs.inspection import inspect_folder
from core.models.hf_folder import inspect_hf_folder
from core.models.mm_folder import inspect_mm_folder
from core.runners import conversion
from core.runners.context import InputArtifact, RunContext, Stopped
from core.specs.conversion import ConversionSpec
from core.storage.local import Store
from core.storage.manifest import FileEntry, Manifest
from tests.bench.conversion import Bench, write_model
from tests.services import REPOSITORY
from tests.tiny import TinyShape, tiny_model, write_safetensors

SHAPE = TinyShape(vision_layers=2, text_layers=3)
PARALLEL = {"tp_size": 2, "llm_pp_layers": [[1, 2]], "vit_pp_layers": [[2, 0]]}
OTHER = {"tp_size": 1, "llm_pp_layers": [[3]], "vit_pp_layers": [[2]]}
ART = "art_" + "0" * 26


class Usage(NamedTuple):
    total: int
    used: int
    free: int


class Jobs:
    """Runs specs one after another against one store."""

    def __init__(self, root: Path) -> None:
        self.store = Store(root / "store")
        self.root = root
        self.count = 0

    def context(self, spec: dict[str, Any], **inputs: InputArtifact) -> RunContext:
        self.count += 1
        folder = self.root / f"job{self.count}"
        folder.mkdir()
        parsed = ConversionSpec.model_validate({"source": {"artifact": ART}} | spec)
        return RunContext(
            job_id="job_" + "0" * 26,
            attempt=1,
            kind="conversion",
            spec=parsed,
            inputs=inputs,
            job_dir=folder,
            attempt_dir=folder,
            store=self.store,
        )

    def run(self, spec: dict[str, Any], **inputs: InputArtifact) -> InputArtifact:
        """The artifact, as the input of a next job."""
        ctx = self.context(spec, **inputs)
        conversion.run(ctx, ctx.spec)  # type: ignore[arg-type]
        ready = [event for event in events(ctx) if "artifact_id" in event]
        assert len(ready) == 1
        manifest = self.store.manifest(ready[0]["artifact_id"])
        return InputArtifact(manifest.id, manifest.kind, self.store.files_dir(manifest.id), manifest.metadata)

    def files(self, ctx: RunContext) -> list[FileEntry]:
        """What the job's artifact consists of."""
        (artifact_id,) = (event["artifact_id"] for event in events(ctx) if "artifact_id" in event)
        return self.store.manifest(artifact_id).files

    def manifest(self, artifact: InputArtifact) -> Manifest:
        assert artifact.artifact_id is not None
        return self.store.manifest(artifact.artifact_id)

    def unfinished(self) -> list[Path]:
        return list((self.store.root / "artifacts" / ".tmp").glob("*"))


def events(ctx: RunContext) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ctx.attempt_dir / "events.jsonl").read_text().splitlines()]


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    return Jobs(tmp_path)


@pytest.fixture
def model(tmp_path: Path) -> InputArtifact:
    path = tiny_model(tmp_path / "hf", shape=SHAPE, num_shards=2, names="new", nested_config=True)
    return InputArtifact(ART, "hf_model", path, inspect_hf_folder(path).metadata)


class TestThereAndBack:
    def test_three_jobs_give_the_folder_back(self, jobs: Jobs, model: InputArtifact) -> None:
        first = jobs.run({"operation": "hf_to_mm", "parallel": PARALLEL}, source=model)
        second = jobs.run({"operation": "reshard", "parallel": OTHER}, source=first)
        back = jobs.run({"operation": "mm_to_hf"}, source=second)
        for file in model.path.iterdir():
            if file.name.endswith(".index.json"):
                assert json.loads((back.path / file.name).read_text()) == json.loads(file.read_text())
            else:
                assert (back.path / file.name).read_bytes() == file.read_bytes(), file.name
        assert back.metadata == model.metadata

    def test_the_checkpoint_records_its_layout(self, jobs: Jobs, model: InputArtifact) -> None:
        made = jobs.run({"operation": "hf_to_mm", "parallel": PARALLEL, "dtype": "bfloat16"}, source=model)
        assert made.kind == "mm_checkpoint"
        assert made.metadata == {
            "family": "qwen2_5_vl",
            "config": json.loads((made.path / "hf/config.json").read_text()),
            "parallel": PARALLEL,
            "canonical": False,
            "dtype": "bfloat16",
            "iteration": None,
        }
        assert inspect_mm_folder(made.path).tp_size == 2
        assert jobs.manifest(made).lineage.parents == [ART]

    def test_digests_in_the_manifest_are_right(self, jobs: Jobs, model: InputArtifact) -> None:
        import hashlib

        made = jobs.run({"operation": "hf_to_mm", "parallel": PARALLEL}, source=model)
        for entry in jobs.manifest(made).files:
            assert hashlib.sha256((made.path / entry.path).read_bytes()).hexdigest() == entry.sha256

    def test_a_checkpoint_without_a_manifest(self, jobs: Jobs, model: InputArtifact, tmp_path: Path) -> None:
        made = jobs.run({"operation": "hf_to_mm", "parallel": PARALLEL}, source=model)
        bare = shutil.copytree(made.path, tmp_path / "bare")
        shutil.rmtree(bare / "hf")
        source = InputArtifact(None, "mm_checkpoint", bare, {})
        spec = {"operation": "mm_to_hf", "source_parallel": PARALLEL}
        back = jobs.run(spec | {"hf_source": {"artifact": ART}}, source=source, hf_source=model)
        assert inspect_hf_folder(back.path).weight_map == inspect_hf_folder(model.path).weight_map
        other = {"operation": "reshard", "source_parallel": PARALLEL, "parallel": OTHER}
        resharded = jobs.run(other | {"hf_source": {"artifact": ART}}, source=source, hf_source=model)
        assert (resharded.path / "hf/tokenizer.json").read_bytes() == (model.path / "tokenizer.json").read_bytes()
        assert resharded.metadata["config"] == model.metadata["config"]
        with pytest.raises(InvalidSpec, match="give hf_source"):
            jobs.run(spec, source=source)
        with pytest.raises(InvalidSpec, match="give source_parallel"):
            jobs.run({"operation": "mm_to_hf"}, source=source)


class TestAdapters:
    @pytest.fixture
    def adapter(self, tmp_path: Path) -> InputArtifact:
        path = tmp_path / "adapter"
        path.mkdir()
        module = "base_model.model.model.language_model.layers.1.self_attn.q_proj"
        halves = {"A": np.ones((4, SHAPE.hidden), np.float32), "B": np.full((SHAPE.hidden, 4), 2, np.float32)}
        tensors = {f"{module}.lora_{half}.weight": values for half, values in halves.items()}
        write_safetensors(path / "adapter_model.safetensors", tensors)
        peft = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
        (path / "adapter_config.json").write_text(json.dumps(peft, indent=2) + "\n")
        kind, metadata, _ = inspect_folder(path)
        assert (kind, metadata["r"], metadata["num_tensors"]) == ("hf_adapter", 4, 2)
        return InputArtifact(ART, kind, path, metadata)

    def test_three_jobs_give_the_folder_back(self, jobs: Jobs, model: InputArtifact, adapter: InputArtifact) -> None:
        spec = {"operation": "hf_to_mm", "parallel": PARALLEL, "hf_source": {"artifact": ART}, "verify": True}
        first = jobs.run(spec, source=adapter, hf_source=model)
        assert first.kind == inspect_folder(first.path)[0] == "mm_adapter"
        assert first.metadata["config"] == model.metadata["config"]
        second = jobs.run({"operation": "reshard", "parallel": OTHER}, source=first)
        back = jobs.run({"operation": "mm_to_hf"}, source=second)
        assert back.kind == "hf_adapter"
        for file in adapter.path.iterdir():
            assert (back.path / file.name).read_bytes() == file.read_bytes()


class TestReports:
    def test_progress_in_bytes_and_a_line_per_file(
        self, jobs: Jobs, model: InputArtifact, caplog: pytest.LogCaptureFixture
    ) -> None:
        ctx = jobs.context({"operation": "hf_to_mm", "parallel": PARALLEL}, source=model)
        caplog.clear()  # the runs before are logged, too, where an earlier test has set the level
        with caplog.at_level(logging.INFO):
            conversion.run(ctx, ctx.spec)  # type: ignore[arg-type]
        progress = [event for event in events(ctx) if event.get("unit") == "bytes"]
        assert progress[0]["done"] == 0
        assert progress[-1]["done"] == progress[-1]["total"] > 0
        assert sum(message.startswith("wrote release/mp_rank_") for message in caplog.messages) == 4


MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
"""Runs a command and prints its peak in KiB. It stands between, because a new process begins with the peak of the one that started it."""


@pytest.mark.slow
class TestMemory:
    def test_it_does_not_grow_with_the_model(self, tmp_path: Path) -> None:
        """Of 0.7 GB that are read and written a job holds a part."""
        shape = TinyShape(vision_layers=1, text_layers=1, hidden=2048, heads=16, kv_heads=2, ffn=11008)
        assert write_model(tmp_path / "hf", shape, vocab_size=64_000, zeros=True) > 600 << 20
        spec = {"operation": "hf_to_mm", "parallel": {**OTHER, "llm_pp_layers": [[1]], "vit_pp_layers": [[1]]}}
        source = (tmp_path / "hf", "hf_model", inspect_hf_folder(tmp_path / "hf").metadata)
        attempt = Bench(tmp_path, repeat=1).attempt(spec, {"source": source})
        command = [sys.executable, "-c", MEASURE, sys.executable, "-m", "core.runners", str(attempt)]
        measured = subprocess.run(command, check=True, capture_output=True, text=True, cwd=REPOSITORY)
        assert int(measured.stdout) < 300 << 10


class TestFailures:
    def test_a_contradicting_source_parallel(self, jobs: Jobs, model: InputArtifact) -> None:
        made = jobs.run({"operation": "hf_to_mm", "parallel": PARALLEL}, source=model)
        with pytest.raises(IncompatiblePlan, match="leave it out"):
            jobs.run({"operation": "mm_to_hf", "source_parallel": OTHER}, source=made)

    def test_a_full_disk_is_seen_before_anything_is_written(
        self, jobs: Jobs, model: InputArtifact, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100, 90, 10))
        with pytest.raises(DiskFull, match="10 are free"):
            jobs.run({"operation": "hf_to_mm", "parallel": PARALLEL}, source=model)
        assert not jobs.unfinished()

    def test_a_disk_that_fills_up_is_named_and_what_was_made_is_removed(self, jobs: Jobs, model: InputArtifact) -> None:
        ctx = jobs.context({"operation": "hf_to_mm", "parallel": PARALLEL}, source=model)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(DiskFull, match=r"writing model_optim_rng\.pt failed: File too large"):
                conversion.run(ctx, ctx.spec)  # type: ignore[arg-type]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not jobs.unfinished()
        assert not list((ctx.job_dir / "conversion").iterdir())

    def test_a_stop_leaves_nothing(self, jobs: Jobs, model: InputArtifact) -> None:
        ctx = jobs.context({"operation": "hf_to_mm", "parallel": PARALLEL}, source=model)
        ctx._stop.set()
        with pytest.raises(Stopped):
            conversion.run(ctx, ctx.spec)  # type: ignore[arg-type]
        assert not jobs.unfinished()
        assert not any("artifact_id" in event for event in events(ctx))


class TestNextAttempt:
    """After a stop or a kill the finished files are kept, looked at again, and not written twice."""

    SPEC: ClassVar[dict[str, Any]] = {"operation": "hf_to_mm", "parallel": PARALLEL}

    def test_it_writes_only_what_is_missing(
        self, jobs: Jobs, model: InputArtifact, caplog: pytest.LogCaptureFixture
    ) -> None:
        whole = jobs.run(self.SPEC, source=model)
        job_dir = self.stopped_after(2, jobs, model)
        ctx = jobs.context(self.SPEC, source=model)
        ctx.job_dir, ctx.attempt = job_dir, 2
        caplog.clear()  # the runs before are logged, too, where an earlier test has set the level
        with caplog.at_level(logging.INFO):
            conversion.run(ctx, ctx.spec)  # type: ignore[arg-type]
        assert "going on after an earlier attempt: 2 files are finished" in caplog.messages
        assert sum(message.startswith("wrote release/") for message in caplog.messages) == 2
        assert jobs.files(ctx) == jobs.manifest(whole).files
        progress = [event for event in events(ctx) if event.get("unit") == "bytes"]
        assert progress[-1]["done"] == progress[-1]["total"]
        assert not list((job_dir / "conversion").iterdir())

    def test_a_damaged_file_is_written_again(self, jobs: Jobs, model: InputArtifact) -> None:
        whole = jobs.run(self.SPEC, source=model)
        job_dir = self.stopped_after(3, jobs, model)
        file = next(job_dir.glob("conversion/1/files/release/*/model_optim_rng.pt"))
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        ctx = jobs.context(self.SPEC, source=model)
        ctx.job_dir, ctx.attempt = job_dir, 2
        conversion.run(ctx, ctx.spec)  # type: ignore[arg-type]
        assert jobs.files(ctx) == jobs.manifest(whole).files

    def test_it_begins_anew_when_the_source_has_changed(
        self, jobs: Jobs, model: InputArtifact, caplog: pytest.LogCaptureFixture
    ) -> None:
        job_dir = self.stopped_after(3, jobs, model)
        tiny_model(model.path, shape=SHAPE, seed=1, num_shards=2, names="new", nested_config=True)
        ctx = jobs.context(self.SPEC, source=model)
        ctx.job_dir, ctx.attempt = job_dir, 2
        caplog.clear()  # the runs before are logged, too, where an earlier test has set the level
        with caplog.at_level(logging.INFO):
            conversion.run(ctx, ctx.spec)  # type: ignore[arg-type]
        assert not any(message.startswith("going on") for message in caplog.messages)
        assert jobs.files(ctx) == jobs.manifest(jobs.run(self.SPEC, source=model)).files

    @staticmethod
    def stopped_after(num_files: int, jobs: Jobs, model: InputArtifact) -> Path:
        """The folder of a job that was told to stop when that many files were finished."""
        ctx = jobs.context(TestNextAttempt.SPEC, source=model)
        record = Journal.record
        count = 0

        def counting(journal: Journal, entry: Record) -> None:
            nonlocal count
            if count == num_files:
                raise Stopped
            count += 1
            record(journal, entry)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Journal, "record", counting)
            with pytest.raises(Stopped):
                conversion.run(ctx, ctx.spec)  # type: ignore[arg-type]
        return ctx.job_dir


class TestVerify:
    @pytest.mark.parametrize("dtype", [None, "bfloat16"])
    def test_it_is_recorded_in_the_artifact(
        self, jobs: Jobs, model: InputArtifact, caplog: pytest.LogCaptureFixture, dtype: str | None
    ) -> None:
        caplog.set_level(logging.INFO)
        spec = {"operation": "hf_to_mm", "parallel": PARALLEL, "verify": True, "dtype": dtype}
        first = jobs.run(spec, source=model)
        second = jobs.run({"operation": "reshard", "parallel": OTHER, "verify": True}, source=first)
        back = jobs.run({"operation": "mm_to_hf", "verify": True}, source=second)
        assert [made.metadata["verified"] for made in (first, second, back)] == [True] * 3
        assert sum("read back from the disk" in message for message in caplog.messages) == 3

    def test_logits_of_both_forms_are_compared(self, jobs: Jobs, model: InputArtifact) -> None:
        pytest.importorskip("transformers")
        spec = {"operation": "hf_to_mm", "parallel": PARALLEL, "verify": "logits", "dtype": "bfloat16"}
        first = jobs.run(spec, source=model)
        second = jobs.run({"operation": "reshard", "parallel": OTHER, "verify": "logits"}, source=first)
        back = jobs.run({"operation": "mm_to_hf", "verify": "logits"}, source=second)
        for made in (first, second, back):
            assert made.metadata["verified"] is True
            report = made.metadata["verified_logits"]
            assert (report["vision_layers"], report["language_layers"]) == ([0, 1], [0, 1, 2])
            assert 0 <= report["difference"] < 1e-4 * report["largest"]

    def test_progress_covers_it(self, jobs: Jobs, model: InputArtifact) -> None:
        ctx = jobs.context({"operation": "hf_to_mm", "parallel": PARALLEL, "verify": True}, source=model)
        conversion.run(ctx, ctx.spec)  # type: ignore[arg-type]
        progress = [event for event in events(ctx) if event.get("unit") == "bytes"]
        assert progress[-1]["done"] == progress[-1]["total"] > 1.9 * model.metadata["total_bytes"]

    def test_a_changed_value_is_found(self, jobs: Jobs, model: InputArtifact, monkeypatch: pytest.MonkeyPatch) -> None:
        write = HashingWriter.write

        def flipping(writer: HashingWriter, data: bytes | memoryview) -> int:
            block = bytearray(memoryview(data).cast("B"))
            if len(block) > 50_000:
                block[50_000] ^= 1
            return write(writer, memoryview(block))

        made = jobs.run({"operation": "hf_to_mm", "parallel": PARALLEL}, source=model)
        monkeypatch.setattr(HashingWriter, "write", flipping)
        with pytest.raises(VerificationFailed, match=r"not what was read: .* is damaged: its CRC-32"):
            jobs.run({"operation": "hf_to_mm", "parallel": PARALLEL, "verify": True}, source=model)
        with pytest.raises(VerificationFailed, match=r"not what was read: .*embed_tokens"):
            jobs.run({"operation": "mm_to_hf", "verify": True}, source=made)
        assert not jobs.unfinished()

    def test_a_broken_source_leaves_nothing(self, jobs: Jobs, model: InputArtifact) -> None:
        made = jobs.run({"operation": "hf_to_mm", "parallel": PARALLEL}, source=model)
        (made.path / "release/mp_rank_01_000/model_optim_rng.pt").unlink()
        for spec in ({"operation": "mm_to_hf"}, {"operation": "reshard", "parallel": OTHER}):
            with pytest.raises(AppError, match="mp_rank_01_000"):
                jobs.run(spec, source=made)
        assert not jobs.unfinished()
