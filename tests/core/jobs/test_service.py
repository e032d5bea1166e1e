from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from sqlalchemy.orm import Session

from core.db.models import Artifact, Job
from core.db.session import Database
from core.errors import (
    AppError,
    Conflict,
    ForbiddenPath,
    IncompatiblePlan,
    InvalidDataset,
    InvalidSpec,
    NotFound,
    UnsupportedOption,
)
from core.jobs import repository, service
from core.jobs.lifecycle import JobState, transition
from core.jobs.principal import Principal
from core.settings import Settings
from core.storage.local import Store
from tests.factories import (
    ADMIN,
    ALICE,
    BOB,
    LAYOUT_7B,
    QWEN_7B,
    add_artifact,
    add_node,
    dataset_source,
    hf_7b,
    request,
    submit,
)


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """Rules do not depend on the database; one kind is enough here."""
    return sqlite_url


def training_spec(model: Artifact, data: Artifact, **changes: Any) -> dict[str, Any]:
    spec = {
        "model": {"artifact": model.id},
        "dataset": {"artifact": data.id},
        "parallel": {**LAYOUT_7B, "nproc_per_node": 2},
        "train_iters": 10,
        "global_batch_size": 8,
    }
    return spec | changes


class TestPlan:
    def test_memory_is_told_per_pipeline_rank_with_all_its_chunks_and_one_slice_of_them(
        self, database: Database, settings: Settings
    ) -> None:
        virtual = {"llm_pp_layers": [[0, 10], [9, 9]], "vit_pp_layers": [[32, 0], [0, 0]]}
        with database.write() as session:
            model, data = hf_7b(session), add_artifact(session, "dataset")

            def parameters(**parallel: Any) -> list[int]:
                plan = plan_of(session, settings, training_spec(model, data, parallel=parallel))
                return [rank.parameters for rank in plan.memory_per_rank]

            whole = parameters(**LAYOUT_7B, nproc_per_node=2)
            chunked = parameters(**virtual, nproc_per_node=2)
            sliced = parameters(**{**LAYOUT_7B, "tp_size": 2}, nproc_per_node=4)
        assert len(chunked) == 2
        assert sum(chunked) == sum(whole)
        for half, full in zip(sliced, whole, strict=True):
            assert full / 2 < half < full / 2 * 1.001  # norms and some biases are held by both

    def test_checkpoints_that_the_disk_cannot_hold_are_a_risk(self, database: Database, settings: Settings) -> None:
        with database.write() as session:
            model, data = hf_7b(session), add_artifact(session, "dataset")

            def plan_with(keep_last: int) -> service.Plan:
                saving = {"save_interval": 1, "keep_last": keep_last}
                return plan_of(session, settings, training_spec(model, data, train_iters=2000, checkpoint=saving))

            few, many = plan_with(1), plan_with(1000)
        assert many.disk_bytes == 1001 * few.disk_bytes // 2
        assert f"it writes {many.disk_bytes} bytes at its peak" in " ".join(many.risks)


def plan_of(session: Session, settings: Settings, spec: dict[str, Any]) -> service.Plan:
    return service.plan(
        session,
        settings=settings,
        store=Store(settings.store_dir),
        principal=ALICE,
        request=request("training", spec),
    )


