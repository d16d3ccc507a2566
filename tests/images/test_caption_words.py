"""What captioners are asked, and what is made of what they answer."""

from __future__ import annotations

from typing import get_args

import pytest

from trainer.images.caption_words import Mode, finished, instruction

MODES: tuple[Mode, ...] = get_args(Mode)


def plain(raw: str) -> str | None:
    """The caption of an answer, without its trigger."""
    caption = finished(raw, mode="plain", trigger="")
    return None if caption is None else caption[:1].lower() + caption[1:]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_asks_for_one_sentence_and_nothing_else(mode: Mode) -> None:
    asked = instruction(mode)

    assert "one sentence of at most 40 words" in asked
    assert "caption alone" in asked
    assert "{" not in asked


@pytest.mark.parametrize(
    ("mode", "left_out"),
    [
        ("character", ["face", "hair", "eyes", "skin", "body", "age", "sex"]),
        ("product", ["shape", "colour", "material", "print", "brand"]),
        ("style", ["medium", "technique", "palette", "mood", "painting"]),
    ],
)
def test_a_mode_forbids_what_the_new_word_must_learn(mode: Mode, left_out: list[str]) -> None:
    _, _, forbidden = instruction(mode).partition("ever mention")

    assert [word for word in left_out if word not in forbidden.partition("Do tell")[0]] == []


@pytest.mark.parametrize("mode", ["character", "product"])
def test_a_subject_is_called_by_its_trigger_from_the_start(mode: Mode) -> None:
    assert "called TOK and nothing else" in instruction(mode)
    assert instruction(mode).count("Begin with TOK.") == 1


def test_what_was_written_about_tok_serves_any_trigger() -> None:
    raw = "TOK in a red coat, with a dog that licks TOK's hand."

    person = finished(raw, mode="character", trigger="ohwx", class_word="woman")
    nobody = finished(raw, mode="character", trigger="")

    assert person == "a photo of ohwx woman in a red coat, with a dog that licks the woman's hand"
    assert nobody == "The person in a red coat, with a dog that licks the person's hand"


def test_a_word_like_the_name_stays_where_no_name_was_given() -> None:
    caption = finished("A sign that reads TOK.", mode="general", trigger="ohwx")

    assert caption == "ohwx, a sign that reads TOK"


@pytest.mark.parametrize("mode", ["plain", "general"])
def test_the_whole_picture_is_asked_for_without_leaving_anything_out(mode: Mode) -> None:
    assert "ever mention" not in instruction(mode)


@pytest.mark.parametrize(
    ("mode", "raw", "caption"),
    [
        ("plain", "A cup on a table.", "TOK a cup on a table"),
        ("general", "A cup on a table.", "TOK, a cup on a table"),
        ("style", "A cup on a table.", "A cup on a table, in the style of TOK"),
        ("style", "a cup. It rains.", "A cup. It rains, in the style of TOK"),
        ("product", "TOK on a wooden table.", "a photo of TOK on a wooden table"),
        ("product", "The product lies on a shelf.", "a photo of TOK lies on a shelf"),
        ("product", "A white cup on a table.", "a photo of TOK, a white cup on a table"),
        ("character", "TOK sits on a chair.", "a photo of TOK woman sits on a chair"),
        ("character", "TOK woman sits.", "a photo of TOK woman sits"),
        ("character", "A smiling woman in red.", "a photo of TOK woman in red"),
        ("character", "A photo of TOK in red.", "a photo of TOK woman in red"),
        ("character", "Close-up of TOK in red.", "close-up of TOK woman in red"),
        ("character", "Hands on a piano.", "a photo of TOK woman, Hands on a piano"),
    ],
)
def test_the_trigger_stands_where_the_mode_wants_it(mode: Mode, raw: str, caption: str) -> None:
    assert finished(raw, mode=mode, trigger="TOK", class_word="Woman") == caption


def test_a_character_without_a_class_is_the_trigger_alone() -> None:
    caption = finished("A man by the sea.", mode="character", trigger="TOK")

    assert caption == "a photo of TOK by the sea"


@pytest.mark.parametrize("mode", MODES)
def test_a_trigger_that_the_model_wrote_small_is_written_as_given(mode: Mode) -> None:
    caption = finished("a photo of tok on a bench", mode=mode, trigger="TOK")

    assert caption is not None
    assert caption.count("TOK") == 1
    assert "tok" not in caption


@pytest.mark.parametrize("mode", ["plain", "general"])
@pytest.mark.parametrize("trigger", ["man", "TOK"])
def test_an_ordinary_word_that_is_the_trigger_stays_an_ordinary_word(
    mode: Mode, trigger: str
) -> None:
    raw = f"A {trigger} and another {trigger} shake hands."

    caption = finished(raw, mode=mode, trigger=trigger)

    assert caption == f"A {trigger} and another {trigger} shake hands"


