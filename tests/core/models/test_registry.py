"""The families and their tables."""

import subprocess
import sys

import pytest

from core.errors import InvalidModel, NotFound
from core.models.layout import hf_shapes, stage_layout
from core.models.mapping import old_name
from core.models.plan import stages, whole
from core.models.registry import FAMILIES, Family, detect, get_family
from core.specs.parallel import ParallelSpec
from tests.tiny import TinyShape, tiny_config


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    return get_family(request.param)


class TestTables:
    def test_every_mapped_weight_has_one_rule_and_one_plan(self, family: Family) -> None:
        names = [rule.mm for rule in family.mapping]
        assert len(names) == len(set(names))
        assert set(names) == set(family.plan)

    def test_no_hf_weight_is_named_by_two_rules(self, family: Family) -> None:
        for mapping in (family.mapping, family.canonical_mapping or ()):
            dims = next(iter(family.sizes.values())).dims()
            names = [name for rule in mapping for name in rule.hf_shapes(dims)]
            assert len(names) == len(set(names))

    def test_both_mappings_take_the_same_hf_weights_of_the_same_shapes(self, family: Family) -> None:
        if family.canonical_mapping is None:
            pytest.skip("no canonical form")
        dims = next(iter(family.sizes.values())).dims()
        shapes = [
            {name: shape for rule in mapping for name, shape in rule.hf_shapes(dims).items()}
            for mapping in (family.mapping, family.canonical_mapping)
        ]
        assert shapes[0] == shapes[1]


class TestQwen25VL:
    def test_published_sizes_have_the_known_number_of_weights(self) -> None:
        sizes = get_family("qwen2_5_vl").sizes
        assert len(hf_shapes(sizes["7B"])) == 729  # what Qwen2.5-VL-7B-Instruct's index lists
        assert len(hf_shapes(sizes["3B"])) == 824  # tied: no lm_head

    def test_mm_tensor_counts_are_upstreams(self) -> None:
        config = get_family("qwen2_5_vl").sizes["7B"]
        fused = stage_layout(config, whole(config))
        assert len(fused) == 10 * 32 + 1 + 5 + 7 * 28 + 1 + 1 + 1


class TestQwen2VL:
    def test_published_sizes_have_the_known_number_of_weights(self) -> None:
        sizes = get_family("qwen2_vl").sizes
        assert len(hf_shapes(sizes["7B"])) == 730  # what Qwen2-VL-7B-Instruct's index lists
        assert len(hf_shapes(sizes["2B"])) == 729  # tied: no lm_head

    @pytest.mark.parametrize(("size", "legal"), [("2B", [1, 2]), ("7B", [1, 2, 4]), ("72B", [1, 2, 4, 8])])
    def test_legal_tensor_parallel_sizes(self, size: str, legal: list[int]) -> None:
        family = get_family("qwen2_vl")
        assert family.legal_tp(family.sizes[size]) == legal


class TestDetect:
    def test_by_model_type(self) -> None:
        assert detect({"model_type": "qwen2_5_vl"}).name == "qwen2_5_vl"

    @pytest.mark.parametrize("config", [{"model_type": "llama"}, {}])
    def test_others_are_refused_with_the_known_ones(self, config: dict[str, str]) -> None:
        with pytest.raises(InvalidModel, match="supported: qwen2_5_vl, qwen2_vl"):
            detect(config)

    def test_an_unknown_name_is_not_found(self) -> None:
        with pytest.raises(NotFound, match="known: qwen2_5_vl, qwen2_vl"):
            get_family("qwen")


class TestNames:
    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("visual.blocks.0.norm1.weight", "model.visual.blocks.0.norm1.weight"),
            ("model.layers.3.mlp.up_proj.weight", "model.language_model.layers.3.mlp.up_proj.weight"),
            ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
            ("lm_head.weight", "lm_head.weight"),
        ],
    )
    def test_either_form_becomes_the_old_one(self, old: str, new: str) -> None:
        assert (old_name(new), old_name(old)) == (old, old)


class TestBuild:
    @pytest.mark.parametrize("tied", [True, False])
    def test_the_layers_of_a_stage_are_named_and_shaped_as_its_rank_file(self, tied: bool) -> None:
        import torch

        from core.device import get_accelerator

        family = get_family("qwen2_5_vl")
        ids = dict.fromkeys(("<|endoftext|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>"), 1)
        ids |= {"<|vision_start|>": 2, "<|vision_end|>": 3}
        shape = TinyShape(vision_layers=3, text_layers=3, tied=tied)
        config = family.parse_config(tiny_config(shape, vocab_size=64, ids=ids))
        parallel = ParallelSpec(llm_pp_layers=((0, 2, 1),), vit_pp_layers=((2, 1, 0),))
        for stage in (whole(config), *stages(config, parallel)):
            with torch.device("meta"):
                layers = family.build(config, stage, accelerator=get_accelerator("cpu"))
            shapes = {name: tuple(tensor.shape) for name, tensor in layers.state_dict().items()}
            assert shapes == {name: layout.shape for name, layout in stage_layout(config, stage).items()}


def test_the_ground_floor_loads_no_torch() -> None:
    code = (
        "import sys; import core.models.registry, core.models.layout, core.models.hf_folder, core.models.mm_folder;"
        "heavy = {'torch', 'numpy', 'transformers', 'safetensors'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
