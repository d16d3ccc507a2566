"""FLUX.1 in training: prior preservation, text that learns, guidance, masks, long captions."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import make_tiny_models
import pytest
import snapshots
import torch
from PIL import Image
from safetensors.torch import load_file
from skimage import data as photographs
from snapshots import changed, encoded, fresh, gradient, loss_of, watched
from tiny import compose, configuration, losses, never

from trainer import base_model, encoding
from trainer.base_model import BaseModel
from trainer.config import ModelConfig
from trainer.data.dataset import Batch
from trainer.errors import InputError, NonFiniteError
from trainer.events import NoteEvent
from trainer.families import load_family
from trainer.job import RunFolder
from trainer.resolve import Layer, resolve
from trainer.trainables import recompute_activations
from trainer.training import Training

CLASS_PROMPT = "a photo of a woman"
CAPTION = "A photograph of a TOK"
PRIOR: dict[str, Any] = {
    "with_prior_preservation": True,
    "photo_class": "Woman",
    "cache_latents": False,
    "batch_size": 2,
}


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures, each with a caption of its own."""
    folder = snapshots.write_pictures(tmp_path_factory.mktemp("flux") / "subject", 3)
    for number in range(3):
        (folder / f"{number}.txt").write_text(f"TOK number {number}")
    return folder


