"""Several subjects in one training: each with its own token, captions, class and share."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import snapshots
import torch
from safetensors.torch import load_file
from skimage import data as photographs
from tiny import compose, configuration, digests, never, train

from trainer.concepts import prepare_concepts
from trainer.config import TrainingConfig
from trainer.errors import CheckpointError, InputError
from trainer.events import Event, NoteEvent
from trainer.inspection import inspect_pictures
from trainer.job import RunFolder
from trainer.processes import ALONE
from trainer.resolve import Layer, resolve
from trainer.training import Training

TWO = {"token_abstraction": "TOK,TOK1", "train_text_encoder_ti": True, "checkpointing_steps": 100}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("concepts")
    made = {
        "woman": snapshots.write_pictures(root / "woman", 2),
        "cat": snapshots.write_pictures(root / "cat", 3, photograph=photographs.cat),
        "women": snapshots.write_pictures(root / "women", 4),
        "cats": snapshots.write_pictures(root / "cats", 3, photograph=photographs.cat),
    }
    (root / "captions.jsonl").write_text('{"file_name": "1.png", "text": "a TOK1 asleep"}\n')
    return made | {"captions": root / "captions.jsonl"}


def concepts_of(folders: dict[str, Path], **second: Any) -> list[dict[str, Any]]:
    """A woman, shown three times an epoch, and a cat whose class has words of its own."""
    woman = {
        "images_data_url": str(folders["woman"]),
        "repeats": 3,
        "photo_class": "Woman",
        "class_images_url": str(folders["women"]),
        "with_prior_preservation": True,
        "prior_loss_weight": 0.5,
    }
    cat = {
        "images_data_url": str(folders["cat"]),
        "captions_file_url": str(folders["captions"]),
        "class_prompt": "a photo of a cat",
        "class_images_url": str(folders["cats"]),
        "with_prior_preservation": True,
    }
    return [woman, cat | second]


def several(model: Path, concepts: list[dict[str, Any]], **leaves: Any) -> Any:
    given = {"rank": 4, "max_train_steps": 2, "learning_rate": 1e-3, "tensorboard": False}
    values = {"model_url": str(model), "concepts": concepts, **given, **TWO, **leaves}
    return resolve([Layer("test", values, explicit=True)])


def sized(config: TrainingConfig) -> TrainingConfig:
    """The configuration with the size that the base model would decide."""
    return config.with_leaf("resolution_width", 64).with_leaf("resolution_height", 64)


def slots(training: Training, epochs: int = 1) -> list[tuple[str, str, bool, float]]:
    """Caption, folder of the picture, whether it is of a class, and weight, of each example."""
    found = []
    for step in range(epochs * training.dataset.plan.steps_per_epoch):
        for batch in training.dataset[step]:
            for row, number in enumerate(batch.numbers):
                example = training.dataset.examples[number]
                weight, is_class = float(batch.weights[row]), bool(batch.is_class[row])
                found.append((batch.captions[row], example.path.parent.name, is_class, weight))
    return found


def test_each_concept_has_its_share_words_class_and_weight_in_an_epoch(
    sd15_folder: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    training, _ = compose(several(sd15_folder, concepts_of(folders)), tmp_path)
    plan = training.dataset.plan

    # Two pictures three times, and three once.
    assert (plan.num_examples, plan.steps_per_epoch) == (9, 9)
    counted = Counter(slots(training))
    assert counted == {
        ("A photograph of a TOK", "concept_1", False, 1.0): 6,
        ("A photograph of a TOK1", "concept_2", False, 1.0): 2,
        ("a TOK1 asleep", "concept_2", False, 1.0): 1,
        ("a photo of a woman", "class_1", True, 0.5): 6,
        ("a photo of a cat", "class_2", True, 1.0): 3,
    }
    for step in range(plan.steps_per_epoch):
        (batch,) = training.dataset[step]
        own, other = (training.dataset.examples[n].path.parent.name for n in batch.numbers)
        # A class picture stands beside a subject of its class.
        assert {own: other} in ({"concept_1": "class_1"}, {"concept_2": "class_2"})


def test_each_concepts_words_become_its_own_new_tokens(
    sd15_folder: Path, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = snapshots.record_gradients(monkeypatch)
    config = several(sd15_folder, concepts_of(folders), train_text_encoder_ti_frac=1.0)
    config = config.with_leaf("max_train_steps", 9)
    training, _ = compose(config, tmp_path)
    list(training.steps(RunFolder(tmp_path), never))

    captions = [training.dataset[step][0].captions[0] for step in range(9)]
    for caption, gradients in zip(captions, seen.before, strict=True):
        (rows,) = gradients[-1:]
        assert rows is not None
        learning = (rows.abs().amax(1) > 0).tolist()
        assert learning == (
            [False, False, True, True] if "TOK1" in caption else [True, True] + [False] * 2
        )
    assert {"TOK1" in caption for caption in captions} == {True, False}


def test_prepared_pictures_lie_in_a_folder_for_each_concept_and_class(
    sd15_folder: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    compose(several(sd15_folder, concepts_of(folders)), tmp_path)
    counts = {
        folder.name: len(list(folder.glob("*.png"))) for folder in (tmp_path / "prepared").iterdir()
    }
    assert counts == {"concept_1": 2, "concept_2": 3, "class_1": 4, "class_2": 3}


def test_concepts_of_one_class_share_its_pictures_and_one_without_has_none(
    sd15_folder: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    first, second = concepts_of(folders)
    shared = second | {name: first.get(name) for name in ("photo_class", "class_images_url")}
    shared.pop("class_prompt")
    without = second | {"with_prior_preservation": False}
    one, _ = compose(several(sd15_folder, [first, shared]), tmp_path / "one")
    two, _ = compose(several(sd15_folder, [first, without]), tmp_path / "two")

    assert sum(example.is_class for example in one.dataset.examples) == 4
    counted = Counter((place, is_class) for _, place, is_class, _ in slots(one))
    assert counted[("class_1", True)] == 9
    counted = Counter((place, is_class) for _, place, is_class, _ in slots(two))
    assert counted == {
        ("concept_1", False): 6,
        ("class_1", True): 6,
        ("concept_2", False): 3,
    }


@pytest.mark.parametrize(
    "change", [{"repeats": 2}, {"token": "TOK"}, {"prior_loss_weight": 2.0}], ids=str
)
def test_other_concepts_are_another_run(
    change: dict[str, Any], sd15_folder: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    config = several(sd15_folder, concepts_of(folders))
    training, _ = compose(config, tmp_path)
    list(training.steps(RunFolder(tmp_path), never))
    before = digests(tmp_path)

    with pytest.raises(CheckpointError, match="concepts"):
        compose(several(sd15_folder, concepts_of(folders, **change)), tmp_path)
    assert digests(tmp_path) == before


def test_moved_folders_of_the_same_concepts_are_the_same_run(
    sd15_folder: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    config = several(sd15_folder, concepts_of(folders))
    training, _ = compose(config, tmp_path / "run")
    list(training.steps(RunFolder(tmp_path / "run"), never))
    moved = snapshots.write_pictures(tmp_path / "moved", 3, photograph=photographs.cat)
    again, _ = compose(
        several(sd15_folder, concepts_of(folders, images_data_url=str(moved))), tmp_path / "run"
    )
    list(again.resume(RunFolder(tmp_path / "run")))
    assert again.step == 2


def test_one_concept_trains_what_the_single_form_trains(
    sdxl_folder: Path, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots.skip_reading_back(monkeypatch)
    options: dict[str, Any] = {
        "with_prior_preservation": True,
        "photo_class": "Woman",
        "class_images_url": str(folders["women"]),
    }
    tokens = {"train_text_encoder_ti": True, "max_train_steps": 3, "batch_size": 2}
    single = configuration(sdxl_folder, folders["woman"], **tokens, **options)
    concept = {"images_data_url": str(folders["woman"]), **options}
    listed = several(sdxl_folder, [concept], token_abstraction="TOK", **tokens)
    train(single, tmp_path / "single")
    train(listed, tmp_path / "listed")

    for name in ("pytorch_lora_weights", "lora_emb"):
        one, two = (
            load_file(tmp_path / run / "outputs" / f"{name}.safetensors")
            for run in ("single", "listed")
        )
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert (tmp_path / "listed" / "prepared" / "prepared.json").exists()


def prepared_with(config: TrainingConfig, folder: Path) -> list[Event]:
    """What is said while pictures are prepared."""
    return list(prepare_concepts(config, RunFolder(folder), ALONE))


BAD_FIELDS = {
    "images_data_url": "concepts[1].images_data_url",
    "captions_file_url": "concepts[1].captions_file_url",
    "class_images_url": "concepts[1].class_images_url",
}


@pytest.mark.parametrize(("leaf", "field"), BAD_FIELDS.items())
def test_an_error_names_the_concept_that_it_is_about(
    sd15_folder: Path, folders: dict[str, Path], tmp_path: Path, leaf: str, field: str
) -> None:
    config = sized(several(sd15_folder, concepts_of(folders, **{leaf: str(tmp_path / "none")})))

    for ask in (inspect_pictures, partial(prepared_with, folder=tmp_path)):
        with pytest.raises(InputError, match="does not exist") as caught:
            ask(config)
        assert [problem.field for problem in caught.value.problems] == [field]


def test_a_note_names_the_concept_that_it_is_about(
    sd15_folder: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    config = sized(several(sd15_folder, concepts_of(folders)))
    said = [event for event in prepared_with(config, tmp_path) if isinstance(event, NoteEvent)]

    few = {e.field: e.message for e in said if "pictures; at least" in e.message}
    assert [(field, message.split(" pictures")[0]) for field, message in few.items()] == [
        ("concepts[0].images_data_url", "only 2"),
        ("concepts[1].images_data_url", "only 3"),
    ]
    assert "concepts[1].instance_prompt" in {event.field for event in said}
    # That there are few, `validate` tells in its advice.
    others = {(e.field, e.message) for e in said if e.message not in few.values()}
    assert others == {(note.field, note.message) for note in inspect_pictures(config).notes}


def test_class_pictures_of_the_run_and_pictures_without_concepts_keep_their_names(
    sd15_folder: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    prior = {"with_prior_preservation": True, "photo_class": "Man", "class_images_url": "nowhere"}
    concepts = [{"images_data_url": str(folders["woman"])}]
    of_run = several(sd15_folder, concepts, token_abstraction="TOK", **prior)
    single = configuration(sd15_folder, tmp_path / "none")

    for config, field in ((of_run, "class_images_url"), (single, "images_data_url")):
        with pytest.raises(InputError, match="does not exist") as caught:
            inspect_pictures(config)
        assert [problem.field for problem in caught.value.problems] == [field]


def test_a_caption_beside_a_class_picture_goes_before_the_class_prompt(
    sd15_folder: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    cats = snapshots.write_pictures(tmp_path / "cats", 2, photograph=photographs.cat)
    (cats / "1.txt").write_text("a sleeping cat")
    config = sized(several(sd15_folder, concepts_of(folders, class_images_url=str(cats))))
    captions = {picture.caption for picture in inspect_pictures(config).pictures}

    assert {"a sleeping cat", "a photo of a cat"} <= captions


def test_folders_of_an_earlier_configuration_are_removed_and_no_others(
    sd15_folder: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    first, second = concepts_of(folders)
    for name in ("prepared/concept_x", "class_images/mine", "class_images/1", "class_images/2"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "000.png").touch()
    prepared_with(sized(several(sd15_folder, [first, second])), tmp_path)

    def left() -> set[str]:
        return {
            path.relative_to(tmp_path).as_posix()
            for name in ("prepared", "class_images")
            for path in (tmp_path / name).iterdir()
            if path.is_dir()
        }

    others = {"prepared/concept_x", "class_images/mine"}
    kept = {f"prepared/{name}" for name in ("concept_1", "concept_2", "class_1", "class_2")}
    assert left() == others | kept
    # One concept is prepared in `prepared/` itself; pictures of its class are to be made.
    del first["class_images_url"]
    (tmp_path / "class_images" / "1").mkdir()
    prepared_with(sized(several(sd15_folder, [first], token_abstraction="TOK")), tmp_path)
    assert left() == others | {"prepared/class_1", "class_images/1"}
