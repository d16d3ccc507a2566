"""diffusers' scripts for FLUX.2: that of [klein] is read, others are refused by what they train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from reading import filled, loaded, lost, pictures, taken, unneeded

from trainer import base_model
from trainer.config import ModelConfig
from trainer.errors import InputError
from trainer.fitting import fitted
from trainer.importers import Imported, imported
from trainer.importers.documents import read_document
from trainer.resolve import Layer, resolve

LINE = "accelerate launch --mixed_precision=bf16 train_dreambooth_lora_flux2_klein.py "
LINE += "--pretrained_model_name_or_path some/klein --instance_prompt 'a zkx cup' "


def command(words: str, place: str = "p") -> Imported:
    return imported([read_document(f"{LINE} --instance_data_dir={place} {words}")])


# Of the shape of the script's guide.
GUIDE = "--output_dir=cup --gradient_checkpointing --cache_latents --offload --resolution=768 "
GUIDE += "--train_batch_size=1 --guidance_scale=1 --use_8bit_adam --gradient_accumulation_steps=4 "
GUIDE += "--optimizer=adamW --learning_rate=2e-4 --lr_scheduler=constant --lr_warmup_steps=100 "
GUIDE += "--max_train_steps=400 --rank=16 --seed=0 --text_encoder_out_layers 9 18 27 "


def test_a_guides_command_loses_nothing() -> None:
    found = command(GUIDE)
    config = loaded(found)

    assert lost(found) == {}
    assert (config.adapter.rank, config.adapter.alpha) == (16, 4)
    assert (config.run.batch_size, config.run.gradient_accumulation_steps) == (1, 4)
    assert (config.data.resolution_width, config.run.mixed_precision) == (768, "bf16")
    assert "no guidance" in unneeded(found)["guidance_scale"]
    # An alpha that is not given is 4 in every version of this script.
    assert not any("Alpha is the rank" in remark for remark in found.remarks)


def test_an_import_fits_such_a_base_model(flux2_folder: Path) -> None:
    """On the family's own layers, which are those of the script."""
    base = base_model.locate(ModelConfig(model_url=str(flux2_folder)))
    given: dict[str, Any] = {**command(GUIDE).values, "model_url": str(flux2_folder)}

    config = fitted(resolve([Layer("import", given, explicit=True)]), base)

    assert config.adapter.target_unet_modules == base.family.target_modules


def test_the_scripts_own_values_are_written_out() -> None:
    found = command("")

    assert {name: filled(found)[name] for name in ("rank", "alpha", "timestep_shift")} == {
        **{"rank": 4, "alpha": 4, "timestep_shift": 1.0},
    }
    assert "guidance_scale" not in found.values
    assert "train_text_encoder" not in found.values
    assert any("double blocks alone" in remark for remark in found.remarks)
    assert any("means of the VAE's latents" in remark for remark in found.remarks)


@pytest.mark.parametrize("words", ["", "--text_encoder_out_layers 10 20 30"])
def test_other_layers_of_the_text_encoder_are_lost_even_where_nothing_is_said(words: str) -> None:
    assert "layers 9, 18 and 27" in lost(command(words))["text_encoder_out_layers"]


def test_rates_of_text_encoders_mean_nothing() -> None:
    found = command("--text_encoder_lr 1e-5 --adam_weight_decay_text_encoder 0.1")

    assert {"text_encoder_lr", "adam_weight_decay_text_encoder"} <= unneeded(found).keys()


def test_captions_are_dropped_as_often() -> None:
    assert command("--caption_dropout 0.1").values["caption_dropout"] == 0.1


# Sizes.


def test_pictures_are_cut_square_unless_buckets_are_asked_for() -> None:
    square, own = (
        command("--resolution 640"),
        command("--resolution 640 --use_aspect_ratio_buckets"),
    )

    assert "enable_bucket" not in square.values
    assert own.values["enable_bucket"] is True
    assert own.values["resolution_width"] == own.values["resolution_height"] == 640
    assert any("brought to the trained one" in remark for remark in own.remarks)


def test_the_largest_of_listed_buckets_is_the_trained_size() -> None:
    words = "--use_aspect_ratio_buckets --aspect_ratio_buckets '512,512;768,640;640,768' "
    found = command(f"{words} --resolution 320")

    # Height comes first there.
    assert (found.values["resolution_width"], found.values["resolution_height"]) == (640, 768)
    assert found.values["enable_bucket"] is True
    assert taken(found)["aspect_ratio_buckets"] > {"resolution_width"}
    assert "goes before it" in unneeded(found)["resolution"]


@pytest.mark.parametrize("buckets", ["768", "768,640,2", "wide,high", "'512,512;'"])
def test_buckets_of_another_form_are_refused(buckets: str) -> None:
    with pytest.raises(InputError, match="aspect_ratio_buckets.*HEIGHT,WIDTH"):
        command(f"--aspect_ratio_buckets={buckets}")


def test_layers_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="numbers of layers"):
        command("--text_encoder_out_layers a b c")


@pytest.mark.parametrize(("tokens", "is_taken"), [("8", False), ("256", True), ("1024", False)])
def test_a_length_of_captions_that_is_not_here_is_lost(tokens: str, is_taken: bool) -> None:
    found = command(f"--max_sequence_length {tokens}")

    assert (found.values.get("max_sequence_length") == int(tokens)) is is_taken
    assert ("max_sequence_length" in lost(found)) is not is_taken


def test_sdxl_reads_captions_without_a_language_model() -> None:
    words = "train_dreambooth_lora_sdxl.py --instance_data_dir p --max_sequence_length 256"
    found = imported([read_document(f"python {words}")])

    assert "max_sequence_length" not in found.values
    assert "max_sequence_length" in unneeded(found)


# Lengths.


def test_class_pictures_make_no_epoch_longer(tmp_path: Path) -> None:
    here = pictures(tmp_path / "p", 8)
    prior = "--with_prior_preservation --class_prompt cup --num_class_images 50 "
    words = prior + "--train_batch_size 2 --num_train_epochs 3 --repeats 2 --validation_epochs 1"
    found = command(words, str(here))

    assert found.values["num_train_epochs"] == 6
    # 8 pictures, twice, two in a step.
    assert found.values["sample_steps"] == 8


# Scripts with such names.


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("train_dreambooth_lora_flux2.py", r"trains FLUX\.2 \[dev\]"),
        ("train_dreambooth_lora_flux2_img2img.py", "pairs of pictures"),
        ("train_dreambooth_lora_flux2_klein_img2img.py", "pairs of pictures"),
        ("train_dreambooth_lora_flux_kontext.py", "pairs of pictures"),
        ("flux_2_train_network.py", "musubi-tuner"),
    ],
)
@pytest.mark.parametrize("program", [None, "diffusers", "kohya"])
def test_scripts_with_such_names_are_refused_by_what_they_train(
    script: str, reason: str, program: str | None
) -> None:
    with pytest.raises(InputError, match=reason):
        imported([read_document(f"accelerate launch {script} --rank 4")], program)
