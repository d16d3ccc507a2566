"""Command lines of diffusers' training scripts, read as configurations of this program."""

from __future__ import annotations

from pathlib import Path

import pytest
from reading import filled, import_file, loaded, lost, pictures, unneeded

from trainer.errors import InputError
from trainer.importers import Imported, imported
from trainer.importers.adapted import ATTENTION, JOINT
from trainer.importers.diffusers import SCRIPTS
from trainer.importers.documents import read_document

SHELL = """#!/usr/bin/env bash
# A figurine, made for these tests.
export BASE="stabilityai/stable-diffusion-xl-base-1.0"
PICTURES={folder}
cd ~/work && echo ready

accelerate launch --num_processes=2 --mixed_precision=bf16 \\
  examples/train_dreambooth_lora_sdxl_advanced.py \\
  --pretrained_model_name_or_path="$BASE" \\
  --instance_data_dir=${{PICTURES}} \\
  --instance_prompt="a photo of TOK figurine" \\
  --token_abstraction="TOK" --num_new_tokens_per_abstraction=3 \\
  --train_text_encoder_ti --train_text_encoder_ti_frac=0.4 \\
  --with_prior_preservation --class_prompt="a photo of a figurine" --class_data_dir=class \\
  --num_class_images=40 --resolution=768 --train_batch_size=2 --repeats=3 \\
  --gradient_accumulation_steps 2 --gradient_checkpointing \\
  --learning_rate=3e-4 --text_encoder_lr=2e-4 --scale_lr \\
  --lr_scheduler=cosine --lr_warmup_steps=30 --snr_gamma=5 --rank=12 --use_dora \\
  --use_8bit_adam --max_train_steps=640 --checkpointing_steps=160 --seed=5 \\
  --validation_prompt="TOK on a desk" --validation_epochs=2 --num_validation_images=4 \\
  --output_dir="out/figurine" --report_to=wandb --push_to_hub --hub_token=hf_hidden \\
  --lora_unet_blocks=mid && echo done
"""


def command(text: str) -> Imported:
    return imported([read_document(text)])


def test_a_shell_file_is_taken_over(tmp_path: Path) -> None:
    here = pictures(tmp_path / "p", 5)
    found = import_file(tmp_path, "run.sh", SHELL.format(folder=here))
    config = loaded(found)

    assert found.program == "diffusers"
    assert config.model.model_url == "stabilityai/stable-diffusion-xl-base-1.0"
    assert config.data.images_data_url == str(here)
    assert config.data.instance_prompt == "a photo of TOK figurine"
    assert config.token.train_text_encoder_ti
    assert config.token.num_new_tokens_per_abstraction == 3
    assert config.token.train_text_encoder_ti_frac == 0.4
    assert config.prior.with_prior_preservation
    assert config.prior.class_prompt == "a photo of a figurine"
    assert config.prior.num_class_images == 40
    assert (config.data.resolution_width, config.data.resolution_height) == (768, 768)
    assert (config.run.batch_size, config.run.gradient_accumulation_steps) == (2, 2)
    # scale_lr: times batch, accumulation and processes.
    assert config.optim.learning_rate == pytest.approx(24e-4)
    assert config.optim.text_encoder_lr == 2e-4
    assert (config.optim.lr_scheduler, config.optim.lr_warmup_steps) == ("cosine", 30)
    assert config.optim.optimizer == "adamw8bit"
    assert (config.adapter.rank, config.adapter.use_dora) == (12, True)
    assert config.adapter.target_unet_modules == ATTENTION
    assert (config.run.max_train_steps, config.run.seed) == (640, 5)
    assert config.run.mixed_precision == "bf16"
    assert config.sample.validation_prompts == ("TOK on a desk",)
    assert config.output.output_name == "figurine"
    assert config.run.wandb


def test_epochs_of_validation_are_counted_with_the_class_pictures(tmp_path: Path) -> None:
    here = pictures(tmp_path / "p", 5)
    found = import_file(tmp_path, "run.sh", SHELL.format(folder=here))

    # An epoch is as long as 40 class pictures, of which a step has 2 x 2 x 2: 5 steps.
    assert found.values["sample_steps"] == 10


