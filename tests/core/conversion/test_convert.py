"""The three conversions: the format to the byte, exact round trips, what transformers makes of it, and every refusal."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.conversion.apply import cast
from core.conversion.convert import hf_to_mm, mm_to_hf, reshard
from core.conversion.hf import HFWeights
from core.conversion.mm import MMWeights
from core.conversion.output import AS_IS, Options
from core.conversion.pt import from_torch, write_pt
from core.conversion.verify import differing
from core.conversion.writing import Quiet
from core.errors import AppError, Conflict, CorruptCheckpoint, DiskFull, IncompatiblePlan, InvalidModel, UnknownWeights
from core.models.hf_folder import HFFolder, inspect_hf_folder
from core.models.layout import hf_shapes
from core.models.mm_folder import inspect_mm_folder, rank_dir
from core.models.plan import legal_tp
from core.specs.parallel import ParallelSpec
from tests.core.conversion import naive
from tests.core.conversion.conftest import ONE, SHAPE, TWO_BY_TWO, VIRTUAL, folder_bytes, hf_weights, load, split
from tests.tiny import ARCHITECTURES, TinyShape, tiny_model, write_safetensors

TIED = TinyShape(vision_layers=3, text_layers=4, tied=True)
OLDER = TinyShape(vision_layers=3, text_layers=4, vision_ffn=128, family="qwen2_vl")
WIDE = TinyShape(vision_layers=3, text_layers=4, vision_heads=8, vision_ffn=64, heads=8, kv_heads=8, ffn=128)


def export(
    mm_dir: Path, source: HFFolder, parallel: ParallelSpec, target: Path, options: Options = AS_IS, **more: int
) -> HFFolder:
    folder = inspect_mm_folder(mm_dir, parallel)
    assert folder.hf_dir is not None
    mm_to_hf(folder, source.config, parallel, target, options, hf_files=folder.hf_dir, **more)
    return inspect_hf_folder(target)


def edit_rank(mm_dir: Path, rank: str, **changes: torch.Tensor | None) -> None:
    """Write one rank file anew with tensors of `model` replaced, added or (None) removed."""
    file = mm_dir / "release" / rank / "model_optim_rng.pt"
    model = load(file)["model"] | changes
    file.unlink()
    write_pt(file, {"model": {name: from_torch(tensor) for name, tensor in model.items() if tensor is not None}})


class TestFormat:
    """The files are those of an independent implementation of the format, in every key, shape, type and byte."""

    @pytest.mark.parametrize("shape", [SHAPE, TIED, WIDE, OLDER], ids=["untied", "tied", "wide", "qwen2_vl"])
    @pytest.mark.parametrize(
        "parallel",
        [ONE, split([[4]], [[3]], 2), TWO_BY_TWO, VIRTUAL, split([[0, 0, 2, 2]], [[2, 1, 0, 0]], 2)],
        ids=["tp1", "tp2", "tp2pp2", "tp2pp2vpp2", "tp2pp4"],
    )
    def test_rank_files(self, tmp_path: Path, shape: TinyShape, parallel: ParallelSpec) -> None:
        source = inspect_hf_folder(tiny_model(tmp_path / "hf", shape=shape))
        hf_to_mm(source, tmp_path / "mm", parallel)
        self.assert_equal(tmp_path / "mm", source, shape, parallel)

    def test_eight_ranks(self, tmp_path: Path) -> None:
        source = inspect_hf_folder(tiny_model(tmp_path / "hf", shape=WIDE))
        parallel = split([[4]], [[3]], 8)
        hf_to_mm(source, tmp_path / "mm", parallel)
        self.assert_equal(tmp_path / "mm", source, WIDE, parallel)

    def test_there_is_no_canonical_qwen2_vl(self, tmp_path: Path) -> None:
        source = inspect_hf_folder(tiny_model(tmp_path / "hf", shape=OLDER))
        with pytest.raises(IncompatiblePlan, match="no canonical checkpoints of qwen2_vl"):
            hf_to_mm(source, tmp_path / "mm", ONE, canonical=True)

    def test_canonical(self, tmp_path: Path, source: HFFolder) -> None:
        parallel = split([[1, 3]], [[3, 0]])
        hf_to_mm(source, tmp_path / "mm", parallel, canonical=True)
        self.assert_equal(tmp_path / "mm", source, SHAPE, parallel, canonical=True)

    @pytest.mark.parametrize(
        ("shape", "canonical", "count"),
        [
            (TinyShape(vision_layers=4, text_layers=4), False, 77),
            (TinyShape(vision_layers=4, text_layers=4, tied=True), False, 76),
            (TinyShape(vision_layers=4, text_layers=4), True, 105),
        ],
    )
    def test_tensor_counts_are_upstreams(self, tmp_path: Path, shape: TinyShape, canonical: bool, count: int) -> None:
        source = inspect_hf_folder(tiny_model(tmp_path / "hf", shape=shape))
        assert hf_to_mm(source, tmp_path / "mm", split([[4]], [[4]]), canonical=canonical).num_tensors == count

    def test_tracker_version_and_modes(self, tmp_path: Path, source: HFFolder) -> None:
        hf_to_mm(source, tmp_path / "mm", TWO_BY_TWO)
        assert (tmp_path / "mm/latest_checkpointed_iteration.txt").read_bytes() == b"release"
        assert load(tmp_path / "mm/release/mp_rank_01_001/model_optim_rng.pt")["checkpoint_version"] == 3.0
        for path in (tmp_path / "mm").rglob("*"):
            assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path

    def test_model_files_travel_along(self, tmp_path: Path, source: HFFolder) -> None:
        hf_to_mm(source, tmp_path / "mm", ONE)
        wanted = {name: data for name, data in folder_bytes(source.path).items() if not name.endswith(".safetensors")}
        assert folder_bytes(tmp_path / "mm/hf") == wanted

    @staticmethod
    def assert_equal(
        mm_dir: Path, source: HFFolder, shape: TinyShape, parallel: ParallelSpec, canonical: bool = False
    ) -> None:
        llm, vit = ([list(chunk) for chunk in lists] for lists in (parallel.llm_pp_layers, parallel.vit_pp_layers))
        wanted = naive.rank_files(
            hf_weights(source, shape), shape, tp=parallel.tp_size, llm=llm, vit=vit, canonical=canonical
        )
        folders = {file.parent.name for file in mm_dir.glob("release/*/*")}
        assert folders == {Path(rank_dir("release", tp, pp, parallel.pp_size)).name for tp, pp in wanted}
        for (tp_rank, pp_rank), models in wanted.items():
            tree = load(mm_dir / rank_dir("release", tp_rank, pp_rank, parallel.pp_size) / "model_optim_rng.pt")
            assert set(tree) == {"checkpoint_version", *models}
            for key, model in models.items():
                assert set(tree[key]) == set(model)
                for name, array in model.items():
                    assert tree[key][name].dtype == torch.float32
                    assert np.array_equal(tree[key][name].numpy(), array), (tp_rank, pp_rank, key, name)


class TestRoundTrip:
    @pytest.mark.parametrize("names", ["old", "new"])
    @pytest.mark.parametrize("num_shards", [1, 3])
    @pytest.mark.parametrize("nested", [True, False])
    @pytest.mark.parametrize("shape", [SHAPE, OLDER], ids=["qwen2_5_vl", "qwen2_vl"])
    def test_a_folder_comes_back_as_it_was(
        self, tmp_path: Path, names: str, num_shards: int, nested: bool, shape: TinyShape
    ) -> None:
        path = tiny_model(
            tmp_path / "hf", shape=shape, names=names, num_shards=num_shards, nested_config=nested, dtype="bfloat16"
        )
        source = inspect_hf_folder(path)
        hf_to_mm(source, tmp_path / "mm", VIRTUAL)
        export(tmp_path / "mm", source, VIRTUAL, tmp_path / "back")
        before, after = folder_bytes(path), folder_bytes(tmp_path / "back")
        index = "model.safetensors.index.json"
        assert json.loads(before.pop(index, b"0")) == json.loads(after.pop(index, b"0"))
        assert before == after

    def test_a_single_file_with_an_index_keeps_its_file(self, tmp_path: Path) -> None:
        source = inspect_hf_folder(tiny_model(tmp_path / "hf", shape=SHAPE, index=True))
        hf_to_mm(source, tmp_path / "mm", ONE)
        back = export(tmp_path / "mm", source, ONE, tmp_path / "back")
        assert (back.path / "model.safetensors").read_bytes() == (source.path / "model.safetensors").read_bytes()

    def test_a_stored_tied_head_comes_back(self, tmp_path: Path) -> None:
        path = tiny_model(tmp_path / "hf", shape=TIED)
        weights = dict(hf_weights(inspect_hf_folder(path), TIED))
        write_safetensors(
            path / "model.safetensors", weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}
        )
        source = inspect_hf_folder(path)
        parallel = split([[2, 2]], [[3, 0]], 2)
        hf_to_mm(source, tmp_path / "mm", parallel)
        export(tmp_path / "mm", source, parallel, tmp_path / "back")
        assert folder_bytes(tmp_path / "back") == folder_bytes(path)

    def test_canonical_comes_back_and_becomes_fused(self, tmp_path: Path, source: HFFolder) -> None:
        hf_to_mm(source, tmp_path / "canonical", ONE, canonical=True)
        hf_to_mm(source, tmp_path / "fused", TWO_BY_TWO)
        back = export(tmp_path / "canonical", source, ONE, tmp_path / "back")
        assert not differing(hf_shapes(source.config), HFWeights(source), HFWeights(back))
        folder = inspect_mm_folder(tmp_path / "canonical")
        reshard(folder, source.config, ONE, tmp_path / "again", TWO_BY_TWO)
        assert folder_bytes(tmp_path / "again") == folder_bytes(tmp_path / "fused")

    @settings(max_examples=20, deadline=None)
    @given(data=st.data())
    def test_hf_mm_reshard_hf_is_exact(self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
        kv_heads = data.draw(st.sampled_from([1, 2, 4, 8]), "kv heads")
        family = data.draw(st.sampled_from(["qwen2_5_vl", "qwen2_vl"]), "family")
        vision_ffns = {"qwen2_5_vl": [24, 40, 48], "qwen2_vl": [32, 64]}  # Qwen2-VL's is a multiple of the width
        shape = TinyShape(
            vision_layers=data.draw(st.integers(1, 4), "vision layers"),
            vision_hidden=32,
            vision_heads=data.draw(st.sampled_from([1, 2, 4, 8]), "vision heads"),
            vision_ffn=data.draw(st.sampled_from(vision_ffns[family]), "vision ffn"),
            text_layers=data.draw(st.integers(1, 5), "text layers"),
            hidden=128,
            heads=kv_heads
            * data.draw(st.sampled_from([g for g in (1, 2, 4) if g * kv_heads <= 16]), "heads per group"),
            kv_heads=kv_heads,
            ffn=data.draw(st.sampled_from([48, 80, 112]), "ffn"),
            tied=data.draw(st.booleans(), "tied"),
            family=family,
        )
        root = tmp_path_factory.mktemp("round")
        dtype = data.draw(st.sampled_from(["float32", "bfloat16"]), "dtype")
        source = inspect_hf_folder(
            tiny_model(root / "hf", shape=shape, dtype=dtype, seed=data.draw(st.integers(0, 99)))
        )
        first, second = (data.draw(splits(source), f"split {number}") for number in (1, 2))
        hf_to_mm(source, root / "first", first)
        reshard(inspect_mm_folder(root / "first", first), source.config, first, root / "second", second)
        hf_to_mm(source, root / "direct", second)
        assert folder_bytes(root / "second") == folder_bytes(root / "direct")
        export(root / "second", source, second, root / "back")
        assert folder_bytes(root / "back") == folder_bytes(root / "hf")
        shutil.rmtree(root)


@st.composite
def splits(draw: st.DrawFn, source: HFFolder) -> ParallelSpec:
    """Any legal layout of the model: stages with vision layers first, each with a layer, in one to three chunks."""
    config = source.config
    tp = draw(st.sampled_from(legal_tp(config)))
    num_vit, num_llm = config.num_vit_layers, config.num_llm_layers
    num_stages = draw(st.integers(1, min(6, num_vit + num_llm)))
    chunks = draw(st.sampled_from([n for n in (1, 2, 3) if n == 1 or (num_stages % n == 0 and num_stages // n > 1)]))
    order = ["vit"] * num_vit + ["llm"] * num_llm
    cuts = sorted(draw(st.permutations(range(1, len(order))))[: num_stages - 1])
    stages = [order[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(order)], strict=True)]
    per_chunk = num_stages // chunks

    def table(tower: str) -> list[list[int]]:
        counts = [stage.count(tower) for stage in stages]
        return [counts[index : index + per_chunk] for index in range(0, num_stages, per_chunk)]

    return split(table("llm"), table("vit"), tp)


class TestOptions:
    def test_a_cast_rounds_as_torch_does_and_config_says_so(self, tmp_path: Path, source: HFFolder) -> None:
        hf_to_mm(source, tmp_path / "mm", TWO_BY_TWO, Options(dtype="bfloat16"))
        back = export(tmp_path / "mm", source, TWO_BY_TWO, tmp_path / "back")
        assert back.dtypes == {"bfloat16"}
        assert back.config.dtype == "bfloat16"
        rounded = torch.load(tmp_path / "mm/release/mp_rank_00_000/model_optim_rng.pt", weights_only=True)["model"]
        name = "image_encoder.encoder.patch_embed.proj.weight"
        original = torch.from_numpy(hf_weights(source)["visual.patch_embed.proj.weight"])
        assert torch.equal(rounded[name], original.bfloat16())
        assert not differing(hf_shapes(source.config), HFWeights(source), HFWeights(back))

    def test_a_cast_on_export(self, tmp_path: Path, source: HFFolder) -> None:
        hf_to_mm(source, tmp_path / "mm", ONE)
        back = export(tmp_path / "mm", source, ONE, tmp_path / "back", Options(dtype="float16"))
        assert (back.dtypes, back.config.dtype) == ({"float16"}, "float16")

    def test_shards_of_a_size(self, tmp_path: Path, source: HFFolder) -> None:
        hf_to_mm(source, tmp_path / "mm", TWO_BY_TWO)
        back = export(tmp_path / "mm", source, TWO_BY_TWO, tmp_path / "back", max_shard_bytes=200_000)
        files = list(back.path.glob("*.safetensors"))
        assert len(files) > 3
        assert all(file.stat().st_size < 220_000 for file in files)
        assert not differing(hf_shapes(source.config), HFWeights(source), HFWeights(back))

    def test_progress_adds_up(self, tmp_path: Path, source: HFFolder) -> None:
        class Counting(Quiet):
            total = done = files = 0

            def begin(self, total_bytes: int, *, to_write: int) -> None:
                self.total = total_bytes

            def advance(self, num_bytes: int) -> None:
                self.done += num_bytes

            def wrote(self, file: str, size_bytes: int) -> None:
                self.files += 1

        watch = Counting()
        written = hf_to_mm(source, tmp_path / "mm", TWO_BY_TWO, Options(watch=watch))
        assert watch.total == watch.done == written.total_bytes > source.total_bytes
        assert watch.files == len(written.digests) == 4

    def test_digests_are_those_of_the_files(self, tmp_path: Path, source: HFFolder) -> None:
        import hashlib

        for file, digest in hf_to_mm(source, tmp_path / "mm", TWO_BY_TWO).digests.items():
            assert hashlib.sha256((tmp_path / "mm" / file).read_bytes()).hexdigest() == digest


class Listening(Quiet):
    def __init__(self) -> None:
        self.heard: dict[str, str] = {}

    def warn(self, code: str, message: str) -> None:
        self.heard[code] = message


class TestValues:
    """NaN and infinities are carried over, and told."""

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_what_is_not_finite_is_named(self, tmp_path: Path, dtype: str, value: float) -> None:
        path = tiny_model(tmp_path / "hf", shape=SHAPE, dtype=dtype)
        weights = dict(hf_weights(inspect_hf_folder(path)))
        for name in ("model.layers.2.self_attn.k_proj.weight", "visual.blocks.1.attn.proj.weight"):
            weights[name] = weights[name].copy()
            weights[name][-1, -1] = value
        write_safetensors(path / "model.safetensors", weights, dtype=dtype)
        source = inspect_hf_folder(path)
        wanted = "NaN or infinite values in model.layers.2.self_attn.k_proj.weight, visual.blocks.1.attn.proj.weight"
        watch = Listening()
        hf_to_mm(source, tmp_path / "mm", TWO_BY_TWO, Options(watch=watch))
        assert watch.heard == {"non_finite_weights": wanted}
        back = Listening()
        export(tmp_path / "mm", source, TWO_BY_TWO, tmp_path / "back", Options(watch=back))
        assert back.heard == watch.heard
        assert folder_bytes(tmp_path / "back") == folder_bytes(path)

    def test_what_a_narrower_type_cannot_hold_is_named(self, tmp_path: Path) -> None:
        path = tiny_model(tmp_path / "hf", shape=SHAPE)
        weights = dict(hf_weights(inspect_hf_folder(path)))
        weights["model.norm.weight"] = weights["model.norm.weight"] * 1e6
        write_safetensors(path / "model.safetensors", weights)
        watch = Listening()
        hf_to_mm(inspect_hf_folder(path), tmp_path / "mm", ONE, Options("float16", watch=watch))
        assert watch.heard == {"overflow": "values too large for the new type became infinite in model.norm.weight"}

    @pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
    def test_every_value_is_rounded_as_torch_rounds(self, stored: str, wanted: str) -> None:
        bits = np.arange(1 << 16, dtype="<u2")
        if stored == "float32":  # every upper half with lower halves around the middle
            lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1000, 0x0FFF], "<u4")
            values = ((bits.astype("<u4") << 16)[:, None] + lower).reshape(-1, 1).view(np.uint8)
        else:
            values = bits.reshape(-1, 1).view(np.uint8)
        types = {name: getattr(torch, name) for name in (stored, wanted)}
        expected = torch.from_numpy(values.copy()).view(types[stored]).to(types[wanted])
        result = torch.from_numpy(cast(values, stored, wanted).copy()).view(types[wanted])
        assert torch.equal(result.isnan(), expected.isnan())
        assert torch.equal(
            result.nan_to_num(0.0, torch.inf, -torch.inf), expected.nan_to_num(0.0, torch.inf, -torch.inf)
        )


class TestDiskFull:
    def test_a_full_disk_is_named_and_the_file_removed(self, tmp_path: Path, source: HFFolder) -> None:
        target = tmp_path / "small"
        target.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", target], capture_output=True).returncode:
            pytest.skip("file systems cannot be mounted here")
        try:
            with pytest.raises(DiskFull, match="No space left on device"):
                hf_to_mm(source, target / "mm", TWO_BY_TWO)
            sizes = [file.stat().st_size for file in target.rglob("*") if file.is_file()]
            assert sum(sizes) < 600_000
            assert len(sizes) < 4
        finally:
            subprocess.run(["umount", target], check=True)


class TestTransformers:
    @pytest.mark.parametrize("shape", [SHAPE, OLDER], ids=["qwen2_5_vl", "qwen2_vl"])
    def test_an_export_computes_the_same_logits(self, tmp_path: Path, shape: TinyShape) -> None:
        transformers = pytest.importorskip("transformers")
        path = tiny_model(tmp_path / "hf", shape=shape, names="new", nested_config=True)
        source = inspect_hf_folder(path)
        hf_to_mm(source, tmp_path / "first", VIRTUAL)
        folder = inspect_mm_folder(tmp_path / "first")
        reshard(folder, source.config, VIRTUAL, tmp_path / "second", TWO_BY_TWO)
        back = export(tmp_path / "second", source, TWO_BY_TWO, tmp_path / "back")
        generator = torch.Generator().manual_seed(0)
        image = source.config.image_token_id
        inputs = {
            "input_ids": torch.tensor([[5, 6, source.config.vision_start_token_id, *[image] * 4, 7, 8]]),
            "pixel_values": torch.randn(16, source.config.vision.patch_dim, generator=generator),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
        }
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == image).int()
        logits = []
        for folder_path in (path, back.path):
            architecture = getattr(transformers, ARCHITECTURES[shape.family])
            model, report = architecture.from_pretrained(folder_path, output_loading_info=True)
            assert not report["missing_keys"]
            assert not report["unexpected_keys"]
            with torch.no_grad():
                logits.append(model(**inputs).logits)
        assert torch.equal(*logits)
        tokenizer = transformers.AutoTokenizer.from_pretrained(back.path)
        assert tokenizer.decode(tokenizer.encode("What colour?<|im_end|>")) == "What colour?<|im_end|>"

    def test_what_transformers_saves_is_converted(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        path = tiny_model(tmp_path / "hf", shape=TIED)
        model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(path)
        model.save_pretrained(tmp_path / "saved")
        source = inspect_hf_folder(tmp_path / "saved")
        hf_to_mm(source, tmp_path / "mm", TWO_BY_TWO)
        back = export(tmp_path / "mm", source, TWO_BY_TWO, tmp_path / "back")
        assert not differing(hf_shapes(source.config), HFWeights(inspect_hf_folder(path)), HFWeights(back))


class TestRefusals:
    def test_an_impossible_split_writes_nothing(self, tmp_path: Path, source: HFFolder) -> None:
        with pytest.raises(IncompatiblePlan, match="use one of 1, 2"):
            hf_to_mm(source, tmp_path / "mm", split([[4]], [[3]], 4))
        assert not (tmp_path / "mm").exists()

    def test_canonical_with_tensor_parallel(self, tmp_path: Path, source: HFFolder) -> None:
        with pytest.raises(IncompatiblePlan, match="canonical"):
            hf_to_mm(source, tmp_path / "mm", TWO_BY_TWO, canonical=True)

    def test_a_target_with_files_in_it(self, tmp_path: Path, source: HFFolder) -> None:
        hf_to_mm(source, tmp_path / "mm", ONE)
        with pytest.raises(Conflict, match="is not empty"):
            hf_to_mm(source, tmp_path / "mm", ONE)

    def test_a_tied_head_that_differs(self, tmp_path: Path) -> None:
        path = tiny_model(tmp_path / "hf", shape=TIED)
        weights = dict(hf_weights(inspect_hf_folder(path), TIED))
        head = weights["model.embed_tokens.weight"] + 1
        write_safetensors(path / "model.safetensors", weights | {"lm_head.weight": head})
        with pytest.raises(InvalidModel, match=r"lm_head\.weight differs from the embedding"):
            hf_to_mm(inspect_hf_folder(path), tmp_path / "mm", ONE)

    def test_types_that_cannot_be_fused(self, tmp_path: Path) -> None:
        path = tiny_model(tmp_path / "hf", shape=SHAPE)
        weights = dict(hf_weights(inspect_hf_folder(path)))
        name = "model.layers.0.self_attn.k_proj.weight"
        write_safetensors(path / "model-a.safetensors", {name: weights.pop(name)}, dtype="bfloat16")
        write_safetensors(path / "model-b.safetensors", weights)
        (path / "model.safetensors").unlink()
        with pytest.raises(InvalidModel, match="of different types"):
            hf_to_mm(inspect_hf_folder(path), tmp_path / "mm", ONE)

    def test_a_link_out_of_the_folder(self, tmp_path: Path, source: HFFolder) -> None:
        secret = tmp_path / "secret.json"
        secret.write_text("{}")
        (source.path / "extra.json").symlink_to(secret)
        with pytest.raises(InvalidModel, match="leads out of its folder"):
            hf_to_mm(source, tmp_path / "mm", ONE)
        hf_to_mm(source, tmp_path / "allowed", ONE, Options(allow_roots=(tmp_path,)))
        assert (tmp_path / "allowed/hf/extra.json").read_text() == "{}"


class TestBrokenCheckpoints:
    """Each way in which a source checkpoint can be wrong has its own refusal."""

    @pytest.fixture
    def mm_dir(self, tmp_path: Path, source: HFFolder) -> Path:
        hf_to_mm(source, tmp_path / "mm", TWO_BY_TWO)
        return tmp_path / "mm"

    @pytest.mark.parametrize(
        ("parallel", "message"),
        [
            (
                split([[2, 2]], [[3, 0]], 2),
                r"mp_rank_00_000.*has 1 layers text_decoder\.decoder\.layers\.\*, .* makes it 2",
            ),
            (split([[0, 4]], [[2, 1]], 2), r"has 3 layers image_encoder.* makes it 2"),
            (
                split([[1, 1], [1, 1]], [[3, 0], [0, 0]], 2),
                r"holds model, but the layout given makes it model0, model1",
            ),
            (split([[1, 3]], [[3, 0]]), "tp 2 x pp 2, but the layout given is tp 1 x pp 2"),
        ],
    )
    def test_a_wrong_source_parallel(
        self, source: HFFolder, mm_dir: Path, tmp_path: Path, parallel: ParallelSpec, message: str
    ) -> None:
        with pytest.raises(IncompatiblePlan, match=message) as caught:
            export(mm_dir, source, parallel, tmp_path / "back")
        assert not (tmp_path / "back").exists()
        if parallel.tp_size == 2:
            assert caught.value.hint == "the rank files hold llm_pp_layers [[1, 3]], vit_pp_layers [[3, 0]]"

    def test_a_missing_tensor(self, source: HFFolder, mm_dir: Path, tmp_path: Path) -> None:
        edit_rank(mm_dir, "mp_rank_01_001", **{"text_decoder.output_layer.weight": None})
        with pytest.raises(UnknownWeights, match=r"mp_rank_01_001.* lacks text_decoder\.output_layer\.weight"):
            export(mm_dir, source, TWO_BY_TWO, tmp_path / "back")

    def test_an_unknown_tensor(self, source: HFFolder, mm_dir: Path, tmp_path: Path) -> None:
        edit_rank(mm_dir, "mp_rank_00_001", extra=torch.zeros(2))
        with pytest.raises(UnknownWeights, match="has extra, which no rule matches"):
            export(mm_dir, source, TWO_BY_TWO, tmp_path / "back")

    def test_a_wrong_shape(self, source: HFFolder, mm_dir: Path, tmp_path: Path) -> None:
        edit_rank(mm_dir, "mp_rank_00_001", **{"text_decoder.decoder.final_layernorm.weight": torch.zeros(2)})
        with pytest.raises(CorruptCheckpoint, match=r"final_layernorm\.weight has shape \[2\], .* make it \[64\]"):
            export(mm_dir, source, TWO_BY_TWO, tmp_path / "back")

    def test_replicas_that_differ_are_warned_of(self, source: HFFolder, mm_dir: Path, tmp_path: Path) -> None:
        watch = Listening()
        edit_rank(mm_dir, "mp_rank_01_001", **{"text_decoder.decoder.final_layernorm.weight": torch.zeros(64)})
        export(mm_dir, source, TWO_BY_TWO, tmp_path / "back", Options(watch=watch))
        where = "mp_rank_01_001/model_optim_rng.pt: text_decoder.decoder.final_layernorm.weight"
        assert where in watch.heard["replicas_differ"]

    def test_a_tied_copy_that_differs(self, tmp_path: Path) -> None:
        source = inspect_hf_folder(tiny_model(tmp_path / "hf", shape=TIED))
        hf_to_mm(source, tmp_path / "mm", TWO_BY_TWO)
        size = (source.config.text.vocab_size // 2, 64)
        edit_rank(tmp_path / "mm", "mp_rank_01_001", **{"text_decoder.output_layer.weight": torch.zeros(size)})
        with pytest.raises(CorruptCheckpoint, match="differs from the embedding"):
            export(tmp_path / "mm", source, TWO_BY_TWO, tmp_path / "back")

    def test_a_tied_copy_that_was_left_out_is_not_missed(self, tmp_path: Path) -> None:
        source = inspect_hf_folder(tiny_model(tmp_path / "hf", shape=TIED))
        hf_to_mm(source, tmp_path / "mm", TWO_BY_TWO)
        for rank in ("mp_rank_00_001", "mp_rank_01_001"):
            edit_rank(tmp_path / "mm", rank, **{"text_decoder.output_layer.weight": None})
        back = export(tmp_path / "mm", source, TWO_BY_TWO, tmp_path / "back")
        assert not differing(hf_shapes(source.config), HFWeights(source), HFWeights(back))

    @pytest.mark.parametrize("keep", [0.3, 0.9])
    def test_a_truncated_rank_file(self, source: HFFolder, mm_dir: Path, tmp_path: Path, keep: float) -> None:
        file = mm_dir / "release/mp_rank_01_000/model_optim_rng.pt"
        data = file.read_bytes()
        file.write_bytes(data[: int(len(data) * keep)])
        with pytest.raises(CorruptCheckpoint, match="mp_rank_01_000"):
            export(mm_dir, source, TWO_BY_TWO, tmp_path / "back")

    @pytest.mark.parametrize("name", ["layers.1.mlp.linear_fc1.weight", "layers.1.input_layernorm.weight"])
    @pytest.mark.parametrize("rank", ["mp_rank_00_001", "mp_rank_01_001"])
    def test_a_flipped_byte(self, source: HFFolder, mm_dir: Path, tmp_path: Path, name: str, rank: str) -> None:
        file = mm_dir / "release" / rank / "model_optim_rng.pt"
        data = bytearray(file.read_bytes())
        values = load(file)["model"][f"text_decoder.decoder.{name}"].numpy().tobytes()
        data[data.index(values) + 5] ^= 1
        file.write_bytes(data)
        with pytest.raises(CorruptCheckpoint, match=rf"{rank}.*: archive/data/\d+ is damaged: its CRC-32 is"):
            export(mm_dir, source, TWO_BY_TWO, tmp_path / "back")
        with pytest.raises(CorruptCheckpoint, match=rf"{rank}.*: archive/data/\d+ is damaged: its CRC-32 is"):
            reshard(inspect_mm_folder(mm_dir), source.config, TWO_BY_TWO, tmp_path / "other", ONE)

    def test_keys_of_another_model(self, source: HFFolder, mm_dir: Path, tmp_path: Path) -> None:
        other = tiny_model(tmp_path / "other", shape=TinyShape(vision_layers=3, text_layers=5))
        folder = inspect_mm_folder(mm_dir)
        with pytest.raises(AppError, match="are not those of the model"):
            mm_to_hf(folder, source.config, TWO_BY_TWO, tmp_path / "back", hf_files=other)


class TestTrained:
    """A checkpoint as Megatron's trainer leaves it: an iteration, arguments, and extra state beside the weights."""

    def test_it_is_read(self, tmp_path: Path, source: HFFolder) -> None:
        from argparse import Namespace

        hf_to_mm(source, tmp_path / "converted", TWO_BY_TWO)
        for rank in (tmp_path / "converted/release").iterdir():
            tree = load(rank / "model_optim_rng.pt")
            tree["model"]["text_decoder.decoder.layers.0.self_attention.linear_qkv._extra_state"] = None
            more = {
                "args": Namespace(lr=1e-5, params_dtype=torch.bfloat16),
                "iteration": 50,
                "rng": np.random.get_state(),
            }
            target = tmp_path / "trained/iter_0000050" / rank.name
            target.mkdir(parents=True)
            torch.save(tree | more, target / "model_optim_rng.pt")
        (tmp_path / "trained/latest_checkpointed_iteration.txt").write_text("50")
        folder = inspect_mm_folder(tmp_path / "trained", TWO_BY_TWO)
        weights = MMWeights(folder, source.config, TWO_BY_TWO)
        assert not differing(hf_shapes(source.config), HFWeights(source), weights)
        reshard(folder, source.config, TWO_BY_TWO, tmp_path / "resharded", ONE)
        assert (tmp_path / "resharded/latest_checkpointed_iteration.txt").read_text() == "release"
