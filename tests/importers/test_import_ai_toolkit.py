"""Jobs of ai-toolkit, read as configurations of this program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from reading import filled, import_file, loaded, lost, pictures, unneeded

from trainer.errors import InputError
from trainer.importers import Imported
from trainer.importers.adapted import CONVOLUTIONS, WHOLE_BLOCKS


def job(**sections: Any) -> dict[str, Any]:
    """A job made for these tests; sections over its own."""
    process = {
        "type": "sd_trainer",
        "training_folder": "results",
        "device": "cuda:0",
        "trigger_word": "zkx",
        "network": {"type": "lora", "linear": 24, "linear_alpha": 12},
        "save": {"dtype": "bf16", "save_every": 300, "max_step_saves_to_keep": 3},
        "datasets": [
            {
                "folder_path": "teapots",
                "caption_ext": "txt",
                "caption_dropout_rate": 0.1,
                "cache_latents_to_disk": True,
                "shuffle_tokens": True,
                "resolution": 768,
            }
        ],
        "train": {
            "batch_size": 2,
            "steps": 1500,
            "gradient_accumulation": 3,
            "lr": "2e-4",
            "optimizer": "adamw8bit",
            "optimizer_params": {"weight_decay": 0.02},
            "lr_scheduler": "constant_with_warmup",
            "lr_scheduler_params": {"num_warmup_steps": 40},
            "dtype": "bf16",
            "gradient_checkpointing": True,
            "noise_scheduler": "flowmatch",
            "ema_config": {"use_ema": True, "ema_decay": 0.99},
        },
        "model": {
            "name_or_path": "black-forest-labs/FLUX.1-dev",
            "is_flux": True,
            "quantize": True,
            "low_vram": True,
        },
        "sample": {
            "sample_every": 200,
            "prompts": ["[trigger] on a shelf", "a plain cup"],
            "guidance_scale": 3.5,
            "sample_steps": 18,
            "width": 768,
            "neg": "blurry",
        },
    }
    for name, value in sections.items():
        merged = {**process[name], **value} if isinstance(process.get(name), dict) else value
        process[name] = merged
    return {"job": "extension", "config": {"name": "teapot v1", "process": [process]}}


def read(folder: Path, **sections: Any) -> Imported:
    return import_file(folder, "job.yaml", yaml.safe_dump(job(**sections)))


def test_a_job_is_taken_over(tmp_path: Path) -> None:
    found = read(tmp_path)
    config = loaded(found)

    assert found.program == "ai-toolkit"
    assert config.model.model_url == "black-forest-labs/FLUX.1-dev"
    assert config.model.quantization == "fp8"
    assert config.data.images_data_url == "teapots"
    assert config.token.token_abstraction == ("zkx",)
    assert config.caption.add_trigger
    assert config.data.instance_prompt == "zkx"
    assert config.data.caption_dropout == 0.1
    assert (config.data.resolution_width, config.data.resolution_height) == (768, 768)
    assert config.data.enable_bucket
    assert (config.adapter.rank, config.adapter.scale) == (24, 1)
    assert config.adapter.target_unet_modules == WHOLE_BLOCKS["flow"]
    assert (config.run.batch_size, config.run.gradient_accumulation_steps) == (2, 3)
    assert config.run.max_train_steps == 1500
    assert config.optim.learning_rate == 2e-4
    assert (config.optim.lr_scheduler, config.optim.lr_warmup_steps) == ("constant_with_warmup", 40)
    assert (config.optim.adam_weight_decay, config.optim.adam_epsilon) == (0.02, 1e-6)
    assert (config.run.checkpointing_steps, config.run.checkpoints_total_limit) == (300, 3)
    assert config.output.save_dtype == "bf16"
    assert config.output.output_name == "teapot v1"
    assert config.sample.validation_prompts == ("zkx on a shelf", "a plain cup")
    assert (config.sample.sample_steps, config.sample.sample_inference_steps) == (200, 18)
    assert config.sample.sample_guidance_scale == 3.5


def test_what_has_no_counterpart_is_told_by_name(tmp_path: Path) -> None:
    found = read(tmp_path, blocks={"some": 1})

    assert {"train.ema_config", "datasets.shuffle_tokens", "blocks"} == lost(found).keys()
    assert {"sample.width", "sample.neg", "model.low_vram", "device"} <= unneeded(found).keys()


def test_defaults_that_are_not_ours_are_written_out(tmp_path: Path) -> None:
    text = yaml.safe_dump(
        {
            "config": {
                "process": [
                    {
                        "type": "sd_trainer",
                        "network": {"linear": 8},
                        "datasets": [{"folder_path": "p"}],
                        "model": {"name_or_path": "base", "is_xl": True},
                    }
                ]
            }
        }
    )
    written = filled(import_file(tmp_path, "job.yaml", text))

    assert {
        "learning_rate": 1e-6,
        "alpha": 1.0,
        "save_dtype": "fp16",
        "mixed_precision": "no",
        "snr_gamma": None,
        "adam_epsilon": 1e-6,
        "adam_weight_decay": 0.01,
        "enable_bucket": True,
        "resolution_width": 512,
        "use_given_masks": False,
    }.items() <= written.items()


@pytest.mark.parametrize(
    ("way", "density", "shift"),
    [
        ("sigmoid", "logit_normal", 1.0),
        ("linear", "uniform", 1.0),
        ("flux_shift", "uniform", None),
    ],
)
def test_times_are_drawn_as_there(
    way: str, density: str, shift: float | None, tmp_path: Path
) -> None:
    found = read(tmp_path, train={"timestep_type": way})

    assert found.values["timestep_density"] == density
    assert found.values["timestep_shift"] == shift


def test_the_older_accumulation_counts_forward_passes_as_steps(tmp_path: Path) -> None:
    train = {"gradient_accumulation": None, "gradient_accumulation_steps": 4, "steps": 1000}
    found = read(tmp_path, train=train)

    assert found.values["gradient_accumulation_steps"] == 4
    assert found.values["max_train_steps"] == 250
    assert found.values["sample_steps"] == 50
    assert any("forward pass" in remark for remark in found.remarks)


def test_courses_of_the_rate_that_are_others_there_are_told(tmp_path: Path) -> None:
    linear = read(tmp_path, train={"lr_scheduler": "linear", "lr_scheduler_params": None})
    warm = read(tmp_path, train={"lr_scheduler_params": None})

    assert "train.lr_scheduler" in lost(linear)
    assert filled(warm)["lr_warmup_steps"] == 1000


def test_the_three_sizes_of_flux_are_a_priority(tmp_path: Path) -> None:
    data = [{"folder_path": "p", "resolution": [512, 768, 1024]}]

    assert read(tmp_path, datasets=data).values["priority"] == "quality"


def test_other_sizes_leave_the_largest_one(tmp_path: Path) -> None:
    data = [{"folder_path": "p", "resolution": [512, 1024]}]
    found = read(tmp_path, datasets=data)

    assert found.values["resolution_width"] == 1024
    assert "1024" in lost(found)["datasets.resolution"]


def test_several_data_sets_are_concepts_and_a_regular_one_is_the_class(tmp_path: Path) -> None:
    data = [
        {"folder_path": "anna", "num_repeats": 3, "default_caption": "[trigger] woman"},
        {"folder_path": "more", "trigger_word": "qrv", "flip_x": True},
        {"folder_path": "women", "is_reg": True, "default_caption": "woman"},
    ]
    found = read(tmp_path, datasets=data)
    config = loaded(found)

    assert config.data.concepts is not None
    anna, more = config.data.concepts
    assert (anna.instance_prompt, anna.repeats, anna.token) == ("zkx woman", 3, "zkx")
    assert (more.instance_prompt, more.token) == ("qrv", "qrv")
    assert (anna.class_images_url, anna.class_prompt) == ("women", "woman")
    # Every second step there is of class pictures.
    assert config.run.max_train_steps == 750
    assert config.sample.sample_steps == 100
    assert "datasets: flip_x" in lost(found)


def test_pictures_without_captions_and_trigger_are_told(tmp_path: Path) -> None:
    found = read(tmp_path, trigger_word=None)

    assert any("without a caption" in remark for remark in found.remarks)
    assert "instance_prompt" not in found.values


def test_pictures_that_are_here_are_not_said_to_be_elsewhere(tmp_path: Path) -> None:
    here = str(pictures(tmp_path / "p", 1))

    assert any("Not on this machine: teapots" in r for r in read(tmp_path).remarks)
    found = read(tmp_path, datasets=[{"folder_path": here}])
    assert not any("Not on this machine" in remark for remark in found.remarks)


def test_a_whole_lokr_has_a_rank_above_every_layer(tmp_path: Path) -> None:
    found = read(
        tmp_path, network={"type": "lokr", "linear": 4, "lokr_full_rank": True, "lokr_factor": 8}
    )

    assert found.values["lora_type"] == "lokr"
    assert found.values["lokr_factor"] == 8
    assert found.values["rank"] > 20_000
    assert "alpha" not in found.values


def test_convolutions_are_adapted_where_they_are_there(tmp_path: Path) -> None:
    model = {"name_or_path": "base", "is_flux": False, "is_xl": True}
    network = {"linear": 16, "conv": 16}
    found = read(tmp_path, model=model, network=network)

    assert set(CONVOLUTIONS) <= set(found.values["target_unet_modules"])


def test_a_model_of_another_make_is_told(tmp_path: Path) -> None:
    found = read(tmp_path, model={"name_or_path": "x", "is_flux": None, "arch": "lumina2"})

    assert "not among the base models" in lost(found)["model.arch"]
    assert "target_unet_modules" not in found.values
    pixart = read(tmp_path, model={"name_or_path": "x", "is_flux": None, "is_pixart": True})
    assert "model.is_pixart" in lost(pixart)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"config": {"process": [{"type": "slider"}]}}, "config.process.type"),
        ({"config": {"process": []}}, "0 processes"),
        ({"config": {"process": [{"type": "sd_trainer", "datasets": "p"}]}}, "datasets"),
        (job(train={"steps": "many"}), "train.steps"),
        (job(network={"linear": -1}), "network.linear"),
        (job(train={"lr": "fast"}), "train.lr"),
    ],
)
def test_a_wrong_job_is_one_clear_error(
    content: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        import_file(tmp_path, "job.yaml", yaml.safe_dump(content))

    assert len(caught.value.problems) == 1
    assert message in str(caught.value)
