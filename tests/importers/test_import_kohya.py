"""kohya's TOML files and command lines, read as configurations of this program."""

from __future__ import annotations

from pathlib import Path

import pytest
from reading import filled, import_file, loaded, lost, pictures, taken, unneeded

from trainer.config import TrainingConfig
from trainer.errors import InputError
from trainer.importers import Imported, imported, reasons
from trainer.importers.adapted import CONVOLUTIONS, WHOLE_BLOCKS
from trainer.importers.documents import read_document
from trainer.resolve import Layer, resolve

NETWORK = 'network_module = "networks.lora"\n'
# Made for these tests: a portrait on SDXL with options of every sort.
PORTRAIT = """
[base]
pretrained_model_name_or_path = "base/portrait_xl.safetensors"
vae = ""

[pictures]
train_data_dir = "{folder}"
resolution = "832,1216"
enable_bucket = true
caption_extension = ".txt"
shuffle_caption = true
keep_tokens = 1
flip_aug = true
caption_dropout_rate = 0.05
cache_latents = true

[length]
max_train_epochs = 8
train_batch_size = 3
gradient_accumulation_steps = 2
learning_rate = 3e-5
unet_lr = "2e-4"
text_encoder_lr = 4e-5
lr_scheduler = "cosine_with_restarts"
lr_scheduler_num_cycles = 3
lr_warmup_steps = 0.25
optimizer_type = "AdamW8bit"
optimizer_args = ["weight_decay=0.05", "betas=0.9,0.95"]
max_grad_norm = 0.5

[net]
network_module = "networks.lora"
network_dim = 24
network_alpha = 12

[numbers]
mixed_precision = "bf16"
save_precision = "fp16"
save_every_n_epochs = 2
save_model_as = "safetensors"
seed = 77
min_snr_gamma = 4
noise_offset = 0.04
clip_skip = 2
max_token_length = 225
xformers = true
output_dir = "somewhere"
output_name = "portrait"
wandb_api_key = "do-not-show"
sample_every_n_epochs = 1
"""


def test_a_portrait_is_taken_over(tmp_path: Path) -> None:
    pictures(tmp_path / "set" / "10_ohwx man", 6)
    found = import_file(tmp_path, "portrait.toml", PORTRAIT.format(folder=tmp_path / "set"))
    config = loaded(found)

    assert found.program == "kohya"
    assert config.model.model_url == "base/portrait_xl.safetensors"
    assert (config.data.resolution_width, config.data.resolution_height) == (832, 1216)
    assert config.data.enable_bucket
    assert config.data.random_flip
    assert config.data.caption_dropout == 0.05
    assert config.token.token_abstraction == ("ohwx",)
    assert (config.adapter.rank, config.adapter.alpha) == (24, 12)
    assert config.adapter.scale == 0.5
    assert config.adapter.target_unet_modules == WHOLE_BLOCKS["table"]
    assert config.adapter.train_text_encoder
    assert (config.optim.learning_rate, config.optim.text_encoder_lr) == (2e-4, 4e-5)
    assert config.optim.optimizer == "adamw8bit"
    assert (config.optim.adam_beta1, config.optim.adam_beta2) == (0.9, 0.95)
    assert config.optim.adam_weight_decay == 0.05
    assert config.optim.adam_weight_decay_text_encoder == 0.05
    assert (config.optim.lr_scheduler, config.optim.lr_num_cycles) == ("cosine_with_restarts", 3)
    assert config.optim.max_grad_norm == 0.5
    assert (config.loss.snr_gamma, config.loss.noise_offset) == (4, 0.04)
    assert (config.run.batch_size, config.run.gradient_accumulation_steps) == (3, 2)
    assert (config.run.seed, config.run.mixed_precision) == (77, "bf16")
    assert (config.output.output_name, config.output.save_dtype) == ("portrait", "fp16")