@pytest.fixture(scope="module")
def of_class(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux") / "class"
    return snapshots.write_pictures(folder, 2, photograph=photographs.cat)


def asked_by(training: Training, batch: Batch) -> dict[str, Any]:
    """What the transformer is given for a batch."""
    seen: list[dict[str, Any]] = []
    hook = training.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    loss_of(training, batch)
    hook.remove()
    return seen[0]


# Prior preservation, where diffusers' advanced script for FLUX.1 has three errors


@pytest.fixture(scope="module")
def with_prior(
    flux_folder: Path, subject: Path, of_class: Path, tmp_path_factory: pytest.TempPathFactory
) -> Training:
    given = PRIOR | {"class_images_url": str(of_class)}
    folder = tmp_path_factory.mktemp("flux prior")
    return compose(configuration(flux_folder, subject, **given), folder)[0]


def test_each_row_of_a_batch_with_class_pictures_has_the_text_of_its_own_caption(
    with_prior: Training, flux_folder: Path
) -> None:
    (batch,) = with_prior.dataset[0]
    asked = asked_by(with_prior, batch)
    base = fresh(flux_folder)
    assert len(batch.captions) == 4
    assert batch.captions[2:] == (CLASS_PROMPT,) * 2
    assert len(set(batch.captions)) == 3
    for row, caption in enumerate(batch.captions):
        own = encoded(base, caption)
        for given, name in (
            ("encoder_hidden_states", "prompt_embeds"),
            ("pooled_projections", "pooled_prompt_embeds"),
        ):
            torch.testing.assert_close(asked[given][row], own[name][0], rtol=0, atol=1e-6)


def test_places_of_text_and_picture_are_those_of_one_example_however_many_there_are(
    with_prior: Training,
) -> None:
    (batch,) = with_prior.dataset[0]
    asked = asked_by(with_prior, batch)
    assert torch.equal(asked["txt_ids"], torch.zeros(512, 3))
    # 64 pixels are 8 latents and 4 tokens on each side.
    places = [[0.0, float(row), float(column)] for row in range(4) for column in range(4)]
    assert asked["img_ids"].tolist() == places


def test_every_example_has_its_own_weight_and_the_prior_counts_as_much_as_is_said(
    with_prior: Training,
) -> None:
    (batch,) = with_prior.dataset[0]
    # The batch of two and two is the sum of its four examples.
    rows = [replace(batch, weights=batch.weights * row) for row in torch.eye(4)]
    each = [gradient(with_prior, row) for row in rows]
    whole = gradient(with_prior, batch)
    assert float((whole - sum(each)).norm()) < 1e-5 * float(whole.norm())
    assert all(float(one.norm()) > 0.01 * float(whole.norm()) for one in each)


def test_the_gradient_is_the_subjects_plus_the_weight_times_the_classs(
    with_prior: Training, flux_folder: Path, subject: Path, of_class: Path, tmp_path: Path
) -> None:
    gradients = {1.0: gradient(with_prior, with_prior.dataset[0][0])}
    for weight in (0.0, 2.5):
        given = PRIOR | {"class_images_url": str(of_class), "prior_loss_weight": weight}
        config = configuration(flux_folder, subject, **given)
        training, _ = compose(config, tmp_path / str(weight))
        gradients[weight] = gradient(training, training.dataset[0][0])
    of_the_class, scale = gradients[1.0] - gradients[0.0], float(gradients[0.0].norm())
    assert float(of_the_class.norm()) > 0.1 * scale
    assert float((gradients[2.5] - gradients[0.0] - 2.5 * of_the_class).norm()) < 1e-5 * scale


# Text


def test_where_new_tokens_are_only_a_default_the_identifier_stays_text_in_both_encoders(
    flux_folder: Path, subject: Path, tmp_path: Path
) -> None:
    # As fal's dialect has it where a request does not say.
    places = {"model_url": str(flux_folder), "images_data_url": str(subject)}
    layers = [
        Layer("dialect", {"train_text_encoder_ti": True, "max_train_steps": 2}, explicit=False),
        Layer("request", {**places, "tensorboard": False, "rank": 4}, explicit=True),
    ]
    training, events = compose(resolve(layers), tmp_path)
    notes = [e for e in events if isinstance(e, NoteEvent) and e.field == "train_text_encoder_ti"]
    assert [note.note for note in notes] == ["yielded"]
    assert training.trainables.new_tokens == {}
    kept, plain = training.text.of(["TOK number 0"]), encoded(fresh(flux_folder), "TOK number 0")
    for name, states in plain.items():
        assert torch.equal(kept[name], states)
    tokenizers = [training.family.pipeline.components[n] for n in ("tokenizer", "tokenizer_2")]
    for tokenizer in tokenizers:
        ids = tokenizer("TOK number 0", add_special_tokens=False).input_ids
        assert "tok" in tokenizer.decode(ids).lower()
        assert "<s0>" not in tokenizer.get_vocab()
    # Nothing of text learns: its encoders are gone before the transformer trains.
    assert training.family.pipeline.text_encoder is None
    assert training.family.pipeline.text_encoder_2 is None
    assert len(losses(list(training.steps(RunFolder(tmp_path), never)))) == 2


def test_new_tokens_that_are_asked_for_learn_in_clip_and_t5_and_can_be_read_back(
    flux_folder: Path, subject: Path, tmp_path: Path
) -> None:
    leaves = {"train_text_encoder_ti": True, "text_encoder_lr": 1e-2, "cache_latents": False}
    composed, _ = snapshots.composition(
        configuration(flux_folder, subject, **leaves, max_train_steps=4), tmp_path
    )
    training, encoders = composed.training, ("text_encoder", "text_encoder_2")
    parts = {n: training.family.pipeline.components[n] for n in (*encoders, "vae", "transformer")}
    states, _ = watched(training, tmp_path)
    for step in range(4):
        moved = changed(states[step], states[step + 1], "new_tokens.")
        # The pivot is at half the steps.
        assert moved == ({f"new_tokens.{name}" for name in encoders} if step < 2 else set())
        assert changed(states[step], states[step + 1], "transformer.")
    base = fresh(flux_folder)
    for name, module in parts.items():
        expected, got = base.pipeline.components[name].state_dict(), snapshots.base_tensors(module)
        assert got.keys() == expected.keys()
        assert not changed(expected, got, "")

    trained = training.text.of(["TOK number 1"])
    snapshots.deliver(composed, tmp_path)
    rows = load_file(tmp_path / "outputs" / "lora_emb.safetensors")
    assert rows.keys() == {"clip_l", "t5xxl"}
    before = encoded(base, "<s0><s1> number 1")
    for key, place in (("clip_l", ""), ("t5xxl", "_2")):
        base.pipeline.load_textual_inversion(
            rows[key],
            token=["<s0>", "<s1>"],
            tokenizer=base.pipeline.components[f"tokenizer{place}"],
            text_encoder=base.pipeline.components[f"text_encoder{place}"],
        )
    after = encoded(base, "<s0><s1> number 1")
    for name, states_of_text in after.items():
        torch.testing.assert_close(states_of_text, trained[name], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(before[name], trained[name], atol=1e-3)


def test_of_text_encoders_that_may_learn_clip_alone_does(
    flux_folder: Path, subject: Path, tmp_path: Path
) -> None:
    config = configuration(flux_folder, subject, train_text_encoder=True, max_train_steps=2)
    training, _ = compose(config, tmp_path)
    t5 = training.family.pipeline.text_encoder_2
    states, _ = watched(training, tmp_path)
    moved = {name.split(".")[0] for name in changed(states[0], states[-1], "")}
    assert moved == {"transformer", "text_encoder"}
    expected = fresh(flux_folder).pipeline.text_encoder_2.state_dict()
    assert not changed(expected, t5.state_dict(), "")


# Guidance


def test_a_guided_transformer_is_told_the_guidance_as_it_was_given(
    with_prior: Training, flux_folder: Path, subject: Path, tmp_path: Path
) -> None:
    config = configuration(flux_folder, subject, guidance_scale=3.5, batch_size=2)
    training, _ = compose(config, tmp_path)
    assert asked_by(training, training.dataset[0][0])["guidance"].tolist() == [3.5] * 2
    # 1 where nobody says, one for each example.
    asked = asked_by(with_prior, with_prior.dataset[0][0])
    assert asked["guidance"].tolist() == [1.0] * 4


def test_a_transformer_without_guidance_is_told_none_and_its_times_are_not_shifted(
    subject: Path, tmp_path: Path
) -> None:
    schnell = make_tiny_models.make_flux(tmp_path / "schnell", guidance_embeds=False)
    training, _ = compose(configuration(schnell, subject, batch_size=2), tmp_path / "run")
    assert asked_by(training, training.dataset[0][0])["guidance"] is None
    assert training.passes.objective.shift_odds(4096) == 1.0  # type: ignore[attr-defined]


# Masks


def test_the_four_pixels_of_a_token_can_have_different_weights(
    flux_folder: Path, subject: Path, tmp_path: Path
) -> None:
    photos = Path(shutil.copytree(subject, tmp_path / "photos"))
    for number in range(3):
        mask = Image.new("L", (64, 64), 255)
        # One latent pixel of the first token counts nothing, its right neighbour half.
        mask.paste(0, (0, 0, 8, 8))
        mask.paste(128, (8, 0, 16, 8))
        mask.save(photos / f"{number}_mask.png")
    config = configuration(flux_folder, photos, cache_latents=False)
    training, _ = compose(config, tmp_path / "run")
    (batch,) = training.dataset[0]

    gains = {}
    for place in ((0, 0), (0, 1), (1, 0), (1, 1)):
        target = training.passes.objective.target
        moved = torch.zeros(8, 8)
        moved[place] = 1000

        def other(*given: torch.Tensor, by: torch.Tensor = moved, of: Any = target) -> torch.Tensor:
            answer: torch.Tensor = of(*given)
            return answer + by

        before = loss_of(training, batch).item()
        training.passes.objective.target = other  # type: ignore[method-assign]
        gains[place] = loss_of(training, batch).item() - before
        training.passes.objective.target = target  # type: ignore[method-assign]
    assert gains[0, 0] == 0
    assert gains[1, 0] > 1
    # The error of 1000 outweighs all others.
    assert gains[1, 1] == pytest.approx(gains[1, 0], rel=0.01)
    assert gains[0, 1] == pytest.approx(128 / 255 * gains[1, 0], rel=0.01)


# Checkpoints that are FLUX.1 by another name, and some that are not


def disguised(flux: Path, folder: Path, pipeline: str, **transformer: Any) -> BaseModel:
    """A copy without weights that says it is of another pipeline and another transformer."""
    shutil.copytree(flux, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for file, entries in (
        ("model_index.json", {"_class_name": pipeline}),
        ("transformer/config.json", transformer),
    ):
        written = json.loads((folder / file).read_text()) | entries
        (folder / file).write_text(json.dumps(written))
    return base_model.locate(ModelConfig(model_url=str(folder)))


def test_a_kontext_checkpoint_trains_as_flux(
    flux_folder: Path, subject: Path, tmp_path: Path
) -> None:
    kontext = tmp_path / "kontext"
    assert disguised(flux_folder, kontext, "FluxKontextPipeline").family_name == "flux"
    for weights in flux_folder.rglob("*.safetensors"):
        shutil.copy(weights, kontext / weights.relative_to(flux_folder))
    training, _ = compose(configuration(kontext, subject, max_train_steps=1), tmp_path / "run")
    plain, _ = compose(configuration(flux_folder, subject, max_train_steps=1), tmp_path / "plain")
    batch = plain.dataset[0][0]
    assert loss_of(training, batch).item() == loss_of(plain, batch).item()


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ("FluxFillPipeline", "is a `FluxFillPipeline`"),
        ("FluxPipeline", "its transformer has in_channels `384` where this family has `64`"),
        ("FluxKontextPipeline", "its transformer has in_channels `384`"),
    ],
)
def test_a_transformer_that_is_given_more_than_latents_is_refused(
    pipeline: str, message: str, flux_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"model_url.*{message}"):
        disguised(flux_folder, tmp_path / "model", pipeline, in_channels=384)


# Captions


def test_a_caption_is_too_long_only_where_no_text_encoder_sees_its_end(flux_folder: Path) -> None:
    family = fresh(flux_folder)
    # The tiny tokenizers have a token for each letter: CLIP reads 75 of them, T5 some 500.
    for_t5, for_neither = "x" * 200, "y" * 600
    notes = encoding.cut_captions(family, [for_t5, for_neither], None, instance_prompt="")
    (note,) = notes
    assert note.note == "warning"
    assert "`yyy" in note.message
    assert "x" not in note.message.split("`")[1]
    end = encoding.cut_off(family, for_neither, None)
    # T5 has room for 511 pieces beside its end mark; one stands for the word's beginning.
    assert len(end) == 600 - 510
    seen, other = encoded(family, for_neither), encoded(family, for_neither[: -len(end)])
    assert torch.equal(seen["prompt_embeds"], other["prompt_embeds"])
    shorter = encoded(family, for_neither[: -len(end) - 1])
    assert not torch.equal(seen["prompt_embeds"], shorter["prompt_embeds"])


def test_a_shorter_length_cuts_what_t5_reads_and_not_what_clip_does(flux_folder: Path) -> None:
    family = fresh(flux_folder)
    family.max_sequence_length = 100
    # Between what CLIP reads of it and what T5 does; T5 has its end mark and the word's beginning.
    caption = "x" * 120
    assert encoding.cut_off(family, caption, None) == "x" * (120 - 98)
    assert encoded(family, caption)["prompt_embeds"].shape[1] == 100

    family.max_sequence_length = 32
    # Beyond 30 letters CLIP alone sees it.
    assert encoding.cut_off(family, "x" * 75, None) == ""
    assert encoding.cut_off(family, "x" * 76, None) == "x"


# Text encoders by themselves


def test_recomputed_activations_leave_t5_without_dropout(flux_folder: Path) -> None:
    family = base_model.load(
        base_model.locate(ModelConfig(model_url=str(flux_folder))),
        base_model.Precision(*[torch.float32] * 4),
    )
    before = family.encode_text([CAPTION])
    recompute_activations(family.pipeline.text_encoder_2)
    after = family.encode_text([CAPTION])
    assert torch.equal(after["prompt_embeds"], before["prompt_embeds"])


def test_a_text_encoder_that_cannot_learn_stays_in_the_format_of_what_is_frozen() -> None:
    learning = base_model.Precision(
        torch.bfloat16, torch.bfloat16, torch.float32, text_encoders=torch.float32
    )
    assert learning.of_text_encoders(load_family("flux")) == {
        "text_encoder": torch.float32,
        "text_encoder_2": torch.bfloat16,
    }


def test_a_text_encoder_that_overflows_is_named_with_its_caption(flux_folder: Path) -> None:
    family = base_model.load(
        base_model.locate(ModelConfig(model_url=str(flux_folder))),
        base_model.Precision(*[torch.float32] * 4),
    )
    family.pipeline.text_encoder_2.encoder.final_layer_norm.weight.data.fill_(torch.inf)
    text = encoding.Text(family, [CAPTION], None, torch.device("cpu"))
    with pytest.raises(NonFiniteError, match=f"no finite states for `{CAPTION}`"):
        list(text.keep())


def test_a_vae_of_sdxl_gives_way_where_nobody_chose_it_and_is_refused_where_somebody_did(
    flux_folder: Path, sdxl_folder: Path
) -> None:
    settings = ModelConfig(model_url=str(flux_folder), vae_url=str(sdxl_folder / "vae"))
    located = base_model.locate(settings, vae_is_explicit=False)
    assert located.settings.vae_url is None
    assert [note.field for note in located.notes] == ["vae_url"]
    with pytest.raises(InputError, match="latent_channels 4, .* speaks of another latent space"):
        base_model.locate(settings)
