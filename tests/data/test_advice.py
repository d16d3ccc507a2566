"""What is said of a set of pictures as a whole."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from skimage import data

from trainer.data.advice import (
    Advice,
    Line,
    Subject,
    advise,
    angle_of,
    copies,
    distance_of,
    recommended_size,
    twins,
)
from trainer.images.faces import Face
from trainer.images.findings import Remark
from trainer.images.quality import Measures, measure

GOOD = Measures(
    sharpness=800,
    brightness=120,
    contrast=60,
    overexposed=0,
    black=0,
    fingerprint="0" * 64,
    mirrored="f" * 64,
)


def photograph(name: str) -> Image.Image:
    return Image.fromarray(getattr(data, name)())


def seen(name: str, image: Image.Image) -> Subject:
    """A picture that is really measured."""
    return Subject(name, (1024, 1024), name, measure(image))


def plain(count: int) -> list[Subject]:
    """Good pictures that have nothing in common: each fingerprint differs in half of its bits."""
    found = []
    for number in range(count):
        bits = "".join("f" if place >> bit & 1 else "0" for bit in [number] for place in range(64))
        unlike = Measures(**{**GOOD.model_dump(), "fingerprint": bits, "mirrored": "3" * 64})
        found.append(Subject(f"{number}.jpg", (1024, 1024), str(number), unlike))
    return found


def line(advice: Advice, topic: str) -> Line:
    (found,) = [line for line in advice.lines if line.topic == topic]
    return found


def face(height: float = 300, *, yaw: float = 0, roll: float = 0) -> Face:
    """A face turned by so many degrees, its nose 0.9 times as far out as an eye is to the side."""
    turn, tilt = math.radians(yaw), math.radians(roll)
    flat = [(-math.cos(turn), 0.0), (math.cos(turn), 0.0), (0.9 * math.sin(turn), 1.0)]
    points = [
        (x * math.cos(tilt) - y * math.sin(tilt), x * math.sin(tilt) + y * math.cos(tilt))
        for x, y in flat
    ]
    landmarks = (*points, points[2], points[2])
    return Face(left=10, top=10, width=200, height=height, score=0.9, landmarks=landmarks)


@pytest.mark.parametrize(
    ("count", "level"), [(2, "act"), (9, "act"), (10, "look"), (19, "look"), (20, "ok"), (60, "ok")]
)
def test_the_number_of_pictures_is_judged_by_the_guide(count: int, level: str) -> None:
    """Row 46; the guide: at least 10 to 15, recommended 20 to 30."""
    subjects = [replace(plain(1)[0], name=str(n), sha256=str(n)) for n in range(count)]

    found = line(advise(subjects), "count")

    few = "only " if count < 10 else ""
    assert (found.found, found.level) == (f"{few}{count} pictures", level)
    assert found.advice == "at least 10, better 20 to 30"


def test_a_good_set_without_faces_gets_one_line_a_topic_and_no_word_of_faces() -> None:
    advice = advise(plain(6))

    assert [(line.topic, line.level) for line in advice.lines] == [
        ("count", "act"),
        ("resolution", "ok"),
        ("sharpness", "ok"),
        ("light", "ok"),
        ("copies", "ok"),
        ("near copies", "ok"),
        ("warnings", "ok"),
    ]


def test_pictures_smaller_than_trained_are_counted_and_the_smallest_named() -> None:
    """Row 40."""
    subjects = [replace(subject, target=(768, 768)) for subject in plain(3)]
    subjects[1] = replace(subjects[1], size=(700, 900))
    subjects[2] = replace(subjects[2], size=(120, 120))

    found = line(advise(subjects), "resolution")

    assert found.level == "act"
    assert found.found == (
        "2 of 3 smaller than trained; the smallest is `2.jpg`, 120x120, to be enlarged 6.4 times"
    )


@pytest.mark.parametrize(("height", "level"), [(1023, "ok"), (976, "ok"), (970, "look")])
def test_what_would_be_enlarged_hardly_at_all_is_large_enough(height: int, level: str) -> None:
    """1024 / 976 is 1.049, and 1024 / 970 is 1.056."""
    subject = replace(plain(1)[0], size=(height, 1024))

    found = line(advise([subject]), "resolution")

    assert found.level == level
    assert "1.0 times" not in found.found


def test_without_a_trained_size_pictures_are_compared_with_the_guides() -> None:
    found = line(advise([replace(plain(1)[0], size=(800, 1200))]), "resolution")

    assert (found.level, found.advice) == ("look", "1024x1024 or larger")
    assert found.found.startswith("1 of 1 smaller than 1024x1024; the smallest is `0.jpg`")


@pytest.mark.parametrize(
    ("priority", "found", "advice"),
    [
        # BFL's largest is a megapixel; `speed` trains half of a side.
        ("speed", "all large enough", "512x512 or larger"),
        ("quality", "2 of 2 smaller than 1024x1024", "1024x1024 or larger"),
        ("high_res_only", "2 of 2 smaller than 1024x1024", "1024x1024 or larger"),
        (None, "2 of 2 smaller than 1024x1024", "1024x1024 or larger"),
    ],
)
def test_pictures_should_be_as_large_as_the_largest_that_a_priority_trains(
    priority: str | None, found: str, advice: str
) -> None:
    recommended = recommended_size(priority)
    small = [replace(one, size=(512, 600), recommended=recommended) for one in plain(2)]

    told = line(advise(small), "resolution")

    assert (told.found.partition(";")[0], told.advice) == (found, advice)


def test_a_blurred_picture_is_named() -> None:
    """Row 41."""
    astronaut = photograph("astronaut")
    soft = seen("soft.jpg", astronaut.filter(ImageFilter.GaussianBlur(8)))

    found = line(advise([seen("sharp.jpg", astronaut), soft]), "sharpness")

    assert (found.found, found.level) == ("`soft.jpg` blurred", "act")


def test_a_picture_much_softer_than_the_rest_is_named() -> None:
    """A blur of 2 pixels leaves 105 of the cup's 1709: not soft by itself."""
    sharp = [seen(f"{turn}.jpg", photograph("coffee").rotate(90 * turn)) for turn in range(4)]
    softer = seen("softer.jpg", photograph("coffee").filter(ImageFilter.GaussianBlur(2)))

    found = line(advise([*sharp, softer]), "sharpness")

    assert (found.found, found.level) == ("`softer.jpg` much softer than the rest", "look")


