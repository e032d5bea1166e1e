import os
import time
from datetime import timedelta
from pathlib import Path

from core.clock import utcnow
from core.db.models import Upload
from core.db.session import Database
from core.jobs import housekeeping
from core.settings import Settings
from core.storage.local import Store
from tests.factories import LAYOUT_7B, add_artifact, hf_7b, submit


def add_upload(database: Database, store: Store, name: str, *, state: str, days_old: float) -> Path:
    with database.write() as session:
        session.add(
            Upload(
                id=name,
                owner="alice",
                filename="x.tar",
                kind="dataset_source",
                name="x",
                size_bytes=3,
                offset=1,
                state=state,
                created_at=utcnow() - timedelta(days=days_old),
            )
        )
    path = store.upload_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


class TestDropCheckpoints:
    def test_only_those_of_long_failed_or_cancelled_trainings_go(self, database: Database, settings: Settings) -> None:
        store, folders = Store(settings.store_dir), {}
        with database.write() as session:
            for name, state, days_old in (("old", "failed", 8), ("young", "cancelled", 1), ("live", "running", 8)):
                spec = {
                    "model": {"artifact": hf_7b(session).id}, "dataset": {"artifact": add_artifact(session, "dataset").id},
                    "parallel": {"llm_pp_layers": [[28]], "vit_pp_layers": [[32]]}, "train_iters": 1, "global_batch_size": 1,
                }  # fmt: skip
                job = submit(session, settings, "training", spec)
                job.state, job.finished_at = state, utcnow() - timedelta(days=days_old)
                folders[name] = store.job_dir(job.id) / "checkpoints"
                folders[name].mkdir(parents=True)
                (folders[name] / "weights").write_bytes(b"x")
        housekeeping.clean(database, settings, utcnow())
        assert [folders[name].exists() for name in ("old", "young", "live")] == [False, True, True]
        assert list(store.temporary_root.iterdir()) == []


class TestFinishDeletions:
    def test_what_is_marked_goes_and_what_the_database_does_not_know_stays(
        self, database: Database, settings: Settings
    ) -> None:
        store = Store(settings.store_dir)
        with database.write() as session:
            model, gone = hf_7b(session), add_artifact(session, "report", deleted_at=utcnow())
            spec = {"operation": "hf_to_mm", "source": {"artifact": model.id}, "parallel": LAYOUT_7B}
            job = submit(session, settings, "conversion", spec)
        kept = [store.job_dir(job.id), store.job_dir("job_of_a_lost_row"), store.artifact_dir(model.id)]
        for folder in (*kept, store.artifact_dir(gone.id)):
            (folder / "files").mkdir(parents=True)
        housekeeping.clean(database, settings, utcnow())
        assert all(folder.exists() for folder in kept)
        assert not store.artifact_dir(gone.id).exists()


class TestExpireUploads:
    def test_only_old_unfinished_ones_go_with_their_bytes(self, database: Database, settings: Settings) -> None:
        store = Store(settings.store_dir)
        old = add_upload(database, store, "upl_old", state="receiving", days_old=8)
        young = add_upload(database, store, "upl_young", state="receiving", days_old=1)
        done = add_upload(database, store, "upl_done", state="complete", days_old=8)
        housekeeping.clean(database, settings, utcnow())
        with database.read() as session:
            assert sorted(session.query(Upload.id).all()) == [("upl_done",), ("upl_young",)]
        assert [path.exists() for path in (old, young, done)] == [False, True, True]


class TestRemoveScraps:
    def test_what_is_still_written_stays(self, tmp_path: Path) -> None:
        for name in ("dead", "alive"):
            (tmp_path / name / "files").mkdir(parents=True)
            (tmp_path / name / "files" / "part").write_text("x")
            for path in (tmp_path / name / "files" / "part", tmp_path / name / "files", tmp_path / name):
                os.utime(path, (0, 0))
        os.utime(tmp_path / "alive" / "files" / "part")
        housekeeping.remove_scraps(tmp_path, older_than=time.time() - 3600)
        assert [path.name for path in tmp_path.iterdir()] == ["alive"]

    def test_a_store_without_scraps_is_fine(self, tmp_path: Path) -> None:
        housekeeping.remove_scraps(tmp_path / "missing", older_than=time.time())
        assert not (tmp_path / "missing").exists()

    def test_what_a_conversion_finished_goes_when_no_attempt_has_come_for_a_day(
        self, database: Database, settings: Settings
    ) -> None:
        work = Store(settings.store_dir).job_dir("job_x") / "conversion"
        for attempt in ("1", "2"):
            (work / attempt / "files").mkdir(parents=True)
        for path in (work / "1" / "files", work / "1"):
            os.utime(path, (0, 0))
        housekeeping.clean(database, settings, utcnow())
        assert [path.name for path in work.iterdir()] == ["2"]
