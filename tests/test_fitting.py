"""A configuration for the base model that was found: refused, given way, without effect."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import make_tiny_models
import pytest
from tiny import compose, configuration

from trainer import base_model
from trainer.base_model import BaseModel
from trainer.config import AdapterConfig, ModelConfig, TrainingConfig
from trainer.errors import InputError, Problem
from trainer.fitting import fitted
from trainer.machine import completed
from trainer.resolve import Layer, resolve

FLOW_ONLY = {
    "timestep_density": "uniform",
    "logit_mean": 0.5,
    "logit_std": 2.0,
    "mode_scale": 0.5,
    "timestep_shift": 3.0,
}


def located(folder: Path) -> BaseModel:
    return base_model.locate(ModelConfig(model_url=str(folder)))


@pytest.fixture
def flux(flux_folder: Path) -> BaseModel:
    return located(flux_folder)


@pytest.fixture
def flux2(flux2_folder: Path) -> BaseModel:
    return located(flux2_folder)


@pytest.fixture
def sdxl(sdxl_folder: Path) -> BaseModel:
    return located(sdxl_folder)


@pytest.fixture(scope="module")
def schnell_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "schnell"
    return make_tiny_models.make_flux(folder, guidance_embeds=False)


def resolved(base: BaseModel, assumed: dict[str, object], **given: object) -> TrainingConfig:
    """A resolved configuration of leaves that a preset assumes and of those somebody gave."""
    places = {"model_url": base.settings.model_url, "images_data_url": "photos"}
    layers = [
        Layer("preset", assumed, explicit=False),
        Layer("train.yaml", {**places, **given}, explicit=True),
    ]
    return resolve(layers)


def given(base: BaseModel, **leaves: object) -> TrainingConfig:
    return fitted(resolved(base, {}, **leaves), base)


def assumed(base: BaseModel, **leaves: object) -> TrainingConfig:
    return fitted(resolved(base, leaves), base)


def refused(base: BaseModel, **leaves: object) -> dict[str, Problem]:
    with pytest.raises(InputError) as caught:
        given(base, **leaves)
    return {problem.field: problem for problem in caught.value.problems}


def notes_on(config: TrainingConfig, field: str) -> list[tuple[str, str]]:
    return [(n.kind, n.message) for n in config.resolved.notes if n.field == field]


# What means nothing


def test_min_snr_is_refused_where_a_model_learns_by_flow_matching(flux: BaseModel) -> None:
    (problem,) = refused(flux, snr_gamma=5.0).values()
    assert problem.field == "snr_gamma"
    assert "got 5" in problem.message
    assert "a `flux` learns by flow matching" in problem.message
    assert problem.hint == "leave it out"


@pytest.mark.parametrize("off", [None, 0])
def test_min_snr_that_somebody_turned_off_is_no_error(off: object, flux: BaseModel) -> None:
    config = given(flux, snr_gamma=off)
    assert config.loss.snr_gamma is None


def test_min_snr_that_nobody_chose_is_off_and_said_to_be(flux2: BaseModel) -> None:
    for config in (given(flux2), assumed(flux2, snr_gamma=0.5)):
        assert config.loss.snr_gamma is None
        assert notes_on(config, "snr_gamma") == [
            ("ignored", "a `flux2` learns by flow matching"),
        ]


def test_options_of_flow_matching_are_refused_all_at_once_for_a_table_of_noise_levels(
    sdxl: BaseModel,
) -> None:
    problems = refused(sdxl, **FLOW_ONLY)
    assert problems.keys() == FLOW_ONLY.keys()
    assert all(
        "a `sdxl` learns from a table of noise levels" in p.message for p in problems.values()
    )


def test_options_of_flow_matching_that_nobody_chose_are_noted_once_each(sdxl: BaseModel) -> None:
    config = given(sdxl)
    for leaf in FLOW_ONLY:
        reason = "a `sdxl` learns from a table of noise levels"
        assert notes_on(config, leaf) == [("ignored", reason)]
    assert config.loss.snr_gamma == 5.0
    assert notes_on(config, "snr_gamma") == []


def test_all_that_means_something_is_taken(flux: BaseModel) -> None:
    config = given(flux, **(FLOW_ONLY | {"timestep_density": "mode"}), guidance_scale=3.5)
    assert config.loss.mode_scale == 0.5
    assert notes_on(config, "guidance_scale") == notes_on(config, "mode_scale") == []


def test_guidance_is_refused_where_the_denoiser_is_not_told_any(
    schnell_folder: Path, flux2: BaseModel, sdxl: BaseModel
) -> None:
    for base in (located(schnell_folder), flux2, sdxl):
        (problem,) = refused(base, guidance_scale=1.0).values()
        assert problem.field == "guidance_scale"
        assert "not told any guidance" in problem.message
        (note,) = notes_on(given(base), "guidance_scale")
        assert note == ("ignored", "this denoiser is not told any guidance")


# Sizes


def test_a_size_between_two_whole_numbers_of_tokens_is_refused_with_the_nearest(
    flux: BaseModel, flux2: BaseModel, sdxl: BaseModel
) -> None:
    for base in (flux, flux2):
        problems = refused(base, resolution_width=776, resolution_height=1000)
        assert problems.keys() == {"resolution_width", "resolution_height"}
        assert "got 776" in problems["resolution_width"].message
        assert "a multiple of 16" in problems["resolution_width"].message
        # 776 is as near to 768 as to 784.
        assert problems["resolution_width"].hint in ("give 768", "give 784")
        assert problems["resolution_height"].hint in ("give 992", "give 1008")
    assert given(sdxl, resolution_width=776, resolution_height=776).data.resolution_width == 776
    assert given(flux, resolution_width=784, resolution_height=784).data.resolution_width == 784


def test_a_size_that_nobody_chose_is_measured_as_well(flux: BaseModel) -> None:
    with pytest.raises(InputError, match="resolution_width.*776"):
        assumed(flux, resolution_width=776, resolution_height=768)


# Layers


def test_layers_that_nobody_chose_give_way_to_the_familys_with_one_note(
    flux: BaseModel, flux2: BaseModel, sdxl: BaseModel
) -> None:
    fals = ["to_k", "to_q", "to_v", "to_out.0", "conv1", "conv2"]
    for base in (flux, flux2):
        for config in (given(base), assumed(base, target_unet_modules=fals)):
            assert config.adapter.target_unet_modules == base.family.target_modules
            (note,) = notes_on(config, "target_unet_modules")
            assert note[0] == "yielded"
            assert "conv1" in note[1]
    config = given(sdxl)
    assert config.adapter.target_unet_modules == AdapterConfig().target_unet_modules
    assert notes_on(config, "target_unet_modules") == []


def test_layers_of_a_presets_own_stay(flux: BaseModel) -> None:
    config = assumed(flux, target_unet_modules=["to_k", "proj_mlp"])
    assert config.adapter.target_unet_modules == ("to_k", "proj_mlp")
    assert notes_on(config, "target_unet_modules") == []


def test_without_an_adapter_nothing_is_said_of_its_layers_but_that_there_is_none(
    flux: BaseModel,
) -> None:
    config = given(flux, use_lora=False)
    (note,) = notes_on(config, "target_unet_modules")
    assert note[0] == "ignored"


def test_layers_that_somebody_chose_and_the_denoiser_lacks_are_refused(
    flux_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    config = configuration(flux_folder, photo_folder, target_unet_modules=["to_k", "conv1"])
    with pytest.raises(InputError, match="target_unet_modules.*conv1"):
        compose(config, tmp_path)


# Text that learns


def test_new_tokens_that_nobody_chose_give_way_to_words_where_they_say_little(
    flux: BaseModel, flux2: BaseModel
) -> None:
    for base in (flux, flux2):
        config = assumed(base, train_text_encoder_ti=True, token_abstraction=["SIDAI"])
        assert not config.token.train_text_encoder_ti
        (note,) = notes_on(config, "train_text_encoder_ti")
        assert note[0] == "yielded"
        assert "`SIDAI` stays text" in note[1]


def test_what_new_tokens_would_have_needed_is_noted_as_idle_once(flux: BaseModel) -> None:
    idle = (
        "num_new_tokens_per_abstraction",
        "train_text_encoder_ti_frac",
        "token_retraction",
        "text_encoder_lr",
    )
    before = resolved(flux, {"train_text_encoder_ti": True})
    assert not any(notes_on(before, leaf) for leaf in idle)
    after = fitted(before, flux)
    never = given(flux)
    for config in (after, never, completed(after, flux)):
        for leaf in idle:
            assert [kind for kind, _ in notes_on(config, leaf)] == ["ignored"]
        counted = Counter((n.kind, n.field) for n in config.resolved.notes)
        assert [place for place, count in counted.items() if count > 1] == []


def test_new_tokens_that_somebody_chose_learn_where_a_text_encoder_can(
    flux: BaseModel, sdxl: BaseModel
) -> None:
    for base in (flux, sdxl):
        config = given(base, train_text_encoder_ti=True)
        assert config.token.train_text_encoder_ti
        assert notes_on(config, "train_text_encoder_ti") == []
    assert assumed(sdxl, train_text_encoder_ti=True).token.train_text_encoder_ti


@pytest.mark.parametrize("leaf", ["train_text_encoder_ti", "train_text_encoder"])
def test_text_that_should_learn_where_no_text_encoder_can_is_refused(
    leaf: str, flux2: BaseModel
) -> None:
    (problem,) = refused(flux2, **{leaf: True}).values()
    assert problem.field == leaf
    assert "no text encoder of a `flux2` can learn that way" in problem.message
    assert "`TOK` stays text" in str(problem.hint)


def test_text_encoders_that_nobody_let_learn_give_way_only_where_none_can(
    flux: BaseModel, flux2: BaseModel
) -> None:
    config = assumed(flux2, train_text_encoder=True)
    assert not config.adapter.train_text_encoder
    assert [kind for kind, _ in notes_on(config, "train_text_encoder")] == ["yielded"]
    assert assumed(flux, train_text_encoder=True).adapter.train_text_encoder


# Class pictures and noise


def test_class_pictures_are_guided_as_the_pipeline_does_unless_somebody_says_how(
    flux: BaseModel, flux2: BaseModel, sdxl: BaseModel, sd15_folder: Path
) -> None:
    # The defaults that diffusers documents for each pipeline's `guidance_scale`.
    for base, scale in ((flux, 3.5), (flux2, 4.0), (sdxl, 5.0), (located(sd15_folder), 7.5)):
        prior = {"with_prior_preservation": True, "photo_class": "Man"}
        assert given(base, **prior).prior.class_guidance_scale == scale
        own = given(base, **prior, class_guidance_scale=2.0)
        assert own.prior.class_guidance_scale == 2.0


def test_a_noise_offset_is_warned_of_where_pictures_begin_as_plain_noise(
    flux: BaseModel, sdxl: BaseModel
) -> None:
    (note,) = notes_on(given(flux, noise_offset=0.1), "noise_offset")
    assert note[0] == "warning"
    assert "0.1 teaches noise that no sampler of such a model starts from" in note[1]
    for config in (given(flux), given(flux, noise_offset=0.0), given(sdxl, noise_offset=0.1)):
        assert notes_on(config, "noise_offset") == []


def test_everything_that_is_wrong_is_said_at_once(flux2: BaseModel) -> None:
    problems = refused(
        flux2, snr_gamma=1.0, guidance_scale=3.0, train_text_encoder=True, resolution_width=776
    )
    # The other side follows from the one that was given, and is told of there.
    assert problems.keys() == {
        "snr_gamma",
        "guidance_scale",
        "train_text_encoder",
        "resolution_width",
    }


def test_what_was_fitted_once_stays_as_it_is(flux: BaseModel) -> None:
    once = assumed(flux, train_text_encoder_ti=True)
    assert fitted(once, flux) == once


def test_an_option_of_another_objective_that_is_null_asks_for_nothing(sdxl: BaseModel) -> None:
    assert given(sdxl, timestep_shift=None).loss.timestep_shift is None


def test_targets_that_are_no_layers_are_told_of_with_everything_else(flux2: BaseModel) -> None:
    problems = refused(flux2, snr_gamma=1.0, target_unet_modules=["to_k", "conv1"])
    assert problems.keys() == {"snr_gamma", "target_unet_modules"}
    assert "`conv1` is the end of no layer" in problems["target_unet_modules"].message


def test_an_everyday_word_is_warned_of_where_it_stays_text_after_all(flux: BaseModel) -> None:
    config = fitted(
        resolved(flux, {"train_text_encoder_ti": True}, token_abstraction=["woman"]), flux
    )
    kinds = [kind for kind, _ in notes_on(config, "token_abstraction")]
    assert "warning" in kinds


def test_empty_captions_are_warned_of_where_no_sampler_uses_them(
    flux: BaseModel, flux2: BaseModel
) -> None:
    (note,) = notes_on(given(flux, caption_dropout=0.1), "caption_dropout")
    assert note[0] == "warning"
    assert "told its guidance" in note[1]
    for config in (given(flux), given(flux2, caption_dropout=0.1)):
        assert notes_on(config, "caption_dropout") == []
