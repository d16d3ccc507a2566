"""A denoiser in shards: the training of one process, in parts, by `fully_shard` on a processor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sharded_processes
import snapshots
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from PIL import Image
from safetensors.torch import load_file
from tiny import SMALL, TWO_LAYERS, configuration

from trainer.errors import InputError
from trainer.sharding import Sharding, asked_for, refuse_in_shards

ROOT = Path(__file__).parent.parent.parent
CONFIGS = ROOT / "configs/accelerate"
# What `accelerate launch` says to its processes of configs/accelerate/fsdp2.yaml, by test.
IN_SHARDS = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}

# A linear layer within a block and one outside of all.
FEW = {"rank": 4, "target_unet_modules": ["attn.to_q", "x_embedder"]}
WHOLE = {"use_lora": False, "learning_rate": 1e-4}
LOOKED = {"validation_prompts": ["a TOK", "a dog"], "sample_steps": 2, "sample_inference_steps": 2}
CASES: dict[str, dict[str, Any]] = {"full": WHOLE | LOOKED}
MORE: dict[str, dict[str, Any]] = {
    "DoRA": FEW | {"use_dora": True, "gradient_accumulation_steps": 2},
    "full, recomputed": WHOLE | {"gradient_checkpointing": True},
    "LoRA": FEW | {"gradient_checkpointing": True},
    "LoKr": FEW | {"lora_type": "lokr"},
    "LoHa": FEW | {"lora_type": "loha"},
    "pivotal, Prodigy": TWO_LAYERS
    | {"train_text_encoder_ti": True, "optimizer": "prodigy", "rank": 4}
    | {"learning_rate": 1.0, "text_encoder_lr": 1.0},
    "full with text encoders": WHOLE | {"train_text_encoder": True, "text_encoder_lr": 1e-4},
}
ON_SDXL = {"pivotal, Prodigy", "full with text encoders"}
# Random bits of rounding belong to a part: equal from run to run, not to those of one process.
BY_CHANCE = {"full, bf16": WHOLE | {"weights_dtype": "bf16"}}


@dataclass(frozen=True)
class Trained:
    """The trainings of one process and those of two, in shards."""

    names: tuple[str, ...]
    resumed: tuple[str, ...]
    delivered: tuple[str, ...]
    alone: dict[str, dict[str, Any]]
    in_shards: dict[str, dict[str, Any]]
    folder: Path

    def weights(self, name: str, processes: int) -> dict[str, torch.Tensor]:
        """What was learnt, by the last checkpoint."""
        return load_file(
            self.folder / f"{processes}/{name}.run/checkpoints/step-4/weights.safetensors"
        )


@pytest.fixture(scope="module")
def trained(
    flux_folder: Path,
    sdxl_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    pytestconfig: pytest.Config,
) -> Trained:
    folder = tmp_path_factory.mktemp("sharded")
    photos = snapshots.write_pictures(folder / "photos", 5)
    thorough = pytestconfig.getoption("thorough")
    cases = CASES | MORE | BY_CHANCE if thorough else CASES
    given = {name: value for name, value in SMALL.items() if name != "rank"}
    given |= {"images_data_url": str(photos), "enable_bucket": False, "checkpointing_steps": 2}
    models = {name: str(sdxl_folder if name in ON_SDXL else flux_folder) for name in cases}
    leaves = {name: given | {"model_url": models[name]} | own for name, own in cases.items()}
    alone = {
        name: sharded_processes.train_one(
            own | {"batch_size": 4}, folder / f"1/{name}.run", deliver=False
        )
        for name, own in leaves.items()
    }
    half = {name: own | {"batch_size": 2} for name, own in leaves.items()}
    chosen = tuple(leaves) if thorough else ("full",)
    again = {f"{name}{sharded_processes.AGAIN}": half[name] for name in chosen}
    file = folder / "cases.json"
    file.write_text(json.dumps({"trainings": half | again, "deliver": chosen}))
    (folder / "2").mkdir()
    run_in_two(file, folder / "2")
    in_shards = {n: json.loads((folder / f"2/{n}.json").read_text()) for n in leaves}
    return Trained(tuple(leaves), chosen, chosen, alone, in_shards, folder)


def run_in_two(file: Path, folder: Path) -> None:
    """The trainings of a file by two processes in shards."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    own = {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, sharded_processes.__file__, str(file), str(folder)],
        env=os.environ | own | IN_SHARDS,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_shards_train_as_one_process_does(trained: Trained, figure: Callable[[str], None]) -> None:
    largest = 0.0
    for name in trained.names:
        one, two = trained.alone[name]["losses"], trained.in_shards[name]["losses"]
        assert len(one) == len(two) == 4
        if name not in BY_CHANCE:
            assert two == pytest.approx(one, rel=1e-6), name
            differences = (abs(a - b) / a for a, b in zip(one, two, strict=True))
            largest = max(largest, *differences)
    figure(f"{len(trained.names)} configurations, losses differ by at most {largest:.0e}")


