"""From annotations to token files: what is kept, what is refused and why, and that it is the same every time."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from core.data.dataset import TokenisedDataset
from core.data.formats import Record, parse_record, read_records
from core.data.loader import build_batch
from core.data.media import ImageProcessing, UnreadableMedia
from core.data.pipeline import Result, build, choose_validation
from core.data.prepare import Options, Refused, prepare_all
from core.data.template import ChatTemplate
from core.data.video import VideoProcessing
from core.errors import InvalidDataset, InvalidModel
from core.models.config import Config
from tests.core.data.conftest import IMAGE_SIZES
from tests.videos import pictures, write_animation, write_video

NUM_GOOD = len(IMAGE_SIZES)


def question(image: str, answer: str = "A dog.", **fields: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": answer}]
    return {"image": image, "conversations": turns, **fields}


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


class Deadly:
    """Ends the process that receives it, as a decoder that crashes would."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (1,)


GOOD = [question(f"{number}.png", answer=f"Number {number}.") for number in range(NUM_GOOD)]


@pytest.fixture
def options(tmp_path: Path, media_root: Path, model_dir: Path) -> Options:
    return Options(
        source=tmp_path,
        annotations="rows.json",
        media_root="media",
        tokenizer_dir=model_dir,
        processing=ImageProcessing.from_model_dir(model_dir),
        cutoff_len=200,
    )


def built(options: Options, rows: list[Any], output: str = "out", num_workers: int = 0) -> tuple[Result, Path]:
    (options.source / options.annotations).write_text(json.dumps(rows), encoding="utf-8")
    path = options.source / output
    path.mkdir()
    return build(options, path, num_workers=num_workers), path


def report(path: Path) -> Any:
    return json.loads((path / "report.json").read_text())


def refused(path: Path) -> list[Any]:
    return [json.loads(line) for line in (path / "refused.jsonl").read_text().splitlines()]


def preview(path: Path) -> list[Any]:
    return list(json.loads((path / "preview.json").read_text())["rows"])