class TestRefusals:
    """Each refusal comes at submission and says what would work."""

    def refuse(self, database: Database, settings: Settings, kind: str, change: dict[str, Any]) -> AppError:
        with database.write() as session:
            model, data = hf_7b(session), add_artifact(session, "dataset")
            spec: dict[str, Any] = (
                training_spec(model, data)
                if kind == "training"
                else {"operation": "hf_to_mm", "source": {"artifact": model.id}, "parallel": LAYOUT_7B}
            )
            with pytest.raises(AppError) as caught:
                submit(session, settings, kind, spec | change)
            assert session.query(Job).count() == 0
        return caught.value

    def test_layers_that_do_not_sum_to_the_models(self, database: Database, settings: Settings) -> None:
        error = self.refuse(database, settings, "conversion", {"parallel": {**LAYOUT_7B, "llm_pp_layers": [[12, 15]]}})
        assert isinstance(error, IncompatiblePlan)
        assert "27" in error.message
        assert "28" in error.message

    def test_tp_that_does_not_divide_the_kv_heads(self, database: Database, settings: Settings) -> None:
        error = self.refuse(database, settings, "conversion", {"parallel": {**LAYOUT_7B, "tp_size": 8}})
        assert isinstance(error, IncompatiblePlan)
        assert "num_key_value_heads=4" in error.message
        assert "1, 2, 4" in error.message

    def test_vision_layers_after_language_layers(self, database: Database, settings: Settings) -> None:
        layout = {"tp_size": 1, "llm_pp_layers": [[12, 16]], "vit_pp_layers": [[16, 16]]}
        error = self.refuse(database, settings, "conversion", {"parallel": layout})
        assert isinstance(error, IncompatiblePlan)
        assert "vision layers must come before" in error.message

    def test_more_devices_than_the_cluster_has(self, database: Database, settings: Settings) -> None:
        add_node(database, settings, devices=2)
        error = self.refuse(database, settings, "training", {"parallel": {**LAYOUT_7B, "nproc_per_node": 8}})
        assert error.code == "not_enough_devices"
        assert "node-a: 2 cpu" in error.message

    def test_a_family_that_is_only_converted(self, database: Database, settings: Settings) -> None:
        vision = {"depth": 32, "hidden_size": 3584}
        metadata = {"config": {**QWEN_7B, "model_type": "qwen2_vl", "vision_config": vision}}
        with database.write() as session:
            older, data = add_artifact(session, "hf_model", metadata), add_artifact(session, "dataset")
            reference = {"artifact": older.id}
            submit(
                session, settings, "conversion", {"operation": "hf_to_mm", "source": reference, "parallel": LAYOUT_7B}
            )
            evaluation = {"model": reference, "prompts": [{"text": "What?"}]}
            for kind, spec in (("training", training_spec(older, data)), ("evaluation", evaluation)):
                with pytest.raises(UnsupportedOption, match=r"spec\.model: this version only converts qwen2_vl"):
                    submit(session, settings, kind, spec)
            spec = {"operation": "hf_to_mm", "source": {"artifact": older.id}, "parallel": LAYOUT_7B}
            submit(session, settings, "conversion", spec | {"verify": True})
            with pytest.raises(UnsupportedOption, match=r"spec\.verify: no logits to compare: .* qwen2_vl"):
                submit(session, settings, "conversion", spec | {"verify": "logits"})

    def test_an_adapter_without_its_model_and_options_that_have_no_effect(
        self, database: Database, settings: Settings
    ) -> None:
        with database.write() as session:
            model, adapter = {"artifact": hf_7b(session).id}, {"artifact": add_artifact(session, "hf_adapter").id}
            spec = {"operation": "hf_to_mm", "source": adapter, "parallel": LAYOUT_7B}
            with pytest.raises(InvalidSpec, match=r"spec\.hf_source: name the Hugging Face folder"):
                submit(session, settings, "conversion", spec)
            with pytest.raises(InvalidSpec, match=r"spec\.canonical has no effect on an adapter"):
                submit(session, settings, "conversion", spec | {"hf_source": model, "canonical": True})
            with pytest.raises(InvalidSpec, match=r"spec\.hf_source has no effect"):
                submit(session, settings, "conversion", spec | {"source": model, "hf_source": model})
            job = submit(session, settings, "conversion", spec | {"hf_source": model})
            export = {"operation": "mm_to_hf", "source": {"job": job.id}}
            submit(session, settings, "conversion", export)
            with pytest.raises(UnsupportedOption, match=r"spec\.verify: .* an adapter has none by itself"):
                submit(session, settings, "conversion", export | {"verify": "logits"})
            with pytest.raises(InvalidSpec, match=r"spec\.max_shard_bytes has no effect on an adapter"):
                submit(session, settings, "conversion", export | {"max_shard_bytes": 1 << 20})
            with pytest.raises(AppError) as caught:
                submit(session, settings, "evaluation", {"model": {"job": job.id}, "prompts": [{"text": "What?"}]})
            assert caught.value.code == "wrong_artifact_kind"

    @pytest.mark.parametrize(("kind", "count"), [("image", 2), ("video", 1)])
    def test_a_prompt_whose_placeholders_and_files_differ(
        self, database: Database, settings: Settings, kind: str, count: int
    ) -> None:
        with database.write() as session:
            prompt = {"text": f"<{kind}>" * count}
            spec = {"model": {"artifact": hf_7b(session).id}, "prompts": [prompt]}
            wanted = rf"spec\.prompts\[0\]\.text has {count} <{kind}> placeholders for 0 {kind}s"
            with pytest.raises(InvalidSpec, match=wanted):
                submit(session, settings, "evaluation", spec)

    def test_a_source_layout_that_the_rank_files_contradict(self, database: Database, settings: Settings) -> None:
        with database.write() as session:
            source = add_artifact(session, "mm_checkpoint", {"config": QWEN_7B, "tp_size": 2, "pp_size": 1})
            spec = {"operation": "mm_to_hf", "source": {"artifact": source.id}, "source_parallel": LAYOUT_7B}
            wanted = f"makes it tp 1 x pp {len(LAYOUT_7B['llm_pp_layers'][0])}, .* rank files of tp 2 x pp 1"
            with pytest.raises(IncompatiblePlan, match=wanted):
                submit(session, settings, "conversion", spec)

    def test_a_canonical_checkpoint_of_several_ranks(self, database: Database, settings: Settings) -> None:
        change = {"parallel": {**LAYOUT_7B, "tp_size": 2}, "canonical": True}
        error = self.refuse(database, settings, "conversion", change)
        assert isinstance(error, IncompatiblePlan)
        assert "tp_size=1 only" in error.message

    def test_an_artifact_of_the_wrong_kind(self, database: Database, settings: Settings) -> None:
        with database.write() as session:
            wrong = add_artifact(session, "dataset")
        error = self.refuse(database, settings, "conversion", {"source": {"artifact": wrong.id}})
        assert error.code == "wrong_artifact_kind"
        assert "hf_model" in error.message

    def test_a_path_outside_the_allowed_roots(self, database: Database, settings: Settings) -> None:
        error = self.refuse(database, settings, "conversion", {"source": {"path": "/etc"}})
        assert isinstance(error, ForbiddenPath)
        assert "allowed roots" in (error.hint or "")

    @pytest.mark.parametrize(
        ("change", "message", "hint"),
        [
            ({"target_modules": ["q_proj"]}, "q_proj is no linear layer", "q_proj is part of linear_qkv"),
            ({"target_modules": ["linear_qkv", "router"]}, "router is no linear layer", None),
        ],
    )
    def test_lora_on_layers_that_the_model_does_not_have(
        self, database: Database, settings: Settings, change: dict[str, Any], message: str, hint: str | None
    ) -> None:
        error = self.refuse(database, settings, "training", {"lora": change})
        assert isinstance(error, InvalidSpec)
        assert message in error.message
        assert error.hint == hint

    def test_lora_of_a_tower_in_which_nothing_gets_an_adapter(self, database: Database, settings: Settings) -> None:
        error = self.refuse(database, settings, "training", {"lora": {}, "freeze": {"vision_projector": False}})
        assert "spec.freeze.vision_projector is false" in error.message
        assert "linear_fc1, linear_fc2" in (error.hint or "")

    def test_lora_that_resumes_from_another_job_or_is_resumed_from(
        self, database: Database, settings: Settings
    ) -> None:
        with database.write() as session:
            merged = add_artifact(session, "mm_checkpoint", {"iteration": 4, "lora": {"r": 8}})
        resume = {"resume_from": {"artifact": merged.id}}
        for change, message in ((resume | {"lora": {}}, "its own attempts resume"), (resume, "give it as model")):
            assert message in self.refuse(database, settings, "training", change).message

    def test_rows_longer_than_seq_length(self, database: Database, settings: Settings) -> None:
        with database.write() as session:
            data = add_artifact(session, "dataset", {"max_length": 2000, "num_train": 5})
        error = self.refuse(database, settings, "training", {"dataset": {"artifact": data.id}})
        assert "seq_length (1024)" in error.message

    def test_annotations_that_are_not_there(self, database: Database, settings: Settings, tmp_path: Path) -> None:
        with database.write() as session:
            source, model = dataset_source(session, tmp_path / "src"), hf_7b(session)
            spec = {"source": {"artifact": source.id}, "annotations": "b.json", "tokenizer": {"artifact": model.id}}
            with pytest.raises(InvalidDataset, match=r"which has a\.json"):
                submit(session, settings, "dataset", spec)

    def test_foreign_artifacts_do_not_exist(self, database: Database, settings: Settings) -> None:
        with database.write() as session:
            theirs = hf_7b(session, owner=BOB.user)
            spec = {"operation": "hf_to_mm", "source": {"artifact": theirs.id}, "parallel": LAYOUT_7B}
            with pytest.raises(NotFound):
                submit(session, settings, "conversion", spec)