def test_epochs_stay_epochs_and_what_is_counted_in_them_becomes_steps(tmp_path: Path) -> None:
    pictures(tmp_path / "set" / "10_ohwx man", 6)
    found = import_file(tmp_path, "portrait.toml", PORTRAIT.format(folder=tmp_path / "set"))

    # 6 pictures, 10 repeats, 3 x 2 pictures a step: 10 steps an epoch.
    assert found.values["num_train_epochs"] == 8
    assert found.values["lr_warmup_steps"] == 20
    assert found.values["checkpointing_steps"] == 20
    assert found.values["sample_steps"] == 10


def test_what_cannot_be_counted_is_told_with_the_flag_that_says_it(tmp_path: Path) -> None:
    found = import_file(tmp_path, "portrait.toml", PORTRAIT.format(folder="elsewhere"))

    assert "give --lr-warmup-steps" in lost(found)["lr_warmup_steps"]
    assert "give --sample-steps" in unneeded(found)["sample_every_n_epochs"]
    assert found.values["num_train_epochs"] == 8


def test_what_has_no_counterpart_is_told_by_name(tmp_path: Path) -> None:
    found = import_file(tmp_path, "portrait.toml", PORTRAIT.format(folder=tmp_path))

    assert {"shuffle_caption", "keep_tokens", "clip_skip", "max_token_length"} <= lost(found).keys()
    assert {"cache_latents", "xformers", "output_dir", "save_model_as"} <= unneeded(found).keys()
    for name in lost(found):
        assert f"#   {name}: " in found.text
    assert "do-not-show" not in found.text
    assert "do-not-show" not in str(found)


def test_an_unknown_option_is_told_with_the_nearest_known_one(tmp_path: Path) -> None:
    text = NETWORK + "max_train_stepps = 10\nrubbish = 1\nmy_token = 'hf_1'\n"
    found = import_file(tmp_path, "a.toml", text, "kohya")

    assert "did you mean `max_train_steps`" in lost(found)["max_train_stepps"]
    assert lost(found)["rubbish"].startswith("is not known here")
    assert "hf_1" not in str(found)


def test_defaults_that_are_not_ours_are_written_out(tmp_path: Path) -> None:
    found = import_file(tmp_path, "bare.toml", NETWORK, "kohya")

    assert filled(found) == {
        "use_given_masks": False,
        "rank": 4,
        "alpha": 1.0,
        "train_text_encoder": True,
        "learning_rate": 2e-6,
        "adam_weight_decay": 0.01,
        "adam_weight_decay_text_encoder": 0.01,
        "max_train_steps": 1600,
        "snr_gamma": None,
        "mixed_precision": "no",
    }
    assert "images_data_url" in found.remarks[-1]


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ("Prodigy", {"optimizer": "prodigy", "adam_weight_decay": 0.0}),
        ("adafactor", {"optimizer": "adafactor", "adam_weight_decay": 0.0}),
        ("PagedAdamW8bit", {"optimizer": "paged_adamw8bit", "adam_weight_decay": 0.01}),
        ("AdamW", {"optimizer": "adamw", "adam_weight_decay": 0.01}),
    ],
)
def test_an_optimizer_comes_with_its_own_defaults(
    optimizer: str, expected: dict[str, object], tmp_path: Path
) -> None:
    text = f'{NETWORK}optimizer_type = "{optimizer}"\nlearning_rate = 1.0\n'
    found = import_file(tmp_path, "a.toml", text)

    assert {name: found.values[name] for name in expected} == expected


def test_prodigys_arguments_become_its_options_and_others_are_left(tmp_path: Path) -> None:
    arguments = '["d_coef=2", "decouple=True", "use_bias_correction=True", "weight_decay=0.01"]'
    text = f'{NETWORK}optimizer_type="Prodigy"\nlearning_rate=1\noptimizer_args={arguments}\n'
    found = import_file(tmp_path, "a.toml", text)
    config = loaded_with_pictures(found)

    assert config.optim.prodigy_use_bias_correction
    assert not config.optim.prodigy_safeguard_warmup
    assert "optimizer_args: d_coef" in lost(found)
    assert config.optim.adam_weight_decay == 0.01


