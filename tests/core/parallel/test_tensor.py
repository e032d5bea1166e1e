"""Cutting a module: what is replaced, what is held of each parameter. That it computes the same is tested in test_equivalence."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from core.models.plan import Replicate, Row, stages
from core.models.qwen2_5_vl.family import PLAN
from core.parallel.mesh import Mesh, build_mesh
from core.parallel.tensor import Held, SplitOutputLinear, cut, held, pattern, shard
from core.specs.parallel import ParallelSpec
from tests.core.training.tiny import stage_model, tiny_config, whole_model
from tests.distributed import run

LAYER = "text_decoder.decoder.layers.3."


class TestHeld:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            (LAYER + "self_attention.linear_qkv.bias", Held.SLICE),
            (LAYER + "mlp.linear_fc2.weight", Held.SLICE),
            (LAYER + "input_layernorm.weight", Held.ADDEND),
            ("text_decoder.decoder.final_layernorm.weight", Held.ADDEND),
            ("text_decoder.embedding.word_embeddings.weight", Held.SLICE),
            ("image_encoder.encoder.blocks.layers.0.mlp.linear_fc2.bias", Held.COPY),
            ("image_encoder.encoder.patch_embed.proj.weight", Held.COPY),
        ],
    )
    def test_slices_by_the_plan_and_addends_in_the_sequence_parallel_part(self, name: str, expected: Held) -> None:
        assert held(name, PLAN) is expected


class TestShard:
    def test_one_process_is_left_as_it_is(self) -> None:
        model = whole_model(tiny_config())
        before = [type(module) for module in model.modules()]
        assert shard(model, PLAN, Mesh()) == {}
        assert [type(module) for module in model.modules()] == before

    def test_slices_make_up_the_whole_model(self) -> None:
        whole = whole_model(tiny_config()).state_dict()
        slices = run(_slices, 2)
        for name, tensor in whole.items():
            rule = PLAN[pattern(name)]
            for rank, mine in enumerate(slices):
                assert torch.equal(mine[name], cut(tensor, rule, tp_size=2, tp_rank=rank)), name
            total = sum(mine[name].numel() for mine in slices)
            assert total == tensor.numel() * (2 if isinstance(rule, Replicate) else 1)

    def test_frozen_parameters_stay_frozen_and_names_stay(self) -> None:
        assert run(_frozen, 2) == [True, True]

    def test_a_cut_parameter_without_a_layer_for_it_is_our_own_mistake(self) -> None:
        assert run(_unknown_layer, 2) == ["no layer for odd, a Odd cut by Row(dim='x')"] * 2


class TestSplitOutputLinear:
    @pytest.mark.parametrize("sequence", [False, True])
    def test_keeps_no_more_than_its_own_rows(self, sequence: bool) -> None:
        for kept, rows in run(_kept, 2, sequence):
            assert kept == [rows]


def _kept(rank: int, sequence: bool) -> tuple[list[int], int]:
    group = build_mesh(pp_size=1, dp_size=1, tp_size=2).tp_group
    assert group is not None
    layer = SplitOutputLinear(nn.Linear(6, 8), Row("x"), group, sequence=sequence)
    kept = []
    x = torch.randn(4, 6, requires_grad=True)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim == 2 and tensor is not layer.weight:
            kept.append(len(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return kept, len(x)


def _slices(rank: int) -> dict[str, torch.Tensor]:
    model = whole_model(tiny_config())
    shard(model, PLAN, build_mesh(pp_size=1, dp_size=1, tp_size=2))
    return model.state_dict()


def _frozen(rank: int) -> bool:
    config = tiny_config()
    stage = stages(config, ParallelSpec(llm_pp_layers=((4,),), vit_pp_layers=((4,),)))[0]
    model = stage_model(config, stage)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name)
    names = [name for name, _ in model.named_parameters()]
    shard(model, PLAN, build_mesh(pp_size=1, dp_size=1, tp_size=2))
    return sorted(names) == sorted(name for name, _ in model.named_parameters()) and all(
        parameter.requires_grad == ("mlp" in name) for name, parameter in model.named_parameters()
    )


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4))


def _unknown_layer(rank: int) -> str:
    try:
        shard(nn.ModuleDict({"odd": Odd()}), {"odd.weight": Row("x")}, build_mesh(pp_size=1, dp_size=1, tp_size=2))
    except AssertionError as error:
        return str(error)
    return ""