class TestSpecs:
    """What the spec alone tells."""

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            (
                {"operation": "hf_to_mm", "source": {"path": "/m"}, "parallel": LAYOUT_7B, "tp": 2},
                "Extra inputs are not permitted",
            ),
            ({"operation": "hf_to_mm", "source": {"path": "/m"}}, "parallel is required with hf_to_mm"),
            (
                {"operation": "mm_to_hf", "source": {"path": "/m"}, "parallel": LAYOUT_7B},
                "parallel has no effect with mm_to_hf",
            ),
            ({"operation": "hf_to_mm", "source": {}, "parallel": LAYOUT_7B}, "exactly one of artifact, job, path"),
            (
                {
                    "operation": "hf_to_mm",
                    "source": {"path": "/m"},
                    "parallel": {"llm_pp_layers": [[1, 2]], "vit_pp_layers": [[3]]},
                },
                "both need one entry per pipeline rank",
            ),
        ],
    )
    def test_contradictions_are_refused(self, spec: dict[str, Any], message: str) -> None:
        with pytest.raises(ValidationError, match=message):
            request("conversion", spec)

    def test_a_batch_that_does_not_divide_names_both_numbers(self) -> None:
        spec = {
            "model": {"path": "/m"},
            "dataset": {"path": "/d"},
            "parallel": {**LAYOUT_7B, "nproc_per_node": 8},
            "train_iters": 1,
            "global_batch_size": 6,
        }
        with pytest.raises(
            ValidationError, match=r"global_batch_size \(6\) must be a multiple of the data-parallel size \(4\)"
        ):
            request("training", spec)


