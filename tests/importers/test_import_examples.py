"""Configurations of the shapes that the programs' own guides and examples have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from reading import filled, import_file, lost, pictures, taken, unneeded

from trainer.cli import run
from trainer.importers import Imported, imported
from trainer.importers.adapted import CLIP, CONVOLUTIONS, JOINT
from trainer.importers.documents import read_document

# kohya's guides: a command with a data set file beside it.

NETWORK = """accelerate launch --num_cpu_threads_per_process 1 {script} \\
  --pretrained_model_name_or_path="base/{base}" --dataset_config="{data}" \\
  --output_dir="out" --output_name="teapot" --save_model_as=safetensors \\
  --network_module={module} --network_dim=24 --network_alpha=12 \\
  --learning_rate=2e-4 --optimizer_type="AdamW8bit" --lr_scheduler="constant" \\
  --max_train_epochs=6 --save_every_n_epochs=2 --mixed_precision="bf16" --sdpa \\
  --gradient_checkpointing --cache_latents {more}
"""
ONE = (
    "[general]\nenable_bucket = true\ncaption_extension = '.txt'\n[[datasets]]\nresolution = 1024\n"
)
ONE += "batch_size = 2\n[[datasets.subsets]]\nimage_dir = '{folder}'\nnum_repeats = 3\n"


def kohya(folder: Path, script: str, more: str, data: str = "") -> Imported:
    here = pictures(folder / "photos", 4)
    (folder / "data.toml").write_text(data or ONE.format(folder=here))
    is_flux = script.startswith("flux")
    text = NETWORK.format(
        script=script,
        base="flux1-dev.safetensors" if is_flux else "xl.safetensors",
        data=folder / "data.toml",
        module="networks.lora_flux" if is_flux else "networks.lora",
        more=more,
    )
    return import_file(folder, "run.sh", text)


def validates(found: Imported, folder: Path) -> bool:
    target = folder / "me.yaml"
    target.write_text(found.text)
    return run(["validate", str(target)]) == 0


XL = "sdxl_train_network.py"
RATES = "--unet_lr=2e-4 --text_encoder_lr1=3e-5 --text_encoder_lr2={second} "


def test_a_guides_sdxl_network_loses_nothing(tmp_path: Path) -> None:
    found = kohya(tmp_path, XL, RATES.format(second="3e-5") + "--cache_text_encoder_outputs")

    assert lost(found) == {}
    # Where captions are kept, neither of SDXL's text encoders learns.
    assert "train_text_encoder" not in found.values
    assert {"text_encoder_lr1", "text_encoder_lr2"} <= unneeded(found).keys()
    assert "no text encoder learns" in unneeded(found)["cache_text_encoder_outputs"]
    # 4 pictures, 3 repeats, 2 in a batch: 6 steps an epoch.
    assert found.values["checkpointing_steps"] == 12
    assert taken(found)["num_repeats"] == {"num_train_epochs"}
    assert unneeded(found)["dataset_config"] == "is read, too"
    assert validates(found, tmp_path)


def test_rates_of_text_encoders_are_one(tmp_path: Path) -> None:
    alike = kohya(tmp_path / "a", XL, RATES.format(second="3e-5"))
    apart = kohya(tmp_path / "b", XL, RATES.format(second="1e-5"))
    second = kohya(tmp_path / "c", XL, "--text_encoder_lr 0 1e-5")

    for found in (alike, apart):
        assert found.values["text_encoder_lr"] == 3e-5
        assert found.values["train_text_encoder"] is True
    assert "text_encoder_lr2" in unneeded(alike)
    assert "that of text_encoder_lr1 is taken, 3e-5" in lost(apart)["text_encoder_lr2"]
    assert second.values["text_encoder_lr"] == 1e-5
    assert "one rate" in lost(second)["text_encoder_lr"]


FLUX = "--clip_l=a --t5xxl=b --ae=c --guidance_scale=1.0 --timestep_sampling=flux_shift "
FLUX += "--model_prediction_type=raw --blocks_to_swap=18 --cache_text_encoder_outputs "


def test_a_guides_flux_network_teaches_clip(tmp_path: Path) -> None:
    found = kohya(tmp_path, "flux_train_network.py", FLUX)

    # CLIP learns there although T5's output is kept; only network_train_unet_only stops it.
    assert found.values["train_text_encoder"] is True
    assert found.values["target_text_encoder_modules"] == list(CLIP)
    assert found.values["offload_blocks"] == 18
    # What the script's fused layers share is told, and nothing else is lost.
    assert lost(found).keys() == {"network_args: split_qkv"}
    assert any("proj_out" in remark for remark in found.remarks)
    assert validates(found, tmp_path)


def test_the_length_of_captions_is_taken_over(tmp_path: Path) -> None:
    found = kohya(tmp_path, "flux_train_network.py", FLUX + "--t5xxl_max_token_length=256")

    assert found.values["max_sequence_length"] == 256
    assert "t5xxl_max_token_length" not in lost(found)
    assert validates(found, tmp_path)


@pytest.mark.parametrize(
    ("name", "more", "tokens"),
    [
        ("flux1-schnell.safetensors", "", 256),
        ("flux1-schnell.safetensors", "--t5xxl_max_token_length=128", 128),
        ("flux1-dev.safetensors", "", None),
    ],
)
def test_schnell_reads_shorter_captions(name: str, more: str, tokens: int | None) -> None:
    line = "python flux_train_network.py --network_module networks.lora_flux --train_data_dir p"
    found = imported([read_document(f"{line} --pretrained_model_name_or_path {name} {more}")])

    assert found.values.get("max_sequence_length") == tokens


def test_split_layers_are_as_here(tmp_path: Path) -> None:
    more = FLUX + "--network_train_unet_only --network_args split_qkv=True verbose=True in_dims=4,4"
    found = kohya(tmp_path, "flux_train_network.py", more)

    assert lost(found).keys() == {"network_args: in_dims"}
    assert {"network_args: split_qkv", "network_args: verbose"} <= unneeded(found).keys()
    assert found.values["train_text_encoder"] is False


def test_chroma_is_told(tmp_path: Path) -> None:
    found = kohya(tmp_path / "a", "flux_train_network.py", FLUX + "--model_type=chroma")
    other = kohya(tmp_path / "b", "flux_train_network.py", FLUX + "--model_type=flux")

    assert "not among the base models" in lost(found)["model_type"]
    assert "model_type" in unneeded(other)


def test_what_the_script_for_flux_does_not_read_is_not_taken_over(tmp_path: Path) -> None:
    more = "--noise_offset=0.1 --min_timestep=200 --clip_skip=2 --debiased_estimation_loss"
    found = kohya(tmp_path, "flux_train_network.py", FLUX + more)

    assert not found.values.keys() & {"noise_offset", "min_timestep_trained"}
    for name in ("noise_offset", "min_timestep", "clip_skip", "debiased_estimation_loss"):
        assert "does not read it" in unneeded(found)[name]


SEVERAL = """
[general]
shuffle_caption = true
keep_tokens = 1
[[datasets]]
resolution = 512
batch_size = 4
keep_tokens = 2
  [[datasets.subsets]]
  image_dir = 'C:\\anna'
  class_tokens = 'zkx woman'
  [[datasets.subsets]]
  image_dir = 'C:\\cup'
  class_tokens = 'qrv cup'
  keep_tokens = 3
