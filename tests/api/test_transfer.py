"""A folder as a tar that is never written down, and what a download accepts."""

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.transfer import FolderSource, TransferError, is_complete, open_source, sha256_of, target_path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    contents = {
        "config.json": b"{}",
        "empty": b"",
        "deep/er/block": bytes(range(256)) * 2,  # 512 bytes: no padding
        "deep/" + "n" * 150 + "/é.bin": b"x" * 1000,  # needs extended headers
        "weights.bin": bytes(i % 251 for i in range(10_000)),
    }
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def whole(source: FolderSource) -> bytes:
    return source.read(0, source.size + 1)


class TestFolderSource:
    def test_it_is_a_tar_of_every_file(self, folder: Path) -> None:
        source = FolderSource.of(folder)
        content = whole(source)
        assert len(content) == source.size
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            found = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert found == files

    def test_it_does_not_depend_on_when_it_was_made(self, folder: Path) -> None:
        before = whole(FolderSource.of(folder))
        (folder / "config.json").touch()
        assert whole(FolderSource.of(folder)) == before

    @given(offset=st.integers(0, 40_000), count=st.integers(0, 40_000))
    def test_any_piece_equals_that_piece_of_the_whole(self, folder: Path, offset: int, count: int) -> None:
        source = FolderSource.of(folder)
        assert source.read(offset, count) == whole(source)[offset : offset + count]

    def test_a_file_that_shrinks_while_it_is_sent_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"x" * 2000)
        source = FolderSource.of(tmp_path)
        (tmp_path / "a").write_bytes(b"x")
        with pytest.raises(TransferError, match="changed while it was sent"):
            whole(source)

    def test_a_linked_folder_is_refused(self, tmp_path: Path, folder: Path) -> None:
        (tmp_path / "link").symlink_to(folder)
        with pytest.raises(TransferError, match="link to a folder"):
            FolderSource.of(tmp_path)

    def test_an_empty_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(TransferError, match="holds no file"):
            open_source(tmp_path)

    def test_a_path_that_is_not_there_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(TransferError, match="neither a file nor a folder"):
            open_source(tmp_path / "nothing")


class TestTargetPath:
    def test_a_name_inside_the_artifact_is_joined(self, tmp_path: Path) -> None:
        assert target_path(tmp_path, "hf/config.json") == tmp_path / "hf" / "config.json"

    @pytest.mark.parametrize("name", ["", "/etc/passwd", "../up", "a/../../up", "a\\b", "a\0b"])
    def test_a_name_that_would_leave_it_is_refused(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(TransferError, match="does not lie inside"):
            target_path(tmp_path, name)


class TestIsComplete:
    def test_size_and_digest_both_count(self, tmp_path: Path) -> None:
        path = tmp_path / "f"
        path.write_bytes(b"abc")
        digest = sha256_of(path)
        assert is_complete(path, size=3, sha256=digest)
        assert is_complete(path, size=3, sha256=None)
        assert not is_complete(path, size=4, sha256=digest)
        assert not is_complete(path, size=3, sha256="0" * 64)
        assert not is_complete(tmp_path / "other", size=3, sha256=digest)