class TestChains:
    def test_a_whole_chain_is_checked_and_submitted_at_once(
        self, database: Database, settings: Settings, tmp_path: Path
    ) -> None:
        with database.write() as session:
            model, source = hf_7b(session), dataset_source(session, tmp_path / "src")
            convert = submit(
                session,
                settings,
                "conversion",
                {"operation": "hf_to_mm", "source": {"artifact": model.id}, "parallel": LAYOUT_7B},
            )
            data = submit(
                session,
                settings,
                "dataset",
                {"source": {"artifact": source.id}, "annotations": "a.json", "tokenizer": {"artifact": model.id}},
            )
            spec = training_spec(model, add_artifact(session, "dataset")) | {
                "model": {"job": convert.id},
                "dataset": {"job": data.id},
            }
            train = submit(session, settings, "training", spec)
            export = submit(session, settings, "conversion", {"operation": "mm_to_hf", "source": {"job": train.id}})
            assert [job.state for job in (convert, data, train, export)] == ["queued", "queued", "waiting", "waiting"]

    def test_an_impossible_split_is_refused_although_its_input_does_not_exist_yet(
        self, database: Database, settings: Settings
    ) -> None:
        with database.write() as session:
            spec = {"operation": "hf_to_mm", "source": {"artifact": hf_7b(session).id}, "parallel": LAYOUT_7B}
            convert = submit(session, settings, "conversion", spec)
            reshard = {"operation": "reshard", "source": {"job": convert.id}, "parallel": {**LAYOUT_7B, "tp_size": 3}}
            with pytest.raises(IncompatiblePlan, match="tp_size=3"):
                submit(session, settings, "conversion", reshard)

    def test_why_a_job_may_fail_all_the_same_stands_in_its_history(
        self, database: Database, settings: Settings, tmp_path: Path
    ) -> None:
        with database.write() as session:
            model, source = hf_7b(session), dataset_source(session, tmp_path / "source")
            spec = {"source": {"artifact": source.id}, "annotations": "a.json", "tokenizer": {"artifact": model.id}}
            data = submit(session, settings, "dataset", {**spec, "cutoff_len": 2048})
            spec = training_spec(model, source, dataset={"job": data.id}, seq_length=1024)
            job = submit(session, settings, "training", spec)
            told = [event.data for event in repository.events_after(session, job.id, 0) if event.type == "warning"]
        told = [data for data in told if "free in the store" not in data["message"]]  # where the disk is small
        assert [data["code"] for data in told] == ["risk", "risk"]
        assert told[0]["message"].startswith("seq_length (1024) is below the data set's cutoff_len (2048)")
        assert "pipeline rank 1 needs about" in told[1]["message"]

    def test_the_wrong_output_is_refused(self, database: Database, settings: Settings) -> None:
        with database.write() as session:
            spec = {"operation": "hf_to_mm", "source": {"artifact": hf_7b(session).id}, "parallel": LAYOUT_7B}
            convert = submit(session, settings, "conversion", spec)
            with pytest.raises(NotFound, match="will have no output 'model'"):
                submit(
                    session,
                    settings,
                    "conversion",
                    {"operation": "mm_to_hf", "source": {"job": convert.id, "output": "model"}},
                )


