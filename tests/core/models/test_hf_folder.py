"""Inspection of Hugging Face folders without torch: what is found, and each way to be broken."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from core.errors import AppError, InvalidModel, UnknownWeights
from core.models.hf_folder import inspect_hf_folder, read_header
from tests.tiny import TinyShape, random_weights, tiny_model, write_safetensors, write_shards

VOCAB = 512


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "hf", num_shards=2)


def weights(**changes: np.ndarray | None) -> dict[str, np.ndarray]:
    """Weights of the default tiny model with some replaced, added or (None) removed."""
    tensors = dict(random_weights(TinyShape(), vocab_size=VOCAB))
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    return tensors


@pytest.fixture
def rewritten(tmp_path: Path) -> Callable[[dict[str, np.ndarray]], Path]:
    """A folder with these weights in one file, without an index."""

    def write(tensors: dict[str, np.ndarray]) -> Path:
        folder = tiny_model(tmp_path / "hf", vocab_size=VOCAB)
        write_shards(folder, tensors, dtype="float32")
        return folder

    return write


class TestSound:
    @pytest.mark.parametrize("names", ["old", "new"])
    @pytest.mark.parametrize("num_shards", [1, 3])
    def test_names_sizes_and_types(self, tmp_path: Path, names: str, num_shards: int) -> None:
        path = tiny_model(tmp_path, names=names, num_shards=num_shards, dtype="bfloat16")
        found = inspect_hf_folder(path)
        prefix = "model.visual." if names == "new" else "visual."
        assert found.family == "qwen2_5_vl"
        assert found.tensors["visual.merger.ln_q.weight"].key == f"{prefix}merger.ln_q.weight"
        assert found.dtypes == {"bfloat16"}
        assert found.metadata["num_tensors"] == 57
        assert found.total_bytes == 2 * sum(array.size for _, array in random_weights(TinyShape(), vocab_size=496))
        assert len(set(found.weight_map.values())) == num_shards

    def test_shards_without_an_index(self, folder: Path) -> None:
        (folder / "model.safetensors.index.json").unlink()
        assert len(inspect_hf_folder(folder).tensors) == 57

    def test_tied_weights_have_no_head(self, tmp_path: Path) -> None:
        assert "lm_head.weight" not in inspect_hf_folder(tiny_model(tmp_path, shape=TinyShape(tied=True))).tensors

    def test_a_stored_head_of_a_tied_model_is_set_apart(self, rewritten: Callable[..., Path]) -> None:
        folder = rewritten(weights())
        config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
        (folder / "config.json").write_text(json.dumps(config))
        found = inspect_hf_folder(folder)
        assert list(found.tied_copies) == ["lm_head.weight"]
        assert "lm_head.weight" not in found.tensors

    def test_what_safetensors_writes_is_read_alike(self, tmp_path: Path) -> None:
        save_file = pytest.importorskip("safetensors.numpy").save_file
        save_file({"a": np.zeros((2, 3), np.float16), "b": np.ones(5, np.float32)}, tmp_path / "x.safetensors")
        entries = {entry.key: (entry.dtype, entry.shape) for entry in read_header(tmp_path / "x.safetensors")}
        assert entries == {"a": ("F16", (2, 3)), "b": ("F32", (5,))}


class TestBroken:
    def test_not_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidModel, match="is not a folder"):
            inspect_hf_folder(tmp_path / "none")

    def test_no_config(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidModel, match=r"has no config\.json"):
            inspect_hf_folder(tmp_path)

    def test_config_that_is_not_json(self, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        with pytest.raises(InvalidModel, match=r"config\.json is not JSON"):
            inspect_hf_folder(folder)

    def test_quantised(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"bits": 4}}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(InvalidModel, match="quantization_config"):
            inspect_hf_folder(folder)

    def test_no_weights(self, folder: Path) -> None:
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"")
        with pytest.raises(InvalidModel, match="has no safetensors files"):
            inspect_hf_folder(folder)

    @pytest.mark.parametrize("with_index", [True, False])
    def test_a_missing_shard_is_named(self, folder: Path, with_index: bool) -> None:
        (folder / "model-00002-of-00002.safetensors").unlink()
        if not with_index:
            (folder / "model.safetensors.index.json").unlink()
        with pytest.raises(InvalidModel, match=r"lacks model-00002-of-00002\.safetensors"):
            inspect_hf_folder(folder)

    @pytest.mark.parametrize("keep", [4, 100, -1])
    def test_a_truncated_file_is_named(self, folder: Path, keep: int) -> None:
        file = folder / "model-00002-of-00002.safetensors"
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(InvalidModel, match=r"model-00002-of-00002\.safetensors is truncated"):
            inspect_hf_folder(folder)

    def test_an_index_that_names_a_path(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
        with pytest.raises(InvalidModel, match="not a plain file name"):
            inspect_hf_folder(folder)

    def test_an_index_that_is_wrong(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        value = json.loads(index.read_text())
        value["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
        index.write_text(json.dumps(value))
        with pytest.raises(InvalidModel, match=r"places model\.norm\.weight in model-00001-of-00002\.safetensors, but"):
            inspect_hf_folder(folder)

    def test_a_key_in_two_files(self, folder: Path) -> None:
        (folder / "model.safetensors.index.json").unlink()
        write_safetensors(folder / "more.safetensors", {"model.norm.weight": np.ones(64, np.float32)})
        with pytest.raises(InvalidModel, match=r"model\.norm\.weight is in both"):
            inspect_hf_folder(folder)

    def test_a_key_twice_in_one_header(self, tmp_path: Path) -> None:
        entry = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
        text = f"{{{entry},{entry}}}".encode()
        (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"0000")
        with pytest.raises(InvalidModel, match=r"x\.safetensors has a twice"):
            read_header(tmp_path / "x.safetensors")

    def test_both_names_of_one_weight(self, rewritten: Callable[..., Path]) -> None:
        extra = {"model.language_model.norm.weight": np.ones(64, np.float32)}
        with pytest.raises(InvalidModel, match="old and the new name of one weight"):
            inspect_hf_folder(rewritten(weights(**extra)))

    def test_missing_and_unknown_weights_are_listed(self, rewritten: Callable[..., Path]) -> None:
        folder = rewritten(weights(**{"model.norm.weight": None, "model.layers.7.x": np.ones(1, np.float32)}))
        with pytest.raises(UnknownWeights) as caught:
            inspect_hf_folder(folder)
        assert "1 weights are missing: model.norm.weight" in caught.value.message
        assert "1 weights match no rule: model.layers.7.x" in caught.value.message

    def test_a_wrong_shape_is_named_with_both_shapes(self, rewritten: Callable[..., Path]) -> None:
        folder = rewritten(weights(**{"model.norm.weight": np.ones(63, np.float32)}))
        with pytest.raises(
            InvalidModel, match=r"model\.norm\.weight has shape \[63\], but config\.json makes it \[64\]"
        ):
            inspect_hf_folder(folder)

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ({"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}, "has type I8"),
            ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "needs 8 bytes, but has 4"),
            ({"dtype": "F32", "shape": [1]}, "malformed"),
            ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "malformed"),
            ({"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}, "malformed"),
        ],
    )
    def test_a_malformed_header_entry(self, tmp_path: Path, entry: dict[str, object], message: str) -> None:
        text = json.dumps({"a": entry}).encode()
        (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"0000")
        with pytest.raises(AppError, match=message):
            read_header(tmp_path / "x.safetensors")
