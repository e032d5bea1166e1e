import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.archive import Archive
from core.errors import Conflict
from core.storage.manifest import FileEntry, describe

FILES = {
    "config.json": b"{}",
    "empty": b"",
    "exactly-one-block": bytes(512),
    "images/ü.png": b"\x89PNG" * 200,
    "images/" + "long" * 40 + ".png": b"x" * 1025,
    "model.safetensors": bytes(range(256)) * 10,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("artifact")
    for name, content in FILES.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)
    return root


@pytest.fixture(scope="module")
def archive(folder: Path) -> Archive:
    return build(folder)


def build(folder: Path, entries: list[FileEntry] | None = None) -> Archive:
    return Archive(entries or describe(folder), mtime=1_700_000_000, locate=lambda entry: folder / entry.path)


def whole(archive: Archive) -> bytes:
    return b"".join(archive.read(0, archive.size))


class TestArchive:
    def test_extracts_with_tarfile(self, archive: Archive) -> None:
        with tarfile.open(fileobj=io.BytesIO(whole(archive))) as tar:
            found = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
            assert found == FILES
            assert {(member.mode, member.uid, member.mtime) for member in tar} == {(0o644, 0, 1_700_000_000)}

    def test_size_is_known_beforehand(self, archive: Archive) -> None:
        assert len(whole(archive)) == archive.size
        assert archive.size % 512 == 0

    def test_is_the_same_each_time(self, folder: Path, archive: Archive) -> None:
        assert whole(build(folder)) == whole(archive)
        assert build(folder).etag == archive.etag

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    @given(st.data())
    def test_any_range_equals_the_slice(self, archive: Archive, data: st.DataObject) -> None:
        start = data.draw(st.integers(0, archive.size - 1))
        stop = data.draw(st.integers(start + 1, archive.size))
        assert b"".join(archive.read(start, stop)) == whole(archive)[start:stop]

    def test_reads_only_the_files_that_the_range_touches(self, folder: Path) -> None:
        located = []

        def locate(entry: FileEntry) -> Path:
            located.append(entry.path)
            return folder / entry.path

        archive = Archive(describe(folder), mtime=0, locate=locate)
        b"".join(archive.read(archive.size - 1024 - 2560, archive.size - 1024))
        assert located == ["model.safetensors"]

    def test_size_beyond_the_plain_header_field(self) -> None:
        huge = [FileEntry(path="huge", size=1 << 34, sha256="0" * 64), FileEntry(path="next", size=0, sha256="0" * 64)]
        archive = build(Path("/nowhere"), huge)
        header = b"".join(archive.read(0, 1536))
        with tarfile.open(fileobj=io.BytesIO(header), mode="r|") as tar:
            first = tar.next()
        assert first is not None
        assert first.size == 1 << 34
        tail = b"".join(archive.read(archive.size - 1024 - 512, archive.size))
        assert tail.startswith(b"next\0")

    def test_etag_changes_with_content_and_name(self, folder: Path, archive: Archive) -> None:
        entries = describe(folder)
        renamed = [entries[0].model_copy(update={"path": "other"}), *entries[1:]]
        changed = [entries[0].model_copy(update={"sha256": "0" * 64}), *entries[1:]]
        assert len({archive.etag, build(folder, renamed).etag, build(folder, changed).etag}) == 3

    def test_file_that_changed_since_breaks_the_stream(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"1234")
        archive = build(tmp_path)
        (tmp_path / "a").write_bytes(b"12345")
        with pytest.raises(Conflict):
            whole(archive)
