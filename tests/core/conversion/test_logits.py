"""Both forms of a model compute the same, and a mapping that is wrong is found out, which comparing bytes cannot do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from core.conversion.convert import hf_to_mm, mm_to_hf
from core.conversion.logits import HFSide, MMSide, Side, compare_logits
from core.conversion.output import Options
from core.conversion.verify import VerificationFailed
from core.errors import UnsupportedOption
from core.models import registry
from core.models.hf_folder import HFFolder, inspect_hf_folder
from core.models.mapping import FuseGateUp, FuseQKV, InterleaveQKV, Rename, Rule
from core.models.mm_folder import inspect_mm_folder
from core.specs.parallel import ParallelSpec
from tests.core.conversion.conftest import ONE, TWO_BY_TWO, VIRTUAL
from tests.tiny import TinyShape, tiny_model

pytest.importorskip("transformers")
SHAPE = TinyShape(vision_layers=3, text_layers=4)


def mm_side(path: Path, source: HFFolder, parallel: ParallelSpec) -> Side:
    return MMSide(inspect_mm_folder(path, parallel), source.config, parallel)


class TestEqual:
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("names", ["old", "new"])
    def test_every_form_and_split(self, tmp_path: Path, tied: bool, names: str) -> None:
        shape = replace(SHAPE, tied=tied)
        new = names == "new"
        source = inspect_hf_folder(tiny_model(tmp_path / "hf", shape=shape, names=names, nested_config=new))
        for index, parallel in enumerate((ONE, TWO_BY_TWO, VIRTUAL)):
            hf_to_mm(source, tmp_path / f"mm{index}", parallel)
            report = compare_logits(HFSide(source), mm_side(tmp_path / f"mm{index}", source, parallel))
            assert report.vision_layers == [0, 1, 2]
            assert report.language_layers == [0, 2, 3]
            assert report.largest > 0.5
        mine = mm_side(tmp_path / "mm1", source, TWO_BY_TWO), mm_side(tmp_path / "mm2", source, VIRTUAL)
        assert compare_logits(*mine).difference == 0

    def test_a_cast_is_made_on_both_sides(self, tmp_path: Path) -> None:
        source = inspect_hf_folder(tiny_model(tmp_path / "hf", shape=SHAPE))
        hf_to_mm(source, tmp_path / "mm", TWO_BY_TWO, Options(dtype="bfloat16"))
        output = mm_side(tmp_path / "mm", source, TWO_BY_TWO)
        compare_logits(HFSide(source), output, dtype="bfloat16")
        with pytest.raises(VerificationFailed):
            compare_logits(HFSide(source), output)


def _swapped(rule: Rule) -> Rule:
    """Key and value, gate and up: the same shapes, and a mapping that undoes itself."""
    match rule:
        case FuseQKV(hf=(q, k, v)):
            return replace(rule, hf=(q, v, k))
        case FuseGateUp(hf=(gate, up)):
            return replace(rule, hf=(up, gate))
    return rule


def _stacked(rule: Rule) -> Rule:
    """The vision qkv not dealt out by heads: the fault of MindSpeed-MM 2.3.0."""
    if isinstance(rule, InterleaveQKV):
        rows = "vision_config.qkv_size"
        return Rename(rule.hf, rule.mm, rule.place, (rows, *rule.tail))
    return rule


def _crossed(rule: Rule) -> Rule:
    """The two norms of a block in each other's place."""
    names = {"input_layernorm": "pre_mlp_layernorm", "pre_mlp_layernorm": "input_layernorm"}
    for name, other in names.items():
        if isinstance(rule, Rename) and f".{name}." in rule.mm:
            return replace(rule, mm=rule.mm.replace(name, other))
    return rule


class TestDifferent:
    @pytest.mark.parametrize("wrong", [_swapped, _stacked, _crossed])
    @pytest.mark.parametrize("parallel", [ONE, TWO_BY_TWO], ids=["one", "split"])
    def test_a_wrong_mapping_is_found_although_every_byte_comes_back(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: object, parallel: ParallelSpec
    ) -> None:
        family = registry.FAMILIES["qwen2_5_vl"]
        mapping = tuple(map(wrong, family.mapping))  # type: ignore[arg-type]
        monkeypatch.setitem(registry.FAMILIES, "qwen2_5_vl", replace(family, mapping=mapping))
        source = inspect_hf_folder(tiny_model(tmp_path / "hf", shape=SHAPE))
        hf_to_mm(source, tmp_path / "mm", parallel, Options(verify=True))
        mm_to_hf(inspect_mm_folder(tmp_path / "mm"), source.config, parallel, tmp_path / "back", hf_files=source.path)
        back = tmp_path / "back/model.safetensors"
        assert back.read_bytes() == (source.path / "model.safetensors").read_bytes()
        with pytest.raises(
            VerificationFailed, match=r"logits of source and output differ by .*language layers \[0, 2, 3\]"
        ):
            compare_logits(HFSide(source), mm_side(tmp_path / "mm", source, parallel))


class TestRefused:
    def test_a_canonical_checkpoint(self, tmp_path: Path) -> None:
        source = inspect_hf_folder(tiny_model(tmp_path / "hf", shape=SHAPE))
        hf_to_mm(source, tmp_path / "mm", ONE, canonical=True)
        with pytest.raises(UnsupportedOption, match="canonical"):
            compare_logits(HFSide(source), mm_side(tmp_path / "mm", source, ONE))

    def test_a_family_without_a_model(self, tmp_path: Path) -> None:
        source = inspect_hf_folder(tiny_model(tmp_path / "hf", shape=replace(SHAPE, vision_ffn=128, family="qwen2_vl")))
        hf_to_mm(source, tmp_path / "mm", ONE)
        with pytest.raises(UnsupportedOption, match="qwen2_vl"):
            mm_side(tmp_path / "mm", source, ONE)
