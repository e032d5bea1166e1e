"""Batches against the rows they were made of, and the order in which steps come."""

from __future__ import annotations

import itertools
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from core.data.dataset import NO_TARGET, TokenisedDataset
from core.data.decoding import DecoderDied
from core.data.loader import CACHE_BYTES, LossReduction, StepLoader, build_batch, padding_grid
from core.data.media import ImageProcessing, Medium, UnreadableMedia
from core.data.plan import StepPlan, plan_step
from core.errors import InvalidDataset
from core.models.batch import PackedBatch
from core.models.config import Config
from core.models.positions import mrope_positions

torch.set_num_threads(1)
PROCESSING = ImageProcessing()


class TestBuildBatch:
    def test_packs_samples_end_to_end(self, dataset_dir: Path, config: Config) -> None:
        dataset = TokenisedDataset(dataset_dir)
        rows = [dataset.row(0), dataset.row(1)]
        batch = build_batch(rows, config, processing=PROCESSING)
        first = len(rows[0].input_ids)
        assert batch.cu_seqlens == (0, first, first + len(rows[1].input_ids))
        assert batch.input_ids_T[:first].tolist() == rows[0].input_ids.tolist()
        assert batch.targets_T[first:].tolist() == rows[1].targets.tolist()
        assert batch.grid_thw == rows[0].grid_thw + rows[1].grid_thw
        assert batch.rows == (0, 1)
        assert torch.equal(
            batch.position_ids_3T[:, first:], mrope_positions(rows[1].input_ids.tolist(), rows[1].grid_thw, config)
        )
        expected = torch.cat(
            [torch.from_numpy(PROCESSING.load(image.paths[0])[0]) for row in rows for image in row.media]
        )
        assert torch.equal(batch.pixel_values_PD, expected)

    def test_a_videos_positions_follow_its_own_time(self, dataset_dir: Path, config: Config) -> None:
        row = TokenisedDataset(dataset_dir).row(0)
        ids = np.array([1, config.vision_start_token_id, *[config.video_token_id] * 4, config.vision_end_token_id, 2])
        videos = [
            Medium((Path("v.gif"),), (2, 4, 2), num_frames=8, num_taken=4, seconds_per_grid=s) for s in (1.0, 2.5)
        ]
        rows = [replace(row, input_ids=ids, targets=ids, media=(video,)) for video in videos]
        batch = build_batch(rows, config, processing=PROCESSING, with_pixels=False)
        times = (
            batch.position_ids_3T[0].reshape(2, -1)[:, 2:6] - 2
        )  # two ids before the video; two positions per second
        assert times.tolist() == [[0, 0, 2, 2], [0, 0, 5, 5]]

    def test_no_rows_give_an_empty_batch(self, config: Config) -> None:
        batch = build_batch([], config, processing=PROCESSING)
        assert (batch.num_tokens, batch.num_patches, batch.cu_seqlens, batch.grid_thw) == (0, 0, (0,), ())
        assert batch.position_ids_3T.shape == (3, 0)
        assert batch.pixel_values_PD.shape == (0, PROCESSING.patch_dim)

    def test_text_needs_no_image(self, dataset_dir: Path, config: Config) -> None:
        row = TokenisedDataset(dataset_dir, "validation").row(0)
        assert build_batch([row], config, processing=PROCESSING).num_patches == 0

    def test_padding_is_one_more_sample_and_one_more_image(self, dataset_dir: Path, config: Config) -> None:
        row = TokenisedDataset(dataset_dir).row(0)
        plain = build_batch([row], config, processing=PROCESSING)
        padded = build_batch([row], config, processing=PROCESSING, pad_to_tokens=64, pad_to_patches=64, pad_token_id=9)
        size = plain.num_tokens
        assert padded.cu_seqlens == (0, size, 64)
        assert torch.equal(padded.input_ids_T[:size], plain.input_ids_T)
        assert set(padded.input_ids_T[size:].tolist()) == {9}
        assert set(padded.targets_T[size:].tolist()) == {NO_TARGET}
        assert padded.position_ids_3T[0, size:].tolist() == list(range(64 - size))
        assert padded.num_patches == 64 == sum(t * h * w for t, h, w in padded.grid_thw)
        assert not padded.pixel_values_PD[plain.num_patches :].any()
        assert padded.rows == (0,)

    def test_more_than_the_budget_is_refused(self, dataset_dir: Path, config: Config) -> None:
        row = TokenisedDataset(dataset_dir).row(0)
        with pytest.raises(InvalidDataset, match="tokens, its budget is 4"):
            build_batch([row], config, processing=PROCESSING, pad_to_tokens=4)

    def test_ranks_without_patches_read_no_image(self, dataset_dir: Path, config: Config, media_root: Path) -> None:
        (media_root / "0.png").unlink()
        batch = build_batch([TokenisedDataset(dataset_dir).row(0)], config, processing=PROCESSING, with_pixels=False)
        assert (len(batch.pixel_values_PD), batch.num_patches) == (0, 24)

    @pytest.mark.parametrize("content", [None, b"no image"])
    def test_a_lost_image_is_named_with_its_row(
        self, dataset_dir: Path, config: Config, media_root: Path, content: bytes | None
    ) -> None:
        (media_root / "2.png").unlink()
        if content:
            (media_root / "2.png").write_bytes(content)
        with pytest.raises(UnreadableMedia, match=r"row 13: image .*2\.png: "):
            build_batch([TokenisedDataset(dataset_dir).row(1)], config, processing=PROCESSING)

    def test_an_image_that_changed_its_size_is_named(self, dataset_dir: Path, config: Config, media_root: Path) -> None:
        (media_root / "0.png").write_bytes((media_root / "1.png").read_bytes())
        with pytest.raises(UnreadableMedia, match=r"row 11: image .*0\.png: the file now gives the grid \(1, 2, 8\)"):
            build_batch([TokenisedDataset(dataset_dir).row(0)], config, processing=PROCESSING)

    def test_image_tokens_that_do_not_match_name_the_row(self, dataset_dir: Path, config: Config) -> None:
        row = TokenisedDataset(dataset_dir).row(0)
        row = replace(row, media=(Medium(row.media[0].paths, (1, 8, 8)),))
        with pytest.raises(InvalidDataset, match="row 11: 6 image tokens in the text, 16 by its images' sizes"):
            build_batch([row], config, processing=PROCESSING)