def test_pictures_on_the_way_are_those_of_one_process(
    trained: Trained, figure: Callable[[str], None]
) -> None:
    folders = [trained.folder / f"{processes}/full.run/samples" for processes in (1, 2)]
    alone, in_shards = (
        {p.relative_to(folder): np.asarray(Image.open(p)) / 1.0 for p in folder.rglob("*.png")}
        for folder in folders
    )
    assert len(alone) == 6
    assert alone.keys() == in_shards.keys()
    apart = [np.abs(alone[path] - in_shards[path]).max() for path in alone]
    assert max(apart) <= 1
    figure(f"{len(alone)} pictures, at most {max(apart):.0f} of 255 apart")


def test_each_of_two_processes_holds_half_of_the_denoiser(
    trained: Trained, figure: Callable[[str], None]
) -> None:
    for facts in trained.in_shards.values():
        # Rounded up where a tensor has an odd number of rows: none of this model does.
        assert 2 * facts["part"] == facts["whole"] > 100_000
        assert facts["odd"]
    # Adapters are not among it.
    assert len({facts["whole"] for facts in trained.in_shards.values()}) <= 2
    figure(f"{facts['part']:,} of {facts['whole']:,} numbers")


def test_a_sharded_training_goes_on_to_the_same_bytes(
    trained: Trained, figure: Callable[[str], None]
) -> None:
    for name in trained.resumed:
        again = json.loads((trained.folder / f"2/{name}{sharded_processes.AGAIN}.json").read_text())
        before = load_file(
            trained.folder / f"2/{name}{sharded_processes.AGAIN}.before/weights.safetensors"
        )
        after = trained.weights(name, 2)
        assert again["losses"] == trained.in_shards[name]["losses"][2:]
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before), name
        # And they are whole: those of one process have the same shapes.
        alone = trained.weights(name, 1)
        assert {n: t.shape for n, t in alone.items()} == {n: t.shape for n, t in after.items()}
    figure(f"{len(trained.resumed)} of {len(trained.resumed)} resumed, all bytes equal")


def test_the_files_of_a_sharded_training_are_whole_and_verified(
    trained: Trained, figure: Callable[[str], None]
) -> None:
    passed = 0
    for name in trained.delivered:
        report = json.loads((trained.folder / f"2/{name}.run/outputs/verify.json").read_text())
        statuses = [check["status"] for check in report["checks"]]
        assert "passed" in statuses
        assert "failed" not in statuses
        passed += statuses.count("passed")
    figure(f"{passed} checks of {len(trained.delivered)} trainings passed")


def variables_of(config: Path) -> dict[str, str]:
    """What `accelerate launch` tells its processes of a configuration."""
    arguments = ["--config_file", str(config), "program.py"]
    parsed, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    variables: dict[str, str] = prepare_multi_gpu_env(parsed)
    return variables


def test_the_launcher_files_for_shards_ask_for_them_and_for_nothing_that_is_left_aside(
    monkeypatch: pytest.MonkeyPatch, figure: Callable[[str], None]
) -> None:
    for name in os.environ:
        if name.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.delenv(name)
    for name in ("fsdp2", "fsdp2_two_nodes"):
        assert asked_for(variables_of(CONFIGS / f"{name}.yaml")) == Sharding(True, ())
    for name in ("eight_gpus", "two_nodes"):
        assert asked_for(variables_of(CONFIGS / f"{name}.yaml")) is None
    figure("2 files for shards, 2 without")


@pytest.mark.parametrize(
    ("variables", "field"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "fsdp_auto_wrap_policy"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "fsdp_activation_checkpointing"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"}, "fsdp_reshard_after_forward"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "accelerate launch"),
    ],
)
def test_a_way_to_shard_that_is_not_done_here_is_refused_by_name(
    variables: dict[str, str], field: str, figure: Callable[[str], None]
) -> None:
    with pytest.raises(InputError, match=field):
        asked_for(IN_SHARDS | variables)
    figure(f"`{field}`, exit 2")


def test_an_entry_that_does_not_act_is_told(figure: Callable[[str], None]) -> None:
    asked = asked_for(IN_SHARDS | {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"})

    assert asked is not None
    assert [note.field for note in asked.notes] == ["fsdp_state_dict_type"]
    figure("1 note")


def test_one_process_has_nobody_to_share_with(
    flux_folder: Path, photo_folder: Path, figure: Callable[[str], None]
) -> None:
    config = configuration(flux_folder, photo_folder)

    with pytest.raises(InputError, match="at least 2 processes"):
        refuse_in_shards(config, num_processes=1)
    figure("exit 2")


@pytest.mark.parametrize(
    ("field", "leaves"),
    [
        ("quantization", {"quantization": "int8"}),
        ("offload_blocks", {"offload_blocks": 1}),
        ("channels_last", {"channels_last": True}),
        ("compile_blocks", {"compile_blocks": True}),
        ("optimizer", {"use_lora": False, "optimizer": "adafactor"}),
        ("mixed_precision", {"use_lora": False, "mixed_precision": "fp16"}),
        ("fused_backward", {"use_lora": False, "fused_backward": True, "max_grad_norm": 0.0}),
    ],
)
def test_options_that_need_whole_weights_are_refused_by_name(
    field: str,
    leaves: dict[str, Any],
    flux_folder: Path,
    photo_folder: Path,
    figure: Callable[[str], None],
) -> None:
    config = configuration(flux_folder, photo_folder, **leaves)

    with pytest.raises(InputError, match=field):
        refuse_in_shards(config, num_processes=2)
    figure(f"`{field}`, exit 2")