def test_what_has_no_counterpart_is_told_and_keys_are_not_shown(tmp_path: Path) -> None:
    found = import_file(tmp_path, "run.sh", SHELL.format(folder="elsewhere"))

    assert lost(found).keys() == {"lora_unet_blocks", "accelerate --num_processes"}
    assert {"num_validation_images", "class_data_dir"} <= unneeded(found).keys()
    assert "hf_hidden" not in str(found)


def test_variables_before_a_command_are_part_of_it(tmp_path: Path) -> None:
    text = "CUDA_VISIBLE_DEVICES=1 python train_dreambooth_lora.py --instance_data_dir p --rank 3"

    assert import_file(tmp_path, "run.sh", text).values["rank"] == 3


def test_paths_of_windows_keep_their_folders(tmp_path: Path) -> None:
    text = "python train_dreambooth_lora.py ^\n  --instance_data_dir=C:\\pics\\dog ^\n  --rank=3\n"

    assert import_file(tmp_path, "run.bat", text).values["images_data_url"] == "C:/pics/dog"


def test_variables_that_are_set_elsewhere_are_told() -> None:
    found = command(
        "accelerate launch train_dreambooth_lora.py --pretrained_model_name_or_path=$MODEL "
        "--instance_data_dir p --instance_prompt 'a zkx dog' --max_train_steps 5"
    )

    assert any("filled in: pretrained_model_name_or_path" in remark for remark in found.remarks)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            "train_dreambooth.py",
            {"use_lora": False, "learning_rate": 5e-6, "resolution_width": 512},
        ),
        (
            "train_dreambooth_lora.py",
            {"learning_rate": 5e-4, "rank": 4, "adam_weight_decay": 0.01, "batch_size": 4},
        ),
        ("train_dreambooth_lora_sdxl.py", {"learning_rate": 1e-4, "resolution_width": 1024}),
        ("train_dreambooth_flux.py", {"use_lora": False, "guidance_scale": 3.5}),
        (
            "train_dreambooth_lora_flux.py",
            {
                "guidance_scale": 3.5,
                "timestep_density": "uniform",
                "timestep_shift": 1.0,
                "target_unet_modules": list(JOINT),
            },
        ),
        ("train_dreambooth_lora_sd15_advanced.py", {"resolution_width": 512, "rank": 4}),
        ("train_dreambooth_lora_flux_advanced.py", {"resolution_width": 512}),
    ],
)
def test_every_script_has_its_defaults(script: str, expected: dict[str, object]) -> None:
    found = command(f"python {script} --instance_data_dir p --instance_prompt 'a zkx dog'")

    assert {name: found.values[name] for name in expected} == expected
    assert loaded(found)


def test_every_script_is_known_by_its_name() -> None:
    for script in SCRIPTS:
        found = command(f"accelerate launch {script} --instance_data_dir p --rank 8")
        assert found.program == "diffusers"
        if SCRIPTS[script].kind == "flow":
            assert "snr_gamma" not in found.values
        else:
            assert found.values["snr_gamma"] is None


def test_one_epoch_is_assumed_where_no_length_is_given(tmp_path: Path) -> None:
    line = "python train_dreambooth_lora.py --instance_data_dir p --repeats 7"

    assert command(line).values["num_train_epochs"] == 7
    steps = command(f"{line} --max_train_steps 50")
    assert steps.values["max_train_steps"] == 50
    assert "num_train_epochs" not in steps.values


def test_epochs_with_class_pictures_are_steps_where_pictures_can_be_counted(tmp_path: Path) -> None:
    here = pictures(tmp_path / "p", 6)
    prior = (
        "--with_prior_preservation --class_prompt dog --num_class_images 50 --num_train_epochs 3"
    )
    line = "python train_dreambooth_lora.py --train_batch_size 4 --instance_data_dir {} " + prior

    # 50 class pictures by four: 13 steps an epoch.
    assert command(line.format(here)).values["max_train_steps"] == 39
    unknown = command(line.format("elsewhere"))
    assert unknown.values["num_train_epochs"] == 3
    assert any("give max_train_steps" in remark for remark in unknown.remarks)


