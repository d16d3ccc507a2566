"""The small world's base model, and that a training in it teaches what it should.

Figures of all options, with their spread over seeds: `scripts/check_learning`.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import click
import faulty_loop
import learning
import make_learning_tables
import pytest
import torch
import world_flux
from faulty_loop import FAULTS, Course
from learning import World
from learning_checks import BOUNDS, WORLDS, Bench, Bound, kept, worse_than_with_faults
from make_world import ASKED, check, sampled
from world_pictures import SCENES, draw, look
from world_subjects import SHOWN, SUBJECT, draw_in_style, is_plain, styled

from trainer.cli import run
from trainer.prompt_library import library

ROOT = Path(__file__).parent.parent
WORLD = WORLDS["sdxl"](Path()).folder
SEED = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(WORLD, tmp_path_factory.mktemp("world"))


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Who looks


def test_what_is_drawn_of_the_subject_is_like_it_and_no_figure_of_the_world_is() -> None:
    places = [(ground, "center") for ground in ("white", "black", "gray", "pink")]
    pictures, masks = SUBJECT.draw(places, drawn(0))
    assert masks.shape == (4, 64, 64)
    assert min(map(SUBJECT.likeness, pictures)) > 0.85
    assert max(map(SUBJECT.likeness, draw(SCENES, drawn(1)))) < SHOWN / 4
    assert min(map(SUBJECT.coloured, pictures)) > 0.95


def test_a_picture_without_a_figure_is_not_like_the_subject() -> None:
    assert SUBJECT.likeness(torch.full((3, 64, 64), 0.5)) == 0.0


def test_a_style_is_seen_where_it_is_drawn_and_nowhere_else() -> None:
    scenes = SCENES[::20]
    assert min(map(styled, draw_in_style(scenes, drawn(0)))) > 0.9
    assert max(map(styled, draw(scenes, drawn(0)))) < 0.1


def test_a_figure_of_two_colours_is_not_plain() -> None:
    (striped,), _ = SUBJECT.draw([("white", "center")], drawn(0))
    (plain,) = draw([SCENES[0]], drawn(0))
    assert is_plain(plain, SCENES[0].colour)
    assert not is_plain(striped, SUBJECT.outer)


# The base model


@pytest.mark.parametrize("family", WORLDS)
def test_a_base_model_is_small_and_in_half_precision(family: str) -> None:
    folder = WORLDS[family](Path()).folder
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert sum(path.stat().st_size for path in files) < 20e6


LENGTHS = [("flux", {"max_sequence_length": length}) for length in world_flux.LENGTHS]


@pytest.mark.parametrize(("family", "options"), [("sdxl", {}), *LENGTHS])
def test_a_base_model_draws_what_it_is_told(
    family: str, options: dict[str, int], tmp_path: Path
) -> None:
    scenes = SCENES[7::50]
    pipeline = WORLDS[family](tmp_path).family.pipeline
    shares, _ = check(pipeline, scenes, seed=SEED, **options)
    assert len(scenes) == 8
    assert all(shares[name] >= least for name, least in ASKED.items()), shares


def test_pictures_of_one_seed_are_the_same(world: World) -> None:
    prompts = ["a red circle", "a blue square"]
    first, again = (sampled(world.family.pipeline, prompts, seed=SEED) for _ in range(2))
    assert torch.equal(first, again)
    assert [look(picture).colour for picture in first] == ["red", "blue"]


# Training


def test_a_subject_is_learnt_and_put_on_any_ground(world: World) -> None:
    photos = learning.write_photos(world.work / "photos")
    run = world.train("subject", photos, {"max_train_steps": 200, "seed": SEED})

    base, learnt = (learning.measure(world, one, count=12, seed=SEED) for one in (None, run))

    assert base.mean_likeness < 0.1
    assert learnt.mean_likeness > base.mean_likeness + 0.2
    assert learnt.background >= 0.9
    # What was put on comes off to the bit.
    again = learning.measure(world, None, count=12, seed=SEED)
    assert torch.equal(again.pictures, base.pictures)


# The checks


@pytest.mark.parametrize(
    ("bound", "holds", "fails"), [(Bound(least=0.9), 0.9, 0.89), (Bound(most=0.01), 0.01, 0.02)]
)
def test_a_bound_is_held_at_its_edge(bound: Bound, holds: float, fails: float) -> None:
    assert bound.holds(holds)
    assert not bound.holds(fails)


def test_ours_is_worse_only_beyond_two_deviations() -> None:
    """By hand: the deviation of 0.5, 0.7 is 0.141."""
    theirs = {"with faults: likeness": {0: 0.5, 1: 0.7}}
    assert worse_than_with_faults({**theirs, "ours: likeness": {0: 0.3, 1: 0.4}}) == []
    assert worse_than_with_faults({**theirs, "ours: likeness": {0: 0.1, 1: 0.2}}) == [
        "worse than with faults: likeness"
    ]


def test_figures_of_several_calls_are_kept_in_one_file(tmp_path: Path) -> None:
    asked, path = {"family": "sdxl", "steps": 800, "pictures": 40}, tmp_path / "figures.json"
    kept(path, asked, {"likeness": {1: 0.5}})
    kept(path, asked, {"likeness": {0: 0.25}, "style": {0: 1.0}})

    told = json.loads(path.read_text())
    assert told["figures"] == {"likeness": {"0": 0.25, "1": 0.5}, "style": {"0": 1.0}}
    assert told["steps"] == 800
    with pytest.raises(click.ClickException, match="has figures with steps 800, not 20"):
        kept(path, {**asked, "steps": 20}, {"style": {1: 1.0}})


def test_the_page_has_the_figures_that_were_measured() -> None:
    page = make_learning_tables.PAGE.read_text()
    assert page == make_learning_tables.page_with_figures(page), (
        "run scripts/make_learning_tables.py"
    )
    figures = json.loads(make_learning_tables.FILES["sdxl"].read_text())["figures"]
    assert figures.keys() >= BOUNDS.keys()


def test_the_loop_with_faults_learns_too_and_each_fault_changes_it(tmp_path: Path) -> None:
    photos = learning.write_photos(tmp_path, masked=True)
    course = Course(6, 1e-3, 4, ["to_q", "to_v"], 4, SEED, token_rate=5e-3)
    learnt = {
        faults: faulty_loop.train(WORLD, photos, replace(course, faults=faults))
        for faults in [(), *((fault,) for fault in FAULTS)]
    }
    weights = {
        faults: torch.cat([p.flatten() for p in trained.unet.parameters() if p.requires_grad])
        for faults, trained in learnt.items()
    }
    tokens = {
        faults: trained.text_encoder.get_input_embeddings().weight[-2:].detach()
        for faults, trained in learnt.items()
    }
    assert len(weights) == 5
    for fault in FAULTS:
        assert not torch.equal(weights[(fault,)], weights[()])
    assert not torch.equal(tokens["epoch-counted pivot",], tokens[()])


def test_a_training_of_a_check_is_of_its_seed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, dict[str, object]]] = []
    monkeypatch.setattr(
        World, "train", lambda _, name, photos, leaves, **given: asked.append((name, leaves))
    )
    Bench(world, seed=5, count=4, steps=20).train("some", Path("photos"), {"rank": 2})
    assert asked == [("some-5", {"seed": 5, "max_train_steps": 20, "rank": 2})]


# The demo


def test_the_demos_options_are_right_and_its_prompts_are_a_library(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = (ROOT / "scripts" / "demo").read_text()
    command = script[script.index("trainer train \\\n") : script.index('"$@"\n\nsay')]
    words = shlex.split(command.replace("\\\n", " "))
    photos = learning.write_photos(tmp_path / "photos")
    places = {"demo/photos": str(photos), "tests/samples/world": str(WORLD)}
    output = words.index("--output")
    asked = [places.get(word, word) for word in words[2:output] + words[output + 2 :]]

    code = run(["validate", *asked, "--json"])

    assert code == 0, capsys.readouterr().err
    told = json.loads(capsys.readouterr().out)
    assert len(told["explicit"]) > 10
    assert set(library(str(ROOT / "scripts" / "demo_prompts.yaml"))) >= {"on pink", "on black"}