def test_an_optimizer_that_does_not_exist_here_is_told(tmp_path: Path) -> None:
    found = import_file(tmp_path, "a.toml", NETWORK + 'optimizer_type = "Lion"\n')

    assert "adamw is taken" in lost(found)["optimizer_type"]


def loaded_with_pictures(found: Imported) -> TrainingConfig:
    values = {"images_data_url": "photos", **found.values}
    return resolve([Layer("test", values, explicit=True)])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["algo=lokr", "factor=8"], {"lora_type": "lokr", "lokr_factor": 8}),
        (["algo=loha"], {"lora_type": "loha"}),
        (["algo=locon", "dora_wd=True"], {"lora_type": "lora", "use_dora": True}),
    ],
)
def test_lycoris_algorithms_are_forms_of_adapter(
    arguments: list[str], expected: dict[str, object], tmp_path: Path
) -> None:
    text = f'network_module = "lycoris.kohya"\nnetwork_dim = 8\nnetwork_args = {arguments}\n'
    found = import_file(tmp_path, "a.toml", text)

    assert {name: found.values[name] for name in expected} == expected
    # LyCORIS adapts convolutions, too, unless its preset says otherwise.
    assert set(CONVOLUTIONS) <= set(found.values["target_unet_modules"])
    assert loaded_with_pictures(found)


def test_arguments_of_networks_without_a_counterpart_are_told(tmp_path: Path) -> None:
    arguments = '["algo=boft", "preset=attn-only", "rank_dropout=0.1", "use_tucker=False", "odd=1"]'
    text = f'network_module = "lycoris.kohya"\nnetwork_args = {arguments}\n'
    found = import_file(tmp_path, "a.toml", text)

    lost_ones = {"network_args: algo", "network_args: rank_dropout", "network_args: odd"}
    assert lost_ones <= lost(found).keys()
    assert "network_args: use_tucker" in unneeded(found)
    assert set(found.values["target_unet_modules"]) == {"to_k", "to_q", "to_v", "to_out.0"}


@pytest.mark.parametrize(("preset", "is_whole"), [("attn-only", False), ("attn-mlp", True)])
def test_a_preset_of_lycoris_says_which_layers_of_text_encoders_learn(
    preset: str, is_whole: bool, tmp_path: Path
) -> None:
    text = f'network_module = "lycoris.kohya"\nnetwork_args = ["algo=locon", "preset={preset}"]\n'
    found = import_file(tmp_path, "a.toml", text + "text_encoder_lr = 1e-5\n")

    attention = {"q_proj", "k_proj", "v_proj", "out_proj"}
    whole = {*attention, "fc1", "fc2"}
    assert set(found.values["target_text_encoder_modules"]) == (whole if is_whole else attention)


def test_a_preset_of_attention_alone_is_of_both_streams_of_flux(tmp_path: Path) -> None:
    arguments = 'network_args = ["algo=locon", "preset=attn-only"]\nnetwork_dim = 8\n'
    text = (
        'pretrained_model_name_or_path = "flux1-dev.safetensors"\nclip_l = "clip_l.safetensors"\n'
    )
    text += f'network_module = "lycoris.kohya"\n{arguments}'
    found = import_file(tmp_path, "a.toml", text)

    assert {"to_q", "add_q_proj", "to_add_out"} <= set(found.values["target_unet_modules"])
    assert "network_args: preset" in lost(found)


def test_a_warm_up_in_percent_is_a_share_of_all_steps(tmp_path: Path) -> None:
    found = import_file(
        tmp_path, "a.toml", NETWORK + 'max_train_steps = 400\nlr_warmup_steps = "5%"\n'
    )

    assert found.values["lr_warmup_steps"] == 20


