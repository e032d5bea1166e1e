"""The whole road through HTTP, against `temper serve` as a user starts it. Small on purpose: `make demo` is the large one."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors import safe_open

from api.client import TERMINAL_STATES, ApiError, Client, Event, Job
from tests.digits import SHAPE
from tests.e2e.service import Service
from tests.road import STATIONS, digits_road, photos_road, submit_road
from tests.tiny import tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TRAIN_ITERS = 6
LINE = re.compile(
    r"iteration (\d+)/6 \| consumed samples (\d+) \| elapsed time per iteration \(ms\) [\d.]+ \| learning rate \S+ \| "
    r"global batch size 32 \| loss (\S+) \| grad norm \S+"
)


@pytest.fixture
def service(embedded: Service) -> Service:
    return embedded


@dataclass
class Walked:
    """The digits' road, walked once for all the tests below."""

    jobs: dict[str, Job]
    events: list[Event]
    model: Path


@pytest.fixture(scope="module")
def walked(embedded: Service) -> Walked:
    client, model = embedded.client, embedded.folder / "model"
    registered = client.register("hf_model", model)
    uploaded = client.upload("dataset_source", embedded.folder / "digits", chunk_bytes=100_000)
    submitted = submit_road(client, digits_road(registered.id, uploaded.id, train_iters=TRAIN_ITERS))
    assert submitted["train"].state == "waiting"
    events = list(client.events(submitted["train"].id))
    jobs = {station: client.wait(job.id, timeout_s=300) for station, job in submitted.items()}
    failures = {job.name: (job.error, client.logs(job.id, tail=20).content) for job in jobs.values() if job.error}
    assert not failures
    return Walked(jobs, events, model)


class TestTheRoad:
    def test_every_job_succeeds_and_names_its_outputs(self, walked: Walked) -> None:
        assert {station: job.state for station, job in walked.jobs.items()} == dict.fromkeys(STATIONS, "succeeded")
        assert all(job.outputs for job in walked.jobs.values())

    def test_the_live_events_are_complete_and_in_order(self, service: Service, walked: Walked) -> None:
        numbers = [event.data["seq"] for event in walked.events if event.type != "log"]
        assert numbers == list(range(1, len(numbers) + 1))
        states = [event.data["state"] for event in walked.events if event.type == "state"]
        assert states[0] == "waiting"
        assert states[-3:] == ["starting", "running", "succeeded"]
        steps = [event.data["step"] for event in walked.events if event.type == "metric"]
        assert steps == list(range(1, TRAIN_ITERS + 1))
        history = list(service.client.history(walked.jobs["train"].id))
        assert [event.type for event in history] == [event.type for event in walked.events if event.type != "log"]

    def test_the_live_log_is_the_log(self, service: Service, walked: Walked) -> None:
        live = "".join(event.data["text"] for event in walked.events if event.type == "log")
        assert live.encode() == b"".join(service.client.follow_logs(walked.jobs["train"].id))

    def test_the_log_has_the_fields_usual_line_for_each_step(self, service: Service, walked: Walked) -> None:
        log = b"".join(service.client.follow_logs(walked.jobs["train"].id)).decode()
        found = LINE.findall(log)
        assert [(int(step), int(samples)) for step, samples, _ in found] == [
            (n, 32 * n) for n in range(1, TRAIN_ITERS + 1)
        ]

    def test_metrics_are_those_of_the_log(self, service: Service, walked: Walked) -> None:
        series = service.client.metrics(walked.jobs["train"].id)
        assert [step for step, _, _ in series["loss"]] == list(range(1, TRAIN_ITERS + 1))
        names = {"learning_rate", "grad_norm", "step_time_ms", "tokens_per_second", "consumed_samples"}
        assert names <= series.keys()
        later = service.client.metrics(walked.jobs["train"].id, names=["loss"], since_step=4)
        assert set(later) == {"loss"}
        assert later["loss"][-1][0] == TRAIN_ITERS
        assert all(step >= 4 for step, _, _ in later["loss"])

    def test_the_export_is_downloaded_verified_and_trained(
        self, service: Service, walked: Walked, tmp_path: Path
    ) -> None:
        artifact_id = walked.jobs["export"].outputs[0].artifact_id
        report = service.client.download(artifact_id, tmp_path)
        assert report.unverified == []
        assert service.client.download(artifact_id, tmp_path).fetched_bytes == 0
        before, after = weights_of(walked.model), weights_of(tmp_path)
        assert before.keys() == after.keys()
        assert any(before[name] != after[name] for name in before)
        assert json.loads((tmp_path / "config.json").read_text()) == json.loads(
            (walked.model / "config.json").read_text()
        )

    def test_lineage_leads_back_to_the_base(self, service: Service, walked: Walked) -> None:
        export = service.client.artifact(walked.jobs["export"].outputs[0].artifact_id).model_dump()
        assert export["lineage"]["job_id"] == walked.jobs["export"].id
        assert walked.jobs["train"].output("checkpoint") in export["parents"]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT asks transformers 5 for it
