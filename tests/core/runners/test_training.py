"""The training kind from inputs on disk to published artifacts, in one process and under torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from core.conversion.convert import hf_to_mm, mm_to_hf
from core.conversion.output import Options
from core.conversion.writing import Quiet
from core.data import loader
from core.data.dataset import Row, TokenisedDataset, TokenWriter
from core.data.media import ImageProcessing, Medium
from core.data.plan import plan_step
from core.data.video import VideoProcessing, load_medium
from core.device.cpu import CpuAccelerator
from core.errors import (
    CorruptCheckpoint,
    DiskFull,
    IncompatiblePlan,
    InvalidDataset,
    InvalidSpec,
)
from core.jobs.fitting import disk_bytes, memory_per_rank
from core.models.batch import PackedBatch
from core.models.config import Config
from core.models.hf_folder import inspect_hf_folder
from core.models.mm_folder import inspect_mm_folder
from core.models.plan import whole
from core.parallel.mesh import Mesh
from core.runners import training
from core.runners.context import EXIT_STOPPED, InputArtifact, RunContext, Stopped
from core.specs.parallel import ParallelSpec
from core.specs.training import TrainingSpec
from core.storage.local import Store
from core.training import checkpoint
from core.training.checkpoint import Checkpoints, Position
from core.training.feeding import build_loader, largest_batch
from tests.services import wait_until
from tests.tiny import TinyShape, tiny_model
from tests.videos import pictures, write_animation

WHOLE = {"llm_pp_layers": [[2]], "vit_pp_layers": [[2]]}
SPLIT = {"llm_pp_layers": [[0, 2]], "vit_pp_layers": [[2, 0]]}
VIRTUAL = {"llm_pp_layers": [[0, 0], [1, 1]], "vit_pp_layers": [[1, 1], [0, 0]]}
NUM_ROWS = 6

torch.set_num_threads(1)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def hf_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("hf"), shape=TinyShape(tied=request.param))


@pytest.fixture(scope="module")
def untied_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("untied"))


def write_dataset(folder: Path, config: Config) -> Path:
    """Rows of random text, every other one with an image, one in four with a video."""
    processing = ImageProcessing()
    videos = VideoProcessing.like(processing, max_pixels=56 * 56)
    random = np.random.default_rng(5)
    (folder / "media").mkdir(parents=True)
    with TokenWriter(folder) as writer:
        for row in range(NUM_ROWS):
            ids: list[int] = [1, 2]
            media = []
            if row % 2 == 0:
                width, height = 56 + 28 * row, 60
                Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"media/{row}.png")
                media = [Medium((Path(f"{row}.png"),), processing.grid(height, width))]
                ids += [config.vision_start_token_id]
                ids += [config.image_token_id] * processing.num_tokens(media[0].grid) + [config.vision_end_token_id]
            if row % 4 == 1:
                path = write_animation(folder / f"media/{row}.gif", pictures(8, width=40 * row, height=60))
                video = videos.plan([Path(path.name)], videos.probe([path]))
                media = [video]
                ids += [config.vision_start_token_id]
                ids += [config.video_token_id] * processing.num_tokens(video.grid) + [config.vision_end_token_id]
            ids += random.integers(0, 100, 6).tolist()
            trained = np.zeros(len(ids), np.uint8)
            trained[-4:] = 1
            writer.add(np.array(ids), trained, media=media, source_row=row + 1)
        writer.finish(
            train=list(range(NUM_ROWS)),
            validation=[],
            media_root=folder / "media",
            vocab_size=config.text.vocab_size,
            tokenizer_digest="",
            image_token_id=config.image_token_id,
            video_token_id=config.video_token_id,
            pad_token_id=0,
            image_processing=processing,
            video_processing=videos,
        )
    return folder


class Bench:
    """A store with inputs, in which attempts of one job are run."""

    def __init__(self, root: Path, model_dir: Path) -> None:
        self.store = Store(root / "store")
        folder = inspect_hf_folder(model_dir)
        self.config = folder.config
        self.model = InputArtifact(None, "hf_model", model_dir, folder.metadata)
        self.dataset = InputArtifact(None, "dataset", write_dataset(root / "dataset", folder.config), {})
        self.root = root

    def use_mm(self, **parallel: Any) -> None:
        """Give the model in mm layout."""
        layout = ParallelSpec.model_validate(parallel)
        folder = inspect_hf_folder(self.model.path)
        hf_to_mm(folder, self.root / "mm", layout)
        metadata = {"family": "qwen2_5_vl", "config": folder.config_json, "parallel": layout.model_dump(mode="json")}
        self.model = InputArtifact(None, "mm_checkpoint", self.root / "mm", metadata)

    def context(
        self, spec: TrainingSpec, *, job: str = "job_a", attempt: int = 1, **inputs: InputArtifact
    ) -> RunContext:
        attempt_dir = self.store.attempt_dir(job, attempt)
        attempt_dir.mkdir(parents=True)
        return RunContext(
            job_id=job,
            attempt=attempt,
            kind="training",
            spec=spec,
            inputs={"model": self.model, "dataset": self.dataset, **inputs},
            job_dir=self.store.job_dir(job),
            attempt_dir=attempt_dir,
            store=self.store,
        )

    def torchrun(
        self,
        spec: TrainingSpec,
        world_size: int,
        *,
        job: str = "job_a",
        module: str = "core.runners",
        **settings: str,
    ) -> subprocess.CompletedProcess[str]:
        attempt_dir = self.described(spec, job)
        options = ["--standalone", "--local-addr=localhost", f"--nproc-per-node={world_size}"]
        command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", module, str(attempt_dir)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", **settings}
        return subprocess.run(command, capture_output=True, text=True, timeout=280, env=env, check=False)

    def described(self, spec: TrainingSpec, job: str = "job_a") -> Path:
        """The folder of a first attempt, with its `job.json`."""
        attempt_dir = self.store.attempt_dir(job, 1)
        attempt_dir.mkdir(parents=True)
        inputs = {
            name: {"artifact_id": None, "kind": item.kind, "path": str(item.path), "metadata": item.metadata}
            for name, item in {"model": self.model, "dataset": self.dataset}.items()
        }
        (attempt_dir / "job.json").write_text(
            json.dumps(
                {
                    "job_id": job, "attempt": 1, "kind": "training", "spec": spec.model_dump(mode="json"),
                    "inputs": inputs, "store": str(self.store.root), "device": "cpu",
                }
            )
        )  # fmt: skip
        return attempt_dir

    def events(self, kind: str, *, job: str = "job_a", attempt: int = 1) -> list[dict[str, Any]]:
        lines = (self.store.attempt_dir(job, attempt) / "events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["type"] == kind]

    def losses(self, *, job: str = "job_a", attempt: int = 1) -> list[float]:
        return [event["values"]["loss"] for event in self.events("metric", job=job, attempt=attempt)]

    def outputs(self, *, job: str = "job_a", attempt: int = 1) -> dict[str, Path]:
        events = self.events("artifact", job=job, attempt=attempt)
        return {event["name"]: self.store.files_dir(event["artifact_id"]) for event in events}


@pytest.fixture
def bench(tmp_path: Path, untied_dir: Path) -> Bench:
    return Bench(tmp_path, untied_dir)


def training_spec(parallel: dict[str, Any] = WHOLE, **changes: Any) -> TrainingSpec:
    values: dict[str, Any] = {
        "model": {"path": "/m"},
        "dataset": {"path": "/d"},
        "parallel": parallel,
        "train_iters": 4,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "seq_length": 64,
        "optimizer": {"lr": 1e-3, "lr_warmup_fraction": 0.0},
        "freeze": {"vision_encoder": False, "vision_projector": False},
        "precision": "fp32",
        "checkpoint": {"save_interval": 2},
        **changes,
    }
    return TrainingSpec.model_validate(values)


def used_bytes(folder: Path) -> int:
    """Bytes of the files below a folder, each inode once."""
    found = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum({stat.st_ino: stat.st_size for stat in found}.values())


class TestRun:
    def test_publishes_the_final_checkpoint_and_the_kept_ones(self, bench: Bench) -> None:
        training.run(bench.context(spec := training_spec()), spec)
        outputs = bench.outputs()
        assert set(outputs) == {"checkpoint", "checkpoint-0000002", "tensorboard"}
        assert [path.name.split(".")[0] for path in outputs["tensorboard"].iterdir()] == ["events"]
        final = inspect_mm_folder(outputs["checkpoint"], ParallelSpec.model_validate(WHOLE))
        assert final.iteration == 4
        assert (outputs["checkpoint"] / "hf" / "tokenizer.json").is_file()
        manifest = bench.store.manifest(outputs["checkpoint"].parent.name)
        assert manifest.kind == "mm_checkpoint"
        assert {name: manifest.metadata[name] for name in ("family", "parallel", "canonical", "dtype", "iteration")} == {
            "family": "qwen2_5_vl", "parallel": {"tp_size": 1, **WHOLE}, "canonical": False, "dtype": "float32",
            "iteration": 4,
        }  # fmt: skip

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_takes_the_disk_space_that_its_plan_says(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch, precision: str
    ) -> None:
        spec = training_spec(precision=precision, checkpoint={"save_interval": 1, "keep_last": 2})
        ctx = bench.context(spec)
        most, remove = 0, checkpoint._remove

        def removed(path: Path) -> None:
            nonlocal most
            most = max(most, used_bytes(ctx.job_dir / "checkpoints"))
            remove(path)

        monkeypatch.setattr(checkpoint, "_remove", removed)
        training.run(ctx, spec)
        planned = disk_bytes(spec, memory_per_rank(spec, bench.config, 1))
        assert most == pytest.approx(planned, rel=0.05)
        assert used_bytes(bench.store.root / "artifacts") == pytest.approx(planned * 2 / 3, rel=0.1)

    def test_tells_metrics_progress_and_what_is_trained(self, bench: Bench) -> None:
        spec = training_spec(freeze={"vision_encoder": True, "vision_projector": False})
        training.run(ctx := bench.context(spec), spec)
        assert len(bench.losses()) == 4
        assert bench.events("progress")[-1]["done"] == 4
        table = json.loads((ctx.attempt_dir / "parameters.json").read_text())
        assert table["summary"]["vision_encoder"]["trained"] == 0
        assert table["summary"]["vision_projector"]["frozen"] == 0
        rows = table["stages"][0]["parameters"]
        assert {row["name"] for row in rows if not row["trained"]} == {
            row["name"] for row in rows if row["name"].startswith("image_encoder.encoder.")
        }

    def test_frozen_weights_come_out_bit_identical(self, bench: Bench) -> None:
        bench.use_mm(**WHOLE)
        spec = training_spec(freeze={"vision_encoder": True, "vision_projector": True})
        training.run(bench.context(spec), spec)
        before = torch.load(bench.model.path / "release/mp_rank_00/model_optim_rng.pt", weights_only=True)["model"]
        after = torch.load(
            bench.outputs()["checkpoint"] / "iter_0000004/mp_rank_00/model_optim_rng.pt", weights_only=True
        )["model"]
        assert set(before) == set(after)
        same = {name for name in before if torch.equal(before[name], after[name])}
        assert same == {name for name in before if name.startswith("image_encoder.")}

    def test_bf16_trains_and_writes_bfloat16(self, bench: Bench) -> None:
        spec = training_spec(precision="bf16", train_iters=12, optimizer={"lr": 3e-3, "lr_warmup_fraction": 0.0})
        training.run(bench.context(spec), spec)
        losses = bench.losses()
        assert losses[-1] < losses[0]
        file = bench.outputs()["checkpoint"] / "iter_0000012/mp_rank_00/model_optim_rng.pt"
        assert {tensor.dtype for tensor in torch.load(file, weights_only=True)["model"].values()} == {torch.bfloat16}

    def test_recompute_changes_nothing(self, bench: Bench) -> None:
        recompute = {
            "vision_encoder": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
            "text_decoder": {"recompute_granularity": "selective"},
        }
        for job, changes in (("job_a", {}), ("job_b", {"recompute": recompute})):
            training.run(bench.context(spec := training_spec(**changes), job=job), spec)
        assert bench.losses(job="job_b") == bench.losses(job="job_a")

    def test_static_shapes_change_nothing(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        training.run(bench.context(spec := training_spec(), job="job_b"), spec)
        monkeypatch.setattr(CpuAccelerator, "static_shapes", True)
        sizes = set()
        build = loader._pack

        def watched(*args: Any, **options: Any) -> PackedBatch:
            batch = build(*args, **options)
            sizes.add((batch.num_tokens, batch.num_patches))
            return batch

        monkeypatch.setattr(loader, "_pack", watched)
        training.run(bench.context(spec), spec)
        assert len(sizes) == 1
        assert bench.losses() == pytest.approx(bench.losses(job="job_b"), rel=1e-5)

    def test_a_stop_keeps_and_publishes_the_last_checkpoint(self, bench: Bench) -> None:
        ctx = bench.context(spec := training_spec(checkpoint={}))
        ctx._stop.set()
        with pytest.raises(Stopped):
            training.run(ctx, spec)
        assert set(bench.outputs()) == {"checkpoint-0000001", "tensorboard"}

    def test_a_training_that_fails_publishes_its_curves(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object, **__: object) -> None:
            raise DiskFull("no room")

        monkeypatch.setattr(Checkpoints, "save", full)
        ctx = bench.context(spec := training_spec())
        with pytest.raises(DiskFull):
            training.run(ctx, spec)
        assert set(bench.outputs()) == {"tensorboard"}
        (file,) = bench.outputs()["tensorboard"].iterdir()
        assert file.read_bytes().count(b"lm loss") == 2

    def test_term_to_the_process_group_stops_training_not_its_decoders(self, bench: Bench) -> None:
        attempt_dir = bench.described(training_spec(train_iters=100_000, checkpoint={}))
        command = [sys.executable, "-m", "core.runners", str(attempt_dir)]
        with subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL) as runner:
            events = attempt_dir / "events.jsonl"
            wait_until(lambda: events.exists() and '"metric"' in events.read_text(), timeout_s=60, what="a step")
            decoders = psutil.Process(runner.pid).children()
            assert {process.cmdline()[-2] for process in decoders} == {"core.data.decoding"}
            os.killpg(runner.pid, signal.SIGTERM)
            assert runner.wait(60) == EXIT_STOPPED
        assert len(bench.outputs()) == 2
        assert not any(process.is_running() for process in decoders)


class TestFeeding:
    @pytest.mark.parametrize("tp_rank", [0, 1])
    def test_of_tensor_parallel_ranks_the_first_alone_decodes(self, bench: Bench, tp_rank: int) -> None:
        dataset, spec, cpu = TokenisedDataset(bench.dataset.path), training_spec(), CpuAccelerator()
        mesh, stage = Mesh(rank=tp_rank, tp_size=2), whole(bench.config)
        with build_loader(dataset, spec, mesh, stage, bench.config, cpu, Position()) as loader:
            batches = list(next(iter(loader)).micro_batches)
            has_decoded = bool(loader._decoders.pids)
        for batch in (*batches, largest_batch(dataset, spec, mesh, stage, bench.config, cpu)):
            assert len(batch.pixel_values_PD) == (batch.num_patches if tp_rank == 0 else 0)
        assert sum(batch.num_patches for batch in batches) > 0
        assert has_decoded == (tp_rank == 0)

    @pytest.mark.parametrize(("reduction", "weight"), [("token", 16), ("sample", 4), ("square", 8)])
    def test_the_loss_is_weighted_as_the_spec_says(self, bench: Bench, reduction: str, weight: float) -> None:
        spec = training_spec(loss_reduction=reduction)  # 4 samples a step, of 4 targets each
        dataset, stage = TokenisedDataset(bench.dataset.path), whole(bench.config)
        with build_loader(dataset, spec, Mesh(), stage, bench.config, CpuAccelerator(), Position()) as fed:
            step = next(iter(fed))
        assert step.loss_weight == pytest.approx(weight)


class TestResume:
    def test_a_new_attempt_goes_on_from_the_newest_checkpoint(self, bench: Bench) -> None:
        training.run(bench.context(spec := training_spec(), job="job_b"), spec)
        ctx = bench.context(spec)
        ctx._stop.set()
        with pytest.raises(Stopped):
            training.run(ctx, spec)
        training.run(bench.context(spec, attempt=2), spec)
        assert bench.losses() + bench.losses(attempt=2) == bench.losses(job="job_b")

    def test_resume_from_another_jobs_checkpoint_is_exact(self, bench: Bench) -> None:
        training.run(bench.context(spec := training_spec(), job="job_b"), spec)
        given = InputArtifact(None, "mm_checkpoint", bench.outputs(job="job_b")["checkpoint-0000002"], {})
        training.run(bench.context(spec, resume_from=given), spec)
        assert bench.losses() == bench.losses(job="job_b")[2:]

    def test_a_finished_checkpoint_has_nothing_left_to_train(self, bench: Bench) -> None:
        training.run(bench.context(spec := training_spec(), job="job_b"), spec)
        given = InputArtifact(None, "mm_checkpoint", bench.outputs(job="job_b")["checkpoint"], {})
        with pytest.raises(InvalidSpec, match="at iteration 4 already"):
            training.run(bench.context(spec, resume_from=given), spec)

    def test_another_precision_is_refused(self, bench: Bench) -> None:
        training.run(bench.context(spec := training_spec(), job="job_b"), spec)
        given = InputArtifact(None, "mm_checkpoint", bench.outputs(job="job_b")["checkpoint-0000002"], {})
        with pytest.raises(IncompatiblePlan, match="precision fp32"):
            training.run(bench.context(spec := training_spec(precision="bf16"), resume_from=given), spec)

    def test_weights_without_a_data_position_are_no_training_checkpoint(self, bench: Bench) -> None:
        bench.use_mm(**WHOLE)
        with pytest.raises(CorruptCheckpoint, match="not a training checkpoint"):
            training.run(bench.context(spec := training_spec(), resume_from=bench.model), spec)


class TestRefusals:
    def test_a_row_longer_than_seq_length(self, bench: Bench) -> None:
        with pytest.raises(InvalidSpec, match=r"seq_length is 16, but 2 of 6 rows are longer \(longest: \d+ tokens\)"):
            training.run(bench.context(spec := training_spec(seq_length=16)), spec)

    def test_a_data_set_of_another_tokenizer(self, bench: Bench) -> None:
        meta = bench.dataset.path / "tokens" / "meta.json"
        meta.write_text(json.dumps({**json.loads(meta.read_text()), "vocab_size": 10**6}))
        with pytest.raises(InvalidDataset, match="token ids up to 999999, the model up to"):
            training.run(bench.context(spec := training_spec()), spec)

    def test_a_wrong_number_of_processes(self, bench: Bench) -> None:
        with pytest.raises(IncompatiblePlan, match="asks for 2 processes, 1 were started"):
            training.run(bench.context(spec := training_spec({**WHOLE, "nproc_per_node": 2})), spec)

    def test_layers_that_do_not_add_up(self, bench: Bench) -> None:
        with pytest.raises(IncompatiblePlan, match="adds up to 3"):
            training.run(bench.context(spec := training_spec({**WHOLE, "llm_pp_layers": [[3]]})), spec)


class TestAgainstTransformers:
    def test_the_first_loss_and_gradient_are_those_of_transformers_on_the_same_samples(
        self, tmp_path: Path, hf_dir: Path
    ) -> None:
        from transformers import Qwen2_5_VLForConditionalGeneration

        bench = Bench(tmp_path, hf_dir)
        training.run(bench.context(spec := training_spec(train_iters=1, global_batch_size=NUM_ROWS)), spec)
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            hf_dir, dtype=torch.float32, attn_implementation="eager"
        )
        dataset, loss = TokenisedDataset(bench.dataset.path), 0.0
        for index in range(NUM_ROWS):
            row = dataset.row(index)
            weight = int((row.targets >= 0).sum()) / int(dataset.num_targets.sum())
            share = model(**as_transformers(row, dataset, bench.config)).loss * weight
            share.backward()
            loss += share.item()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        (metrics,) = bench.events("metric")
        assert metrics["values"]["loss"] == pytest.approx(loss, rel=1e-5)
        assert metrics["values"]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def as_transformers(row: Row, dataset: TokenisedDataset, config: Config) -> dict[str, Any]:
    """One row as transformers' model takes it."""
    ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
    labels = torch.full_like(ids, -100)
    labels[0, 1:] = torch.from_numpy(row.targets[:-1])
    if not row.media:
        return {"input_ids": ids, "labels": labels}
    (medium,) = row.media
    pixels = load_medium(medium, dataset.meta.image_processing, dataset.meta.video_processing)
    of_a_video = "_videos" if medium.is_video else ""
    return {
        "input_ids": ids,
        "labels": labels,
        f"pixel_values{of_a_video}": torch.from_numpy(pixels),
        f"{'video' if medium.is_video else 'image'}_grid_thw": torch.tensor(row.grid_thw),
        "mm_token_type_ids": (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int(),
        **({"second_per_grid_ts": torch.tensor(row.seconds_per_grid)} if medium.is_video else {}),
    }


class Warnings(Quiet):
    """Keeps the codes of warnings, such as that of tied embeddings that have drifted apart."""

    def __init__(self) -> None:
        self.codes: list[str] = []

    def warn(self, code: str, message: str) -> None:
        self.codes.append(code)


def exported(bench: Bench, target: Path, split: dict[str, Any]) -> set[str]:
    """Export what was trained, which warns of replicas that have drifted apart; return the names of the weights."""
    checkpoint, layout, watch = bench.outputs()["checkpoint"], ParallelSpec.model_validate(split), Warnings()
    source = inspect_mm_folder(checkpoint, layout)
    mm_to_hf(source, bench.config, layout, target, Options(watch=watch), hf_files=checkpoint / "hf")
    assert watch.codes == []
    return set(inspect_hf_folder(target).tensors)


def goes_on_in_one_process(bench: Bench, **changes: Any) -> list[float]:
    """Resume a job of several processes from its second step, at another layout; return the losses."""
    given = InputArtifact(None, "mm_checkpoint", bench.outputs()["checkpoint-0000002"], {})
    spec = training_spec(resume_from={"path": "/c"}, **changes)
    training.run(bench.context(spec, job="job_c", resume_from=given), spec)
    return bench.losses(job="job_c")


class TestUnderTorchrun:
    def test_two_stages_train_as_one_process_does(self, tmp_path: Path, hf_dir: Path) -> None:
        bench = Bench(tmp_path, hf_dir)
        training.run(bench.context(spec := training_spec(), job="job_b"), spec)
        result = bench.torchrun(training_spec({**SPLIT, "nproc_per_node": 2}), 2)
        assert result.returncode == 0, result.stdout + result.stderr
        assert bench.losses() == pytest.approx(bench.losses(job="job_b"), rel=1e-4)
        assert "iteration 4/4 | consumed samples 16 |" in result.stdout
        assert exported(bench, tmp_path / "exported", SPLIT) == set(inspect_hf_folder(hf_dir).tensors)
        assert goes_on_in_one_process(bench) == pytest.approx(bench.losses()[2:], rel=1e-4)

    def test_virtual_chunks_train_as_one_process_does(self, tmp_path: Path, bench: Bench) -> None:
        training.run(bench.context(spec := training_spec(), job="job_b"), spec)
        result = bench.torchrun(training_spec({**VIRTUAL, "nproc_per_node": 2}), 2)
        assert result.returncode == 0, result.stdout + result.stderr
        assert bench.losses() == pytest.approx(bench.losses(job="job_b"), rel=1e-4)
        assert exported(bench, tmp_path / "exported", VIRTUAL) == set(inspect_hf_folder(bench.model.path).tensors)

    def test_slices_of_stages_train_in_bf16_from_a_checkpoint_of_another_layout(
        self, tmp_path: Path, bench: Bench
    ) -> None:
        bench.use_mm(tp_size=2, **WHOLE)
        training.run(bench.context(spec := training_spec(precision="bf16"), job="job_b"), spec)
        split = {**SPLIT, "tp_size": 2}
        result = bench.torchrun(training_spec({**split, "nproc_per_node": 4}, precision="bf16"), 4)
        assert result.returncode == 0, result.stdout + result.stderr
        assert bench.losses() == pytest.approx(bench.losses(job="job_b"), rel=1e-2)
        exported(bench, tmp_path / "exported", split)
        assert goes_on_in_one_process(bench, precision="bf16") == pytest.approx(bench.losses()[2:], rel=1e-2)
        tables = [bench.store.attempt_dir(job, 1) / "parameters.json" for job in ("job_a", "job_b")]
        first, second = (json.loads(table.read_text())["summary"] for table in tables)
        assert first == second

    def test_the_error_of_a_later_rank_is_the_jobs_error(self, bench: Bench) -> None:
        spec = training_spec({**WHOLE, "nproc_per_node": 2}, global_batch_size=NUM_ROWS)
        dataset = TokenisedDataset(bench.dataset.path)
        plan = plan_step(
            dataset.lengths, dataset.patches, seed=spec.seed, consumed_samples=0, global_batch_size=NUM_ROWS, dp_size=2,
            token_budget=spec.micro_batch_size * spec.seq_length,
        )  # fmt: skip
        row = next(row for rows in plan.micro_batches[1] for row in rows if dataset.patches[row])
        dataset.row(row).media[0].paths[0].write_bytes(b"no image")
        result = bench.torchrun(spec, 2)
        assert result.returncode != 0
        (failed,) = bench.events("error")
        assert failed["code"] == "unreadable_media"
        assert failed["message"].startswith(f"rank 1: row {row + 1}: ")