def test_a_picture_without_a_caption_is_told_to_get_another_one_here(tmp_path: Path) -> None:
    text = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "a"\n'
    told = [
        import_file(tmp_path, "a.toml", text + more).remarks
        for more in ("", 'class_tokens = "sks cat"\n')
    ]

    assert [reasons.BARE in remarks for remarks in told] == [True, False]


def test_the_configuration_of_the_graphical_interface_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="graphical interface"):
        import_file(tmp_path, "a.json", '{"LoRA_type": "Standard", "network_dim": 8}')


def test_convolutions_with_another_rank_get_the_one_rank_and_that_is_told(tmp_path: Path) -> None:
    text = f'{NETWORK}network_dim = 16\nnetwork_args = ["conv_dim=8", "conv_alpha=1"]\n'
    found = import_file(tmp_path, "a.toml", text)

    assert set(CONVOLUTIONS) <= set(found.values["target_unet_modules"])
    assert "16" in lost(found)["network_args: conv_dim"]


def test_without_a_network_all_weights_are_trained(tmp_path: Path) -> None:
    found = import_file(tmp_path, "a.toml", 'train_data_dir = "p"\nlearning_rate = 1e-5\n')

    assert found.values["use_lora"] is False
    assert any("network_module" in remark for remark in found.remarks)


def test_cached_texts_mean_that_text_encoders_do_not_learn(tmp_path: Path) -> None:
    for option in ("cache_text_encoder_outputs = true", "network_train_unet_only = true"):
        found = import_file(tmp_path, "a.toml", f"{NETWORK}{option}\n")
        assert found.values.get("train_text_encoder", False) is False


# Class pictures


def test_half_of_an_even_batch_is_class_pictures(tmp_path: Path) -> None:
    pictures(tmp_path / "set" / "5_ohwx woman", 4)
    pictures(tmp_path / "reg" / "1_woman", 4)
    text = f"{NETWORK}train_data_dir='{tmp_path}/set'\nreg_data_dir='{tmp_path}/reg'\n"
    text += "train_batch_size = 4\nmax_train_steps = 100\nprior_loss_weight = 0.5\n"
    config = loaded(import_file(tmp_path, "a.toml", text))

    assert config.prior.with_prior_preservation
    assert config.prior.class_prompt == "woman"
    assert config.prior.class_images_url == f"{tmp_path}/reg"
    assert config.prior.prior_loss_weight == 0.5
    assert (config.run.batch_size, config.run.max_train_steps) == (2, 100)


def test_every_second_step_of_single_pictures_is_a_class_picture(tmp_path: Path) -> None:
    pictures(tmp_path / "reg" / "1_woman", 1)
    text = f"{NETWORK}train_data_dir='p'\nreg_data_dir='{tmp_path}/reg'\n"
    text += "max_train_steps = 101\nsave_every_n_steps = 50\nlr_warmup_steps = 10\n"
    found = import_file(tmp_path, "a.toml", text)

    assert found.values["max_train_steps"] == 51
    assert found.values["checkpointing_steps"] == 25
    assert found.values["lr_warmup_steps"] == 5
    assert any("halved" in remark for remark in found.remarks)


def test_class_pictures_without_a_name_ask_for_one(tmp_path: Path) -> None:
    text = f"{NETWORK}train_data_dir='p'\nreg_data_dir='elsewhere'\n"
    found = import_file(tmp_path, "a.toml", text)

    assert found.values["class_images_url"] == "elsewhere"
    assert any("give class_prompt" in remark for remark in found.remarks)


# Data sets

DATA = """
[general]
enable_bucket = true
caption_extension = ".txt"
flip_aug = true

[[datasets]]
resolution = 768
batch_size = 2
keep_tokens = 1

  [[datasets.subsets]]
  image_dir = "anna"
  class_tokens = "zkx woman"
  num_repeats = 4

  [[datasets.subsets]]
  image_dir = "teapot"
  class_tokens = "qrv teapot"
  flip_aug = false

  [[datasets.subsets]]
  is_reg = true
  image_dir = "women"
  class_tokens = "woman"
"""


