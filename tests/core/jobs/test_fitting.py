"""What a plan says of memory."""

from __future__ import annotations

import pytest

from core.errors import InvalidSpec
from core.jobs.fitting import GIB, check_recompute, disk_bytes, lora_suggestion, memory_per_rank, suggestions
from core.models.qwen2_5_vl.family import SIZES
from core.specs.training import LoraSpec, TrainingSpec
from tests.core.training.tiny import tiny_config, training_spec

CONFIG = tiny_config()


def spec_of(**changes: object) -> TrainingSpec:
    return training_spec(seq_length=1024, **changes)


class TestRecompute:
    def test_more_layers_than_there_are_are_refused(self) -> None:
        def spec_with(count: int) -> TrainingSpec:
            policy = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": count}
            return spec_of(recompute={"text_decoder": policy})

        check_recompute(spec_with(CONFIG.text.num_hidden_layers), CONFIG)
        with pytest.raises(InvalidSpec, match=r"text_decoder\.recompute_num_layers is 99"):
            check_recompute(spec_with(99), CONFIG)


class TestMemory:
    def test_the_total_is_the_sum_of_its_parts(self) -> None:
        (rank,) = memory_per_rank(spec_of(), CONFIG, 1 << 40)
        parts = rank.weights_bytes + rank.gradients_bytes + rank.optimizer_bytes + rank.activations_bytes
        assert rank.total_bytes == parts
        assert rank.fits

    def test_what_does_not_fit_is_told_what_would(self) -> None:
        spec = spec_of()
        (rank,) = memory_per_rank(spec, CONFIG, 1)
        assert not rank.fits
        found = suggestions(spec, CONFIG, rank.total_bytes - 1)
        assert 1 <= len(found) <= 3
        assert found[0] == "full recompute of both towers"

    def test_only_what_the_hosts_can_run_is_suggested(self) -> None:
        spec = spec_of()
        full, two, two_by_four = (
            suggestions(spec, CONFIG, 6 * memory_per_rank(spec, CONFIG, 1)[0].total_bytes // 10, hosts=hosts)
            for hosts in ([1], [2], [2, 2])
        )
        assert all("pp_layers" not in text for text in full)
        assert any("nproc_per_node 2, " in text for text in two)
        assert all("nnodes" not in text for text in two)
        assert len(two_by_four) >= len(two)

    def test_more_data_parallel_ranks_are_suggested_where_their_share_of_the_state_fits(self) -> None:
        spec = spec_of(precision="bf16")
        (rank,) = memory_per_rank(spec, CONFIG, 1)
        room = rank.total_bytes - rank.optimizer_bytes * 5 // 8  # a share of 1 / 4 fits, one of 1 / 2 does not
        assert "nproc_per_node 4, data-parallel size 4" in suggestions(spec, CONFIG, room)
        assert not any("data-parallel" in text for text in suggestions(spec, CONFIG, room, hosts=[2]))
        four = spec_of(precision="bf16", parallel={**spec.parallel.model_dump(), "nproc_per_node": 4})
        assert memory_per_rank(four, CONFIG, room)[0].fits

    def test_nothing_is_suggested_where_nothing_helps(self) -> None:
        assert suggestions(spec_of(), CONFIG, 1) == []

    def test_adapters_need_little_beside_the_weights_and_are_suggested_where_whole_weights_do_not_fit(self) -> None:
        config, parallel = SIZES["7B"], {"llm_pp_layers": [[28]], "vit_pp_layers": [[32]]}
        whole = spec_of(parallel=parallel, freeze={}, precision="bf16")
        lora = whole.model_copy(update={"lora": LoraSpec(r=2)})
        (full,), (adapted,) = (memory_per_rank(spec, config, 64 * GIB) for spec in (whole, lora))
        assert (full.fits, adapted.fits) == (False, True)
        assert adapted.trained_parameters == 28 * 2 * (3584 + 4608 + 3584 + 3584)  # of linear_qkv and linear_proj
        assert adapted.gradients_bytes == 4 * adapted.trained_parameters
        assert lora_suggestion(whole, config, 64 * GIB) == ["lora on all linear layers, which trains adapters alone"]
        assert lora_suggestion(whole, config, GIB) == lora_suggestion(lora, config, 64 * GIB) == []


class TestDisk:
    def test_one_more_than_the_kept_while_a_new_one_is_written_but_no_more_than_are_made(self) -> None:
        def needed(**checkpoint: object) -> int:
            spec = spec_of(precision="bf16", train_iters=10, checkpoint=checkpoint)
            return disk_bytes(spec, memory_per_rank(spec, CONFIG, 1))

        one = needed(save_optim=True)
        assert needed(save_interval=10, keep_last=3) == one
        assert needed(save_interval=5, keep_last=3) == 2 * one
        assert needed(save_interval=1, keep_last=3) == 4 * one
        assert needed(save_interval=1, keep_last=3, save_optim=False) < one

    def test_adapters_are_small_and_the_merged_model_comes_at_the_end(self) -> None:
        config = SIZES["7B"]
        layout = {"llm_pp_layers": [[28]], "vit_pp_layers": [[32]]}
        frozen = {"vision_encoder": True, "vision_projector": True}
        spec = spec_of(
            parallel=layout, precision="bf16", lora=LoraSpec(r=16), freeze=frozen, checkpoint={"save_interval": 1}
        )
        (rank,) = memory_per_rank(spec, config, 64 * GIB)
        whole = (rank.parameters - rank.trained_parameters) * 2
        assert whole < disk_bytes(spec, [rank]) < whole * 1.02