class TestLora:
    def test_peft_loads_the_adapter_and_the_chain_goes_on_with_merged_weights(
        self, service: Service, walked: Walked, tmp_path: Path
    ) -> None:
        client = service.client
        road = digits_road(client.register("hf_model", walked.model).id, "", train_iters=TRAIN_ITERS)
        whole = {"nproc_per_node": 1, "llm_pp_layers": [[4]], "vit_pp_layers": [[4]]}
        changes = {
            "model": {"job": walked.jobs["convert"].id},
            "dataset": {"job": walked.jobs["dataset"].id},
            "parallel": whole,
            "freeze": {},
            "lora": {"r": 8, "alpha": 16, "target_modules": ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]},
        }
        tuned = client.submit("training", {**road["train"][1], **changes}, name="lora")
        exported = client.submit("conversion", {"operation": "mm_to_hf", "source": {"job": tuned.id}}, name="merged")
        foretold = {"job": tuned.id, "output": "adapter"}
        reused = {"operation": "hf_to_mm", "source": foretold, "hf_source": road["convert"][1]["source"]}
        layout = {"parallel": {"llm_pp_layers": [[4]], "vit_pp_layers": [[4]]}}
        converted = client.submit("conversion", reused | layout, name="adapter")
        jobs = [client.wait(job.id, timeout_s=300) for job in (tuned, exported, converted)]
        assert [(job.state, job.error) for job in jobs] == [("succeeded", None)] * 3
        assert {output.name: output.kind for output in jobs[0].outputs} == {
            "checkpoint": "mm_checkpoint", "adapter": "hf_adapter", f"adapter-{TRAIN_ITERS // 2:07d}": "hf_adapter",
            "tensorboard": "report",
        }  # fmt: skip
        assert jobs[2].outputs[0].kind == "mm_adapter"
        told = client.artifact(jobs[0].output("checkpoint")).metadata["lora"]
        assert f"max |Δlogit| {told['max_logit_difference']:.3g}" in client.logs(tuned.id).content.decode()

        client.download(jobs[0].output("adapter"), tmp_path / "adapter")
        client.download(jobs[1].outputs[0].artifact_id, tmp_path / "merged")
        assert answers_differ_by(walked.model, tmp_path / "adapter", tmp_path / "merged") < 1e-5


