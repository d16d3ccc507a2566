"""Cases in which an import could say something false, show a secret or end in a traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from reading import import_file, lost, unneeded

from trainer.cli import run
from trainer.config_files import parse_yaml
from trainer.errors import InputError
from trainer.importers import Imported, imported
from trainer.importers.desk import Desk
from trainer.importers.documents import read_document
from trainer.importers.secret_names import HIDDEN

XL = {"name_or_path": "base", "is_xl": True}
FLUX = {"name_or_path": "base", "is_flux": True}
SUBSET = 'network_module = "networks.lora"\n[[datasets]]\n[[datasets.subsets]]\n'


def job(folder: Path, **sections: Any) -> Imported:
    process = {"type": "sd_trainer", "model": XL, "datasets": [{"folder_path": "p"}], **sections}
    text = yaml.safe_dump({"config": {"process": [process]}})
    return import_file(folder, "job.yaml", text)


def kohya(folder: Path, text: str) -> Imported:
    return import_file(folder, "a.toml", text)


def command(text: str) -> Imported:
    return imported([read_document(text)])


# ai-toolkit's networks.


def test_a_whole_factor_is_lokrs_alone(tmp_path: Path) -> None:
    network = {
        **{"type": "lora", "linear": 32, "linear_alpha": 32, "lokr_full_rank": True},
        "network_kwargs": {"ignore_if_contains": []},
    }
    found = job(tmp_path, network=network)

    assert (found.values["rank"], found.values["alpha"]) == (32, 32)
    assert "network.network_kwargs" in unneeded(found)


def test_a_lora_of_a_transformer_has_a_strength_of_one(tmp_path: Path) -> None:
    lora = job(tmp_path, model=FLUX, network={"linear": 32, "linear_alpha": 8})
    lokr = job(tmp_path, model=FLUX, network={"type": "lokr", "linear": 32, "linear_alpha": 8})

    assert "alpha" not in lora.values
    assert "strength of 1" in unneeded(lora)["network.linear_alpha"]
    assert lokr.values["alpha"] == 8


@pytest.mark.parametrize("network", [{"type": "lora"}, {}])
def test_a_network_without_a_rank_is_a_lora(network: dict[str, Any], tmp_path: Path) -> None:
    found = job(tmp_path, network=network)

    assert "use_lora" not in found.values
    assert found.values.get("rank", 4) == 4
    assert found.values["alpha"] == 1
    assert job(tmp_path).values["use_lora"] is False


# Secrets.


def test_one_file_may_have_data_sets_and_training(tmp_path: Path) -> None:
    text = 'wandb_api_key = "hidden-x"\nseed = 5\n[net]\nnetwork_module = "networks.lora"\n'
    text += 'network_dim = 12\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = "p"\n'
    found = kohya(tmp_path, text)

    assert (found.values["rank"], found.values["seed"]) == (12, 5)
    assert found.values["images_data_url"] == "p"
    assert "hidden-x" not in repr(found)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "HF_TOKEN",
            "hfToken",
            "HFToken",
            "hf-token",
            "huggingfacetoken",
            "token_hf",
            "tokenOfHub",
        ),
        *("my.api-key", "apiKey", "apikey", "wandbAPIKey", "wandb_api_key_2", "api_keys"),
        *("db_passwd", "dbPassword", "basic-auth", "credential", "credentials", "Secret"),
        *("client_secret_value", "awsSecretAccessKey", "AWS_SECRET_ACCESS_KEY_ID"),
    ],
)
def test_secrets_are_hidden_wherever_they_stand(name: str) -> None:
    desk = Desk({name: "hidden-x", "some": [{"inner": {name: ["hidden-x"]}}]}, {})
    desk.run({})

    assert len(desk.left) == 2
    assert "hidden-x" not in repr(desk.left)


@pytest.mark.parametrize(
    "value", ["hf_AbCdEfGhIjKl", ["--x", "sk-proj-0123456789"], "https://me:pass-word@host/p.zip"]
)
def test_what_looks_like_a_secret_is_hidden_whatever_it_is_called(value: Any) -> None:
    desk = Desk({"extra": value}, {})
    desk.run({})

    shown = repr(desk.left)
    assert HIDDEN in shown
    assert not any(part in shown for part in ("AbCdEf", "012345", "pass-word"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("keep_tokens", "2"), ("class_tokens", ["zkx dog"]), ("max_token_length", "225")),
        *(("token_warmup_min", 3), ("metadata_author", "me"), ("my_token_length", "75")),
    ],
)
def test_tokens_of_captions_are_no_secrets(name: str, value: Any) -> None:
    desk = Desk({name: value}, {})
    desk.run({})

    assert desk.left[0].value == value


@pytest.mark.parametrize("name", ["hfToken", "apiKey", "wandb_api_key", "HF_TOKEN", "hub_token"])
def test_no_report_shows_a_key(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.toml").write_text(f'{name} = "hidden-x"\nnetwork_module = "networks.lora"\n')
    process = {"type": "sd_trainer", "model": {**XL, name: "hidden-x"}, name: "hidden-x"}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"config": {"process": [process]}}))
    line = f"python train_dreambooth_lora.py --rank 4 --{name} hidden-x"

    for source in (str(tmp_path / "a.toml"), str(tmp_path / "job.yaml"), line):
        for form in ([], ["--json"]):
            assert run(["import", source, *form]) == 0
            talk = "".join(capsys.readouterr())
            assert name in talk
            assert "hidden-x" not in talk


def test_the_default_of_an_unset_variable_is_not_shown() -> None:
    found = command(
        "python train_dreambooth_lora.py --hub_token='${HF_TOKEN:-hf_x}' --output_dir='${O:-out}'"
    )

    assert "hf_x" not in repr(found)
    assert any("to be filled in: output_dir." in remark for remark in found.remarks)


def test_an_unclosed_quotation_is_told_by_its_line(tmp_path: Path) -> None:
    text = "echo don't\npython \\\n train_dreambooth_lora.py --seed 5\n"
    assert import_file(tmp_path, "a.sh", text).values["seed"] == 5

    with pytest.raises(InputError) as caught:
        import_file(tmp_path, "b.sh", "\necho \\\n a\nTOKEN='hf_x\n")
    assert "line 4" in str(caught.value)
    assert "hf_x" not in str(caught.value)


def test_a_line_break_does_not_leave_the_comment(tmp_path: Path) -> None:
    text = '"odd\\nadapter: {rank: 99}\\n#" = "x"\nclip_skip = "2\\nrank: 98"\n'
    found = kohya(tmp_path, 'network_module = "networks.lora"\n' + text)

    assert parse_yaml(found.text, "me.yaml")["adapter"]["rank"] == 4


# Times of flow matching.

TIMES = 'network_module = "networks.lora_flux"\nlogit_mean = 0.5\nlogit_std = 0.8\n'


def test_a_larger_mean_is_less_noise_there(tmp_path: Path) -> None:
    found = kohya(tmp_path, TIMES + 'weighting_scheme = "logit_normal"\n')
    script = command("python train_dreambooth_lora_flux.py --rank 4 --logit_mean=0.5")

    assert (found.values["logit_mean"], found.values["logit_std"]) == (-0.5, 0.8)
    assert script.values["logit_mean"] == -0.5


def test_options_of_a_density_count_only_where_it_is_drawn_by(tmp_path: Path) -> None:
    text = 'timestep_sampling = "sigmoid"\nsigmoid_scale = 1.2\nmode_scale = 1.0\n'
    found = kohya(tmp_path, TIMES + text)

    assert found.values["logit_std"] == 1.2
    assert {"logit_mean", "logit_std", "mode_scale"} <= unneeded(found).keys()
    assert not found.values.keys() & {"logit_mean", "mode_scale"}


@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap"])
def test_a_weight_on_the_loss_is_told(scheme: str, tmp_path: Path) -> None:
    found = kohya(tmp_path, TIMES + f'weighting_scheme = "{scheme}"\n')

    assert "no weight by noise level" in lost(found)["weighting_scheme"]


def test_a_weight_counts_only_where_the_prediction_has_one(tmp_path: Path) -> None:
    raw = kohya(tmp_path, TIMES + 'weighting_scheme = "cosmap"\nmodel_prediction_type = "raw"\n')
    moved = kohya(tmp_path, TIMES + 'weighting_scheme = "mode"\ntimestep_sampling = "shift"\n')

    assert "only where model_prediction_type" in unneeded(raw)["weighting_scheme"]
    assert "only where timestep_sampling" in unneeded(moved)["weighting_scheme"]


# Single options.


def test_numbers_of_command_lines_are_numbers() -> None:
    found = command(
        "python train_network.py --network_module networks.lora --clip_skip=1 "
        "--max_token_length 75 --network_args rs_lora=True --network_dim 16 --network_alpha 2"
    )

    assert {"clip_skip", "max_token_length"} <= unneeded(found).keys()
    # 2 over the root of 16 is 8 over 16.
    assert "alpha 8 is as strong" in lost(found)["network_args: rs_lora"]


@pytest.mark.parametrize(("end", "share"), [(-1, None), (100, 0.25), (900, 1.0)])
def test_text_encoders_stop_at_a_share_of_the_steps(end: int, share: float | None) -> None:
    found = command(
        "python train_db.py --train_data_dir p --max_train_steps 400 "
        f"--stop_text_encoder_training {end}"
    )

    assert found.values["train_text_encoder"] is (end > 0)
    assert found.values.get("train_text_encoder_frac") == share


def test_the_newer_option_of_the_optimizer_goes_before_the_older(tmp_path: Path) -> None:
    text = 'network_module = "networks.lora"\nuse_8bit_adam = true\n'

    assert kohya(tmp_path, text).values["optimizer"] == "adamw8bit"
    found = kohya(tmp_path, text + 'optimizer_type = "Prodigy"\n')
    assert found.values["optimizer"] == "prodigy"


@pytest.mark.parametrize("steps", [0, -5])
def test_no_steps_are_no_length(steps: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="max_train_steps"):
        kohya(tmp_path, f'network_module = "networks.lora"\nmax_train_steps = {steps}\n')
    with pytest.raises(InputError, match=r"train\.steps"):
        job(tmp_path, train={"steps": steps})


@pytest.mark.parametrize(
    "words", ['"${args[@]}"', '--rank 4 "${args[@]}"', "--use_dora $@", "--rank 4 $MORE", "more"]
)
def test_words_that_are_no_option_are_refused_by_name(words: str) -> None:
    with pytest.raises(InputError) as caught:
        command(f"python train_dreambooth_lora.py {words} --seed 5")

    assert words.rsplit(maxsplit=1)[-1].strip('"') in str(caught.value)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('image_dir = "p"\nclass_tokens = 3\n', "class_tokens"),
        ('image_dir = "p"\nclass_tokens = ["a"]\n', "class_tokens"),
        ('image_dir = ["p", "q"]\n', "image_dir"),
    ],
)
def test_words_of_a_subset_are_text(text: str, field: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=field):
        kohya(tmp_path, SUBSET + text)


def test_a_sample_without_a_prompt_is_left_out(tmp_path: Path) -> None:
    found = job(tmp_path, sample={"samples": [{"prompt": None}, {"prompt": "a cup", 3: 1}]})

    assert found.values["validation_prompts"] == ["a cup"]


def test_names_that_are_no_text_are_told(tmp_path: Path) -> None:
    text = "config: {process: [{type: sd_trainer, 9: 1, train: {8: 2}}], 5: 3}"
    found = import_file(tmp_path, "job.yaml", text)

    assert {"9", "train.8", "5"} <= lost(found).keys()


def test_publishing_is_an_option_here() -> None:
    found = command("python train_dreambooth_lora.py --rank 4 --push_to_hub")

    assert "--push-to-hub" in unneeded(found)["push_to_hub"]