class TestDropSurplus:
    def test_of_all_attempts_the_last_checkpoints_and_the_newest_curves_stay_and_what_is_used(
        self, database: Database, settings: Settings
    ) -> None:
        with database.write() as session:
            spec = training_spec(hf_7b(session), add_artifact(session, "dataset"), checkpoint={"keep_last": 2})
            job = submit(session, settings, "training", spec)

            def made(name: str, kind: str = "mm_checkpoint", **metadata: Any) -> Artifact:
                return add_artifact(session, kind, metadata, name=name, job_id=job.id)

            first = [made(f"checkpoint-00000{number}", iteration=number) for number in (30, 40, 50)]
            first += [made("tensorboard", "report")]
            used = {"operation": "mm_to_hf", "source": {"job": job.id, "output": "checkpoint-0000040"}}
            submit(session, settings, "conversion", {**used, "hf_source": spec["model"]})
            submit(session, settings, "training", {**spec, "model": {"job": job.id}})
            second = [made("checkpoint-0000050", iteration=50), made("checkpoint", iteration=60)]
            second += [made("tensorboard", "report")]

            assert service.drop_surplus(session, job) == [first[0].id, first[2].id, first[3].id]
            assert {item.id for item in repository.outputs(session, job.id)} == {
                item.id for item in [first[1], *second]
            }
            assert service.drop_surplus(session, job) == []