class TestBuild:
    def test_rows_become_batches(self, options: Options, config: Config, model_dir: Path) -> None:
        _, path = built(options, GOOD)
        dataset = TokenisedDataset(path)
        dataset.check_model(config)
        rows = [dataset.row(index) for index in range(len(dataset))]
        batch = build_batch(rows, config, processing=dataset.meta.image_processing)
        assert batch.num_patches == dataset.patches.sum()
        assert batch.num_tokens == dataset.lengths.sum()
        template = ChatTemplate.from_model_dir(model_dir)
        learnt = [row.targets[row.targets >= 0].tolist() for row in rows]
        assert [template.decode(ids) for ids in learnt] == ["Number 0.", "Number 1.", "Number 2."]

    def test_normalised_records_are_what_was_read(self, options: Options) -> None:
        _, path = built(options, GOOD)
        lines = (path / "train.jsonl").read_bytes().splitlines()
        assert [parse_record(line, "messages") for line in lines] == [parse_record(row) for row in GOOD]
        assert (path / "validation.jsonl").read_bytes() == b""
        assert not (path / "records.jsonl").exists()

    def test_every_refused_row_has_a_verdict_and_the_others_stay(self, options: Options, media_root: Path) -> None:
        whole = (media_root / "0.png").read_bytes()
        (media_root / "cut.png").write_bytes(whole[: len(whole) // 2])
        (media_root / "text.png").write_text("hello")
        Image.new("L", (8000, 20)).save(media_root / "thin.png")
        bad = [
            question("absent.png"),
            question("cut.png"),
            question("text.png"),
            question("thin.png"),
            question("../rows.json"),
            question("0.png", answer="word " * 200),
            {"conversations": []},
            question("1.png", audio="x.wav"),
        ]
        result, path = built(options, [row for pair in zip(bad, bad, strict=True) for row in pair] + GOOD)
        verdicts = refused(path)
        assert [verdict["row"] for verdict in verdicts] == list(range(1, 17))
        assert [verdict["code"] for verdict in verdicts[::2]] == [
            "missing_image",
            "unreadable_image",
            "unreadable_image",
            "aspect_ratio",
            "path_outside",
            "too_long",
            "no_turns",
            "unsupported_media",
        ]
        assert verdicts[0]["message"] == "image 'absent.png': the file does not exist"
        assert "cut.png" in verdicts[2]["message"]
        assert "cutoff_len is 200" in verdicts[10]["message"]
        assert result.num_refused == 16
        assert report(path)["refused"]["by_code"]["unreadable_image"] == 4
        assert report(path)["refused"]["listed"] == verdicts
        dataset = TokenisedDataset(path)
        assert [dataset.source_row(index) for index in range(len(dataset))] == [17, 18, 19]

    def test_over_length_rows_tell_their_length(self, options: Options) -> None:
        long = question("0.png", answer="x " * 50)
        _, path = built(replace(options, cutoff_len=60), [long, *GOOD])
        _, whole = built(options, [long], output="whole")
        length = TokenisedDataset(whole).lengths[0]
        assert refused(path) == [
            {"row": 1, "code": "too_long", "message": f"{length} tokens (6 of images), cutoff_len is 60"}
        ]

    def test_a_row_of_exactly_cutoff_len_is_kept(self, options: Options) -> None:
        _, path = built(options, GOOD[:1])
        length = int(TokenisedDataset(path).lengths[0])
        assert built(replace(options, cutoff_len=length), GOOD[:1], output="exact")[0].num_refused == 0

    def test_a_repeated_media_root_gets_a_hint(self, options: Options) -> None:
        _, path = built(options, [question("media/0.png"), *GOOD])
        assert "use media_root '.'" in refused(path)[0]["message"]

    def test_fail_stops_at_the_first_bad_row(self, options: Options) -> None:
        with pytest.raises(
            InvalidDataset, match=r"row 2: image 'absent\.png': the file does not exist \(missing_image\)"
        ):
            built(replace(options, on_bad_sample="fail"), [GOOD[0], question("absent.png"), GOOD[1]])

    def test_nothing_left_is_an_error_with_the_reasons(self, options: Options) -> None:
        with pytest.raises(InvalidDataset, match=r"all 2 rows were refused \(missing_image 2\); the first: row 1"):
            built(options, [question("absent.png")] * 2)

    def test_no_rows_is_an_error(self, options: Options) -> None:
        with pytest.raises(InvalidDataset, match=r"'rows\.json' have no rows"):
            built(options, [])

    def test_max_samples_limits_and_may_exceed(self, options: Options) -> None:
        assert built(replace(options, max_samples=2), GOOD)[0].meta.num_rows == 2
        assert built(replace(options, max_samples=99), GOOD, output="more")[0].meta.num_rows == 3

    def test_duplicates_are_noted_and_kept(self, options: Options) -> None:
        result, path = built(options, [GOOD[0], GOOD[1], GOOD[0], {**GOOD[0], "id": "other"}])
        assert report(path)["duplicates"] == {"count": 2, "listed": [{"row": 3, "first": 1}, {"row": 4, "first": 1}]}
        assert (result.meta.num_rows, result.num_duplicates) == (4, 2)

    def test_preview_marks_what_is_learnt(self, options: Options) -> None:
        _, path = built(options, GOOD)
        first = json.loads((path / "preview.json").read_text())["rows"][0]
        assert [s["text"] for s in first["segments"] if s["trained"]] == ["Number 0.<|im_end|>"]
        assert (first["row"], first["images"]) == (1, ["0.png"])

    def test_counts_and_histograms_add_up(self, options: Options) -> None:
        result, path = built(options, GOOD)
        values = report(path)
        assert values["rows"] == {"read": 3, "accepted": 3, "refused": 0, "train": 3, "validation": 0}
        assert values["tokens"]["total"] == result.meta.num_tokens
        assert values["tokens"]["image"] * 4 == TokenisedDataset(path).patches.sum()
        for histogram in values["histograms"].values():
            assert sum(bucket["rows"] for bucket in histogram) == 3

    def test_explicit_splits_decide(self, options: Options) -> None:
        rows = [{**GOOD[0], "split": "validation"}, {**GOOD[1], "split": "train"}, GOOD[2]]
        _, path = built(options, rows)
        assert TokenisedDataset(path, "validation").source_row(0) == 1
        assert len(TokenisedDataset(path)) == 2
        assert json.loads((path / "validation.jsonl").read_text())["images"] == ["0.png"]

    def test_all_rows_for_validation_is_an_error(self, options: Options) -> None:
        with pytest.raises(InvalidDataset, match="all 1 rows are for validation"):
            built(options, [{**GOOD[0], "split": "validation"}])

    def test_text_and_image_rows_mix(self, options: Options) -> None:
        text = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
        _, path = built(options, [text, *GOOD])
        assert TokenisedDataset(path).patches.tolist()[0] == 0

    def test_a_bad_line_costs_only_its_row(self, options: Options) -> None:
        options = replace(options, annotations="rows.jsonl")
        lines = [json.dumps(GOOD[0]), "{broken", json.dumps(GOOD[1])]
        (options.source / "rows.jsonl").write_text("\n".join(lines))
        (options.source / "out").mkdir()
        result = build(options, options.source / "out", num_workers=0)
        assert (result.meta.num_rows, result.refused) == (2, {"not_json": 1})

    @pytest.mark.parametrize("field", ["annotations", "media_root"])
    def test_links_out_of_the_source_are_refused(self, options: Options, field: str, tmp_path_factory: Any) -> None:
        outside = tmp_path_factory.mktemp("outside")
        (outside / "rows.json").write_text(json.dumps(GOOD))
        (options.source / "link").symlink_to(outside)
        value = {"annotations": "link/rows.json", "media_root": "link"}[field]
        (options.source / "rows.json").write_text(json.dumps(GOOD))
        (options.source / "out").mkdir()
        with pytest.raises(InvalidDataset, match=f"{field} '{value}' leads outside the source"):
            build(replace(options, **{field: value}), options.source / "out", num_workers=0)

    def test_a_tokenizer_that_contradicts_the_model_is_refused(self, options: Options, model_dir: Path) -> None:
        copy = options.source / "model"
        copy.mkdir()
        for name in ("tokenizer.json", "config.json", "preprocessor_config.json"):
            (copy / name).write_bytes((model_dir / name).read_bytes())
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, "image_token_id": 1}))
        with pytest.raises(InvalidDataset, match="image_token_id is 479 for the data set, 1 for the model"):
            built(replace(options, tokenizer_dir=copy), GOOD)
        (copy / "config.json").write_text("{")
        with pytest.raises(InvalidModel, match=r"config\.json is not JSON"):
            built(replace(options, tokenizer_dir=copy), GOOD, output="again")

    def test_listener_hears_progress_and_may_stop_it(self, options: Options) -> None:
        class StopNow(Exception):
            pass

        def listen(done: int, total: int) -> None:
            heard.append((done, total))
            raise StopNow

        heard: list[tuple[int, int]] = []
        (options.source / "rows.json").write_text(json.dumps(GOOD * 50))
        (options.source / "out").mkdir()
        with pytest.raises(StopNow):
            build(options, options.source / "out", num_workers=0, after_chunk=listen)
        assert heard == [(18, 150)]