def test_a_sentence_about_a_character_begins_with_a_capital() -> None:
    raw = "TOK stands by the sea. TOK's hat is red, and Dr. TOK smiles! TOK waves."

    caption = finished(raw, mode="character", trigger="ohwx", class_word="woman")

    assert caption == (
        "a photo of ohwx woman stands by the sea. The woman's hat is red, and Dr. the woman "
        "smiles! The woman waves"
    )


@pytest.mark.parametrize("mode", ["character", "product", "style"])
def test_the_trigger_never_stands_twice(mode: Mode) -> None:
    raw = "TOK holds a cup while a dog looks at tok, and TOK's hat is on the chair."

    caption = finished(raw, mode=mode, trigger="TOK", class_word="man")

    assert caption is not None
    assert caption.count("TOK") == 1
    assert "tok" not in caption


def test_the_second_time_a_character_is_what_it_is() -> None:
    caption = finished(
        "TOK waves; a dog runs to TOK.", mode="character", trigger="TOK", class_word="Girl"
    )

    assert caption == "a photo of TOK girl waves; a dog runs to the girl"


def test_a_trigger_inside_another_word_is_no_trigger() -> None:
    caption = finished("A tokamak in a hall.", mode="plain", trigger="TOK")

    assert caption == "TOK a tokamak in a hall"


@pytest.mark.parametrize("trigger", ["<s0>", "ohwx.man", "a+b", r"\1", "sks dog"])
def test_a_trigger_of_any_signs_stands_as_it_is(trigger: str) -> None:
    assert (
        finished(f"{trigger} by a wall", mode="general", trigger=trigger) == f"{trigger} by a wall"
    )
    assert finished("by a wall", mode="general", trigger=trigger) == f"{trigger}, by a wall"
    assert finished("a man by a wall", mode="character", trigger=trigger) == (
        f"a photo of {trigger} by a wall"
    )


def test_a_name_keeps_its_capital_behind_the_trigger() -> None:
    assert finished("Paris at night.", mode="general", trigger="TOK") == "TOK, Paris at night"


@pytest.mark.parametrize(
    "raw",
    [
        "a cup on a table",
        "A cup on a table.",
        '"A cup on a table."',
        "“A cup on a table”",
        "'A cup on a table.'",
        '"A cup on a table',
        "Here is a caption: A cup on a table.",
        "Here's a short caption for the image:\n\n**A cup on a table.**",
        "Sure! Here is the caption:\n\nA cup on a table.",
        "Certainly, here is a description of the picture: a cup on a table",
        "Caption: A cup on a table.",
        "**Caption:** A cup on a table.",
        "### Caption\nA cup on a table.".replace("Caption\n", "Caption:\n"),
        "Image description: *A cup on a table.*",
        "ASSISTANT: A cup on a table.",
        "```\nA cup on a table.\n```",
        "```text\nA cup on a table.\n```",
        "- A cup on a table.",
        "1. A cup on a table.",
        "A [cup](http://cups.example) on a `table`.",
        "A cup\non a\r\n\ttable.",
        "a cup on a table .",
        "<think>It is a cup. The user wants one sentence.</think>\n\nA cup on a table.",
        "It is a cup, I think.</think>A cup on a table.",
        "A cup on a table.</s>",
        "A cup on a table.<|im_end|>",
        "The image shows a cup on a table.",
        "This picture depicts a cup on a table.",
        "In this image, there is a cup on a table.",
        "In the photo we can see a cup on a table.",
        "There is a cup on a table.",
        "A cup on a table. Let me know if you want another one!",
        "A cup on a table.\n\nNote: I left out the brand.",
        "A cup on a table. I hope this helps.",
        "A cup on a table. Behind it a window with",
        "A cup on a table. A cup on a table. A cup on a table.",
    ],
)
def test_only_the_caption_is_left_of_an_answer(raw: str) -> None:
    assert plain(raw) == "a cup on a table"