class TestCancelAndRetry:
    @pytest.fixture
    def job_id(self, database: Database, settings: Settings) -> str:
        with database.write() as session:
            spec = {"operation": "hf_to_mm", "source": {"artifact": hf_7b(session).id}, "parallel": LAYOUT_7B}
            return submit(session, settings, "conversion", spec).id

    def test_a_queued_job_is_cancelled_at_once_and_twice_is_fine(self, database: Database, job_id: str) -> None:
        for _ in range(2):
            with database.write() as session:
                assert service.cancel(session, session.get_one(Job, job_id)).state == "cancelled"

    def test_a_running_job_is_asked_to_stop(self, database: Database, job_id: str) -> None:
        with database.write() as session:
            job = session.get_one(Job, job_id)
            for state in (JobState.STARTING, JobState.RUNNING):
                transition(session, job, state)
            assert service.cancel(session, job).state == "cancelling"

    def test_a_failed_job_is_queued_again(self, database: Database, job_id: str) -> None:
        with database.write() as session:
            job = session.get_one(Job, job_id)
            transition(session, job, JobState.FAILED, error={"code": "x", "message": "y", "hint": None})
            service.retry(session, job)
            assert (job.state, job.error, job.finished_at) == ("queued", None, None)

    def test_a_succeeded_job_can_be_neither_cancelled_nor_retried(self, database: Database, job_id: str) -> None:
        with database.write() as session:
            job = session.get_one(Job, job_id)
            for state in (JobState.STARTING, JobState.RUNNING, JobState.SUCCEEDED):
                transition(session, job, state)
            with pytest.raises(Conflict):
                service.cancel(session, job)
            with pytest.raises(Conflict):
                service.retry(session, job)


def register(session: Session, settings: Settings, kind: str, path: Path, *, principal: Principal = ADMIN) -> Artifact:
    """Register a folder as the API does."""
    store = Store(settings.store_dir)
    return service.register(
        session, settings=settings, store=store, principal=principal, kind=kind, path=str(path), name=None
    )


class TestArtifacts:
    def test_an_artifact_of_a_live_job_is_not_deleted(self, database: Database, settings: Settings) -> None:
        with database.write() as session:
            model = hf_7b(session)
            job = submit(
                session,
                settings,
                "conversion",
                {"operation": "hf_to_mm", "source": {"artifact": model.id}, "parallel": LAYOUT_7B},
            )
            with pytest.raises(Conflict, match=job.id):
                service.delete_artifact(session, model)
            service.cancel(session, job)
            service.delete_artifact(session, model)
            assert model.deleted_at is not None

    def test_registering_checks_the_folder_and_hashes_it(
        self, database: Database, settings: Settings, tmp_path: Path
    ) -> None:
        source = tmp_path / "source"
        source.mkdir()
        (source / "a.json").write_text("[]")
        store = Store(settings.store_dir)
        with database.write() as session:
            made = register(session, settings, "dataset_source", source, principal=ADMIN)
        (entry,) = store.manifest(made.id).files
        assert (made.name, made.shared, entry.path, entry.size) == ("source", True, "a.json", 2)
        assert entry.sha256 == "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"

    def test_a_link_out_of_the_allowed_roots_is_refused(
        self, database: Database, settings: Settings, tmp_path: Path
    ) -> None:
        source = tmp_path / "source"
        source.mkdir()
        (source / "a.json").write_text("[]")
        (tmp_path / "beside.txt").write_text("within the roots")
        (source / "fine.txt").symlink_to(tmp_path / "beside.txt")

        with database.write() as session:
            assert register(session, settings, "dataset_source", source).num_files == 2
        (source / "passwd.txt").symlink_to("/etc/passwd")
        with database.write() as session, pytest.raises(ForbiddenPath, match=r"passwd\.txt"):
            register(session, settings, "dataset_source", source)

    def test_an_empty_folder_is_no_data_set(self, database: Database, settings: Settings, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        with database.write() as session, pytest.raises(InvalidDataset):
            register(session, settings, "dataset_source", tmp_path / "empty", principal=ALICE)

    def test_a_report_cannot_be_registered(self, database: Database, settings: Settings, tmp_path: Path) -> None:
        with database.write() as session, pytest.raises(InvalidSpec, match="cannot be registered"):
            register(session, settings, "report", tmp_path, principal=ALICE)
