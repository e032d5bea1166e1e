"""Reading annotation files, and the verdict on each kind of bad row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.data import formats
from core.data.formats import (
    IMAGE,
    VIDEO,
    BadRow,
    MediaRoot,
    Message,
    Sample,
    count_records,
    parse_record,
    read_records,
)
from core.errors import InvalidDataset
from tests.services import REPOSITORY

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)


def llava(*texts: str, **fields: Any) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"conversations": turns, **fields}


def messages(*texts: Any, **fields: Any) -> dict[str, Any]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": turns, **fields}


def refusal(value: Any, format: Any = "auto") -> tuple[str, str]:
    with pytest.raises(BadRow) as caught:
        parse_record(value, format)
    return caught.value.code, str(caught.value)


class TestReadRecords:
    @pytest.fixture(params=[1, 7, 1 << 20])
    def block(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(formats, "_BLOCK", request.param)

    @pytest.mark.usefixtures("block")
    @pytest.mark.parametrize("indent", [None, 2])
    def test_reads_a_list_whatever_the_block_size(self, indent: int | None, tmp_path: Path) -> None:
        rows = [{"a": "x" * 50, "b": [1, {"c": '是"]},'}]}, 12345, "[", [], {}, -1.5e300, None]
        (tmp_path / "rows.json").write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8")
        read = list(read_records(tmp_path / "rows.json"))
        assert [record.value for record in read] == rows
        assert [record.row for record in read] == list(range(1, 8))

    @given(rows=st.lists(json_values, max_size=5), block=st.integers(1, 40))
    def test_reads_any_list(self, rows: list[Any], block: int, tmp_path_factory: pytest.TempPathFactory) -> None:
        path = tmp_path_factory.mktemp("list") / "rows.json"
        path.write_text(json.dumps(rows), encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(formats, "_BLOCK", block)
            assert [record.value for record in read_records(path)] == rows

    def test_reads_lines_unparsed_and_numbers_them_as_an_editor_does(self, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n{broken\n{"a": 2}')
        read = [(record.row, record.value) for record in read_records(tmp_path / "rows.jsonl")]
        assert read == [(1, b'{"a": 1}'), (3, b"{broken"), (4, b'{"a": 2}')]

    def test_a_byte_order_mark_is_no_data(self, tmp_path: Path) -> None:
        (tmp_path / "rows.json").write_bytes(b"\xef\xbb\xbf [1]")
        assert [record.value for record in read_records(tmp_path / "rows.json")] == [1]

    @pytest.mark.parametrize("content", [b"", b"  \n", b"[]", b"[\n]"])
    def test_an_empty_file_has_no_rows(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "rows.json").write_bytes(content)
        assert list(read_records(tmp_path / "rows.json")) == []

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ('[{"a": 1}, {"a": ', "row 2 is not JSON"),
            ('[{"a": 1}', "the end of the file after row 1"),
            ('[{"a": 1} {"a": 2}]', "'{' after row 1, expected ','"),
            ('[{"a": 1},]', "row 2 is not JSON"),
        ],
    )
    def test_a_broken_list_says_where(self, content: str, message: str, tmp_path: Path) -> None:
        (tmp_path / "rows.json").write_text(content)
        with pytest.raises(InvalidDataset, match=message):
            list(read_records(tmp_path / "rows.json"))

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidDataset, match=r"'rows\.json' do not exist"):
            list(read_records(tmp_path / "rows.json"))

    def test_bytes_that_are_not_utf_8_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "rows.json").write_bytes(b'["\xff"]')
        with pytest.raises(InvalidDataset, match="not UTF-8"):
            list(read_records(tmp_path / "rows.json"))

    def test_counting_stops_where_told(self, tmp_path: Path) -> None:
        (tmp_path / "rows.json").write_text("[1, 2, 3]")
        assert [count_records(tmp_path / "rows.json", n) for n in (None, 2, 99)] == [3, 2, 3]


class TestParseRecord:
    def test_llava_becomes_messages(self) -> None:
        sample = parse_record(llava("<image>\nWhat?", "A dog.", image="a/b.jpg", id="7"))
        assert sample == Sample(("a/b.jpg",), (Message("user", "<image>\nWhat?"), Message("assistant", "A dog.")))

    @pytest.mark.parametrize("field", ["image", "images"])
    def test_images_may_be_a_list(self, field: str) -> None:
        assert parse_record(llava("<image> <image>", "x", **{field: ["a", "b"]})).images == ("a", "b")

    @pytest.mark.parametrize("nothing", [{}, {"image": None}, {"image": ""}, {"images": []}])
    def test_text_alone_is_a_sample(self, nothing: dict[str, Any]) -> None:
        assert parse_record(llava("hi", "yes", **nothing)).images == ()

    def test_a_system_field_and_a_system_turn_both_lead(self) -> None:
        turn = {"conversations": [{"from": "system", "value": "S"}, *llava("hi", "yes")["conversations"]]}
        assert parse_record(turn).messages[0] == Message("system", "S")
        assert parse_record(llava("hi", "yes", system="S")).messages[0] == Message("system", "S")

    def test_content_parts_become_placeholders_in_their_places(self) -> None:
        parts = [
            {"type": "text", "text": "Is "},
            {"type": "image", "image": "a.jpg"},
            {"type": "text", "text": " a dog?"},
        ]
        sample = parse_record(messages(parts, [{"type": "text", "text": "Yes."}]))
        assert sample == Sample(("a.jpg",), (Message("user", "Is <image> a dog?"), Message("assistant", "Yes.")))

    @pytest.mark.parametrize(
        "part",
        [
            {"type": "image_url", "value": "a.jpg"},
            {"type": "image_url", "image_url": {"url": "a.jpg"}},
            {"type": "image", "path": "a.jpg"},
        ],
    )
    def test_other_spellings_of_an_image_part(self, part: dict[str, Any]) -> None:
        assert parse_record(messages([part], "x")).images == ("a.jpg",)

    @pytest.mark.parametrize(
        ("row", "videos"),
        [
            (llava("<video>What?", "x", video="a.mp4"), [("a.mp4",)]),
            (llava("<image>\nWhat?", "x", video="a.mp4"), [("a.mp4",)]),  # as LLaVA-Video writes it
            (messages("<video> <video>", "x", videos=["a.mp4", ["1.jpg", "2.jpg"]]), [("a.mp4",), ("1.jpg", "2.jpg")]),
            (messages([{"type": "video", "video": "a.mp4"}], "x"), [("a.mp4",)]),
            (messages([{"type": "video", "video": ["1.jpg", "2.jpg"]}], "x"), [("1.jpg", "2.jpg")]),
            (messages([{"type": "video_url", "video_url": {"url": "a.mp4"}}], "x"), [("a.mp4",)]),
        ],
    )
    def test_forms_of_videos(self, row: dict[str, Any], videos: list[tuple[str, ...]]) -> None:
        sample = parse_record(row)
        assert (list(sample.videos), sample.images) == (videos, ())
        assert sample.placeholders() == [VIDEO] * len(videos)
        assert parse_record(sample.to_json().encode(), "messages") == sample

    def test_images_and_videos_keep_their_order(self) -> None:
        sample = parse_record(llava("<video><image>", "x", "<image>", "y", images=["a", "b"], video="c"))
        assert sample.placeholders() == [VIDEO, IMAGE, IMAGE]

    def test_what_the_readme_shows_is_accepted(self) -> None:
        readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
        lines = readme.split("```jsonl\n")[1].split("```")[0].splitlines()
        samples = [parse_record(line.encode()) for line in lines]
        assert [(len(sample.images), sample.videos) for sample in samples] == [
            (1, ()), (2, ()), (0, (("c.mp4",),)), (0, (("f1.jpg", "f2.jpg"),)),
        ]  # fmt: skip

    def test_a_line_is_parsed(self) -> None:
        assert parse_record(json.dumps(llava("hi", "yes")).encode()) == parse_record(llava("hi", "yes"))

    def test_split_is_kept(self) -> None:
        assert parse_record(llava("hi", "yes", split="validation")).split == "validation"

    @pytest.mark.parametrize(
        ("value", "code", "message"),
        [
            (b"{broken", "not_json", "the line is not JSON"),
            (b"[" * 100_000, "not_json", "not JSON"),
            ([1], "not_an_object", "got [1]"),
            ({"id": 1}, "missing_field", "'conversations' or 'messages' is missing; the row has 'id'"),
            (llava("hi", "x", audio="a.wav"), "unsupported_media", "field 'audio' has 'a.wav'"),
            (messages([{"type": "audio", "audio": "a.wav"}], "x"), "unsupported_media", "'messages[0].content[0].type' is 'audio'"),
            (messages("hi", "x", videos=["a.mp4"]), "placeholder_count", "0 <video> placeholders for 1 videos"),
            (llava("<image><video>", "x", image="a"), "placeholder_count", "1 <video> placeholders for 0 videos"),
            (llava("<video>", "x", video="a", videos=["a"]), "videos_twice", "both 'video' and 'videos'"),
            (llava("<video>", "x", videos=["a", []]), "bad_field", "'videos[1]' must be a path, got []"),
            (llava("<video>", "x", video=[["a", 3]]), "bad_field", "'video[0]' must be a path, got 3"),
            (llava("<image>", "x", image=[["a", "b"]]), "bad_field", "'image[0]' must be a path, got ['a', 'b']"),
            (messages([{"type": "video", "video": {}}], "x"), "bad_field", "must name the path of its video"),
            (llava("<image><image>", "x", image="a"), "placeholder_count", "2 <image> placeholders for 1 images"),
            (llava("What?", "x", image="a"), "placeholder_count", "0 <image> placeholders for 1 images"),
            (llava("hi", "<image>", image="a"), "placeholder_in_answer", "turn 1"),
            (messages([{"type": "text", "text": "<image>"}], "x"), "placeholder_count", "images and videos are parts of their own"),
            (messages([{"type": "image", "image": "a"}], "x", images=["b"]), "images_twice", "inside the messages"),
            (llava("<image>", "x", image="a", images=["a"]), "images_twice", "both 'image' and 'images'"),
            (llava("<image>", "x", image=7), "bad_field", "field 'image' must be a path or a list of paths, got 7"),
            (llava("<image>", "x", images=["a", None]), "bad_field", "'images[1]' must be a path, got None"),
            (llava("hi", "x", system=3), "bad_field", "field 'system' must be a text, got 3"),
            ({"conversations": "hi"}, "bad_field", "must be a list of turns, got 'hi'"),
            ({"conversations": [{"from": "human"}]}, "bad_field", "'conversations[0]' must have 'from' and 'value'"),
            (messages("hi", 4), "bad_field", "'messages[1].content' must be a text or a list of parts, got 4"),
            ({"messages": [{"role": "tool", "content": "x"}]}, "unknown_role", "'messages[0].role' is 'tool'"),
            ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown_role", "is ['user']"),
            ({"messages": []}, "no_turns", "no user and assistant turns"),
            (llava("hi"), "no_answer", "the last turn (0) is the user's"),
            (llava("hi", "yes", "and?"), "no_answer", "the last turn (2)"),
            (llava("hi", " \n"), "empty_answer", "turn 1"),
            (llava("hi", "yes", split="test"), "bad_field", "got 'test'"),
            (llava("hi", "\ud800"), "bad_text", "half a surrogate pair at character 0"),
        ],
    )  # fmt: skip
    def test_says_what_is_wrong(self, value: Any, code: str, message: str) -> None:
        found, text = refusal(value)
        assert found == code
        assert message in text

    def test_turns_must_alternate(self) -> None:
        turns = llava("hi", "yes")["conversations"]
        assert refusal({"conversations": turns[::-1]}) == (
            "role_order",
            "turn 0 has the role 'assistant', expected 'user'",
        )
        assert refusal({"conversations": [turns[0], turns[0]]})[1] == "turn 1 has the role 'user', expected 'assistant'"
        late = {"from": "system", "value": "S"}
        assert refusal({"conversations": [*turns, late]})[1] == "turn 2 has the role 'system', expected 'user'"

    def test_a_named_format_is_held_to(self) -> None:
        assert refusal(messages("hi", "yes"), "llava") == (
            "missing_field",
            "field 'conversations' (format llava) is missing; the row has 'messages'",
        )
        assert refusal(llava("hi", "yes"), "messages")[0] == "missing_field"

    @given(value=json_values)
    def test_any_json_gives_a_sample_or_a_verdict(self, value: Any) -> None:
        for row in (value, {"messages": value}, {"conversations": [{"from": value, "value": value}], "image": value}):
            with pytest.raises(BadRow):
                parse_record(row)

    def test_normalised_record_is_read_again_the_same(self) -> None:
        sample = parse_record(llava("<image>是?", "A dog.", image="a.jpg"))
        assert parse_record(sample.to_json().encode(), "messages") == sample


class TestMediaRoot:
    @pytest.fixture
    def root(self, tmp_path: Path) -> MediaRoot:
        (tmp_path / "media" / "sub").mkdir(parents=True)
        (tmp_path / "media" / "sub" / "a.jpg").touch()
        (tmp_path / "secret.jpg").touch()
        (tmp_path / "media" / "out.jpg").symlink_to(tmp_path / "secret.jpg")
        (tmp_path / "media" / "up").symlink_to(tmp_path)
        (tmp_path / "media" / "in").symlink_to(tmp_path / "media" / "sub")
        (tmp_path / "media" / "loop").symlink_to(tmp_path / "media" / "loop")
        return MediaRoot(tmp_path / "media")

    @pytest.mark.parametrize("given", ["sub/a.jpg", "./sub/a.jpg", "sub/../sub//a.jpg", "in/a.jpg"])
    def test_paths_inside_are_found_in_one_spelling(self, root: MediaRoot, given: str) -> None:
        assert root.locate(given) == "sub/a.jpg"

    def test_an_absolute_path_inside_is_found(self, root: MediaRoot) -> None:
        assert root.locate(str(root.path / "sub" / "a.jpg")) == "sub/a.jpg"

    def test_a_missing_file_is_not_its_business(self, root: MediaRoot) -> None:
        assert root.locate("absent.jpg") == "absent.jpg"

    @pytest.mark.parametrize(
        "given",
        ["../secret.jpg", "sub/../../secret.jpg", "out.jpg", "up/secret.jpg", "/etc/passwd", "..", ".", "../media2/a"],
    )
    def test_nothing_leads_outside(self, root: MediaRoot, given: str) -> None:
        with pytest.raises(BadRow) as caught:
            root.locate(given)
        assert caught.value.code == "path_outside"

    @pytest.mark.parametrize("given", ["http://host/a.jpg", "data:image/png;base64,AAAA", "file:///etc/passwd"])
    def test_an_address_is_not_followed(self, root: MediaRoot, given: str) -> None:
        with pytest.raises(BadRow) as caught:
            root.locate(given)
        assert caught.value.code == "remote_image"

    def test_a_nul_character_is_a_verdict(self, root: MediaRoot) -> None:
        with pytest.raises(BadRow) as caught:
            root.locate("a\0.jpg")
        assert caught.value.code == "bad_path"