@pytest.mark.parametrize(
    ("raw", "caption"),
    [
        ("A man , with a hat , smiles .", "a man, with a hat, smiles"),
        (
            "Dr. Smith at St. Paul's. It is 5 p.m. there.",
            "dr. Smith at St. Paul's. It is 5 p.m. there",
        ),
        ("A sign that reads “OPEN” in red.", "a sign that reads “OPEN” in red"),
        ('"OPEN" in red on a "CLOSED" sign.', '"OPEN" in red on a "CLOSED" sign'),
        ("A 3.5 inch disk. It is blue.", "a 3.5 inch disk. It is blue"),
        ("A cup. A spoon lies by it. A kn", "a cup. A spoon lies by it"),
        ("A snake_case word on a screen", "a snake_case word on a screen"),
        ("Sure-footed goats on a rock.", "sure-footed goats on a rock"),
        ("Please wait, says a sign.", "please wait, says a sign"),
        ("Rows of red, red, red chairs in a hall.", "rows of red, red, red chairs in a hall"),
        ("A very very very large cat.", "a very very very large cat"),
        ("No image is visible on the blank TV.", "no image is visible on the blank TV"),
        ("Unfortunately named shop.", "unfortunately named shop"),
        ("Sorry! reads a sign above a door.", "sorry! reads a sign above a door"),
        ("A very, very old tree.", "a very, very old tree"),
        ("Un café au lait à Paris.", "un café au lait à Paris"),
    ],
)
def test_what_belongs_to_a_caption_stays(raw: str, caption: str) -> None:
    assert plain(raw) == caption


def test_a_style_learns_the_medium_so_that_captions_keep_quiet_about_it() -> None:
    caption = finished(
        "This is a loose watercolor painting of a boat on a lake.", mode="style", trigger="TOK"
    )

    assert caption == "A boat on a lake, in the style of TOK"
    other = finished("A watercolor painting of a boat.", mode="general", trigger="TOK")
    assert other == "TOK, a watercolor painting of a boat"


@pytest.mark.parametrize(
    ("raw", "caption"),
    [
        ("A photo of a dog.", "A dog"),
        ("A pen and ink drawing of a fox.", "A fox"),
        ("The black and white photograph of a mill", "A mill"),
        ("A vibrant, highly detailed digital illustration depicting a city.", "A city"),
        ("A 3D render of a fox", "A fox"),
    ],
)
def test_a_medium_is_known_by_the_words_before_it(raw: str, caption: str) -> None:
    assert finished(raw, mode="style", trigger="") == caption


@pytest.mark.parametrize(
    "raw",
    [
        "A woman holding a photo of her dog in a park",
        "A girl drawing with chalk on the pavement",
        "A boy taking a picture of a tower",
        "A man in a long shot with trees behind him",
        "A wall with a large painting of a ship",
    ],
)
def test_a_subject_with_a_picture_of_something_is_kept(raw: str) -> None:
    assert finished(raw, mode="style", trigger="") == raw


@pytest.mark.parametrize(
    "raw",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, but I cannot identify people in images.",
        "Sorry, I am not able to describe this person.",
        "I cannot assist with this request.",
        "I'm unable to see the image.",
        "As an AI language model, I have no eyes.",
        "Unfortunately, no image was attached.",
        "Please provide the image that you would like me to describe.",
        "No image was provided.",
        "No image has been uploaded.",
        "Sorry.",
        "Sorry. I can't describe it.",
        "Unfortunately, I cannot see it.",
        "<think>Should I?</think> I won't describe this.",
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_a_refusal_is_no_caption(raw: str, mode: Mode) -> None:
    assert finished(raw, mode=mode, trigger="TOK") is None


@pytest.mark.parametrize(
    "raw",
    [
        "a woman with a with a with a with a with a",
        "red red red red red",
        "a cat and a dog and a cat and a dog and a cat and a dog and a cat and a dog",
        "the man the table the man a table the man the man table the the man a man "
        "the table man the table a man the",
    ],
)
def test_a_loop_is_no_caption(raw: str) -> None:
    assert finished(raw, mode="plain", trigger="TOK") is None


def test_what_was_said_before_a_loop_is_kept() -> None:
    raw = "A cup on a table. It is it is it is it is it is it is. A spoon."

    assert plain(raw) == "a cup on a table"


@pytest.mark.parametrize(
    "raw", ["", "  \n", "...", "<think>so many thoughts", "Caption:", "!?", '""']
)
def test_an_empty_answer_is_no_caption(raw: str) -> None:
    assert finished(raw, mode="plain", trigger="TOK") is None


def test_a_long_answer_ends_with_the_last_sentence_that_fits() -> None:
    sentences = [" ".join(f"Word{n}x{m}" for m in range(11)) + "." for n in range(9)]

    caption = plain(" ".join(sentences))

    # Five sentences of eleven words are 55, six are 66.
    assert caption is not None
    assert caption.split()[-1] == "Word4x10"


def test_a_single_sentence_that_is_too_long_ends_at_a_comma() -> None:
    raw = " ".join(f"thing{n}," if n == 44 else f"thing{n}" for n in range(90))

    caption = plain(raw)

    assert caption is not None
    assert caption.split()[-1] == "thing44"


def test_the_same_answer_gives_the_same_caption() -> None:
    raw = "Here is a caption: A cup on a table."

    assert finished(raw, mode="style", trigger="TOK") == finished(raw, mode="style", trigger="TOK")