def test_class_pictures_that_are_there_are_used(tmp_path: Path) -> None:
    here = pictures(tmp_path / "class", 4)
    line = f"python train_dreambooth.py --instance_data_dir p --class_data_dir {here} "
    line += "--with_prior_preservation --class_prompt dog --num_class_images "

    assert command(line + "4").values["class_images_url"] == str(here)
    assert "class_images_url" not in command(line + "5").values


def test_captions_beside_the_pictures_are_told_of(tmp_path: Path) -> None:
    here = pictures(tmp_path / "p", 1)
    (here / "0.txt").write_text("a zkx dog")
    found = command(f"python train_dreambooth_lora.py --instance_data_dir {here}")

    assert any("Captions lie in" in remark for remark in found.remarks)


def test_a_data_set_of_the_hub_is_to_be_downloaded() -> None:
    found = command("python train_dreambooth_lora_sdxl.py --dataset_name=someone/dogs")

    assert "hf download --repo-type dataset someone/dogs" in lost(found)["dataset_name"]
    assert "images_data_url" in found.remarks[-1]


def test_prodigy_keeps_its_one_rate() -> None:
    found = command(
        "python train_dreambooth_lora_sdxl_advanced.py --instance_data_dir p --optimizer prodigy "
        "--train_text_encoder --learning_rate 1 --text_encoder_lr 1"
    )

    assert found.values["learning_rate"] == 1
    assert "text_encoder_lr" not in found.values
    assert loaded(found).optim.text_encoder_lr == 1


def test_warm_up_is_assumed_where_the_rate_has_one() -> None:
    line = "python train_dreambooth_lora.py --instance_data_dir p"

    assert "lr_warmup_steps" not in command(line).values
    assert command(line + " --lr_scheduler cosine").values["lr_warmup_steps"] == 500


def test_text_encoders_have_the_denoisers_decay_where_the_script_has_one() -> None:
    line = "--instance_data_dir p --train_text_encoder --adam_weight_decay 0.03"
    older = command(f"python train_dreambooth_lora.py {line}")
    newer = command(f"python train_dreambooth_lora_sdxl.py {line}")

    assert older.values["adam_weight_decay_text_encoder"] == 0.03
    assert "adam_weight_decay_text_encoder" not in newer.values


def test_a_weight_on_the_loss_by_noise_level_is_told() -> None:
    found = command("python train_dreambooth_lora_flux.py --weighting_scheme=sigma_sqrt")

    assert "no weight" in lost(found)["weighting_scheme"]
    assert found.values["timestep_density"] == "uniform"


def test_defaults_are_told_apart_from_what_was_given() -> None:
    found = command("python train_dreambooth_lora.py --rank 4 --instance_data_dir p")

    assert "rank" not in filled(found)
    assert filled(found)["batch_size"] == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo hello --there", "holds no command"),
        ("python train_dreambooth_lora.py --rank=four", "rank"),
        ("python train_dreambooth_lora.py --rank=4 --rank=8", "stands there twice"),
        ("python train_dreambooth_lora.py --instance_prompt='a dog", "quotation"),
        ("python train_dreambooth_lora_pixart.py --rank 4", "whose options are not read"),
        ("python train_dreambooth.py --resolution big", "resolution"),
    ],
)
def test_a_wrong_command_line_is_one_clear_error(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        command(text)

    assert len(caught.value.problems) == 1
    assert message in str(caught.value)


def test_another_script_is_refused_with_the_nearest_name() -> None:
    document = read_document("python train_dreambooth_lora_sd15.py --rank 4")

    with pytest.raises(InputError, match="did you mean `train_dreambooth_lora_sd"):
        imported([document], "diffusers")