def test_subsets_become_concepts(tmp_path: Path) -> None:
    found = import_file(tmp_path, "data.toml", DATA)
    config = loaded(found)

    assert config.data.concepts is not None
    anna, teapot = config.data.concepts
    assert (anna.images_data_url, anna.instance_prompt, anna.repeats) == ("anna", "zkx woman", 4)
    assert (teapot.token, teapot.repeats) == ("qrv", 1)
    assert (anna.class_images_url, anna.class_prompt) == ("women", "woman")
    assert (config.data.resolution_width, config.data.resolution_height) == (768, 768)
    # Half of each batch of two is of the class.
    assert config.run.batch_size == 1
    # The training's own options are in another file: nothing of it is assumed.
    assert found.filled == ()


def test_options_that_differ_between_subsets_are_told(tmp_path: Path) -> None:
    found = import_file(tmp_path, "data.toml", DATA)

    assert "subsets: flip_aug" in lost(found)
    assert "keep_tokens" in lost(found)
    assert loaded(found).data.random_flip


def test_training_and_data_sets_are_read_together(tmp_path: Path) -> None:
    (tmp_path / "data.toml").write_text(
        '[[datasets]]\nresolution=512\n[[datasets.subsets]]\nimage_dir="p"\nnum_repeats=5\n'
        'class_tokens="zkx dog"\n'
    )
    (tmp_path / "train.toml").write_text(f"{NETWORK}max_train_epochs = 10\n")
    together = imported([read_document(str(tmp_path / n)) for n in ("train.toml", "data.toml")])
    text = NETWORK + 'max_train_epochs = 10\ndataset_config = "data.toml"\n'
    named = import_file(tmp_path, "other.toml", text)

    for found in (together, named):
        assert found.values["images_data_url"] == "p"
        assert found.values["instance_prompt"] == "zkx dog"
        # Ten epochs of five repeats are fifty of one.
        assert found.values["num_train_epochs"] == 50
        assert found.values["resolution_width"] == 512


def test_a_data_set_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    found = import_file(tmp_path, "a.toml", NETWORK + 'dataset_config = "gone.toml"\n')

    assert "give it beside this one" in lost(found)["dataset_config"]


# FLUX.1


def test_flow_matching_has_a_density_and_a_shift(tmp_path: Path) -> None:
    text = (
        'pretrained_model_name_or_path = "flux1-dev.safetensors"\nae = "ae.safetensors"\n'
        'network_module = "networks.lora_flux"\ntimestep_sampling = "shift"\n'
        "discrete_flow_shift = 3.1582\nsigmoid_scale = 1.2\nmin_snr_gamma = 5\n"
        'guidance_scale = 1.0\nmodel_prediction_type = "raw"\nfp8_base = true\n'
        "network_train_unet_only = true\n"
    )
    found = import_file(tmp_path, "flux.toml", text)

    assert found.values["model_url"] == "black-forest-labs/FLUX.1-dev"
    assert found.values["timestep_density"] == "logit_normal"
    assert found.values["timestep_shift"] == 3.1582
    assert found.values["logit_std"] == 1.2
    assert found.values["quantization"] == "fp8"
    assert found.values["target_unet_modules"] == list(WHOLE_BLOCKS["flow"])
    assert "snr_gamma" not in found.values
    assert "flow matching" in unneeded(found)["min_snr_gamma"]
    assert "model_prediction_type" in unneeded(found)
    assert any("FLUX.1-dev stands for" in remark for remark in found.remarks)


def test_flow_matchings_defaults_are_written_out(tmp_path: Path) -> None:
    found = import_file(tmp_path, "flux.toml", 'network_module = "networks.lora_flux"\n')

    assert filled(found)["guidance_scale"] == 3.5
    assert filled(found)["timestep_density"] == "uniform"
    assert filled(found)["timestep_shift"] == 3.0
    assert "model_prediction_type" in lost(found)


# Sample prompts


