"""Names of base models: ours, the owner's before them, and lists that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.errors import InputError
from trainer.known_models import known_model, known_models


@pytest.fixture(autouse=True)
def nothing_of_the_owners(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRAINER_BASE_MODELS", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


def own_list(folder: Path, text: str) -> Path:
    path = folder / "trainer" / "base_models.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def options_of(name: str) -> dict[str, object]:
    model = known_model(name)
    assert model is not None
    return dict(model.options)


def test_ours_say_where_a_model_is_or_which_file_is_needed() -> None:
    assert len(known_models()) > 20
    assert options_of("v1-5-pruned-emaonly") == {
        "model_url": "stable-diffusion-v1-5/stable-diffusion-v1-5"
    }
    for model in known_models().values():
        assert "model_url" in model.options or model.note


@pytest.mark.parametrize("guide", ["Depth", "Canny", "Fill"])
def test_what_guides_pictures_needs_a_base_model_of_its_own(guide: str) -> None:
    model = known_model(f"flux-pro-1.0-{guide.lower()}")

    assert model is not None
    assert "model_url" not in model.options
    assert f"black-forest-labs/FLUX.1-{guide}-dev" in model.problem("model").message


def test_the_owners_entry_goes_before_ours_as_a_whole(tmp_path: Path) -> None:
    name = "realisticVisionV51_v51VAE_94301"
    assert "vae_url" in options_of(name)

    own_list(tmp_path, f"{name}: {{model_url: ./vision.safetensors, variant: fp16}}\n")

    assert options_of(name) == {
        "model_url": str(tmp_path / "trainer" / "vision.safetensors"),
        "variant": "fp16",
    }


def test_a_hub_id_stays_one_unless_the_folder_is_there(tmp_path: Path) -> None:
    (tmp_path / "trainer" / "here" / "model").mkdir(parents=True)
    own_list(tmp_path, "a: {model_url: some/model}\nb: {model_url: here/model}\n")

    assert options_of("a") == {"model_url": "some/model"}
    assert options_of("b") == {"model_url": str(tmp_path / "trainer" / "here" / "model")}


def test_a_list_that_changes_is_read_again(tmp_path: Path) -> None:
    own_list(tmp_path, "mine: {model_url: some/model}\n")
    assert known_model("mine") is not None

    own_list(tmp_path, "mine: {model_url: another/larger-model}\n")

    assert options_of("mine") == {"model_url": "another/larger-model"}


def test_of_several_lists_a_later_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    for number, file in enumerate(files):
        file.write_text(f"both: {{model_url: m/{number}}}\nonly{number}: {{note: x}}\n")
    monkeypatch.setenv("TRAINER_BASE_MODELS", ":".join(map(str, files)))

    assert options_of("both") == {"model_url": "m/1"}
    assert known_model("only0") is not None


@pytest.mark.parametrize(
    ("text", "field", "said"),
    [
        ("mine: a.safetensors\n", "mine", "allowed: model_url or note"),
        ("mine: {variant: fp16}\n", "mine", "allowed: model_url or note"),
        ("mine: {model_url: a/b, modelurl: c}\n", "mine.modelurl", "there is no such option"),
        ("mine: {model_url: 3}\n", "mine.model_url", "got 3 (in "),
        ("mine: {model_url: ''}\n", "mine.model_url", "allowed: text, not empty"),
    ],
)
def test_a_list_that_cannot_be_used_is_told_by_file_entry_and_field(
    tmp_path: Path, text: str, field: str, said: str
) -> None:
    path = own_list(tmp_path, text)

    with pytest.raises(InputError) as caught:
        known_models()

    (problem,) = caught.value.problems
    assert problem.field == field
    assert said in problem.message
    assert str(path) in problem.message


def test_a_list_that_is_named_and_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINER_BASE_MODELS", "/nowhere/models.yaml")

    with pytest.raises(InputError, match="cannot be read"):
        known_model("mine")


def test_null_is_not_the_same_as_leaving_an_option_out(tmp_path: Path) -> None:
    own_list(tmp_path, "mine: {model_url: some/model, vae_url: null}\n")

    assert options_of("mine") == {"model_url": "some/model", "vae_url": None}


def test_a_place_cannot_be_null(tmp_path: Path) -> None:
    own_list(tmp_path, "mine: {model_url: null}\n")

    with pytest.raises(InputError, match="got null"):
        known_models()