class TestPaddingGrid:
    def test_is_near_a_square(self) -> None:
        assert padding_grid(64, 2) == (1, 8, 8)
        assert padding_grid(8, 2) == (1, 2, 4)

    def test_refuses_what_cannot_be_merged(self) -> None:
        with pytest.raises(InvalidDataset, match="6 patches"):
            padding_grid(6, 2)


class TestStepLoader:
    @staticmethod
    def loader(
        dataset_dir: Path,
        config: Config,
        *,
        dp: int = 1,
        rank: int = 0,
        consumed: int = 0,
        cache_bytes: int = CACHE_BYTES,
        reduction: LossReduction = "token",
        split: Literal["train", "validation"] = "train",
        with_pixels: bool = True,
    ) -> StepLoader:
        dataset = TokenisedDataset(dataset_dir, split)

        def plan(consumed_samples: int) -> StepPlan:
            return plan_step(
                dataset.lengths,
                dataset.patches,
                seed=5,
                consumed_samples=consumed_samples,
                global_batch_size=4,
                dp_size=dp,
                token_budget=32,
            )

        return StepLoader(
            dataset,
            config,
            plan,
            dp_rank=rank,
            consumed_samples=consumed,
            cache_bytes=cache_bytes,
            loss_reduction=reduction,
            with_pixels=with_pixels,
        )

    @staticmethod
    def batches(loader: StepLoader, steps: int) -> list[list[PackedBatch]]:
        with loader:
            return [list(step.micro_batches) for step in itertools.islice(loader, steps)]

    def test_follows_the_plan(self, dataset_dir: Path, config: Config) -> None:
        with self.loader(dataset_dir, config) as loader:
            for number, step in enumerate(itertools.islice(loader, 5)):
                assert step.plan.first_position == 4 * number
                batches = list(step.micro_batches)
                assert tuple(batch.rows for batch in batches) == step.plan.micro_batches[0]
                assert (step.num_samples, step.work.targets) == (4, 8)
                assert step.work.tokens == sum(len(batch.input_ids_T) for batch in batches)
                assert step.num_images == sum(len(batch.grid_thw) for batch in batches)
                assert step.work.patches == sum(batch.num_patches for batch in batches)

    def test_a_batch_is_that_of_its_rows_bit_for_bit(self, dataset_dir: Path, config: Config) -> None:
        dataset = TokenisedDataset(dataset_dir)
        for batch in itertools.chain(*self.batches(self.loader(dataset_dir, config), 4)):  # later ones from the cache
            expected = build_batch([dataset.row(row) for row in batch.rows], config, processing=PROCESSING)
            for name, value in vars(expected).items():
                found = getattr(batch, name)
                assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value

    def test_text_starts_no_process(self, dataset_dir: Path, config: Config) -> None:
        with self.loader(dataset_dir, config, split="validation") as loader:
            batches = [batch for step in itertools.islice(loader, 2) for batch in step.micro_batches]
            assert {row for batch in batches for row in batch.rows} == {0}
            assert loader._decoders.pids == []

    def test_ranks_without_pixels_start_no_process(self, dataset_dir: Path, config: Config) -> None:
        with self.loader(dataset_dir, config, with_pixels=False) as loader:
            batches = list(next(iter(loader)).micro_batches)
            assert sum(batch.num_patches for batch in batches) > 0
            assert not any(len(batch.pixel_values_PD) for batch in batches)
            assert loader._decoders.pids == []

    def test_a_decoder_that_is_killed_is_named_with_its_row_and_file(self, dataset_dir: Path, config: Config) -> None:
        with self.loader(dataset_dir, config, cache_bytes=0) as loader, ThreadPoolExecutor(1) as thread:
            thread.submit(loader._part, 0).result()
            (pid,) = loader._decoders.pids
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(DecoderDied, match=r"row 13: image .*1\.png: .* was killed by SIGKILL"):
                thread.submit(loader._part, 1).result()

    @pytest.mark.parametrize(("reduction", "weight"), [("sample", 1 / 2), ("square", 2**-0.5)])
    def test_weights_follow_each_samples_number_of_targets(
        self, dataset_dir: Path, config: Config, reduction: LossReduction, weight: float
    ) -> None:
        with self.loader(dataset_dir, config, reduction=reduction) as loader:
            step = next(iter(loader))
            batches = list(step.micro_batches)
        assert step.loss_weight == pytest.approx(4 * 2 * weight)
        for batch in batches:
            assert batch.weights_T is not None
            torch.testing.assert_close(
                batch.weights_T[batch.targets_T >= 0], torch.full((2 * len(batch.rows),), weight)
            )

    def test_targets_that_count_alike_need_no_weights(self, dataset_dir: Path, config: Config) -> None:
        step = self.batches(self.loader(dataset_dir, config), 1)[0]
        assert all(batch.weights_T is None for batch in step)

    def test_goes_on_where_it_stopped(self, dataset_dir: Path, config: Config) -> None:
        through = self.batches(self.loader(dataset_dir, config), 4)
        resumed = self.batches(self.loader(dataset_dir, config, consumed=8), 2)
        for whole, again in zip(through[2:], resumed, strict=True):
            for left, right in zip(whole, again, strict=True):
                assert left.rows == right.rows
                assert torch.equal(left.pixel_values_PD, right.pixel_values_PD)

    def test_ranks_share_the_rows_of_one(self, dataset_dir: Path, config: Config) -> None:
        def rows(batches: list[PackedBatch]) -> list[int]:
            return [row for batch in batches for row in batch.rows]

        alone = self.batches(self.loader(dataset_dir, config), 3)
        ranks = [self.batches(self.loader(dataset_dir, config, dp=3, rank=rank), 3) for rank in range(3)]
        for step in range(3):
            assert len({len(rank[step]) for rank in ranks}) == 1
            assert sorted(rows(alone[step])) == sorted(row for rank in ranks for row in rows(rank[step]))

    def test_a_step_that_was_broken_off_is_skipped(self, dataset_dir: Path, config: Config) -> None:
        with self.loader(dataset_dir, config) as loader:
            steps = iter(loader)
            next(steps)
            second = next(steps)
            assert second.plan.first_position == 4
            assert [batch.rows for batch in second.micro_batches] == list(second.plan.micro_batches[0])

    def test_an_image_lost_in_mid_run_ends_it(self, dataset_dir: Path, config: Config, media_root: Path) -> None:
        (media_root / "1.png").unlink()
        with pytest.raises(UnreadableMedia, match=r"1\.png"):
            self.batches(self.loader(dataset_dir, config), 2)

    def test_a_small_data_set_is_decoded_once(self, dataset_dir: Path, config: Config, media_root: Path) -> None:
        dataset = TokenisedDataset(dataset_dir)
        alone = [build_batch([dataset.row(row)], config, processing=PROCESSING) for row in range(len(dataset))]
        with self.loader(dataset_dir, config) as loader:
            steps = iter(loader)
            list(next(steps).micro_batches)  # 4 positions of 3 rows: each at least once
            for image in media_root.iterdir():
                image.unlink()
            for batch in next(steps).micro_batches:
                expected = torch.cat([alone[row].pixel_values_PD for row in batch.rows])
                assert torch.equal(batch.pixel_values_PD, expected)

    def test_threads_that_want_the_same_row_share_one_decoding(self, dataset_dir: Path, config: Config) -> None:
        with self.loader(dataset_dir, config) as loader, ThreadPoolExecutor(8) as threads:
            for row in range(3):
                parts = list(threads.map(loader._part, [row] * 8))
                assert all(part is parts[0] for part in parts)

    def test_the_cache_keeps_to_its_limit(self, dataset_dir: Path, config: Config) -> None:
        with self.loader(dataset_dir, config) as loader:
            sizes = {row: loader._part(row).num_bytes for row in range(3)}
        with self.loader(dataset_dir, config, cache_bytes=sizes[0] + sizes[1] - 1) as loader:
            for row in range(3):
                loader._part(row)
            assert sum(part.num_bytes for part in loader._cache.values()) <= sizes[0] + sizes[1] - 1
            assert 0 in loader._cache
            assert 1 not in loader._cache

    def test_without_room_every_row_is_decoded_anew(self, dataset_dir: Path, config: Config, media_root: Path) -> None:
        with self.loader(dataset_dir, config, cache_bytes=0) as loader:
            steps = iter(loader)
            list(next(steps).micro_batches)
            for image in media_root.iterdir():
                image.unlink()
            with pytest.raises(UnreadableMedia):
                _ = [list(next(steps).micro_batches) for _ in range(10)]