class TestPrepareAll:
    def test_worker_processes_give_the_same_in_the_same_order(self, options: Options) -> None:
        rows = [question(f"{n % 4}.png", answer=f"Number {n}.") for n in range(150)]
        _, alone = built(options, rows)
        _, pooled = built(options, rows, output="pooled", num_workers=2)
        for name in (
            "train.jsonl",
            "refused.jsonl",
            "report.json",
            "preview.json",
            "tokens/input_ids.i32",
            "tokens/trained.u8",
        ):
            assert (alone / name).read_bytes() == (pooled / name).read_bytes()

    def test_a_row_that_kills_its_process_is_refused_and_the_others_stay(self, options: Options) -> None:
        records = [Record(n, question(f"{n % 3}.png")) for n in range(1, 150)]
        records[70] = Record(71, Deadly())
        outcomes = list(prepare_all(options, records, num_workers=2))
        assert [outcome.row for outcome in outcomes] == list(range(1, 150))
        bad = [outcome for outcome in outcomes if isinstance(outcome, Refused)]
        assert [(outcome.row, outcome.code) for outcome in bad] == [(71, "crashed")]

    def test_needs_no_process_for_small_work(self, options: Options) -> None:
        (options.source / "rows.json").write_text(json.dumps(GOOD))
        records = read_records(options.source / "rows.json")
        assert len(list(prepare_all(options, records, num_workers=0))) == NUM_GOOD


class TestChooseValidation:
    @given(
        splits=st.lists(st.integers(0, 2), max_size=60),
        fraction=st.floats(0, 1),
        seed=st.integers(0, 2**32 - 1),
    )
    def test_holds_out_exactly_the_share_and_the_marked(self, splits: list[int], fraction: float, seed: int) -> None:
        marks = np.array(splits, np.int8)
        chosen = choose_validation(marks, fraction, seed)
        assert chosen[marks == 2].all()
        assert not chosen[marks == 1].any()
        assert chosen[marks == 0].sum() == round((marks == 0).sum() * fraction)
        assert (chosen == choose_validation(marks, fraction, seed)).all()

    def test_another_seed_chooses_others(self) -> None:
        marks = np.zeros(1000, np.int8)
        assert (choose_validation(marks, 0.2, 1) != choose_validation(marks, 0.2, 2)).any()


