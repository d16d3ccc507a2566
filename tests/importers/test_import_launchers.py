"""What starts a script: each of its options is taken over, called needless, or lost by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from reading import filled, import_file, lost, pictures, taken, unneeded
from torch.distributed.run import get_args_parser

from trainer.config import LEAVES
from trainer.importers import Imported, imported
from trainer.importers.desk import Desk
from trainer.importers.documents import read_document
from trainer.importers.launcher import Launcher, tell_launcher

FLUX = "train_dreambooth_lora_flux.py --instance_data_dir p"
XL = "sdxl_train_network.py --network_module networks.lora --train_data_dir p"


def command(text: str) -> Imported:
    return imported([read_document(text)])


def told(program: str, name: str, value: object, precision: str = "") -> Desk:
    desk = Desk({"seed": 5}, {"rank": 4})
    tell_launcher(desk, Launcher(program, {name: value}), own_precision=precision)
    return desk


OPTIONS = [
    (program, name.removeprefix("--"))
    for program, parser in (
        ("accelerate", launch_command_parser()),
        ("torchrun", get_args_parser()),
    )
    for action in parser._actions
    for name in action.option_strings[:1]
    if name.startswith("--") and "-" not in name[2:] and name != "--help"
]


def test_every_option_of_the_launchers_is_spoken_of() -> None:
    assert len(OPTIONS) > 100
    for program, name in OPTIONS:
        for value in (True, "1", "2", "bf16"):
            desk = told(program, name, value)
            entries = [*desk.left, *desk.taken]
            assert [entry.name for entry in entries] == [f"{program} --{name}"]
            assert not any("is not known" in entry.reason for entry in desk.left), (program, name)


def test_reasons_name_options_that_exist() -> None:
    flags = {f"--{leaf.replace('_', '-')}" for leaf in LEAVES}
    said = "\n".join(
        entry.reason for program, name in OPTIONS for entry in told(program, name, "2").left
    ).replace("accelerate --use_deepspeed", "")

    assert set(re.findall(r"--[a-z][a-z_-]*", said)) - flags == set()


def test_an_option_that_no_launcher_has_is_told_with_the_nearest() -> None:
    found = command(f"accelerate launch --num_proceses 2 {FLUX}")

    assert "did you mean `num_processes`" in lost(found)["accelerate --num_proceses"]


# Number formats.


def test_diffusers_scripts_take_the_launchers_number_format() -> None:
    found = command(f"accelerate launch --mixed_precision=fp16 {FLUX}")
    both = command(f"accelerate launch --mixed_precision=fp16 {FLUX} --mixed_precision bf16")

    assert found.values["mixed_precision"] == "fp16"
    assert taken(found)["accelerate --mixed_precision"] == {"mixed_precision"}
    assert both.values["mixed_precision"] == "bf16"
    assert "goes before it" in unneeded(both)["accelerate --mixed_precision"]


def test_kohyas_scripts_do_not() -> None:
    """Their own option is `no` by itself, and goes to the Accelerator."""
    found = command(f"accelerate launch --mixed_precision bf16 --num_processes=1 {XL}")

    assert found.values["mixed_precision"] == "no"
    assert "own option alone" in unneeded(found)["accelerate --mixed_precision"]
    assert "as it is done here" in unneeded(found)["accelerate --num_processes"]


def test_without_a_launcher_nothing_is_mixed() -> None:
    python, open_ = command(f"python {FLUX}"), command(f"accelerate launch {FLUX}")

    assert filled(python)["mixed_precision"] == "no"
    assert "mixed_precision" not in open_.values
    assert any("`accelerate config`" in remark for remark in open_.remarks)
    assert not any("`accelerate config`" in remark for remark in python.remarks)


def test_a_number_format_that_is_not_here_is_lost() -> None:
    found = command(f"accelerate launch --mixed_precision fp8 --fp8_format=E4M3 {FLUX}")

    assert "accelerate --mixed_precision" in lost(found)
    assert "accelerate --fp8_format" in unneeded(found)


# Processes.


@pytest.mark.parametrize(
    "line",
    [
        "accelerate launch --multi_gpu --num_processes 2 -m",
        "CUDA_VISIBLE_DEVICES=0,1 .venv/bin/accelerate launch --num-processes=2",
        "python -m accelerate.commands.launch --num_processes=2",
    ],
)
def test_several_processes_are_lost_by_name(line: str) -> None:
    assert "start as many" in lost(command(f"{line} {XL}"))["accelerate --num_processes"]


def test_machines_share_out_processes_and_change_nothing() -> None:
    for machines, reason in (("1", "as it is done here"), ("2", "several GPUs")):
        found = command(f"accelerate launch --num_machines={machines} --num_processes=1 {XL}")
        assert reason in unneeded(found)["accelerate --num_machines"]


def test_torchrun_is_a_launcher() -> None:
    found = command(f"torchrun --standalone --nproc_per_node=4 {FLUX}")

    assert "torchrun --nproc_per_node" in lost(found)
    assert "torchrun --standalone" in unneeded(found)


def test_the_launcher_next_to_the_script_is_read_and_outer_ones_are_told() -> None:
    found = command(f"srun --nodes 2 accelerate launch --mixed_precision fp16 {FLUX}")

    assert found.values["mixed_precision"] == "fp16"
    assert any("started by srun" in remark for remark in found.remarks)
    assert not any("srun" in entry.name for entry in found.left)


@pytest.mark.parametrize(
    ("line", "rate"),
    [
        ("accelerate launch --num_processes=3", 36e-4),
        ("torchrun --nproc_per_node 2 --nnodes=2", 48e-4),
        ("torchrun", 12e-4),
        ("torchrun --nnodes=2", 24e-4),
        ("python -u", 12e-4),
    ],
)
def test_a_scaled_rate_is_that_of_all_processes(line: str, rate: float) -> None:
    scaled = "--scale_lr --learning_rate 1e-4 --train_batch_size 2 --gradient_accumulation_steps 6"
    found = command(f"{line} {FLUX} {scaled}")

    assert found.values["learning_rate"] == pytest.approx(rate)
    assert not any("scale_lr" in remark for remark in found.remarks)


@pytest.mark.parametrize("words", ["", "--num_processes=$GPUS"])
def test_a_number_of_processes_that_is_not_said_is_assumed_aloud(words: str) -> None:
    found = command(f"accelerate launch {words} {FLUX} --scale_lr --train_batch_size 3")

    assert found.values["learning_rate"] == pytest.approx(3e-4)
    assert any("one is assumed" in remark for remark in found.remarks)
    plain = command(f"accelerate launch {words} {FLUX}")
    assert not any("one is assumed" in remark for remark in plain.remarks)


def test_an_epoch_has_fewer_steps_with_more_processes(tmp_path: Path) -> None:
    here = pictures(tmp_path / "p", 12)
    kohya = XL.replace("_dir p", f"_dir {here}") + " --train_batch_size 2 --save_every_n_epochs 1"
    script = FLUX.replace("_dir p", f"_dir {here}") + " --train_batch_size 2 --validation_epochs 1"

    for processes, steps in ((1, 6), (3, 2)):
        launched = f"accelerate launch --num_processes {processes}"
        assert command(f"{launched} {kohya}").values["checkpointing_steps"] == steps
        assert command(f"{launched} {script}").values["sample_steps"] == steps


def test_options_of_deepspeed_count_with_it_alone() -> None:
    words = "--zero_stage 2 --gradient_accumulation_steps 8"
    alone = command(f"accelerate launch {words} {XL}")
    along = command(f"accelerate launch --use_deepspeed {words} {XL}")

    assert "does nothing without" in unneeded(alone)["accelerate --gradient_accumulation_steps"]
    assert lost(along).keys() == {
        *("accelerate --use_deepspeed", "accelerate --gradient_accumulation_steps")
    }


def test_keys_of_a_launcher_are_not_shown() -> None:
    found = command(f"accelerate launch --aws_access_key_id=hidden-x {FLUX} --seed 5")

    assert "hidden-x" not in repr(found)


# Its file.

FILE = """compute_environment: LOCAL_MACHINE
distributed_type: {kind}
mixed_precision: {numbers}
num_machines: 1
num_processes: 3
deepspeed_config: {{gradient_accumulation_steps: 2}}
"""


def test_the_launchers_file_is_read_beside_the_command(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(FILE.format(kind="DEEPSPEED", numbers="bf16"))
    text = f"accelerate launch --config_file a.yaml --num_processes=1 {FLUX}\n"
    found = import_file(tmp_path, "run.sh", text)

    assert found.values["mixed_precision"] == "bf16"
    # The command line goes before the file.
    assert "accelerate --num_processes" in unneeded(found)
    assert lost(found).keys() >= {
        *("accelerate --use_deepspeed", "accelerate --gradient_accumulation_steps")
    }
    assert "is read, too" in unneeded(found)["accelerate --config_file"]


@pytest.mark.parametrize("numbers", ["no", "'no'"])
def test_a_file_that_mixes_nothing_says_so(numbers: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(FILE.format(kind="'NO'", numbers=numbers))
    found = import_file(tmp_path, "run.sh", f"accelerate launch --config_file=a.yaml {FLUX}\n")

    assert found.values["mixed_precision"] == "no"
    assert "start as many" in lost(found)["accelerate --num_processes"]


def test_a_file_of_deepspeeds_own_leaves_the_number_format_open(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "distributed_type: DEEPSPEED\n"
        "deepspeed_config: {deepspeed_config_file: d.json, gradient_clipping: 0.7}\n"
    )
    text = f"accelerate launch --config_file a.yaml {FLUX}\n"
    found = import_file(tmp_path, "run.sh", text)

    assert "--max-grad-norm" in lost(found)["accelerate --gradient_clipping"]
    assert any("`accelerate config`" in remark for remark in found.remarks)


@pytest.mark.parametrize("number", [".inf", "-3", ".nan"])
def test_a_number_that_counts_no_processes_is_lost(number: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"num_processes: {number}\n")
    text = f"accelerate launch --config_file a.yaml {FLUX} --scale_lr\n"
    found = import_file(tmp_path, "run.sh", text)

    assert "is no number of processes" in lost(found)["accelerate --num_processes"]
    assert any("one is assumed" in remark for remark in found.remarks)


@pytest.mark.parametrize("name", ["gone.yaml", "x" * 5000])
def test_a_launchers_file_that_is_not_here_is_lost(name: str) -> None:
    found = command(f"accelerate launch --config_file={name} {FLUX}")

    assert "no such file" in lost(found)["accelerate --config_file"]
    assert any("`accelerate config`" in remark for remark in found.remarks)