def test_two_pictures_are_too_few_to_call_one_softer_than_the_rest() -> None:
    softer = seen("softer.jpg", photograph("coffee").filter(ImageFilter.GaussianBlur(2)))

    found = line(advise([seen("a.jpg", photograph("coffee")), softer]), "sharpness")

    assert found.level == "ok"


def test_dark_and_flat_pictures_are_named_and_not_called_blurred() -> None:
    """Row 42."""
    dark = seen("dark.jpg", ImageEnhance.Brightness(photograph("astronaut")).enhance(0.1))
    flat = seen("flat.png", Image.new("RGB", (400, 400), "red"))

    advice = advise([seen("a.jpg", photograph("cat")), dark, flat])

    assert line(advice, "light").found == "`dark.jpg` very dark; `flat.png` one flat colour"
    assert line(advice, "light").level == "act"
    assert line(advice, "sharpness").level == "ok"


def test_a_product_on_white_is_no_more_than_worth_a_look() -> None:
    """Row 33."""
    image = Image.new("RGB", (1000, 1000), "white")
    image.paste(photograph("coffee").resize((500, 500)), (0, 0))

    found = line(advise([seen("cup.png", image)]), "light")

    assert (found.found, found.level) == ("`cup.png` mostly pure white", "look")


def test_the_same_file_under_another_name_is_named_once() -> None:
    """Row 44."""
    first = seen("g1.jpg", photograph("cat"))
    again = replace(first, name="copy of g1.jpg")

    advice = advise([first, again])

    assert copies([(s.name, s.sha256) for s in (first, again)]) == (("copy of g1.jpg", "g1.jpg"),)
    assert line(advice, "copies").found == "`copy of g1.jpg` is the same file as `g1.jpg`"
    assert line(advice, "copies").level == "act"
    assert line(advice, "near copies").level == "ok"


