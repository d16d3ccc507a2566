"""Captions of pictures: matched by path, by unique base name, never by order; the trigger."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from grid import write_folder

from trainer.config import DataConfig, Note
from trainer.errors import InputError
from trainer.folder_names import KohyaFolder, kohya_folder
from trainer.sources.archive import open_source
from trainer.sources.captions import (
    Caption,
    find_captions,
)

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
        *,
        trigger: str | None = None,
        identifiers: Sequence[str] = (),
        add_trigger: bool = False,
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
            return find_captions(
                source,
                names,
                data,
                trigger=trigger,
                identifiers=identifiers,
                add_trigger=add_trigger,
            )

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

    found = ask(["a.jpg", "b.jpg"], one_line)

    assert texts_of(found) == {"a.jpg": "A", "b.jpg": "B"}
    assert len(found[1]) == 1
    assert "line 1 of" in messages_of(found)[0]
    assert "holds 2 objects" in messages_of(found)[0]


def test_a_captions_file_may_be_marked_utf_16_as_windows_writes_it(ask: Ask) -> None:
    found = ask(["a.jpg"], rows(("a.jpg", "Zoë")).encode("utf-16"))

    assert texts_of(found) == {"a.jpg": "Zoë"}


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


def test_a_caption_that_is_still_to_be_written_is_the_prompt_for_now_and_no_warning(
    ask: Ask,
) -> None:
    found = ask(["a.jpg", "b.jpg"], rows(("a.jpg", "A")), skip_caption_generation=False)

    assert found[0]["a.jpg"].origin == "file"
    assert found[0]["b.jpg"] == Caption("A photograph of a TOK", "instance_prompt")
    assert found[1] == []


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


def test_lines_that_lack_the_same_are_one_problem(ask: Ask) -> None:
    names = [f"{number}.jpg" for number in range(5)]

    with pytest.raises(InputError) as error:
        ask(names, rows(*((name, "A") for name in names), column="caption"))

    (problem,) = error.value.problems
    assert problem.message.startswith("line 1 of")
    assert problem.message.endswith(
        "has no `text` (it has: caption, file_name); 4 more lines likewise"
    )
    assert problem.hint == "set `caption_column` to the key of the captions"


def test_a_captions_file_that_is_not_there_is_refused_under_its_own_field(ask: Ask) -> None:
    with pytest.raises(InputError) as error:
        ask(["a.jpg"], captions_file_url="/nowhere/captions.jsonl")

    assert error.value.problems[0].field == "captions_file_url"


def test_a_caption_file_of_kohyas_tools_is_a_text_file_beside_the_picture(ask: Ask) -> None:
    found = ask({"a.jpg": "x", "a.caption": "kohya", "b.jpg": "x", "b.caption": "", "b.txt": "B"})

    assert texts_of(found) == {"a.jpg": "kohya", "b.jpg": "B"}
    assert len(found[1]) == 1
    assert "are not used: `b.caption`" in messages_of(found)[0]


def test_a_text_beside_a_picture_that_differs_from_the_captions_file_is_said_to_be_unused(
    ask: Ask,
) -> None:
    files = {"a.jpg": "x", "a.txt": "other", "b.jpg": "x", "b.txt": "same\n", "c.jpg": "x"}

    found = ask(files, rows(("a.jpg", "A"), ("b.jpg", " same "), ("c.jpg", " C")))

    assert texts_of(found) == {"a.jpg": "A", "b.jpg": " same ", "c.jpg": " C"}
    assert messages_of(found) == [
        "text files give these pictures other captions, which are not used: `a.jpg`"
    ]


def test_metadata_among_the_pictures_gives_captions_with_names_from_its_folder(ask: Ask) -> None:
    files = {
        "train/a.jpg": "x",
        "train/deep/b.jpg": "x",
        "train/metadata.jsonl": rows(("deep/b.jpg", "B"), ("a.jpg", "A")),
        "test/a.jpg": "x",
        "test/metadata.jsonl": rows(("./a.jpg", "T")),
    }

    found = ask(files)

    assert found[0] == {
        "train/a.jpg": Caption("A", "metadata"),
        "train/deep/b.jpg": Caption("B", "metadata"),
        "test/a.jpg": Caption("T", "metadata"),
    }
    assert found[1] == []


def test_of_two_metadata_files_the_nearer_one_is_right(ask: Ask) -> None:
    files = {
        "metadata.jsonl": rows(("a.jpg", "far"), ("sub/a.jpg", "far")),
        "a.jpg": "x",
        "sub/a.jpg": "x",
        "sub/metadata.jsonl": rows(("a.jpg", "near")),
    }

    assert texts_of(ask(files)) == {"a.jpg": "far", "sub/a.jpg": "near"}


def test_metadata_goes_before_text_files_and_after_the_captions_file(ask: Ask) -> None:
    files = {"a.jpg": "x", "a.txt": "txt", "metadata.jsonl": rows(("a.jpg", "metadata"))}

    assert texts_of(ask(files)) == {"a.jpg": "metadata"}
    assert texts_of(ask(files, rows(("a.jpg", "file")))) == {"a.jpg": "file"}


def test_the_caption_column_is_looked_for_in_metadata_too(ask: Ask) -> None:
    metadata = '{"file_name": "a.jpg", "text": "short", "long": "a longer text"}'
    files = {"a.jpg": "x", "metadata.jsonl": metadata}

    found = ask(files, caption_column="long")

    assert texts_of(found) == {"a.jpg": "a longer text"}
    assert found[1] == []


def test_a_caption_column_without_any_table_has_no_effect_and_that_is_said(ask: Ask) -> None:
    (note,) = ask(["a.jpg"], caption_column="long")[1]

    assert (note.kind, note.field) == ("ignored", "caption_column")
    assert "no captions_file_url, and no `metadata.jsonl`" in note.message


@pytest.mark.parametrize(
    ("metadata", "field", "says"),
    [
        ("{", "images_data_url", "line 1, column 2 of `set/metadata.jsonl` is not valid JSON"),
        ("", "images_data_url", "`set/metadata.jsonl` is empty"),
        ('{"image": "a.jpg"}', "images_data_url", "has no `file_name` (it has: image)"),
        (
            rows(("a.jpg", "A"), column="prompt"),
            "caption_column",
            "line 1 of `set/metadata.jsonl` has no `text` (it has: file_name, prompt)",
        ),
        (rows(("z.jpg", "A")), "images_data_url", "it names `set/z.jpg`, the pictures are"),
    ],
)
def test_damaged_metadata_is_refused_by_its_name_with_a_way_out(
    ask: Ask, metadata: str, field: str, says: str
) -> None:
    with pytest.raises(InputError) as error:
        ask({"set/a.jpg": "x", "set/metadata.jsonl": metadata})

    (problem,) = error.value.problems
    assert says in problem.message
    assert problem.field == field
    assert problem.hint.endswith(", or take `set/metadata.jsonl` out of the pictures")


def test_metadata_without_any_picture_beside_it_is_refused(ask: Ask) -> None:
    with pytest.raises(InputError, match="it names `b/a.jpg`, no picture lies beside it"):
        ask({"a/a.jpg": "x", "b/metadata.jsonl": rows(("a.jpg", "A"))})


def test_metadata_that_cannot_be_unpacked_is_refused_by_its_name(tmp_path: Path) -> None:
    row = rows(("a.jpg", "A damaged caption"))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a.jpg", b"x")
        archive.writestr("metadata.jsonl", row)
    (tmp_path / "set.zip").write_bytes(packed.getvalue().replace(b"damaged", b"changed", 1))

    with open_source(str(tmp_path / "set.zip")) as source, pytest.raises(InputError) as error:
        find_captions(source, ["a.jpg"], DataConfig(images_data_url="set.zip"))

    assert "`metadata.jsonl` cannot be used: the file is damaged" in str(error.value)


@pytest.mark.parametrize(
    ("folder", "repeats", "caption"),
    [
        ("10_sks dog", 10, "sks dog"),
        ("1_man", 1, "man"),
        ("500_x", 500, "x"),
        ("100_ohwx", 100, "ohwx"),
        ("5_sks_dog", 5, "sks_dog"),
        ("img/10_TOK", 10, "TOK"),
        ("2024_holiday/3_Zoë", 3, "Zoë"),
    ],
)
def test_kohyas_folder_names_hold_repeats_and_a_caption(
    folder: str, repeats: int, caption: str
) -> None:
    name = folder.rpartition("/")[2]

    assert kohya_folder(f"{folder}/a.jpg") == KohyaFolder(name, repeats, caption)


@pytest.mark.parametrize(
    "picture",
    [
        "10_sks dog.jpg",
        "100_0001.jpg",
        "10_sks dog/deeper/a.jpg",
        "2024_holiday/a.jpg",
        "501_x/a.jpg",
        "20240101_party/a.jpg",
        f"{'9' * 5000}_x/a.jpg",
        "12_05_2023/a.jpg",
        "100CANON/a.jpg",
        "100_PANA/a.jpg",
        "101_0615/a.jpg",
        "01_front/a.jpg",
        "0_x/a.jpg",
        "10_/a.jpg",
        "10 dogs/a.jpg",
        "dog_10/a.jpg",
        "a.jpg",
    ],
)
def test_dates_numbered_folders_and_cameras_folders_are_none_of_kohyas(picture: str) -> None:
    assert kohya_folder(picture) is None


def test_a_kohya_folders_name_is_the_caption_of_pictures_without_their_own(ask: Ask) -> None:
    found = ask({"10_sks dog/a.jpg": "x", "10_sks dog/a.txt": "own", "10_sks dog/b.jpg": "x"})

    assert found[0] == {
        "10_sks dog/a.jpg": Caption("own", "txt"),
        "10_sks dog/b.jpg": Caption("sks dog", "folder"),
    }
    assert found[1] == []


def test_captions_without_the_trigger_are_said_where_others_have_it(ask: Ask) -> None:
    captions = rows(("a.jpg", "a TOK"), ("b.jpg", "a tok"), ("c.jpg", "TOKYO"), ("d.jpg", "a man"))

    found = ask(["a.jpg", "b.jpg", "c.jpg", "d.jpg"], captions, trigger="TOK")

    (note,) = found[1]
    assert (note.kind, note.field) == ("warning", "token_abstraction")
    assert note.message == (
        "3 of 4 captions do not have the word `TOK` (1 have it in other letter case), so their "
        "pictures do not teach it; write it into them, or set `add_trigger: true`: "
        "`b.jpg`, `c.jpg`, `d.jpg`"
    )
    assert texts_of(found)["b.jpg"] == "a tok"


@pytest.mark.parametrize(
    ("captions", "trigger", "warned"),
    [
        # Row 55: all of them in other letter case.
        (("a tok", "tok here"), "TOK", True),
        # A style, described in plain words, under a name that nobody chose.
        (("a house by the sea", "a cat"), "TOK", False),
        (("a house by the sea", "a cat"), "TOK2", False),
        # A name that somebody chose.
        (("a house by the sea", "a cat"), "SIDAI", True),
        (("a photo of SIDAI", "SIDAI's cat"), "SIDAI", False),
        (("a house in style of [trigger]", "a cat"), "TOK", True),
    ],
)
def test_that_all_captions_lack_the_trigger_is_said_where_it_was_meant(
    ask: Ask, captions: tuple[str, str], trigger: str, warned: bool
) -> None:
    pairs = zip(["a.jpg", "b.jpg"], captions, strict=True)

    found = ask(["a.jpg", "b.jpg"], rows(*pairs), trigger=trigger)

    assert bool(found[1]) is warned
    assert list(texts_of(found).values()) == list(captions)


def test_a_trigger_in_the_prompt_of_other_pictures_is_meant(ask: Ask) -> None:
    found = ask(
        ["a.jpg", "b.jpg"],
        rows(("a.jpg", "a man")),
        trigger="TOK",
        skip_caption_generation=False,
    )

    assert ["1 of 1 captions" in message for message in messages_of(found)] == [True]


def test_without_captions_of_the_users_own_no_trigger_is_asked_for(ask: Ask) -> None:
    assert ask(["a.jpg"], trigger="SIDAI", add_trigger=True) == (
        {"a.jpg": Caption("A photograph of a TOK", "instance_prompt")},
        [],
    )


def test_another_identifier_does_as_well_as_the_trigger(ask: Ask) -> None:
    captions = rows(("a.jpg", "a TOK"), ("b.jpg", "a TOK1"))

    assert ask(["a.jpg", "b.jpg"], captions, trigger="TOK", identifiers=["TOK", "TOK1"])[1] == []


def test_a_placeholder_of_other_programs_is_said_to_stand_for_nothing(ask: Ask) -> None:
    found = ask(["a.jpg"], rows(("a.jpg", "a photo of [trigger]")), trigger="TOK")

    assert "1 have it as `[trigger]`, which stands for nothing here" in messages_of(found)[0]
    assert texts_of(found) == {"a.jpg": "a photo of [trigger]"}


def test_the_trigger_is_put_into_captions_that_lack_it_where_the_user_wants_it(ask: Ask) -> None:
    files = {
        "a.jpg": "x",
        "a.txt": "a photo of TOK",
        "b.jpg": "x",
        "b.txt": "a photo of tok",
        "5_dog/c.jpg": "x",
        "d.jpg": "x",
        "d.txt": "[trigger] on a hill",
        "e.jpg": "x",
    }

    found = ask(files, trigger="TOK", add_trigger=True, instance_prompt="nothing")

    assert texts_of(found) == {
        "a.jpg": "a photo of TOK",
        "b.jpg": "TOK, a photo of tok",
        "5_dog/c.jpg": "TOK, dog",
        "d.jpg": "TOK on a hill",
        "e.jpg": "nothing",
    }
    assert found[0]["b.jpg"].origin == "txt"
    assert [(n.field, n.message) for n in found[1]][1:] == [
        (
            "add_trigger",
            "`TOK` is put into 3 of 4 captions that lack it: `5_dog/c.jpg`, `b.jpg`, `d.jpg`",
        )
    ]


def test_a_number_of_too_many_digits_is_told_by_its_line(ask: Ask) -> None:
    row = '{"file_name": "a.png", "text": "A", "n": ' + "1" * 5000 + "}"

    with pytest.raises(InputError, match="line 2.*a number has too many digits"):
        ask(["a.png", "b.png"], rows(("b.png", "B")) + row)


def test_half_a_character_is_replaced_and_said(ask: Ask) -> None:
    halves = (
        '{"file_name": "a.png", "text": "A \\ud83d!"}\n{"file_name": "\\ude00.png", "text": ""}'
    )

    found = ask(["a.png", "b.png"], rows(("b.png", "whole \U0001f600")) + halves)

    assert texts_of(found)["a.png"] == "A \ufffd!"
    assert texts_of(found)["b.png"] == "whole \U0001f600"
    assert any("line 2 and 1 more of" in m and "half a character" in m for m in messages_of(found))
    assert all(message.encode() for message in messages_of(found))


def test_half_a_character_in_a_key_can_be_told(ask: Ask) -> None:
    with pytest.raises(InputError, match="it has: file_name, \ufffd") as error:
        ask(["a.png"], '{"file_name": "a.png", "\\ud83d": "A"}')

    assert str(error.value).encode()