[[datasets]]
resolution = [768, 640]
batch_size = 2
  [[datasets.subsets]]
  image_dir = 'C:\\more'
  metadata_file = 'C:\\more.json'
"""


def test_what_differs_between_data_sets_is_told_as_what_becomes_of_it(tmp_path: Path) -> None:
    found = kohya(tmp_path, XL, "", SEVERAL)

    assert (found.values["resolution_width"], found.values["resolution_height"]) == (768, 640)
    assert "768 x 640" in lost(found)["resolution"]
    assert "4 is taken" in lost(found)["subsets: batch_size"]
    # Captions are as written whatever the number, and no file of captions is taken.
    assert lost(found)["subsets: keep_tokens"] == lost(found)["keep_tokens"]
    assert "is taken" not in lost(found)["subsets: keep_tokens"]
    assert not any("metadata_file" in name and "taken" in why for name, why in lost(found).items())
    assert taken(found)["class_tokens"] == {"concepts"}


def sizes(*sides: int) -> str:
    return "".join(
        f"[[datasets]]\nresolution = {side}\n[[datasets.subsets]]\nimage_dir = 'anna'\n"
        for side in sides
    )


def test_one_folder_at_several_sizes_is_one_set(tmp_path: Path) -> None:
    found = kohya(tmp_path / "a", XL, "", sizes(768, 1280))
    quality = kohya(tmp_path / "b", XL, "", sizes(512, 768, 1024))
    older = kohya(tmp_path / "c", "train_network.py", "", sizes(512, 768, 1024))

    assert found.values["images_data_url"] == "anna"
    # An epoch there shows each picture once at each size.
    assert found.values["num_train_epochs"] == 12
    assert found.values["resolution_width"] == 1280
    assert quality.values["priority"] == "quality"
    # Those are no priority of Stable Diffusion 1.5.
    assert older.values["resolution_width"] == 1024


def test_json_is_read_as_toml_is(tmp_path: Path) -> None:
    text = '{"datasets": [{"resolution": 640, "subsets": [{"image_dir": "p", "num_repeats": 2}]}]}'
    found = import_file(tmp_path, "data.json", text)

    assert found.program == "kohya"
    assert (found.values["images_data_url"], found.values["resolution_width"]) == ("p", 640)


def test_all_weights_have_no_frozen_ones_to_offload(tmp_path: Path) -> None:
    text = "python flux_train.py --train_data_dir p --blocks_to_swap 8 --fused_backward_pass "
    text += "--optimizer_type adafactor --max_grad_norm 0.5 --mixed_precision bf16 "
    found = imported([read_document(text + "--full_bf16 --stop_text_encoder_training -1")])

    assert found.values["fused_backward"] is True
    assert "offload_blocks" not in found.values
    assert "on the GPU" in unneeded(found)["blocks_to_swap"]
    assert "no norm" in lost(found)["max_grad_norm"]
    assert not found.values.keys() & {"rank", "alpha"}


# ai-toolkit's examples.


def job(folder: Path, model: dict[str, Any], **sections: Any) -> Imported:
    here = pictures(folder / "photos", 2)
    process = {
        "type": "sd_trainer",
        "training_folder": "output",
        "device": "cuda:0",
        "network": {"type": "lora", "linear": 24, "linear_alpha": 24},
        "save": {"dtype": "float16", "save_every": 200, "push_to_hub": False},
        "datasets": [
            {
                "folder_path": str(here),
                "caption_ext": "txt",
                "caption_dropout_rate": 0.04,
                "shuffle_tokens": False,
                "resolution": [512, 768, 1024],
            }
        ],
        "train": {
            "batch_size": 1,
            "steps": 900,
            "gradient_accumulation_steps": 1,
            "train_unet": True,
            "train_text_encoder": False,
            "optimizer": "adamw8bit",
            "lr": 1e-4,
            "dtype": "bf16",
            "ema_config": {"use_ema": False},
        },
        "model": {"quantize": True, **model},
        "sample": {
            "sampler": "flowmatch",
            "sample_every": 200,
            "sample_start_step": 0,
            "width": 1024,
            "prompts": ["a teapot on a shelf"],
            "neg": "",
            "walk_seed": True,
            "guidance_scale": 4,
        },
    }
    for name, value in sections.items():
        merged = {**process[name], **value} if isinstance(process.get(name), dict) else value
        process[name] = merged
    text = yaml.safe_dump({"job": "extension", "config": {"name": "teapot", "process": [process]}})
    return import_file(folder, "job.yaml", text)


DEV = {"name_or_path": "black-forest-labs/FLUX.1-dev", "is_flux": True}


def test_an_example_of_flux_loses_nothing(tmp_path: Path) -> None:
    found = job(tmp_path, DEV)

    assert lost(found) == {}
    assert found.values["priority"] == "quality"
    assert found.values["quantization"] == "fp8"
    assert unneeded(found)["save.push_to_hub"] == "is off"
    assert "adam_weight_decay_text_encoder" not in found.values
    assert validates(found, tmp_path)


def test_an_adapter_under_a_distilled_model_is_told(tmp_path: Path) -> None:
    found = job(tmp_path, {**DEV, "assistant_lora_path": "some/training-adapter"})

    assert "distilled" in lost(found)["model.assistant_lora_path"]


def test_prompts_leave_their_options(tmp_path: Path) -> None:
    prompts = ["make it smile  --ctrl_img a.png", "[trigger], in the rain"]
    found = job(
        tmp_path,
        {"name_or_path": "x", "arch": "flux_kontext:dev"},
        sample={"prompts": prompts},
        train={"timestep_type": "weighted"},
    )

    assert found.values["validation_prompts"] == ["make it smile", "in the rain"]
    assert "sample.prompts --ctrl_img" in unneeded(found)
    # Its times are even ones, with a weight on the loss.
    assert found.values["timestep_density"] == "uniform"
    assert lost(found).keys() == {"train.timestep_type"}


def test_a_base_model_of_another_make_is_lost(tmp_path: Path) -> None:
    found = job(tmp_path, {"name_or_path": "x", "arch": "zimage"})

    assert "not among the base models" in lost(found)["model.arch"]
    assert "target_unet_modules" not in found.values


def test_an_sdxl_job_adapts_convolutions_as_strongly(tmp_path: Path) -> None:
    model = {"name_or_path": "xl", "is_xl": True, "quantize": False}
    network = {"linear": 16, "linear_alpha": 8, "conv": 16}
    even = job(tmp_path / "a", model, network={**network, "conv_alpha": 8})
    odd = job(tmp_path / "b", model, network={**network, "conv_alpha": 16})

    for found in (even, odd):
        assert set(CONVOLUTIONS) <= set(found.values["target_unet_modules"])
    assert lost(even) == {}
    assert "alpha 8 over rank 16; there 16 over 16" in lost(odd)["network.conv_alpha"]
    assert validates(even, tmp_path)


def test_what_is_off_there_is_not_always_so_here(tmp_path: Path) -> None:
    train = {"train_unet": False, "train_text_encoder": True}
    found = job(tmp_path, DEV, train=train, network={"transformer_only": False})

    assert {"train.train_unet", "network.transformer_only"} <= lost(found).keys()


def test_a_mask_without_a_mask_is_not_told(tmp_path: Path) -> None:
    data = [{"folder_path": "p", "mask_path": None, "mask_min_value": 0.1, "invert_mask": False}]
    without = job(tmp_path / "a", DEV, datasets=data)
    masks = job(tmp_path / "b", DEV, datasets=[{**data[0], "mask_path": "m"}])

    assert "datasets.mask_min_value" in unneeded(without)
    assert {"datasets.mask_path", "datasets.mask_min_value"} <= lost(masks).keys()
    assert "use_given_masks: true" in lost(masks)["datasets.mask_path"]


def test_the_same_folder_at_several_sizes_is_one_data_set(tmp_path: Path) -> None:
    data = [{"folder_path": "p", "resolution": side} for side in (512, 768, 1024)]
    found = job(tmp_path, DEV, datasets=data)

    assert found.values["images_data_url"] == "p"
    assert found.values["priority"] == "quality"


# diffusers' guides.

GUIDE = """export MODEL_NAME="some/base"
export INSTANCE_DIR="{folder}"
accelerate launch {script} \\
  --pretrained_model_name_or_path=$MODEL_NAME {pictures}=$INSTANCE_DIR \\
  --output_dir="figurine" --mixed_precision="bf16" --instance_prompt="a photo of zkx figurine" \\
  --resolution=768 --train_batch_size=1 --gradient_accumulation_steps=2 \\
  --report_to="wandb" --lr_scheduler="constant" --lr_warmup_steps=0 --max_train_steps=300 \\
  --seed="0" --push_to_hub {more}