def test_near_copies_and_mirrored_ones_are_named() -> None:
    """Row 45."""
    cat, cup = photograph("cat"), photograph("coffee")
    subjects = [
        seen("g1.jpg", cat),
        seen("g2.jpg", cup),
        seen("n.jpg", cat.resize((225, 150))),
        seen("m.jpg", ImageOps.mirror(cup)),
    ]

    assert twins(subjects) == (("n.jpg", "g1.jpg", False), ("m.jpg", "g2.jpg", True))
    found = line(advise(subjects), "near copies")
    assert found.found == "`n.jpg` is nearly `g1.jpg`; `m.jpg` is nearly `g2.jpg` mirrored"
    assert found.level == "look"


def test_different_photographs_and_flat_pictures_are_no_near_copies() -> None:
    subjects = [seen(name, photograph(name)) for name in ("astronaut", "cat", "coffee", "rocket")]
    subjects += [seen(colour, Image.new("RGB", (64, 64), colour)) for colour in ("red", "blue")]

    assert twins(subjects) == ()


def test_near_copies_are_found_over_any_number_of_pictures() -> None:
    rng = random.Random(0)
    prints = [rng.getrandbits(256) for _ in range(1100)]
    # Each differs in so many bits: 25 of 256 are nearly the same, 26 are not.
    bits = {40: (3, 25), 700: (30, 26), 800: (600, 20), 1099: (0, 25)}
    for place, (first, count) in bits.items():
        prints[place] = prints[first] ^ ((1 << count) - 1)
    mirrored = [rng.getrandbits(256) for _ in prints]
    mirrored[513] = prints[900] ^ 1
    subjects = [
        Subject(f"{place}", (1024, 1024), f"{place}", measures)
        for place, measures in enumerate(
            GOOD.model_copy(update={"fingerprint": f"{own:064x}", "mirrored": f"{other:064x}"})
            for own, other in zip(prints, mirrored, strict=True)
        )
    ]

    assert twins(subjects) == (
        ("40", "3", False),
        ("800", "600", False),
        ("900", "513", True),
        ("1099", "0", False),
    )
    assert twins(subjects[:1]) == ()


def test_one_picture_is_a_picture() -> None:
    assert line(advise(plain(1)), "count").found == "only 1 picture"


def test_many_copies_are_not_all_named() -> None:
    subjects = [replace(plain(1)[0], name=f"{number}.jpg") for number in range(10)]

    assert line(advise(subjects), "copies").found.endswith("; and 6 more")


def test_pictures_with_warnings_are_named() -> None:
    subjects = plain(3)
    subjects[1] = replace(subjects[1], remarks=(Remark.warning("has 2 frames"),))
    subjects[2] = replace(subjects[2], remarks=(Remark.info("is turned upright"),))

    found = line(advise(subjects), "warnings")

    assert (found.found, found.level) == ("1 of 3: `1.jpg`", "look")


def test_where_no_picture_shows_a_face_the_option_is_named() -> None:
    """Row 65."""
    advice = advise([replace(subject, faces=()) for subject in plain(3)])

    found = line(advice, "faces")
    assert (found.found, found.level) == ("no picture shows one", "act")
    assert found.advice == "set `face_aware_cropping: false` if you do not train a person"
    assert {"people", "angle", "distance"}.isdisjoint(line.topic for line in advice.lines)


