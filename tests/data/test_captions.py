"""Matching captions to pictures: by path, by unique base name, never by order."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from grid import write_folder

from trainer.config import DataConfig, Note
from trainer.data.archive import open_source
from trainer.data.captions import Caption, find_captions
from trainer.errors import InputError

Found = tuple[dict[str, Caption], list[Note]]
Ask = Callable[..., Found]


def rows(*pairs: tuple[str, str], column: str = "text") -> str:
    return "".join(json.dumps({"file_name": name, column: text}) + "\n" for name, text in pairs)


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """Finds captions among pictures, with an optional captions file."""

    def ask(
        pictures: list[str] | dict[str, str | bytes],
        captions: str | bytes | None = None,
        **options: object,
    ) -> Found:
        texts = pictures if isinstance(pictures, dict) else {}
        folder = write_folder(tmp_path / "set", dict.fromkeys(pictures, "x") | texts)
        if captions is not None:
            content = captions.encode() if isinstance(captions, str) else captions
            (tmp_path / "captions.jsonl").write_bytes(content)
            options["captions_file_url"] = str(tmp_path / "captions.jsonl")
        data = DataConfig(images_data_url=str(folder), **options)
        with open_source(str(folder)) as source:
            names = [entry.name for entry in source.entries() if entry.name.endswith("g")]
            return find_captions(source, names, data)

    return ask


def texts_of(result: Found) -> dict[str, str]:
    return {name: caption.text for name, caption in result[0].items()}


def messages_of(result: Found) -> list[str]:
    return [note.message for note in result[1]]


def test_rows_are_matched_by_name_whatever_their_order(ask: Ask) -> None:
    found = ask(["a.png", "b.png", "c.png"], rows(("c.png", "C"), ("a.png", "A"), ("b.png", "B")))

    assert texts_of(found) == {"a.png": "A", "b.png": "B", "c.png": "C"}
    assert found[0]["a.png"].origin == "file"
    assert found[1] == []


def test_equal_base_names_are_told_apart_by_their_path(ask: Ask) -> None:
    found = ask(["a/1.jpg", "b/1.jpg"], rows(("b/1.jpg", "B"), ("./a/1.jpg", "A")))

    assert texts_of(found) == {"a/1.jpg": "A", "b/1.jpg": "B"}


def test_a_base_name_is_enough_where_it_is_unique(ask: Ask) -> None:
    found = ask(["deep/a.jpg", "b.jpg"], rows(("a.jpg", "A"), ("images\\b.jpg", "B")))

    assert texts_of(found) == {"deep/a.jpg": "A", "b.jpg": "B"}


def test_an_exact_path_goes_before_a_base_name(ask: Ask) -> None:
    found = ask(["a.jpg"], rows(("other/a.jpg", "other"), ("a.jpg", "right")))

    assert texts_of(found) == {"a.jpg": "right"}
    assert "`other/a.jpg`" in messages_of(found)[0]


def test_a_name_is_the_same_in_either_unicode_form(ask: Ask) -> None:
    found = ask(["Zoe\u0308.jpg"], rows(("Zo\u00eb.jpg", "umlaut")))

    assert list(texts_of(found).values()) == ["umlaut"]


def test_caption_column_chooses_the_key(ask: Ask) -> None:
    both = '{"file_name": "a.jpg", "text": "plain", "long": "a longer text"}\n'

    assert texts_of(ask(["a.jpg"], both)) == {"a.jpg": "plain"}
    assert texts_of(ask(["a.jpg"], both, caption_column="long")) == {"a.jpg": "a longer text"}


def test_a_captions_file_may_be_a_data_uri(ask: Ask) -> None:
    uri = "data:;base64," + base64.b64encode(rows(("a.jpg", "A")).encode()).decode()

    assert texts_of(ask(["a.jpg"], captions_file_url=uri)) == {"a.jpg": "A"}


def test_a_byte_order_mark_blank_lines_and_crlf_are_tolerated(ask: Ask) -> None:
    text = rows(("a.jpg", "A"), ("b.jpg", "B")).replace("\n", "\r\n\r\n")

    found = ask(["a.jpg", "b.jpg"], b"\xef\xbb\xbf" + text.encode())

    assert texts_of(found) == {"a.jpg": "A", "b.jpg": "B"}


def test_several_objects_on_one_line_are_read(ask: Ask) -> None:
    one_line = rows(("a.jpg", "A"), ("b.jpg", "B")).replace("\n", " ")

    assert texts_of(ask(["a.jpg", "b.jpg"], one_line)) == {"a.jpg": "A", "b.jpg": "B"}


def test_a_text_file_beside_the_picture_is_its_caption(ask: Ask) -> None:
    files = {
        "a.jpg": "x",
        "a.txt": "  same stem \n",
        "b.jpg": "x",
        "b.jpg.txt": "whole name",
        "sub/a.jpg": "x",
        "sub/a.TXT": "in its folder",
    }

    found = ask(files)

    assert texts_of(found) == {
        "a.jpg": "same stem",
        "b.jpg": "whole name",
        "sub/a.jpg": "in its folder",
    }
    assert {caption.origin for caption in found[0].values()} == {"txt"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_files_may_be_of_any_unicode_encoding(ask: Ask, encoding: str) -> None:
    found = ask({"a.jpg": "x", "a.txt": "Zoë".encode(encoding)})

    assert texts_of(found) == {"a.jpg": "Zoë"}
    assert found[1] == []


def test_a_text_file_in_the_old_windows_encoding_is_read_and_said(ask: Ask) -> None:
    found = ask({"a.jpg": "x", "a.txt": "Zoë".encode("cp1252")})

    assert texts_of(found) == {"a.jpg": "Zoë"}
    assert "Windows-1252" in messages_of(found)[0]


def test_the_captions_file_goes_before_the_text_file_and_that_before_the_prompt(ask: Ask) -> None:
    files = {"a.jpg": "x", "a.txt": "txt a", "b.jpg": "x", "b.txt": "txt b", "c.jpg": "x"}

    found = ask(files, rows(("a.jpg", "row a")), instance_prompt="the prompt")

    assert found[0] == {
        "a.jpg": Caption("row a", "file"),
        "b.jpg": Caption("txt b", "txt"),
        "c.jpg": Caption("the prompt", "instance_prompt"),
    }
    assert any(
        "1 of 3 pictures" in message and "`c.jpg`" in message for message in messages_of(found)
    )


def test_without_captions_every_picture_gets_the_instance_prompt(ask: Ask) -> None:
    found = ask(["a.jpg", "b.jpg"], instance_prompt="A drawing of a TOK")

    assert texts_of(found) == dict.fromkeys(["a.jpg", "b.jpg"], "A drawing of a TOK")
    assert found[1] == []


@pytest.mark.parametrize("empty", ['""', '"  "', "null"])
def test_an_empty_caption_counts_as_none(ask: Ask, empty: str) -> None:
    row = '{"file_name": "a.jpg", "text": ' + empty + "}\n"

    found = ask({"a.jpg": "x", "b.jpg": "x", "b.txt": " \n"}, row, instance_prompt="prompt")

    assert texts_of(found) == {"a.jpg": "prompt", "b.jpg": "prompt"}


def test_captions_without_a_picture_are_a_warning(ask: Ask) -> None:
    found = ask({"a.jpg": "x", "zz.txt": "lost"}, rows(("a.jpg", "A"), ("zzz.jpg", "lost")))

    assert texts_of(found) == {"a.jpg": "A"}
    assert any("`zz.txt`" in message for message in messages_of(found))
    assert any("`zzz.jpg`" in message for message in messages_of(found))


def test_a_picture_without_caption_is_refused_where_captions_should_be_generated(ask: Ask) -> None:
    with pytest.raises(InputError, match="captioning is not available yet") as error:
        ask(["a.jpg", "b.jpg"], rows(("a.jpg", "A")), skip_caption_generation=False)

    assert error.value.problems[0].field == "skip_caption_generation"
    assert "`b.jpg`" in error.value.problems[0].message


def test_nothing_is_to_be_generated_where_every_picture_has_a_caption(ask: Ask) -> None:
    found = ask(["a.jpg"], rows(("a.jpg", "A")), skip_caption_generation=False)

    assert texts_of(found) == {"a.jpg": "A"}


@pytest.mark.parametrize(
    ("captions", "field", "says"),
    [
        ("", "captions_file_url", "is empty"),
        ('[{"file_name": "a.jpg"}]', "captions_file_url", "is one JSON list"),
        ("file_name,text\na.jpg,A\n", "captions_file_url", "line 1, column 1 of"),
        (rows(("a.jpg", "A")) + '{"file_name": "a', "captions_file_url", "line 2, column"),
        ("[" * 100_000, "captions_file_url", "is one JSON list"),
        ('{"a":' * 100_000, "captions_file_url", "nested too deeply"),
        ('"text"', "captions_file_url", "line 1 of"),
        ('{"text": "A"}', "captions_file_url", "has no `file_name` (it has: text)"),
        ('{"file_name": 5, "text": "A"}', "captions_file_url", "has the `file_name` 5"),
        ('{"file_name": "a.jpg", "text": 5}', "captions_file_url", "has the `text` 5"),
        (
            rows(("a.jpg", "A"), column="caption"),
            "caption_column",
            "has no `text` (it has: caption",
        ),
        (rows(("a.jpg", "A"), ("a.jpg", "B")), "captions_file_url", "a second caption"),
        (rows(("x/a.jpg", "A"), ("y/a.jpg", "B")), "captions_file_url", "a second caption"),
        (rows(("1.jpg", "A")), "captions_file_url", "`1.jpg` fits `c/1.jpg`, `d/1.jpg`"),
        (rows(("z.jpg", "A")), "captions_file_url", "none of the 1 captions"),
        (b"\xff\xff", "captions_file_url", "is not UTF-8 (byte 0)"),
    ],
)
def test_an_unusable_captions_file_is_refused_with_its_reason(
    ask: Ask, captions: str | bytes, field: str, says: str
) -> None:
    with pytest.raises(InputError) as error:
        ask(["a.jpg", "c/1.jpg", "d/1.jpg"], captions)

    assert says in str(error.value)
    assert error.value.problems[0].field == field


def test_every_bad_line_is_named_at_once(ask: Ask) -> None:
    with pytest.raises(InputError) as error:
        ask(["a.jpg"], '{"text": "A"}\nnonsense\n' + rows(("a.jpg", "A")))

    assert len(error.value.problems) == 2


@pytest.mark.parametrize("location", ["/nowhere/captions.jsonl", "https://example.com/c.jsonl"])
def test_a_captions_file_that_is_not_there_is_refused_under_its_own_field(
    ask: Ask, location: str
) -> None:
    with pytest.raises(InputError) as error:
        ask(["a.jpg"], captions_file_url=location)

    assert error.value.problems[0].field == "captions_file_url"
