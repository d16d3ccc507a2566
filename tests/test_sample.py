"""`trainer sample`: a prompt library at several strengths of a finished run, in one grid."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from finished import finished
from PIL import Image
from tiny import TWO_LAYERS, never
from tiny_vision import tiny_clip

from trainer import inference, sampled_runs
from trainer.cli import run
from trainer.errors import Interrupted
from trainer.events import NoteEvent, StageEvent
from trainer.generation import GenerationRequest, Trained
from trainer.images.likeness import Looker
from trainer.inference import Worker
from trainer.job import RunFolder
from trainer.lineup import Look
from trainer.sampled_runs import Sampling

# diffusers makes arrays of tensors the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TWO = """
plain: {prompt: "a photo of {subject}"}
on a beach: {prompt: a man on a beach, negative_prompt: blurry, guidance_scale: 3, seed: 7}
"""


@pytest.fixture(scope="module")
def lora_run(
    sd15_folder: Path, photo_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "me"
    leaves = {**TWO_LAYERS, "instance_prompt": "a photo of TOK man", "photo_class": "Man"}
    return finished(folder, sd15_folder, photo_folder, **leaves)


@pytest.fixture
def me(lora_run: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    return Path(shutil.copytree(lora_run, tmp_path / "me"))


@pytest.fixture
def two(tmp_path: Path) -> str:
    path = tmp_path / "two.yaml"
    path.write_text(TWO)
    return str(path)


def asked(run: Path, **given: Any) -> Sampling:
    """A sampling of one step."""
    return Sampling(str(run), **{"strengths": (0.0, 1.0), "look": Look(steps=1), **given})


def made(wanted: Sampling, stop: Callable[[], bool] = never) -> list[Any]:
    """What is said while the pictures are made."""
    wanted.folder.root.mkdir(exist_ok=True, parents=True)
    return list(sampled_runs.sample(wanted, Worker(), stop))


def index_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "pictures.json").read_text())
    return found


def pixels(path: Path) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(path)).astype(int)


def test_the_command_leaves_a_grid_pictures_and_an_index_of_them(
    me: Path, two: str, capsys: Any
) -> None:
    code = run(["sample", str(me), "--prompts", two, "--steps", "1"])

    said = capsys.readouterr()
    assert code == 0, said.err
    assert said.out == f"Open this grid: {me}/pictures/grid.png\n"
    assert "pictures: 6 of 6" in said.err
    found = index_of(me / "pictures")
    assert found.keys() == {"prompts", "strengths", "likeness_model", "pictures"}
    assert found["prompts"] == [
        {
            "name": "plain",
            "prompt": "a photo of TOK man",
            "negative_prompt": None,
            "guidance_scale": None,
            "steps": 1,
            "seed": 0,
        },
        {
            "name": "on a beach",
            "prompt": "a man on a beach",
            "negative_prompt": "blurry",
            "guidance_scale": 3.0,
            "steps": 1,
            "seed": 7,
        },
    ]
    assert found["strengths"] == [0.0, 0.5, 1.0]
    assert found["likeness_model"] is None
    assert [(p["prompt"], p["strength"], p["path"], p["likeness"]) for p in found["pictures"]] == [
        (0, 0.0, "00-plain-0.png", None),
        (0, 0.5, "00-plain-0.5.png", None),
        (0, 1.0, "00-plain-1.png", None),
        (1, 0.0, "01-on-a-beach-0.png", None),
        (1, 0.5, "01-on-a-beach-0.5.png", None),
        (1, 1.0, "01-on-a-beach-1.png", None),
    ]
    paths = {p["path"] for p in found["pictures"]}
    assert {path.name for path in (me / "pictures").iterdir()} == {
        *(paths | {"grid.png", "pictures.json", ".lock"})
    }
    with Image.open(me / "pictures/grid.png") as grid:
        # Three columns of pictures of 64 pixels, each enlarged to 192.
        assert grid.width > 3 * 192
        assert grid.height > 2 * 192


def test_json_is_what_the_index_says(me: Path, two: str, capsys: Any) -> None:
    flags = ["--prompts", two, "--strengths", "1", "--steps", "1", "--json"]
    assert run(["sample", str(me), *flags]) == 0

    assert json.loads(capsys.readouterr().out) == index_of(me / "pictures")


def test_each_picture_is_that_of_generate_and_at_strength_0_the_base_models(
    lora_run: Path, sd15_folder: Path, two: str, tmp_path: Path
) -> None:
    made(asked(lora_run, prompts=two, output=tmp_path / "out"))

    shared = {"prompt": "a photo of TOK man", "num_inference_steps": 1, "seed": 0}
    base = GenerationRequest(model={"model_url": str(sd15_folder)}, **shared)
    trained = GenerationRequest(trained=(Trained(run=str(lora_run)),), **shared)
    for name, request in (("00-plain-0.png", base), ("00-plain-1.png", trained)):
        place = RunFolder(tmp_path / name)
        list(Worker().generate(request, place, never))
        alone = (place.outputs / "0.png").read_bytes()
        assert (tmp_path / "out" / name).read_bytes() == alone
    assert (
        pixels(tmp_path / "out/00-plain-0.png") != pixels(tmp_path / "out/00-plain-1.png")
    ).any()


def test_a_prompt_starts_from_the_same_noise_at_all_strengths(
    lora_run: Path, two: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    strengths = (0.0, 0.001)
    made(asked(lora_run, prompts=two, strengths=strengths, output=out))
    base, near = (pixels(out / f"01-on-a-beach-{s}.png") for s in ("0", "0.001"))

    look = Look(seed=8, steps=1)
    made(asked(lora_run, prompts=two, strengths=strengths, output=out, look=look))

    other = pixels(out / "01-on-a-beach-0.png")
    assert abs(near - base).mean() < 0.05 * abs(other - base).mean()


def test_a_seed_on_the_command_line_is_that_of_every_prompt(
    lora_run: Path, two: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    made(asked(lora_run, prompts=two, strengths=(0.0,), output=out, look=Look(seed=5, steps=1)))
    with_five = pixels(out / "01-on-a-beach-0.png")

    made(asked(lora_run, prompts=two, strengths=(0.0,), output=out))

    assert index_of(out)["prompts"][1]["seed"] == 7
    assert (pixels(out / "01-on-a-beach-0.png") != with_five).any()


def test_the_base_model_is_loaded_once_and_weights_change_once_for_each_strength(
    lora_run: Path, two: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[Any] = []
    strengths: list[float] = []
    load, apply = inference.base_model.load, inference.apply

    def counted_load(*given: Any, **named: Any) -> Any:
        loads.append(given)
        return load(*given, **named)

    def counted_apply(family: Any, base: Any, runs: Any, **named: Any) -> Any:
        strengths.append(runs[0].strength)
        return apply(family, base, runs, **named)

    monkeypatch.setattr(inference.base_model, "load", counted_load)
    monkeypatch.setattr(inference, "apply", counted_apply)
    made(asked(lora_run, prompts=two, strengths=(1.0, 0.0, -0.5), output=tmp_path / "out"))

    assert len(loads) == 1
    assert strengths == [1.0, 0.0, -0.5]


def test_another_size_is_that_of_all_pictures(lora_run: Path, two: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    look = Look(width=96, height=64, steps=1)
    made(asked(lora_run, prompts=two, strengths=(0.0,), output=out, look=look))

    sizes = {pixels(path).shape for path in out.glob("0*.png")}
    assert sizes == {(64, 96, 3)}


def test_without_a_library_the_runs_own_prompt_is_shown_and_scenes_about_its_subject(
    lora_run: Path, tmp_path: Path
) -> None:
    made(asked(lora_run, strengths=(0.0,), output=tmp_path / "out"))

    prompts = {p["name"]: p["prompt"] for p in index_of(tmp_path / "out")["prompts"]}
    assert prompts["instance-prompt"] == "a photo of TOK man"
    assert prompts["oil-painting"] == "an oil painting of TOK man in a garden"
    # A scene in the words of the instance prompt is no second row.
    assert list(prompts) == [
        *("instance-prompt", "professional-headshot", "casual-outdoor", "full-body"),
        "oil-painting",
    ]


def test_captions_of_ones_own_say_what_a_run_calls_its_subject(me: Path, tmp_path: Path) -> None:
    prepared = me / "prepared/prepared.json"
    index = json.loads(prepared.read_text())
    for picture in index["pictures"]:
        picture["caption"] = "a picture of the sks man"
    prepared.write_text(json.dumps(index))
    out = tmp_path / "out"

    said = made(asked(me, strengths=(0.0,), output=out))

    assert [p["name"] for p in index_of(out)["prompts"]] == ["caption"]
    (note,) = [event for event in said if isinstance(event, NoteEvent)]
    assert note.field == "--subject"
    assert "no caption of run" in note.message
    made(asked(me, strengths=(0.0,), output=out, subject="the sks man"))
    assert index_of(out)["prompts"][1]["prompt"] == "a photo of the sks man"


def test_of_several_subjects_each_own_prompt_is_shown_and_scenes_are_about_the_first(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    places: list[dict[str, Any]] = []
    for name, photo in (("man", "photo_1.jpg"), ("dog", "photo_2.jpg")):
        (tmp_path / name).mkdir()
        shutil.copy(photo_folder / photo, tmp_path / name)
        prompt = f"a photo of {name.upper()}"
        url = str(tmp_path / name)
        places.append({"images_data_url": url, "token": name.upper(), "instance_prompt": prompt})
    leaves = {**TWO_LAYERS, "images_data_url": None, "concepts": places}
    both = finished(tmp_path / "both", sd15_folder, photo_folder, **leaves)

    said = made(asked(both, strengths=(0.0,), output=tmp_path / "out"))

    prompts = {p["name"]: p["prompt"] for p in index_of(tmp_path / "out")["prompts"]}
    assert prompts["instance-prompt MAN"] == "a photo of MAN"
    assert prompts["instance-prompt DOG"] == "a photo of DOG"
    assert prompts["on-a-beach"] == "a photo of MAN on a beach at sunset"
    (note,) = [event for event in said if isinstance(event, NoteEvent)]
    assert note.message == "is not given: `{subject}` is `MAN`, the first of 2"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip"))


def test_likeness_is_the_mean_cosine_with_the_training_pictures_and_shown_in_a_table(
    lora_run: Path, two: str, clip: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    flags = ["--prompts", two, "--strengths", "0,1", "--steps", "1", "--likeness", str(clip)]
    assert run(["sample", str(lora_run), *flags, "--output", str(out)]) == 0

    found = index_of(out)
    looker = Looker(str(clip))
    others = [
        looker.embedding(Image.open(path))
        for path in sorted((lora_run / "prepared").glob("[0-9][0-9][0-9].png"))
    ]
    assert len(others) == 5
    for picture in found["pictures"]:
        own = looker.embedding(Image.open(out / picture["path"]))
        expected = fmean(float(own @ other) for other in others)
        assert picture["likeness"] == pytest.approx(expected, abs=1e-4)
    assert found["likeness_model"] == str(clip)
    table = capsys.readouterr().out
    mean = fmean(p["likeness"] for p in found["pictures"] if p["strength"] == 1)
    assert f"{mean:.3f}" in table
    assert "0 (base)" in table
    assert "on a beach" in table


def test_a_second_sampling_leaves_nothing_of_the_first(
    lora_run: Path, two: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    made(asked(lora_run, prompts=two, output=out))
    (out / "notes.txt").write_text("mine")

    made(asked(lora_run, prompts=two, strengths=(0.5,), output=out))

    assert {path.name for path in out.iterdir()} == {
        *("00-plain-0.5.png", "01-on-a-beach-0.5.png", "grid.png", "pictures.json", "notes.txt")
    }


def test_a_stopped_sampling_leaves_the_earlier_one(
    lora_run: Path, two: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    made(asked(lora_run, prompts=two, strengths=(0.0,), output=out))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    said: list[Any] = []

    with pytest.raises(Interrupted, match="stopped between two pictures"):
        for event in sampled_runs.sample(
            asked(lora_run, prompts=two, output=out), Worker(), lambda: len(said) > 2
        ):
            said.append(event)

    assert said[:2] == [StageEvent("pictures", 0, 4), StageEvent("pictures", 1, 4)]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "`RUN`: there is no folder `nowhere`"),
        (["{photos}"], "has no result"),
        (["{run}", "--strengths", "0,5"], "`--strengths`: got `0,5`; allowed: numbers from -4 to"),
        (["{run}", "--strengths", "1,1"], "each once"),
        (["{run}", "--strengths", "nan"], "got `nan`"),
        (["{run}", "--strengths", ""], "got ``"),
        (["{run}", "--prompts", "persn"], "did you mean `person`?"),
        (["{run}", "--width", "100"], "`--width`: is 100, which is not a multiple of 8"),
        (["{run}", "--output", "{run}"], "is the folder of a training"),
        (["{run}", "--likeness", "nobody/clip"], "`--likeness`: "),
        (["{run}", "--prompts", "{bare}", "--subject", "a"], "`--subject`: no prompt has"),
        (["{run}", "--prompts", "{bare}", "--output", "{foreign}"], "is not from an earlier call"),
    ],
)
def test_what_cannot_be_done_is_named_and_changes_nothing(
    arguments: list[str],
    message: str,
    lora_run: Path,
    photo_folder: Path,
    tmp_path: Path,
    capsys: Any,
) -> None:
    bare, foreign = tmp_path / "bare.yaml", tmp_path / "foreign"
    bare.write_text("one: {prompt: a cat}\n")
    foreign.mkdir()
    (foreign / "grid.png").write_text("mine")
    places = {"run": lora_run, "photos": photo_folder, "bare": bare, "foreign": foreign}
    before = sorted([*lora_run.rglob("*"), *photo_folder.rglob("*")])

    code = run(["sample", *(word.format(**places) for word in arguments)])

    assert code == 2
    assert message in capsys.readouterr().err
    assert sorted([*lora_run.rglob("*"), *photo_folder.rglob("*")]) == before
    assert (foreign / "grid.png").read_text() == "mine"


def test_a_prompt_that_a_base_model_cannot_take_is_named_before_any_picture(
    flux_folder: Path, photo_folder: Path, two: str, tmp_path: Path, capsys: Any
) -> None:
    leaves = {"target_unet_modules": ["x_embedder"], "instance_prompt": "TOK"}
    flux = finished(tmp_path / "flux", flux_folder, photo_folder, **leaves)

    assert run(["sample", str(flux), "--prompts", two]) == 2

    said = capsys.readouterr().err
    assert "`on a beach.negative_prompt`: is nothing that a FluxPipeline" in said
    assert "pictures:" not in said
    assert not (flux / "pictures").exists()