def test_pictures_without_a_face_and_group_photographs_are_named() -> None:
    """Rows 65 and 66."""
    subjects = [replace(subject, faces=(face(),)) for subject in plain(3)]
    subjects[1] = replace(subjects[1], faces=())
    subjects[2] = replace(subjects[2], faces=(face(), face(90)))

    advice = advise(subjects)

    assert line(advice, "faces").found == "none in 1 of 3: `1.jpg`"
    assert line(advice, "people").found == "several in 1 of 3: `2.jpg`"
    assert line(advice, "people").level == line(advice, "faces").level == "look"


def test_a_picture_whose_faces_were_not_looked_for_does_not_count() -> None:
    subjects = plain(2)
    subjects[0] = replace(subjects[0], faces=(face(),))

    assert line(advise(subjects), "faces").level == "ok"


@pytest.mark.parametrize("roll", [0, 30, -90])
@pytest.mark.parametrize(
    ("yaw", "angle"),
    [
        (0, "front"),
        (15, "front"),
        (-15, "front"),
        (30, "three-quarter"),
        (-40, "three-quarter"),
        (60, "side"),
        (-80, "side"),
    ],
)
def test_the_angle_is_read_off_the_nose_however_the_head_is_tilted(
    yaw: float, roll: float, angle: str
) -> None:
    landmarks = face(yaw=yaw, roll=roll).landmarks

    assert landmarks is not None
    assert angle_of(landmarks) == angle


def test_eyes_in_one_place_are_seen_from_the_side() -> None:
    assert angle_of([(5, 5), (5, 5), (9, 7)]) == "side"


@pytest.mark.parametrize(
    ("height", "distance"),
    [(360, "close-up"), (350, "medium"), (120, "medium"), (119, "full"), (20, "full")],
)
def test_the_distance_is_read_off_the_height_of_the_face(height: float, distance: str) -> None:
    assert distance_of(height, 1000) == distance


def test_a_set_of_front_views_from_one_distance_lacks_variety() -> None:
    advice = advise([replace(subject, faces=(face(),)) for subject in plain(4)])

    assert line(advice, "angle") == Line(
        "angle",
        "4 front, 0 three-quarter, 0 side",
        "a mix: front 40 %, three-quarter 30 %, side 20 %",
        "look",
    )
    assert line(advice, "distance").found == "0 close-up, 4 medium, 0 full"
    assert line(advice, "distance").level == "look"


def test_a_set_from_all_sides_and_distances_is_all_right() -> None:
    faces = [face(500), face(300, yaw=30), face(80, yaw=70)]
    subjects = [replace(s, faces=(f,)) for s, f in zip(plain(3), faces, strict=True)]

    advice = advise(subjects)

    assert line(advice, "angle").found == "1 front, 1 three-quarter, 1 side"
    assert line(advice, "angle").level == line(advice, "distance").level == "ok"


def test_faces_without_landmarks_have_a_distance_but_no_angle() -> None:
    bare = face().model_copy(update={"landmarks": None})

    topics = [line.topic for line in advise([replace(plain(1)[0], faces=(bare,))]).lines]

    assert "distance" in topics
    assert "angle" not in topics


def test_the_distance_is_in_what_is_used_of_the_picture() -> None:
    """A square of 1.4 faces cut out of any picture is a close-up."""
    subject = replace(plain(1)[0], faces=(face(300),), size=(420, 420))

    assert line(advise([subject]), "distance").found == "1 close-up, 0 medium, 0 full"


def test_advice_is_json_and_says_how_urgent_it_is_as_a_whole() -> None:
    found = json.loads(json.dumps(advise(plain(3)).as_dict()))

    assert found["level"] == "act"
    assert found["lines"][0] == {
        "topic": "count",
        "found": "only 3 pictures",
        "advice": "at least 10, better 20 to 30",
        "level": "act",
    }


def test_nothing_at_all_gets_advice_too() -> None:
    assert line(advise([]), "count").level == "act"
