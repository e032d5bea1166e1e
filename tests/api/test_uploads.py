"""Archives made by an enemy. What the HTTP side does with uploads is in routes/test_uploads.py."""

import gzip
import io
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from api.uploads import Limits, safe_path, unpack
from core.errors import UnsafeArchive


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "inner" / "root"
    folder.mkdir(parents=True)
    return folder


def limits(**changes: float) -> Limits:
    return Limits(**({"max_bytes": 1 << 30, "max_files": 100, "max_ratio": 1000} | changes))  # type: ignore[arg-type]


def entry(name: str, content: bytes = b"x", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    return member, content


def tar(path: Path, *entries: tuple[tarfile.TarInfo, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for member, content in entries:
            archive.addfile(member, io.BytesIO(content) if member.isreg() else None)
    return path


def outside(root: Path) -> list[str]:
    """What lies beside the root, where nothing may."""
    return [
        name
        for folder in (root.parent, root.parent.parent)
        for name in (path.name for path in folder.iterdir())
        if name not in ("inner", "root", "a.tar", "a.zip")
    ]


class TestTar:
    @pytest.mark.parametrize(("suffix", "mode"), [(".tar", "w"), (".tar.gz", "w:gz"), (".tgz", "w:gz")])
    def test_unpacks_files_and_folders(self, root: Path, tmp_path: Path, suffix: str, mode: str) -> None:
        folder = entry("./images/", b"", type=tarfile.DIRTYPE)
        made = tar(tmp_path / "a", folder, entry("./images/ü.png", b"png"), entry("a.json", b"[]"), mode=mode)
        digests = unpack(made, "x" + suffix, root, limits())
        assert set(digests) == {"images/ü.png", "a.json"}
        assert (root / "images/ü.png").read_bytes() == b"png"

    @pytest.mark.parametrize(
        "name",
        [
            "../evil",
            "a/../../evil",
            "/evil",
            "a\\..\\evil",
            "..",
            "a/./../../evil",
            "a\nb",
            "x" * 300,
            "/".join(["d"] * 2500),
        ],
    )
    def test_refuses_paths_that_could_leave(self, root: Path, tmp_path: Path, name: str) -> None:
        with pytest.raises(UnsafeArchive):
            unpack(tar(tmp_path / "a.tar", entry(name)), "a.tar", root, limits())
        assert outside(root) == []

    @pytest.mark.parametrize(
        "kind",
        [
            tarfile.SYMTYPE,
            tarfile.LNKTYPE,
            tarfile.CHRTYPE,
            tarfile.BLKTYPE,
            tarfile.FIFOTYPE,
            tarfile.GNUTYPE_SPARSE,
            b"Z",
        ],
    )
    def test_refuses_all_but_files_and_folders(self, root: Path, tmp_path: Path, kind: bytes) -> None:
        odd = entry("odd", b"", type=kind, linkname="/etc/passwd")
        with pytest.raises(UnsafeArchive):
            unpack(tar(tmp_path / "a.tar", odd), "a.tar", root, limits())

    def test_refuses_a_link_and_then_a_file_through_it(self, root: Path, tmp_path: Path) -> None:
        made = tar(tmp_path / "a.tar", entry("d", b"", type=tarfile.SYMTYPE, linkname=".."), entry("d/evil"))
        with pytest.raises(UnsafeArchive):
            unpack(made, "a.tar", root, limits())
        assert outside(root) == []

    @pytest.mark.parametrize("names", [("a", "a"), ("a", "./a"), ("a", "a/b"), ("a/b", "a")])
    def test_refuses_paths_that_come_twice(self, root: Path, tmp_path: Path, names: tuple[str, str]) -> None:
        with pytest.raises(UnsafeArchive):
            unpack(tar(tmp_path / "a.tar", *map(entry, names)), "a.tar", root, limits())

    def test_refuses_names_that_are_not_utf8(self, root: Path, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
            archive.addfile(entry("ü")[0], io.BytesIO(b"x"))
        with pytest.raises(UnsafeArchive):
            unpack(tmp_path / "a.tar", "a.tar", root, limits())

    def test_refuses_too_many_entries_folders_too(self, root: Path, tmp_path: Path) -> None:
        made = tar(tmp_path / "a.tar", *(entry(f"d{n}", b"", type=tarfile.DIRTYPE) for n in range(11)))
        with pytest.raises(UnsafeArchive, match="more than 10 entries"):
            unpack(made, "a.tar", root, limits(max_files=10))

    def test_refuses_too_many_bytes_while_they_come(self, root: Path, tmp_path: Path) -> None:
        made = tar(tmp_path / "a.tar", entry("a", bytes(3 << 20)), mode="w:gz")
        with pytest.raises(UnsafeArchive, match="more than 1048576 bytes"):
            unpack(made, "a.tar.gz", root, limits(max_bytes=1 << 20))
        assert (root / "a").stat().st_size <= 1 << 20

    def test_refuses_a_bomb_by_its_ratio(self, root: Path, tmp_path: Path) -> None:
        made = tar(tmp_path / "a.tar", entry("a", bytes(80 << 20)), mode="w:gz")
        with pytest.raises(UnsafeArchive, match="more than 200 times"):
            unpack(made, "a.tar.gz", root, limits(max_ratio=200))

    def test_refuses_a_header_that_would_fill_the_memory(self, root: Path, tmp_path: Path) -> None:
        member = entry("a")[0]
        member.pax_headers = {"comment": "x" * (2 << 20)}
        with pytest.raises(UnsafeArchive, match="header"):
            unpack(tar(tmp_path / "a.tar", (member, b"x"), mode="w:gz"), "a.tgz", root, limits())

    @pytest.mark.parametrize(
        ("spoil", "name"),
        [
            (lambda _: b"", "a.tar"),
            (lambda _: b"no archive at all" * 100, "a.tar"),
            (lambda whole: whole[:700], "a.tar"),
            (lambda _: b"no gzip", "a.tgz"),
            (lambda whole: gzip.compress(whole)[:-30], "a.tgz"),
            (lambda _: b"no zip", "a.zip"),
        ],
    )
    def test_says_that_a_broken_archive_is_broken(
        self, root: Path, tmp_path: Path, spoil: Callable[[bytes], bytes], name: str
    ) -> None:
        whole = tar(tmp_path / "whole", entry("a", os.urandom(2000))).read_bytes()
        (tmp_path / "broken").write_bytes(spoil(whole))
        with pytest.raises(UnsafeArchive) as caught:
            unpack(tmp_path / "broken", name, root, limits())
        assert caught.value.code == "corrupt_archive"


class TestZip:
    def make(self, path: Path, *entries: tuple[zipfile.ZipInfo | str, bytes]) -> Path:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in entries:
                archive.writestr(name, content)
        return path

    def test_unpacks_files_and_folders(self, root: Path, tmp_path: Path) -> None:
        made = self.make(tmp_path / "a.zip", ("images/", b""), ("images/0.png", b"png"), ("a.json", b"[]"))
        assert set(unpack(made, "A.ZIP", root, limits())) == {"images/0.png", "a.json"}

    @pytest.mark.parametrize("name", ["../evil", "/evil", "a\\..\\evil"])
    def test_refuses_paths_that_could_leave(self, root: Path, tmp_path: Path, name: str) -> None:
        with pytest.raises(UnsafeArchive):
            unpack(self.make(tmp_path / "a.zip", (name, b"x")), "a.zip", root, limits())
        assert outside(root) == []

    def test_refuses_links(self, root: Path, tmp_path: Path) -> None:
        link = zipfile.ZipInfo("link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        with pytest.raises(UnsafeArchive):
            unpack(self.make(tmp_path / "a.zip", (link, b"/etc/passwd")), "a.zip", root, limits())

    def test_refuses_a_bomb_by_its_ratio(self, root: Path, tmp_path: Path) -> None:
        made = self.make(tmp_path / "a.zip", ("a", bytes(80 << 20)))
        with pytest.raises(UnsafeArchive, match="more than 200 times"):
            unpack(made, "a.zip", root, limits(max_ratio=200))

    def test_refuses_wrong_content(self, root: Path, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("a", b"abcdefgh" * 8)
        spoiled = (tmp_path / "a.zip").read_bytes().replace(b"abcdefgh", b"abcdefgX", 1)
        (tmp_path / "a.zip").write_bytes(spoiled)
        with pytest.raises(UnsafeArchive):
            unpack(tmp_path / "a.zip", "a.zip", root, limits())


class TestPlainFile:
    def test_becomes_the_only_file(self, root: Path, tmp_path: Path) -> None:
        (tmp_path / "upload").write_bytes(b"[]")
        assert set(unpack(tmp_path / "upload", "rows.json", root, limits())) == {"rows.json"}
        assert (root / "rows.json").read_bytes() == b"[]"


class TestSafePath:
    @pytest.mark.parametrize(("name", "path"), [("a//b", "a/b"), ("./a", "a"), ("a/.", "a"), ("a/..b", "a/..b")])
    def test_normalises(self, name: str, path: str) -> None:
        assert safe_path(name) == path