class TestVideos:
    @pytest.fixture
    def options(self, options: Options) -> Options:
        return replace(options, videos=VideoProcessing.like(options.processing, max_pixels=3136))

    def test_rows_of_every_kind_stand_together(self, options: Options, media_root: Path, config: Config) -> None:
        write_video(media_root / "a.mp4", pictures(20))
        write_animation(media_root / "b.gif", pictures(6))
        rows = [
            GOOD[0],
            {"messages": turns("Hello.", "Hi."), "videos": []},
            {"messages": turns("<video>And <image>?", "A dog."), "images": ["1.png"], "videos": ["a.mp4"]},
            {"video": "b.gif", "conversations": question("")["conversations"]},
            {"messages": turns("<video>", "Three images."), "videos": [["0.png", "0.png", "0.png"]]},
        ]
        result, path = built(options, rows)
        meta = result.meta
        assert (meta.num_rows, meta.num_images, meta.num_videos, meta.num_frames) == (5, 2, 3, 4 + 4 + 3)
        dataset = TokenisedDataset(path)
        assert [[medium.is_video for medium in dataset.row(i).media] for i in range(5)] == [
            [False], [], [True, False], [True], [True],
        ]  # fmt: skip
        assert dataset.row(2).seconds_per_grid == (1.0, 0.0)
        assert dataset.row(4).media[0].paths == (media_root / "0.png",) * 3
        batch = build_batch(
            [dataset.row(index) for index in range(5)],
            config,
            processing=meta.image_processing,
            videos=meta.video_processing,
        )
        assert batch.num_patches == len(batch.pixel_values_PD) == dataset.patches.sum()
        tokens = report(path)["tokens"]
        in_media = (
            (batch.input_ids_T == config.video_token_id).sum(),
            (batch.input_ids_T == config.image_token_id).sum(),
        )
        assert in_media == (tokens["video"], tokens["image"])
        assert 4 * sum(in_media) == batch.num_patches
        assert report(path)["videos"] == {"total": 3, "frames_taken": 11}
        shown = preview(path)[2]
        assert shown["videos"] == [{"path": "a.mp4", "frames": 20, "frames_taken": 4, "seconds": 2.0}]
        assert "<|video_pad|>×" in shown["segments"][0]["text"]

    def test_bad_videos_are_refused_row_by_row(self, options: Options, media_root: Path) -> None:
        write_video(media_root / "a.avi", pictures(30))
        (media_root / "cut.avi").write_bytes((media_root / "a.avi").read_bytes()[:4000])
        (media_root / "text.mp4").write_text("hello")
        names = ["absent.mp4", "cut.avi", "text.mp4", "../rows.json", "a.avi"]
        _, path = built(options, [{"messages": turns("<video>", "x"), "video": name} for name in names])
        assert [verdict["code"] for verdict in refused(path)] == [
            "missing_video", "unreadable_video", "unreadable_video", "path_outside",
        ]  # fmt: skip
        assert refused(path)[0]["message"] == "video 'absent.mp4': the file does not exist"
        assert TokenisedDataset(path).source_row(0) == 5

    def test_a_video_lost_or_changed_since_is_named_with_its_row(
        self, options: Options, media_root: Path, config: Config
    ) -> None:
        write_video(media_root / "a.mp4", pictures(20))
        _, path = built(options, [{"messages": turns("<video>", "x"), "video": "a.mp4"}])
        dataset = TokenisedDataset(path)
        row, meta = dataset.row(0), dataset.meta
        write_video(media_root / "a.mp4", pictures(8))
        with pytest.raises(UnreadableMedia, match=r"row 1: video .*a\.mp4: the file ends before frame 10 of 20"):
            build_batch([row], config, processing=meta.image_processing, videos=meta.video_processing)
        (media_root / "a.mp4").unlink()
        with pytest.raises(UnreadableMedia, match=r"row 1: video .*a\.mp4: the file does not exist"):
            build_batch([row], config, processing=meta.image_processing, videos=meta.video_processing)
        without = build_batch([row], config, processing=meta.image_processing, with_pixels=False)
        assert without.num_patches == row.media[0].num_patches


class TestRealData:
    @pytest.mark.parametrize(
        ("folder", "annotations", "rows", "images"),
        [("cc12m", "llava_instruct_cc12m.json", 32, 32), ("mllm_demo", "mllm_demo.json", 6, 8)],
    )
    def test_is_accepted_whole(
        self, data_dir: Path, tmp_path: Path, folder: str, annotations: str, rows: int, images: int
    ) -> None:
        options = Options(
            source=data_dir / folder,
            annotations=annotations,
            media_root=".",
            tokenizer_dir=data_dir / "qwen2-tokenizer",
            processing=ImageProcessing(max_pixels=262144),
        )
        result = build(options, tmp_path, num_workers=0)
        assert (result.meta.num_rows, result.meta.num_images, result.refused) == (rows, images, {})

    def test_videos_are_accepted(self, data_dir: Path, tmp_path: Path) -> None:
        options = Options(
            source=data_dir / "mllm_demo",
            annotations="mllm_video_demo.json",
            media_root=".",
            tokenizer_dir=data_dir / "qwen2-tokenizer",
            processing=ImageProcessing(),
            videos=VideoProcessing.like(ImageProcessing(), max_frames=64, max_pixels=16384),
        )
        meta = build(options, tmp_path, num_workers=0).meta
        assert (meta.num_rows, meta.num_images, meta.num_videos, meta.num_frames) == (3, 0, 3, 48)
        assert [row["videos"][0]["frames"] for row in preview(tmp_path)] == [243, 270, 146]