"""


def guide(folder: Path, script: str, more: str, place: str = "--instance_data_dir") -> Imported:
    here = pictures(folder / "photos", 2)
    text = GUIDE.format(folder=here, script=script, more=more, pictures=place)
    return import_file(folder, "run.sh", text)


@pytest.mark.parametrize(
    ("script", "more"),
    [
        ("train_dreambooth_lora_sdxl.py", "--learning_rate=1e-4 --validation_epochs=25"),
        ("train_dreambooth_lora_flux.py", "--optimizer=prodigy --learning_rate=1. --rank=4"),
        ("train_dreambooth_flux.py", "--optimizer=prodigy --learning_rate=1. --guidance_scale=1"),
    ],
)
def test_a_guides_command_loses_nothing(script: str, more: str, tmp_path: Path) -> None:
    found = guide(tmp_path, script, more)

    assert lost(found) == {}
    assert "--push-to-hub" in unneeded(found)["push_to_hub"]
    assert "no warm-up" in unneeded(found)["lr_warmup_steps"]
    # Alpha is 4 with or without an option for it where the rank is 4.
    assert not any("Alpha" in remark for remark in found.remarks)
    assert validates(found, tmp_path)


PIVOTAL = "--optimizer=prodigy --learning_rate=1.0 --text_encoder_lr=1.0 --rank=8 "
PIVOTAL += "--train_text_encoder_ti --train_text_encoder_ti_frac=0.5 --caption_column=prompt "


def test_a_data_set_that_is_a_path_is_a_folder(tmp_path: Path) -> None:
    script = "train_dreambooth_lora_sdxl_advanced.py"
    found = guide(tmp_path, script, PIVOTAL, "--dataset_name")
    line = f"python {script} --instance_prompt x --dataset_name "

    assert lost(found) == {}
    assert validates(found, tmp_path)
    away = imported([read_document(line + "./icons")])
    assert away.values["images_data_url"] == "./icons"
    assert "hf download" in lost(imported([read_document(line + "me/icons")]))["dataset_name"]


def test_new_tokens_of_flux_are_told_as_they_are_learnt(tmp_path: Path) -> None:
    script = "train_dreambooth_lora_flux_advanced.py"
    clip = guide(tmp_path / "a", script, PIVOTAL)
    both = guide(tmp_path / "b", script, PIVOTAL + "--enable_t5_ti")
    alone = guide(tmp_path / "c", script, PIVOTAL + "--enable_t5_ti --train_transformer_frac=0")

    assert clip.values["target_unet_modules"] == list(JOINT)
    assert lost(clip).keys() == {"enable_t5_ti"}
    assert lost(both) == {}
    assert "to the last step" in lost(alone)["train_transformer_frac"]


def test_eight_bits_are_said_once(tmp_path: Path) -> None:
    found = guide(tmp_path, "train_dreambooth_lora_sdxl.py", "--use_8bit_adam")

    assert found.values["optimizer"] == "adamw8bit"
    assert "optimizer" not in filled(found)


# Optimizers that are not here.


@pytest.mark.parametrize(
    ("optimizer", "nearest"),
    [
        ("Lion", "adamw"),
        ("DAdaptAdam", "prodigy"),
        ("prodigyplus.ProdigyPlusScheduleFree", "prodigy"),
    ],
)
def test_the_nearest_optimizer_has_its_own_arguments(
    optimizer: str, nearest: str, tmp_path: Path
) -> None:
    text = 'network_module = "networks.lora"\nlearning_rate = 1.0\ntext_encoder_lr = 0.5\n'
    text += f'optimizer_type = "{optimizer}"\noptimizer_args = ["betas=0.95,0.98", "d_coef=2"]\n'
    found = import_file(tmp_path, "a.toml", text)

    assert found.values.get("optimizer", "adamw") == nearest
    assert f"{nearest} is taken" in lost(found)["optimizer_type"]
    assert {"optimizer_args: betas", "optimizer_args: d_coef"} <= lost(found).keys()
    assert "adam_beta1" not in found.values
