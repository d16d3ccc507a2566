"""Pictures at the sizes that a priority asks for: half, three quarters and all of a side."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from grid import (
    bytes_of,
    encoded,
    grid_bytes,
    picture_set,
    plan_of,
    prepared,
    seen,
    write_folder,
)
from PIL import Image
from snapshots import skip_reading_back, stopped_after
from tiny import TWO_LAYERS, compose, configuration, digests, train

from trainer import base_model
from trainer import estimate as forecast
from trainer.config import DataConfig, ModelConfig, TrainingConfig
from trainer.config_files import as_layers, parse_yaml, write_config
from trainer.data import means, overview
from trainer.data.buckets import bucket_sizes, largest_side, native_side, smaller_shapes
from trainer.data.dataset import Dataset
from trainer.data.debug import trained_examples
from trainer.data.plan import Plan, Portion, Slot
from trainer.data.prepared import Example, Prepared, earlier_index
from trainer.data.report import inspect
from trainer.errors import InputError
from trainer.images.crop import face_window
from trainer.images.faces import Face
from trainer.machine import completed
from trainer.resolve import Layer, resolve
from trainer.training import Training

QUALITY = {"priority": "quality", "enable_bucket": True}


@pytest.fixture
def grids(tmp_path: Path) -> Path:
    """One upright picture and one across."""
    files = {"a.png": grid_bytes(192, 96, blue=10), "b.png": grid_bytes(96, 192, blue=20)}
    return write_folder(tmp_path / "set", files)


@pytest.mark.parametrize(
    ("priority", "native", "sides"),
    [
        ("speed", 1024, [512]),
        ("quality", 1024, [1024, 768, 512]),
        ("high_res_only", 1024, [1024]),
        (None, 1024, [1024]),
        ("speed", 768, [384]),
        # In steps of 64, as buckets are; below 256 in steps of 16.
        ("quality", 512, [512, 384, 256]),
        ("quality", 640, [640, 448, 320]),
        ("quality", 64, [64, 48, 32]),
    ],
)
def test_sides_are_shares_of_the_base_models_own(
    priority: str | None, native: int, sides: list[int]
) -> None:
    largest = largest_side(native, priority)

    smaller = smaller_shapes(largest, largest, priority)

    assert [largest, *(width for width, _ in smaller)] == sides
    assert all(width == height for width, height in smaller)
    assert native_side(largest, priority) == native


@pytest.mark.parametrize("priority", ["speed", "quality", "high_res_only"])
def test_no_size_exceeds_a_megapixel_and_every_side_suits_packed_latents(priority: str) -> None:
    side = largest_side(1024, priority)
    shapes = [(side, side), *smaller_shapes(side, side, priority)]

    sizes = [size for shape in shapes for size in bucket_sizes(*shape)]

    assert max(height * width for height, width in sizes) <= 1024 * 1024
    assert {length % 16 for size in sizes for length in size} == {0}


def test_each_picture_is_prepared_once_and_an_epoch_shows_it_at_each_size(
    grids: Path, tmp_path: Path
) -> None:
    _, examples = prepared(picture_set(grids, **QUALITY), tmp_path / "prepared")

    # By hand: aspect 2 at 64², 48² and 32², in steps of 16.
    assert [(e.name, e.scale, e.target) for e in examples] == [
        ("a.png", 0, (80, 48)),
        ("a.png", 1, (64, 32)),
        ("a.png", 2, (48, 16)),
        ("b.png", 0, (48, 80)),
        ("b.png", 1, (32, 64)),
        ("b.png", 2, (16, 48)),
    ]
    assert len(list((tmp_path / "prepared").glob("0??.png"))) == 2
    for example in examples:
        assert all(own >= seen for own, seen in zip(example.size, example.target, strict=True))


def numbered(examples: tuple[Example, ...]) -> list[Example]:
    return [Example(**{**vars(e), "number": place}) for place, e in enumerate(examples)]


def data_set(examples: tuple[Example, ...], data: DataConfig, batch_size: int = 1) -> Dataset:
    own = numbered(examples)
    plan = plan_of(len(own), batch_size=batch_size, sizes=tuple(e.target for e in own))
    return Dataset(own, plan, data, with_pixels=True)


def test_batches_have_one_size_and_pixels_as_large_as_it(grids: Path, tmp_path: Path) -> None:
    wanted = picture_set(grids, **QUALITY)
    _, examples = prepared(wanted, tmp_path / "prepared")
    dataset = data_set(examples, wanted.data, batch_size=2)

    shown: Counter[tuple[int, int]] = Counter()
    for step in range(dataset.plan.steps_per_epoch):
        for batch in dataset[step]:
            ((height, width),) = {tuple(size) for size in batch.geometry["target_size"].tolist()}
            assert batch.pixels.shape[2:] == (height, width)
            shown[height, width] += len(batch.numbers)

    # Of each size there is one picture, which fills its batch.
    assert shown == dict.fromkeys([(80, 48), (48, 80), (64, 32), (32, 64), (48, 16), (16, 48)], 2)


def test_smaller_sizes_show_the_same_of_a_picture(grids: Path, tmp_path: Path) -> None:
    wanted = picture_set(grids, priority="quality", enable_bucket=False)
    _, examples = prepared(wanted, tmp_path / "prepared")
    dataset = data_set(examples, wanted.data)

    for number, example in enumerate(dataset.examples):
        top, left, _, blue = seen(dataset.pixels_of(number, flipped=False))
        # The middle square of 96 pixels begins at pixel 48 of the longer side; a pixel of the
        # smallest size is the mean of three.
        corner = (top, left) if blue == 10 else (left, top)
        assert example.target in ((64, 64), (48, 48), (32, 32))
        assert corner == pytest.approx((48, 0), abs=3)


def test_a_mask_goes_with_its_picture_to_every_size(grids: Path, tmp_path: Path) -> None:
    # White over columns 30 to 70 and rows 60 to 90 of the upright picture.
    mask = np.zeros((192, 96), np.uint8)
    mask[60:90, 30:70] = 255
    write_folder(grids, {"masks/a.png": encoded(Image.fromarray(mask))})
    (grids / "b.png").unlink()
    wanted = picture_set(grids, priority="quality", enable_bucket=False)
    _, examples = prepared(wanted, tmp_path / "prepared")
    dataset = data_set(examples, wanted.data)

    for step in range(3):
        (batch,) = dataset[step]
        assert batch.masks is not None
        column, row, _ = (bytes_of(batch.pixels[0])[..., n].astype(int) for n in range(3))
        weights = batch.masks[0, 0].numpy()
        # But for three pixels at its edges, which smaller sizes mix.
        inside = (row >= 63) & (row < 87) & (column >= 33) & (column < 67)
        outside = (row < 57) | (row > 93) | (column < 27) | (column > 73)
        assert inside.any()
        assert weights[inside].min() > 0.99
        assert weights[outside].max() < 0.01


def test_the_window_lies_over_the_face_at_every_size(
    grids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    face = Face(left=20, top=130, width=40, height=40, score=0.9, landmarks=None)
    detector = SimpleNamespace(identity="one", find=lambda _: (face,))
    monkeypatch.setattr(means, "detector_of", lambda _: (detector, ()))
    (grids / "b.png").unlink()
    wanted = picture_set(
        grids, priority="quality", enable_bucket=False, center_crop=False, face_aware_cropping=True
    )

    _, examples = prepared(wanted, tmp_path / "prepared")

    assert [example.target for example in examples] == [(64, 64), (48, 48), (32, 32)]
    for example in examples:
        times = example.size[1] / 96
        window = face_window(example.size, example.target, face.scaled(times).box)
        assert example.window == (window.top, window.left)
        assert window.top + window.height >= 170 * times


def test_a_second_call_finds_all_sizes_and_another_priority_is_prepared_anew(
    grids: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "prepared"
    _, first = prepared(picture_set(grids, **QUALITY), folder)
    before = earlier_index(folder)

    _, again = prepared(picture_set(grids, **QUALITY), folder)
    assert (again, earlier_index(folder)) == (first, before)

    _, other = prepared(picture_set(grids, priority="high_res_only", enable_bucket=True), folder)
    assert [example.target for example in other] == [(80, 48), (48, 80)]


def test_without_a_priority_a_picture_is_what_it_was(grids: Path, tmp_path: Path) -> None:
    plain = picture_set(grids, enable_bucket=True)

    assert "smaller" not in plain.looks
    assert plain.looks == picture_set(grids, priority="high_res_only", enable_bucket=True).looks


def test_sheet_report_and_validation_tell_all_sizes(grids: Path, tmp_path: Path) -> None:
    wanted = picture_set(grids, **QUALITY)
    prepared(wanted, tmp_path / "prepared")

    told = overview.written_report(tmp_path / "prepared")
    checked = inspect(wanted).pictures

    assert told is not None
    assert [p["trained_size"] for p in told["pictures"]] == [[80, 48], [48, 80]]
    assert [p["smaller_sizes"] for p in told["pictures"]] == [
        [[64, 32], [48, 16]],
        [[32, 64], [16, 48]],
    ]
    assert [(p.target, p.smaller) for p in checked] == [
        ((80, 48), ((64, 32), (48, 16))),
        ((48, 80), ((32, 64), (16, 48))),
    ]
    first: Prepared = earlier_index(tmp_path / "prepared").pictures[0]
    assert list(overview._facts(first)) == ["96x192 → 48x80", "also at 32x64, 16x48"]


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize(
    ("priority", "enough"), [("speed", True), ("quality", False), ("high_res_only", False)]
)
def test_a_picture_is_small_beside_the_largest_size_that_is_trained(
    priority: str, enough: bool, known: bool, tmp_path: Path
) -> None:
    photos = write_folder(tmp_path / "set", {"a.png": encoded(Image.effect_noise((520, 520), 60))})
    side = largest_side(1024, priority) if known else None
    data = {"priority": priority, "resolution_width": side, "resolution_height": side}
    wanted = replace(picture_set(photos), data=picture_set(photos).data.model_copy(update=data))

    (advice,) = inspect(wanted).advice
    (found,) = (line.found for line in advice.lines if line.topic == "resolution")

    assert (found == "all large enough") is enough
    if known:
        prepared(wanted, tmp_path / "prepared")
        report = overview.written_report(tmp_path / "prepared")
        assert report is not None
        (told,) = (n for n in report["advice"]["lines"] if n["topic"] == "resolution")
        sides = {"speed": "512x512 or larger"}
        assert (told["found"], told["advice"]) == (
            found,
            sides.get(priority, "1024x1024 or larger"),
        )


def test_a_picture_that_is_too_small_is_enlarged_with_a_remark(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", {"a.png": grid_bytes(24, 24)})

    _, examples = prepared(picture_set(folder, priority="high_res_only"), tmp_path / "prepared")

    assert [example.target for example in examples] == [(64, 64)]
    (picture,) = earlier_index(tmp_path / "prepared").pictures
    assert any("enlarged" in remark.text for remark in picture.all_remarks())


def resolved(*layers: Layer) -> TrainingConfig:
    return resolve([Layer("first", {"images_data_url": "photos"}, explicit=True), *layers])


def test_a_priority_and_a_size_that_are_both_asked_for_are_an_error() -> None:
    both = Layer("train.yaml", {"priority": "speed", "resolution_height": 512}, explicit=True)

    with pytest.raises(InputError) as caught:
        resolved(both)

    (problem,) = caught.value.problems
    assert problem.field == "priority"
    assert "`resolution_height` 512" in problem.message


@pytest.mark.parametrize(
    ("priority_is_explicit", "left"), [(True, ("speed", None, None)), (False, (None, 512, 512))]
)
def test_of_a_priority_and_a_size_what_nobody_asked_for_yields(
    priority_is_explicit: bool, left: tuple[str | None, int | None, int | None]
) -> None:
    size = {"resolution_width": 512, "resolution_height": 512}

    config = resolved(
        Layer("size", size, explicit=not priority_is_explicit),
        Layer("priority", {"priority": "speed"}, explicit=priority_is_explicit),
    )

    data = config.data
    assert (data.priority, data.resolution_width, data.resolution_height) == left
    assert data.enable_bucket is priority_is_explicit
    assert {n.field for n in config.resolved.notes if n.kind == "yielded"} == (
        set(size) if priority_is_explicit else {"priority"}
    )


def test_a_written_configuration_keeps_the_size_that_its_priority_came_to(
    sd15_folder: Path,
) -> None:
    asked = resolved(Layer("flags", {"priority": "speed"}, explicit=True))
    base = base_model.locate(ModelConfig(model_url=str(sd15_folder)))
    config = completed(asked, base)

    back = resolve(as_layers(parse_yaml(write_config(config), "config.yaml"), "config.yaml"))

    assert (config.data.resolution_width, config.data.resolution_height) == (32, 32)
    assert back.values() == config.values()
    assert [note for note in back.resolved.notes if note.kind == "yielded"] == []


def training_of(model: Path, folder: Path, pictures: Path, **leaves: Any) -> Training:
    """A training composed on the tiny model, whose own side is 64 pixels."""
    training, _ = compose(configuration(model, pictures, **leaves), folder / "run")
    return training


def test_a_class_picture_stands_beside_a_subject_at_the_same_scale(
    sd15_folder: Path, grids: Path, tmp_path: Path
) -> None:
    classes = write_folder(tmp_path / "class", {"c.png": grid_bytes(100, 100)})
    prior = {
        "with_prior_preservation": True,
        "photo_class": "Man",
        "class_images_url": str(classes),
        "enable_bucket": False,
    }
    training = training_of(sd15_folder, tmp_path, grids, priority="quality", **prior)
    plan, examples = training.dataset.plan, training.dataset.examples

    assert [portion.concept for portion in plan.portions] == [1, 1, 1]
    assert (plan.num_examples, plan.steps_per_epoch) == (6, 6)
    shown = [batch for step in range(6) for batch in training.dataset[step]]
    pairs = Counter(tuple(examples[n].target[0] for n in batch.numbers) for batch in shown)
    # One forward pass for both.
    assert pairs == {(64, 64): 2, (48, 48): 2, (32, 32): 2}
    # Latents are kept at each size.
    pictures = training.encodings.pictures
    assert pictures is not None
    assert [pictures.latents_shape((side, side))[1] for side in (64, 48, 32)] == [8, 6, 4]
    seen = list(trained_examples(training.dataset, range(6)))
    assert {example.concept for example in seen} == {1}


def test_class_pictures_are_made_at_the_base_models_own_size(
    sd15_folder: Path, grids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prior = {
        "with_prior_preservation": True,
        "photo_class": "Man",
        "num_class_images": 1,
        "class_inference_steps": 1,
    }

    training = training_of(sd15_folder, tmp_path, grids, priority="speed", **prior)

    (made,) = (tmp_path / "run" / "class_images").rglob("*.png")
    with Image.open(made) as image:
        assert image.size == (64, 64)
    (example,) = (e for e in training.dataset.examples if e.is_class)
    assert example.target == (32, 32)


def test_an_estimate_counts_each_size_of_a_picture(
    sd15_folder: Path, grids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Memory, which takes a while, plays no part here.
    unasked = Mock(side_effect=OSError("not asked for"))
    monkeypatch.setattr(forecast.Forecast, "footprint", unasked)
    several = {"priority": "quality", "num_train_epochs": 2}

    found = forecast.estimate(configuration(sd15_folder, grids, **several))

    assert (found.num_examples, found.steps) == (6, 12)
    assert training_of(sd15_folder, tmp_path, grids, **several).total_steps == 12


@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 2), (2, 1)])
def test_two_processes_train_the_batches_that_one_would(
    batch_size: int, accumulation: int, grids: Path, tmp_path: Path
) -> None:
    classes = write_folder(tmp_path / "class", {"c.png": grid_bytes(96, 192)})
    _, subject = prepared(picture_set(grids, **QUALITY), tmp_path / "prepared")
    _, of_class = prepared(picture_set(classes, of_class=True, **QUALITY), tmp_path / "of_class")
    examples = numbered((*subject, *of_class))
    portions = [
        Portion(
            tuple(e.number for e in examples[: len(subject)] if e.scale == scale),
            class_images=tuple(e.number for e in examples[len(subject) :] if e.scale == scale),
        )
        for scale in range(3)
    ]

    def plan(world: int, rank: int, accumulation: int) -> Plan:
        return plan_of(
            *portions,
            batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            num_processes=world,
            process_index=rank,
            sizes=tuple(e.target for e in examples),
        )

    alone, pair = plan(1, 0, 2 * accumulation), [plan(2, rank, accumulation) for rank in (0, 1)]

    assert pair[0].steps_per_epoch == alone.steps_per_epoch
    for step in range(3 * alone.steps_per_epoch):
        batches, shared = alone.at(step), [one.at(step) for one in pair]
        # As many forward passes on each, of pictures of one size, whose weights mean the same.
        assert len(shared[0]) == len(shared[1])
        together = [batch for of_one in shared for batch in of_one]
        assert all(len({examples[s.number].target for s in batch}) == 1 for batch in together)
        busy = [[replace(s, weight=s.weight / 2) for s in batch] for batch in together]
        busy = [batch for batch in busy if any(slot.weight for slot in batch)]
        assert sorted(busy, key=places) == sorted(batches, key=places)


def places(batch: list[Slot]) -> list[int]:
    return [slot.position for slot in batch]


def test_a_run_that_stops_between_sizes_goes_on_to_the_same_bytes(
    sd15_folder: Path, grids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_reading_back(monkeypatch)
    leaves = {"priority": "quality", "max_train_steps": 3, **TWO_LAYERS}
    config = configuration(sd15_folder, grids, **leaves)

    train(config, tmp_path / "whole")
    stopped_after(2, config, tmp_path / "parts")
    train(config, tmp_path / "parts")

    outputs = digests(tmp_path / "whole" / "outputs")
    assert any(name.endswith(".safetensors") for name in outputs)
    assert digests(tmp_path / "parts" / "outputs") == outputs
