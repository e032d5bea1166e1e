from pathlib import Path

import pytest

from core.clock import utcnow
from core.errors import ForbiddenPath, NotFound
from core.storage.local import Store, resolve_allowed, resolve_inside
from core.storage.manifest import Manifest, describe


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def publish(store: Store, artifact_id: str = "art_1") -> Path:
    files = store.begin(artifact_id)
    (files / "sub").mkdir()
    (files / "sub" / "a.txt").write_text("hello")
    manifest = Manifest(id=artifact_id, kind="report", name="r", created_at=utcnow(), files=describe(files))
    return store.publish(manifest)


class TestStore:
    def test_an_artifact_appears_whole_or_not_at_all(self, store: Store) -> None:
        files = store.begin("art_1")
        (files / "a.txt").write_text("x")
        assert not store.artifact_dir("art_1").exists()
        with pytest.raises(NotFound):
            store.manifest("art_1")
        store.abort("art_1")
        assert not files.exists()

    def test_the_manifest_says_what_is_there(self, store: Store) -> None:
        publish(store)
        (entry,) = store.manifest("art_1").files
        assert (entry.path, entry.size) == ("sub/a.txt", 5)
        assert entry.sha256 == "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
        assert (store.files_dir("art_1") / entry.path).read_text() == "hello"

    def test_a_published_artifact_is_never_replaced(self, store: Store) -> None:
        publish(store)
        with pytest.raises(OSError, match="not empty"):
            publish(store)

    def test_deleting_removes_it_and_is_fine_twice(self, store: Store) -> None:
        folder = publish(store)
        for _ in range(2):
            store.delete("art_1")
        assert not folder.exists()


class TestResolveAllowed:
    @pytest.mark.parametrize("path", ["relative", "/etc/passwd", "/", "\0", ""])
    def test_what_lies_outside_is_refused(self, tmp_path: Path, path: str) -> None:
        with pytest.raises(ForbiddenPath):
            resolve_allowed(path, [tmp_path])

    def test_neither_dots_nor_links_nor_a_common_prefix_lead_out(self, tmp_path: Path) -> None:
        root, beside = tmp_path / "root", tmp_path / "root_evil"
        root.mkdir()
        beside.mkdir()
        (root / "link").symlink_to(beside)
        for path in (f"{root}/../root_evil", f"{root}/link", str(beside)):
            with pytest.raises(ForbiddenPath):
                resolve_allowed(path, [root])

    def test_what_is_inside_is_resolved_and_must_exist(self, tmp_path: Path) -> None:
        (tmp_path / "model").mkdir()
        assert resolve_allowed(f"{tmp_path}/model/.", [tmp_path]) == (tmp_path / "model").resolve()
        with pytest.raises(NotFound):
            resolve_allowed(f"{tmp_path}/missing", [tmp_path])


class TestResolveInside:
    @pytest.mark.parametrize(
        "relative", ["", "../secret", "sub/../../secret", "/etc/passwd", "a\0b", "a\\b", "missing", "sub"]
    )
    def test_what_is_no_file_below_the_root_is_not_found(self, tmp_path: Path, relative: str) -> None:
        (tmp_path / "root" / "sub").mkdir(parents=True)
        (tmp_path / "secret").write_text("x")
        with pytest.raises(NotFound):
            resolve_inside(tmp_path / "root", relative)

    def test_a_link_out_is_not_found(self, tmp_path: Path) -> None:
        (tmp_path / "root").mkdir()
        (tmp_path / "secret").write_text("x")
        (tmp_path / "root" / "link").symlink_to(tmp_path / "secret")
        with pytest.raises(NotFound):
            resolve_inside(tmp_path / "root", "link")
