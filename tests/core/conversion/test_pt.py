"""`.pt` files: torch reads what we write, we read what torch writes, and nothing in a file is ever run."""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from core.conversion.pt import PtTensor, from_torch, read_pt, write_pt
from core.errors import CorruptCheckpoint


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 3, 5, generator=generator)
    return {"a": values, "b": values[0].bfloat16(), "c": values[0, 0].half(), "one": torch.ones(1, 1, 1)}


class TestWriting:
    @pytest.mark.parametrize("mmap", [True, False])
    def test_torch_loads_it_with_weights_only(
        self, tmp_path: Path, tensors: dict[str, torch.Tensor], mmap: bool
    ) -> None:
        tree = {"version": 3.0, "model": {name: from_torch(tensor) for name, tensor in tensors.items()}}
        write_pt(tmp_path / "x.pt", tree)
        loaded = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mmap)
        assert loaded["version"] == 3.0
        for name, tensor in tensors.items():
            assert loaded["model"][name].dtype == tensor.dtype
            assert loaded["model"][name].stride() == tensor.stride()
            assert torch.equal(loaded["model"][name], tensor)

    def test_checksums_alignment_and_digest(self, tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
        file = tmp_path / "x.pt"
        digest = write_pt(file, {"model": {name: from_torch(tensor) for name, tensor in tensors.items()}})
        assert hashlib.sha256(file.read_bytes()).hexdigest() == digest
        with zipfile.ZipFile(file) as archive:
            assert archive.testzip() is None
        assert all(tensor.data.ctypes.data % 64 == 0 for tensor in read_pt(file)["model"].values())

    def test_a_transposed_tensor_is_written_in_its_own_order(self, tmp_path: Path) -> None:
        tensor = torch.arange(6.0).view(2, 3).T
        write_pt(tmp_path / "x.pt", {"t": from_torch(tensor)})
        assert torch.equal(torch.load(tmp_path / "x.pt", weights_only=True)["t"], tensor)

    def test_other_types_are_refused(self) -> None:
        with pytest.raises(TypeError, match="not int64"):
            from_torch(torch.zeros(2, dtype=torch.int64))

    def test_a_failed_write_leaves_no_file(self, tmp_path: Path) -> None:
        class Failing(Exception):
            pass

        def chunks() -> list[np.ndarray]:
            raise Failing

        tensor = from_torch(torch.zeros(2))
        object.__setattr__(tensor, "chunks", chunks)
        with pytest.raises(Failing):
            write_pt(tmp_path / "x.pt", {"t": tensor})
        assert not (tmp_path / "x.pt").exists()


class TestReading:
    def test_what_torch_saves(self, tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
        torch.save({"model": tensors, "p": torch.nn.Parameter(tensors["a"])}, tmp_path / "x.pt")
        tree = read_pt(tmp_path / "x.pt")
        for name, tensor in tensors.items():
            read = tree["model"][name]
            assert (read.dtype, read.shape) == (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            assert read.data.tobytes() == tensor.view(-1).view(torch.uint8).numpy().tobytes()
        assert isinstance(tree["p"], PtTensor)

    def test_a_file_without_checksums(self, tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
        if not hasattr(torch.serialization, "set_crc32_options"):
            pytest.skip("this torch always writes them")
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(tensors, tmp_path / "x.pt")
        finally:
            torch.serialization.set_crc32_options(True)
        tree = read_pt(tmp_path / "x.pt")
        tree["a"].record.check()
        assert tree["a"].data.tobytes() == tensors["a"].numpy().tobytes()

    def test_views_of_one_storage(self, tmp_path: Path) -> None:
        base = torch.arange(10.0)
        torch.save({"first": base[:4], "last": base[4:]}, tmp_path / "x.pt")
        tree = read_pt(tmp_path / "x.pt")
        assert np.frombuffer(tree["last"].data.tobytes(), np.float32).tolist() == [4, 5, 6, 7, 8, 9]

    def test_a_trainers_belongings(self, tmp_path: Path) -> None:
        args = argparse.Namespace(lr=1e-5, dtype=torch.bfloat16)
        torch.save({"args": args, "rng": np.random.get_state(), "iteration": 7}, tmp_path / "x.pt")
        tree = read_pt(tmp_path / "x.pt")
        assert tree["args"] == argparse.Namespace(lr=1e-5, dtype="torch.bfloat16")
        assert tree["iteration"] == 7

    def test_a_view_that_is_not_contiguous(self, tmp_path: Path) -> None:
        torch.save({"t": torch.arange(6.0).view(2, 3).T}, tmp_path / "x.pt")
        with pytest.raises(CorruptCheckpoint, match="only contiguous ones are read"):
            read_pt(tmp_path / "x.pt")


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


class TestHostile:
    def test_a_call_is_refused_by_name_and_not_made(self, tmp_path: Path) -> None:
        torch.save({"model": _Evil(tmp_path / "owned")}, tmp_path / "x.pt")
        with pytest.raises(CorruptCheckpoint, match=r"posix\.mkdir, which is refused") as caught:
            read_pt(tmp_path / "x.pt")
        assert caught.value.code == "unsafe_checkpoint"
        assert not (tmp_path / "owned").exists()

    @pytest.mark.parametrize("name", ["eval", "exec", "getattr", "__import__"])
    def test_builtins_are_refused(self, tmp_path: Path, name: str) -> None:
        self.write(tmp_path / "x.pt", f"cbuiltins\n{name}\n.".encode())
        with pytest.raises(CorruptCheckpoint, match=rf"builtins\.{name}"):
            read_pt(tmp_path / "x.pt")

    def test_attributes_of_allowed_modules_are_no_way_around(self, tmp_path: Path) -> None:
        # protocol 4 resolves dotted names; "OrderedDict.__init__.__globals__" would reach everything
        pickled = b"\x80\x04\x8c\x0bcollections\x8c\x1fOrderedDict.__init__.__globals__\x93."
        self.write(tmp_path / "x.pt", pickled)
        with pytest.raises(CorruptCheckpoint, match=r"refused|damaged"):
            read_pt(tmp_path / "x.pt")

    def test_placeholders_do_nothing(self, tmp_path: Path) -> None:
        self.write(tmp_path / "x.pt", b"cnumpy\nload\n(S'/etc/hostname'\ntR.")
        assert type(read_pt(tmp_path / "x.pt")).__name__ == "_Inert"

    @pytest.mark.parametrize("pickled", [b"", b"garbage", pickle.dumps({"a": 1})[:-2]])
    def test_a_damaged_pickle(self, tmp_path: Path, pickled: bytes) -> None:
        self.write(tmp_path / "x.pt", pickled)
        with pytest.raises(CorruptCheckpoint, match="damaged"):
            read_pt(tmp_path / "x.pt")

    def test_a_tensor_beyond_its_storage(self, tmp_path: Path) -> None:
        torch.save({"t": torch.arange(4.0)}, tmp_path / "x.pt")
        with zipfile.ZipFile(tmp_path / "x.pt") as source, zipfile.ZipFile(tmp_path / "y.pt", "w") as target:
            for info in source.infolist():
                data = source.read(info)
                target.writestr(info.filename, data[:8] if info.filename.endswith("/data/0") else data)
        with pytest.raises(CorruptCheckpoint, match="beyond its storage of 8 bytes"):
            read_pt(tmp_path / "y.pt")

    @pytest.mark.parametrize("keep", [0, 10, 200, -30])
    def test_a_truncated_file(self, tmp_path: Path, keep: int) -> None:
        torch.save({"t": torch.arange(64.0)}, tmp_path / "x.pt")
        (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:keep])
        with pytest.raises(CorruptCheckpoint, match=r"x\.pt"):
            read_pt(tmp_path / "x.pt")

    @staticmethod
    def write(file: Path, pickled: bytes) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", pickled)