class TestTheCommandLine:
    def test_a_file_of_chained_jobs_is_submitted_and_followed(self, service: Service, walked: Walked) -> None:
        model = service.client.register("hf_model", walked.model).id
        jobs = [
            {"kind": "conversion", "name": "there", "spec": {
                "operation": "hf_to_mm", "source": {"artifact": model},
                "parallel": {"llm_pp_layers": [[4]], "vit_pp_layers": [[4]]}}},
            {"kind": "conversion", "name": "back", "spec": {"operation": "mm_to_hf", "source": {"job": "$there"}}},
        ]  # fmt: skip
        (service.folder / "jobs.json").write_text(json.dumps(jobs))
        result = service.cli("submit", str(service.folder / "jobs.json"), "--follow")
        assert result.returncode == 0, result.stderr
        ids = [line.split()[0] for line in result.stdout.splitlines()]
        assert service.client.job(ids[1]).state == "succeeded"
        back = service.client.job(ids[1]).outputs[0].artifact_id
        downloaded = service.cli("download", back, str(service.folder / "back"))
        assert downloaded.returncode == 0, downloaded.stderr
        assert weights_of(service.folder / "back") == weights_of(walked.model)

    def test_a_job_is_listed_shown_and_its_log_and_metrics_printed(self, service: Service, walked: Walked) -> None:
        job = walked.jobs["train"].id
        assert job in service.cli("jobs", "--kind", "training").stdout
        assert "succeeded" in service.cli("show", job).stdout
        assert f"iteration {TRAIN_ITERS}/{TRAIN_ITERS}" in service.cli("logs", job, "--tail", "20").stdout
        assert len(json.loads(service.cli("metrics", job, "loss", "--json").stdout)["loss"]) == TRAIN_ITERS

    def test_an_impossible_split_is_refused_with_what_would_work(self, service: Service, walked: Walked) -> None:
        model = service.client.register("hf_model", walked.model).id
        parallel = {"llm_pp_layers": [[2, 1]], "vit_pp_layers": [[4, 0]]}
        spec = {"operation": "hf_to_mm", "source": {"artifact": model}, "parallel": parallel}
        (service.folder / "bad.json").write_text(json.dumps({"kind": "conversion", "spec": spec}))
        for command in ("submit", "plan"):
            result = service.cli(command, str(service.folder / "bad.json"))
            assert result.returncode == 3
            assert "llm_pp_layers" in result.stderr

    def test_a_key_for_a_user_sees_only_that_users_jobs(self, service: Service, walked: Walked) -> None:
        made = json.loads(service.cli("keys", "create", "laptop", "--user", "ada").stdout)
        with Client(service.server.url, made["key"]) as ada:
            assert list(ada.jobs()) == []
            with pytest.raises(ApiError, match=walked.jobs["train"].id) as raised:
                ada.job(walked.jobs["train"].id)
            assert raised.value.status == 404
        assert service.cli("keys", "delete", made["id"]).returncode == 0
        with Client(service.server.url, made["key"]) as ada, pytest.raises(ApiError) as raised:
            list(ada.jobs())
        assert raised.value.status == 401


class TestTheRoadOfPhotos:
    def test_real_tokenizer_photos_and_captions_walk_it_too(self, service: Service, data_dir: Path) -> None:
        client = service.client
        folder = service.folder / "photos-model"
        model = client.register("hf_model", tiny_model(folder, shape=SHAPE, tokenizer=data_dir / "qwen2-tokenizer"))
        source = client.upload("dataset_source", data_dir / "cc12m")
        annotations = "llava_instruct_cc12m.json"
        submitted = submit_road(client, photos_road(model.id, source.id, annotations=annotations, train_iters=3))
        jobs = {station: client.wait(job.id, timeout_s=500) for station, job in submitted.items()}
        failures = {job.name: (job.error, client.logs(job.id, tail=20).content) for job in jobs.values() if job.error}
        assert not failures
        assert {job.state for job in jobs.values()} <= TERMINAL_STATES
        assert len(client.metrics(jobs["train"].id)["loss"]) == 3


def answers_differ_by(base: Path, adapter: Path, merged: Path) -> float:
    """The largest difference of a logit between the base with its adapter, in PEFT, and the merged model, in transformers."""
    import peft
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration as Model

    ids = torch.arange(20)[None]
    adapted = peft.PeftModel.from_pretrained(Model.from_pretrained(base, dtype=torch.float32), adapter)
    with torch.no_grad():
        found = Model.from_pretrained(merged, dtype=torch.float32)(input_ids=ids).logits
        return float((adapted(input_ids=ids).logits - found).abs().max())


def weights_of(folder: Path) -> dict[str, bytes]:
    """Every weight's bytes by name."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as weights:
            found |= {name: weights.get_tensor(name).tobytes() for name in weights.keys()}  # noqa: SIM118  # not a dict
    return found