def test_sample_prompts_become_validation_prompts(tmp_path: Path) -> None:
    lines = (
        "# for the portrait\n\n"
        "a photo of zkx woman, smiling --n blurry --w 768 --h 1024 --d 7 --l 6.5 --s 24\n"
        "zkx woman on a bicycle --l 6.5 --s 30\n"
    )
    (tmp_path / "prompts.txt").write_text(lines)
    text = f'{NETWORK}sample_prompts = "{tmp_path}/prompts.txt"\nsample_every_n_steps = 200\n'
    found = import_file(tmp_path, "a.toml", text)

    assert found.values["validation_prompts"] == [
        "a photo of zkx woman, smiling",
        "zkx woman on a bicycle",
    ]
    assert found.values["sample_guidance_scale"] == 6.5
    assert "sample_inference_steps" not in found.values
    assert {"sample_prompts --n", "sample_prompts --w", "sample_prompts --d"} <= unneeded(
        found
    ).keys()
    assert "sample_prompts --s" in unneeded(found)
    assert found.values["sample_steps"] == 200


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.toml", '[prompt]\nscale = 6\n[[prompt.subset]]\nprompt = "a"\n'),
        ("p.json", '[{"prompt": "a", "scale": 6}]'),
    ],
)
def test_sample_prompts_of_other_forms_are_read(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    found = import_file(tmp_path, "a.toml", f'{NETWORK}sample_prompts = "{tmp_path / name}"\n')

    assert found.values["validation_prompts"] == ["a"]
    assert found.values["sample_guidance_scale"] == 6


def test_sample_prompts_that_are_not_here_are_told(tmp_path: Path) -> None:
    found = import_file(tmp_path, "a.toml", NETWORK + 'sample_prompts = "gone.txt"\n')

    assert "--validation-prompts" in unneeded(found)["sample_prompts"]


# Command lines


def test_a_command_line_means_what_the_same_file_means(tmp_path: Path) -> None:
    line = (
        "accelerate launch --num_cpu_threads_per_process 1 sdxl_train_network.py "
        '--pretrained_model_name_or_path="base.safetensors" --train_data_dir=p '
        "--resolution=1024,1024 --network_module=networks.lora --network_dim=16 "
        '--network_args "conv_dim=16" "conv_alpha=1" --network_alpha 1 '
        "--learning_rate 1e-4 --gradient_checkpointing --max_train_steps 500"
    )
    found = imported([read_document(line)])
    config = loaded(found)

    assert found.program == "kohya"
    assert (config.adapter.rank, config.adapter.alpha) == (16, 1)
    assert config.run.gradient_checkpointing is True
    assert config.run.max_train_steps == 500
    assert set(CONVOLUTIONS) <= set(config.adapter.target_unet_modules)
    assert taken(found)["resolution"] == {"resolution_width", "resolution_height"}


def test_a_command_line_may_name_its_files(tmp_path: Path) -> None:
    (tmp_path / "train.toml").write_text(NETWORK + "network_dim = 9\nmax_train_steps = 7\n")
    text = "python train_network.py --config_file train --max_train_steps=8\n"
    found = import_file(tmp_path, "run.sh", text)

    assert found.values["rank"] == 9
    assert found.values["max_train_steps"] == 8


# Wrong files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = [1,\n", "is no TOML"),
        (NETWORK + 'network_dim = "many"\n', "network_dim"),
        (NETWORK + "network_dim = 0\n", "network_dim"),
        (NETWORK + 'resolution = "1024x768"\n', "resolution"),
        (NETWORK + 'lr_warmup_steps = "few"\n', "lr_warmup_steps"),
        (NETWORK + 'optimizer_args = ["weight_decay"]\n', "name=value"),
        ("datasets = 3\nresolution = 4\n", "datasets"),
        ("a_thing = 3\n", "--from"),
    ],
)
def test_a_wrong_file_is_one_clear_error(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        import_file(tmp_path, "a.toml", text)

    assert len(caught.value.problems) == 1
    assert message in str(caught.value)
