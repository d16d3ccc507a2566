"""`trainer compare`: the same prompts and noise with several runs and their base models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from finished import finished
from PIL import Image
from tiny import TWO_LAYERS
from tiny_vision import tiny_clip

from trainer import inference, lineup
from trainer.cli import run
from trainer.images.likeness import Looker

# diffusers makes arrays of tensors the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

QUICK = ["--steps", "1", "--output", "out"]


@pytest.fixture(scope="module")
def runs(sd15_folder: Path, photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs, which call their subject differently."""
    folder = tmp_path_factory.mktemp("runs")
    named = {"instance_prompt": "a photo of TOK man", "photo_class": "Man"}
    finished(folder / "me", sd15_folder, photo_folder, **TWO_LAYERS, **named)
    named = {"instance_prompt": "a photo of sks", "token_abstraction": "sks", "seed": 5}
    finished(folder / "other", sd15_folder, photo_folder, **TWO_LAYERS, **named)
    return folder


@pytest.fixture(autouse=True)
def _in_a_folder(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with these runs and a library."""
    (tmp_path / "runs").symlink_to(runs)
    library = "plain: {prompt: 'a photo of {subject}'}\nboat: {prompt: a boat, seed: 3}\n"
    (tmp_path / "two.yaml").write_text(library)
    monkeypatch.chdir(tmp_path)


def comparison() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("out/comparison.json").read_text())
    return found


def pixels(path: str) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(Path("out", path))).astype(int)


def test_base_and_runs_stand_side_by_side_each_about_its_own_subject(
    sd15_folder: Path, capsys: Any
) -> None:
    code = run(["compare", "runs/me", "runs/other", "--prompts", "two.yaml", *QUICK])

    said = capsys.readouterr()
    assert code == 0, said.err
    assert said.out == "Open this grid: out/grid.png\n"
    found = comparison()
    shared = {"base_model": str(sd15_folder)}
    assert found["columns"] == [
        {"name": "base", "run": None, "strength": 0.0, **shared, "subject": "a man"},
        {"name": "me", "run": "runs/me", "strength": 1.0, **shared, "subject": "TOK man"},
        {"name": "other", "run": "runs/other", "strength": 1.0, **shared, "subject": "sks"},
    ]
    assert [(p["name"], p["prompt"], p["seed"]) for p in found["prompts"]] == [
        ("plain", "a photo of {subject}", 0),
        ("boat", "a boat", 3),
    ]
    assert [(p["prompt"], p["column"], p["text"], p["path"]) for p in found["pictures"]] == [
        (0, 0, "a photo of a man", "00-plain-base.png"),
        (0, 1, "a photo of TOK man", "00-plain-1-me.png"),
        (0, 2, "a photo of sks", "00-plain-2-other.png"),
        (1, 0, "a boat", "01-boat-base.png"),
        (1, 1, "a boat", "01-boat-1-me.png"),
        (1, 2, "a boat", "01-boat-2-other.png"),
    ]
    assert (found["width"], found["height"]) == (64, 64)
    with Image.open("out/grid.png") as grid:
        assert grid.width > 3 * 192


def test_at_strength_0_every_run_draws_what_the_base_model_draws() -> None:
    flags = ["--prompts", "two.yaml", "--strength", "0", *QUICK]
    assert run(["compare", "runs/me", "runs/other", *flags]) == 0

    base = pixels("01-boat-base.png")
    assert (pixels("01-boat-1-me.png") == base).all()
    assert (pixels("01-boat-2-other.png") == base).all()


def test_likeness_is_to_each_runs_own_training_pictures(
    runs: Path, tmp_path: Path, capsys: Any
) -> None:
    """The base model's pictures are of the first run's subject, and measured with it."""
    # In a copy of the first run, with one other picture.
    shutil.copytree(runs / "me", tmp_path / "changed")
    (shown, *others) = sorted((tmp_path / "changed/prepared").glob("[0-9][0-9][0-9].png"))
    Image.new("RGB", (64, 64), "green").save(shown)
    clip = str(tiny_clip(tmp_path / "clip"))
    flags = ["--prompts", "two.yaml", "--likeness", clip, *QUICK]

    assert run(["compare", "runs/me", "changed", *flags]) == 0

    found = comparison()
    assert found["likeness_model"] == clip
    looker = Looker(clip)
    shown_by = [
        [looker.embedding(Image.open(path)) for path in sorted(folder.glob("prepared/0*[0-9].png"))]
        for folder in (runs / "me", tmp_path / "changed")
    ]
    assert [len(shown) for shown in shown_by] == [5, 5]
    for picture in found["pictures"]:
        own = looker.embedding(Image.open(Path("out", picture["path"])))
        expected = fmean(float(own @ one) for one in shown_by[picture["column"] == 2])
        assert picture["likeness"] == pytest.approx(expected, abs=1e-4)
    table = capsys.readouterr().out
    mean = fmean(p["likeness"] for p in found["pictures"] if p["column"] == 2)
    assert f"{mean:.3f}" in table
    assert "changed" in table


def test_without_a_clip_no_likeness_is_told(capsys: Any) -> None:
    assert run(["compare", "runs/me", "--prompts", "two.yaml", *QUICK]) == 0

    found = comparison()
    assert found["likeness_model"] is None
    assert {picture["likeness"] for picture in found["pictures"]} == {None}


def test_the_grid_tells_prompts_of_the_one_subject_that_was_trained(monkeypatch: Any) -> None:
    told: list[list[str]] = []
    drawn = lineup.grid
    monkeypatch.setattr(
        lineup,
        "grid",
        lambda names, rows, **of: (
            told.append([row.text for row in rows]) or drawn(names, rows, **of)
        ),
    )
    assert run(["compare", "runs/me", "--prompts", "two.yaml", *QUICK]) == 0
    assert run(["compare", "runs/me", "runs/other", "--prompts", "two.yaml", *QUICK]) == 0

    assert told == [["a photo of TOK man", "a boat"], ["a photo of {subject}", "a boat"]]


def test_json_is_what_the_index_says_and_scenes_that_fit_are_the_default(capsys: Any) -> None:
    assert run(["compare", "runs/me", *QUICK, "--json"]) == 0

    found = comparison()
    assert json.loads(capsys.readouterr().out) == found
    assert [p["name"] for p in found["prompts"]][:2] == ["plain", "professional-headshot"]


def test_runs_of_several_base_models_have_each_a_base_column_and_one_size(
    sdxl_folder: Path, photo_folder: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    xl = finished(tmp_path / "xl", sdxl_folder, photo_folder, **TWO_LAYERS, photo_class="Man")
    loads: list[str] = []
    load = inference.base_model.load

    def counted(base: Any, *given: Any, **named: Any) -> Any:
        loads.append(base.settings.model_url)
        return load(base, *given, **named)

    monkeypatch.setattr(inference.base_model, "load", counted)
    arguments = ["compare", "runs/me", str(xl), "runs/other", "--prompts", "two.yaml", *QUICK]

    code = run([*arguments, "--width", "64", "--height", "64"])

    said = capsys.readouterr().err
    assert code == 0, said
    assert [column["name"] for column in comparison()["columns"]] == [
        *("base sd15", "base sdxl", "me", "xl", "other")
    ]
    assert "warning: `RUNS`: were trained on several base models" in said
    assert sorted(loads) == sorted([str(sdxl_folder), comparison()["columns"][0]["base_model"]])
    sizes = {pixels(path.name).shape for path in Path("out").glob("0*.png")}
    assert sizes == {(64, 64, 3)}


def test_runs_of_one_name_are_told_apart(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "me", tmp_path / "older/me")

    flags = ["--prompts", "two.yaml", *QUICK]
    assert run(["compare", "runs/me", "older/me", *flags]) == 0

    assert [c["name"] for c in comparison()["columns"]] == ["base", "runs/me", "older/me"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs/me", "nowhere"], "`RUN`: there is no folder `nowhere`"),
        (["runs/me", "runs"], "`RUNS`: run `runs` has no result"),
        (["runs/me", "./runs/me"], "is given twice"),
        (["runs/me", "--output", "runs/other"], "is the folder of a training"),
        (["runs/me", "failed"], "ended as `failed`"),
        (["runs/me", "mute"], "no caption of run `mute` has its identifier `TOK`"),
    ],
)
def test_what_cannot_be_compared_is_named(
    arguments: list[str], message: str, runs: Path, capsys: Any
) -> None:
    for name in ("failed", "mute"):
        shutil.copytree(runs / "me", name)
    result = Path("failed/result.json")
    result.write_text(result.read_text().replace('"done"', '"failed"'))
    prepared = Path("mute/prepared/prepared.json")
    prepared.write_text(prepared.read_text().replace("TOK", "zwx"))

    assert run(["compare", *arguments]) == 2

    assert message in capsys.readouterr().err
    assert not Path("compare").exists()
