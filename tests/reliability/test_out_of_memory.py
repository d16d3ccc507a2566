"""Out of memory: exit 4, what would help here and how much, and the way on from the checkpoint."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from make_random_models import describe
from tiny import TWO_LAYERS, compose, configuration, digests, never, steps

from trainer import base_model, engine, machine, memory, out_of_memory, remedies
from trainer.capacity import fits
from trainer.config import TrainingConfig
from trainer.errors import CheckpointError, InputError
from trainer.estimate import estimate
from trainer.events import CheckpointEvent, RunEvent, StepEvent
from trainer.job import RunFolder
from trainer.machine import completed, precision_of
from trainer.memory import Forecast
from trainer.runner import supervise
from trainer.stages import drained

GIBI = 2**30
CPU = torch.device("cpu")


def supervised(config: TrainingConfig, folder: Path) -> Any:
    return supervise(config, RunFolder(folder), [], engine=engine.run, stop=never)


def follow(setting: str, config: TrainingConfig, folder: Path) -> bool:
    """Whether a training goes on from its checkpoint after step 2 with what was advised."""
    options = yaml.safe_load(setting.replace(" and ", "\n"))
    try:
        training, _ = compose(remedies.with_options(config, options), folder)
    except CheckpointError as error:
        assert all(f"`{leaf}`" in error.message for leaf in options)
        return False
    list(training.resume(RunFolder(folder)))
    return training.step == 2


def test_a_run_without_memory_exits_4_says_what_saves_how_much_and_goes_on(
    flux_folder: Path,
    photo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    figure: Callable[[str], None],
) -> None:
    # Otherwise a processor has nothing to advise with which a checkpoint can be gone on from.
    monkeypatch.setattr(machine, "_ON_A_GPU", {})
    # Each that is tried takes a second.
    of_three = [each for each in remedies.CANDIDATES if each.change == remedies.SAME]
    monkeypatch.setattr(remedies, "CANDIDATES", of_three)
    leaves = {"batch_size": 4, "max_train_steps": 3, "checkpointing_steps": 2}
    leaves |= {"target_unet_modules": ["transformer_blocks.0.attn.to_q"]}
    config = configuration(flux_folder, photo_folder, **leaves)
    steps(config, tmp_path / "whole")
    monkeypatch.setenv("TRAINER_FAULT", "oom@3")
    result = supervised(config, tmp_path / "run")
    assert (result.exit_code, result.error_kind, result.step) == (4, "memory", 2)
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert "after step 2 of 3, of which step 2 is in a checkpoint" in written["error"]
    saved = re.findall(r"`([^`]+)` saves? \d+\.\d [KMG]iB: the training (.+)", written["hint"])
    assert len(saved) == 3, written["hint"]
    monkeypatch.delenv("TRAINER_FAULT")
    goes_on = [follow(setting, config, tmp_path / "run") for setting, _ in saved]
    assert [says == "goes on from step 2" for _, says in saved] == goes_on
    assert {says for _, says in saved[1:]} == {"begins anew, with another --output"}
    # It saves least of the three.
    assert goes_on == [True, False, False]
    assert supervised(config, tmp_path / "run").exit_code == 0
    last = Path("checkpoints") / "step-3"
    assert digests(tmp_path / "run" / last) == digests(tmp_path / "whole" / last) != {}
    figure(f"exit 4 with {len(saved)} settings, each as told; gone on to equal bytes")


@pytest.mark.thorough
def test_a_processor_that_can_allocate_no_more_exits_4_without_a_traceback(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    program = """
import resource, sys, torch
from pathlib import Path
from trainer import engine
from trainer.config_files import read_config_file
from trainer.events import RunEvent
from trainer.job import RunFolder
from trainer.resolve import resolve
from trainer.runner import supervise
from trainer.stages import drained

def narrowed(config, folder, stop):
    for event in engine.run(config, folder, stop):
        yield event
        if isinstance(event, RunEvent):
            used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 48 * 2**20, resource.RLIM_INFINITY))

config = resolve(read_config_file(Path(sys.argv[1])))
folder = RunFolder(Path(sys.argv[2]))
result = supervise(config, folder, [], engine=narrowed, stop=lambda: False)
print(result.error)
sys.exit(result.exit_code)
"""
    request = {"model_url": str(sd15_folder), "images_data_url": str(photo_folder), "rank": 4}
    request |= {"batch_size": 64, "max_train_steps": 2, "tensorboard": False, **TWO_LAYERS}
    (tmp_path / "request.json").write_text(json.dumps(request))
    command = [sys.executable, "-c", program, tmp_path / "request.json", tmp_path / "run"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 4, ended.stderr
    assert "after step 0 of 2" in ended.stdout
    assert "Traceback" not in ended.stderr
    figure("exit 4 for 48 MiB too few")


# By torch, of processes that read pictures ahead.
READERS = [
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. "),
    RuntimeError("It is possible that dataloader's workers are out of shared memory."),
    RuntimeError("unable to allocate shared memory(shm) for file </torch_7_1_0>: Success (0)"),
]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("could not create a primitive"),
        *READERS,
    ],
)
def test_every_way_to_say_out_of_memory_is_understood(
    error: Exception, figure: Callable[[str], None]
) -> None:
    assert out_of_memory.ran_out_of_memory(error)
    figure(f"{type(error).__name__}: {error}"[:60])


@pytest.mark.parametrize("error", READERS)
def test_for_readers_without_shared_memory_fewer_of_them_are_advised(
    error: Exception, photo_folder: Path, figure: Callable[[str], None]
) -> None:
    config = configuration(Path("nowhere/at-all"), photo_folder, num_workers=2)
    told = drained(out_of_memory.out_of_memory(error, config, where="here"))
    assert "`num_workers: 0`" in told.hint
    assert "/dev/shm" in told.hint
    figure("`num_workers: 0`")


def test_only_a_step_whose_checkpoint_is_whole_is_told_to_be_in_one(
    figure: Callable[[str], None],
) -> None:
    place = out_of_memory.Place()
    told = [place.words]
    events = [
        RunEvent(0, 2, 1, 1, {}),
        StepEvent(1, 0, 0.0, 0.0, 0.0, 0.0, 0.0),
        CheckpointEvent(1, ""),
        StepEvent(2, 1, 0.0, 0.0, 0.0, 0.0, 0.0),
        CheckpointEvent(2, ""),
    ]
    for event in events:
        place.hear(event)
        told.append(place.words)
    assert told == [
        "before the first step",
        "after step 0 of 2, of which none is in a checkpoint",
        "after step 1 of 2, of which none is in a checkpoint",
        "after step 1 of 2, of which step 1 is in a checkpoint",
        "after step 2 of 2, of which step 1 is in a checkpoint",
        "after the last step, which is in a checkpoint, as all before it are",
    ]
    figure(f"{len(told)} places")


def test_other_errors_are_not_taken_for_it(figure: Callable[[str], None]) -> None:
    assert not out_of_memory.ran_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    descriptor = RuntimeError("could not create a primitive descriptor for a convolution")
    assert not out_of_memory.ran_out_of_memory(descriptor)
    assert not out_of_memory.ran_out_of_memory(ValueError("out of memory"))
    figure("3 other errors")


def test_advice_that_cannot_be_given_does_not_hide_what_happened(
    photo_folder: Path, figure: Callable[[str], None]
) -> None:
    config = configuration(Path("nowhere/at-all"), photo_folder)
    error = drained(out_of_memory.out_of_memory(MemoryError("no room"), config, where="in a test"))
    assert error.message == "in a test: no room"
    assert "nowhere/at-all" in error.hint
    figure("the reason and why there is no advice")


@pytest.mark.parametrize("in_shards", [False, True])
def test_nothing_is_advised_that_several_processes_refuse(
    in_shards: bool,
    flux_folder: Path,
    photo_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    figure: Callable[[str], None],
) -> None:
    config = configuration(flux_folder, photo_folder, use_lora=False, max_grad_norm=0.0)
    if in_shards:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")
    others = {"optimizer": "adafactor"}, {"optimizer": "adamw8bit"}
    found: list[remedies._Search] = []

    class Search(remedies._Search):
        def advice(self, capacity: int, *, has_checkpoint: bool) -> remedies.Advice:
            found.append(self)
            return remedies.Advice(2, "steps", capacity, (), {}, 2)

    monkeypatch.setattr(remedies, "_Search", Search)
    told = out_of_memory.out_of_memory(MemoryError(), config, where="here", num_processes=2)
    hint = drained(told).hint
    assert found[0]._footprint({"fused_backward": True}) is None
    assert found[0]._footprint({"gradient_checkpointing": True}) is not None
    for options in others:
        assert (found[0]._footprint(options) is None) is in_shards
    assert ("counted without shards" in hint) is in_shards
    figure("no updates in backward; in shards no other optimizer")


def test_time_that_is_over_ends_the_search(
    flux_folder: Path, photo_folder: Path, figure: Callable[[str], None]
) -> None:
    config = configuration(flux_folder, photo_folder)
    base = base_model.locate(config.model)
    advice = remedies.advise(config, base, capacity=1, device=CPU, seconds=0.0)
    assert advice.remedies == ()
    assert advice.peak_bytes > 0
    figure("the peak alone")


def advice_for(model: Path, capacity: int, **leaves: Any) -> tuple[TrainingConfig, remedies.Advice]:
    config = configuration(model, Path("photos"), rank=32, mixed_precision="bf16", **leaves)
    base = base_model.locate(config.model)
    return config, remedies.advise(config, base, capacity=capacity, device=CPU)


def foreseen(config: TrainingConfig) -> int:
    base = base_model.locate(config.model)
    config = completed(config, base)
    return Forecast(base, CPU).footprint(config, precision_of(config)).peak_bytes


@pytest.mark.thorough
def test_a_lora_of_sdxl_and_all_weights_of_flux_get_different_advice(
    sdxl_folder: Path,
    flux_folder: Path,
    tmp_path: Path,
    figure: Callable[[str], None],
) -> None:
    sdxl, flux = tmp_path / "sdxl", tmp_path / "flux"
    for folder in (sdxl, flux):
        describe(folder.name, folder, small=False, t5_layers=24)
    _, lora = advice_for(sdxl, 80 * GIBI, batch_size=4)
    whole_config, whole = advice_for(flux, 80 * GIBI, use_lora=False, max_grad_norm=0.0)
    settings = [[remedy.setting for remedy in each.remedies] for each in (lora, whole)]
    assert settings[0][:2] == [
        "gradient_checkpointing: true",
        "batch_size: 1 and gradient_accumulation_steps: 4",
    ]
    # Two moments of 4 bytes for each of 11.9 billion weights become rows and columns.
    assert settings[1][0] == "optimizer: adafactor"
    assert whole.remedies[0].saved_bytes == pytest.approx(8 * 11_901_408_320, rel=0.01)
    assert "weights_dtype: bf16 and fused_backward: true" in settings[1]
    figure(f"{lora.remedies[0]}; {whole.remedies[0]}")
    assert settings[0][2] == "quantization: nf4"
    # Settings are joined, each on top of those before.
    assert fits(whole.reached_bytes, whole.capacity)
    assert foreseen(remedies.with_options(whole_config, whole.together)) == whole.reached_bytes


def test_a_lora_and_all_weights_get_different_advice(
    flux_folder: Path, monkeypatch: pytest.MonkeyPatch, figure: Callable[[str], None]
) -> None:
    # Encoding a picture would take more than a step of a model as small.
    monkeypatch.setattr(memory, "_peak_of_encoding", lambda *_, **__: 0)
    # Some of activations and of the optimizer's state: each that is tried takes a second.
    parts = [remedies.SAME, "activations"], [remedies.FORMATS, "state"]
    some = [each for each in remedies.CANDIDATES if [each.change, each.part] in parts]
    monkeypatch.setattr(remedies, "CANDIDATES", some)
    one_layer = ["transformer_blocks.0.attn.to_q"]
    _, lora = advice_for(flux_folder, 80 * GIBI, batch_size=4, target_unet_modules=one_layer)
    _, whole = advice_for(flux_folder, 80 * GIBI, use_lora=False, max_grad_norm=0.0)
    settings = [[remedy.setting for remedy in each.remedies] for each in (lora, whole)]
    assert "gradient_checkpointing: true" in settings[0]
    assert any("optimizer" in each for each in settings[1])
    assert settings[0] != settings[1]
    figure(f"{settings[0][0]}; {settings[1][0]}")


@pytest.mark.thorough
def test_each_setting_when_followed_saves_what_was_said(
    flux_folder: Path, photo_folder: Path, figure: Callable[[str], None]
) -> None:
    config = configuration(flux_folder, photo_folder, batch_size=4)
    base = base_model.locate(config.model)
    advice = remedies.advise(config, base, capacity=1, device=CPU)
    assert len(advice.remedies) == 3
    for remedy in advice.remedies:
        after = foreseen(remedies.with_options(config, remedy.options))
        assert foreseen(config) - after == remedy.saved_bytes > 0
    figure("3 of 3 to the byte")


def test_settings_that_a_user_excluded_are_not_advised(
    flux_folder: Path, photo_folder: Path, figure: Callable[[str], None]
) -> None:
    leaves = {"use_lora": False, "max_grad_norm": 0.5, "weights_dtype": "fp32"}
    config = configuration(flux_folder, photo_folder, **leaves)
    base = base_model.locate(config.model)
    advice = remedies.advise(config, base, capacity=1, device=CPU)
    with pytest.raises(InputError, match="max_grad_norm"):
        remedies.with_options(config, {"fused_backward": True})
    named = {leaf for remedy in advice.remedies for leaf in remedy.options}
    # Updates in the backward pass cannot be clipped, and whoever gave a norm wants that.
    assert named
    assert "fused_backward" not in named
    figure(", ".join(sorted(named)))


def test_what_is_learnt_changes_last(figure: Callable[[str], None]) -> None:
    def remedy(saved: int, change: int) -> remedies.Remedy:
        return remedies.Remedy({"rank": saved}, saved, change)

    less, most = remedy(100, remedies.SAME), remedy(1000, remedies.OTHER)
    formats, alike = remedy(103, remedies.FORMATS), remedy(500, remedies.FORMATS)
    ordered = remedies._in_order([most, less, formats, alike])
    assert ordered == [alike, less, formats, most]
    figure("1000 bytes after 103")


def test_an_estimate_beyond_the_device_says_what_would_save(
    flux_folder: Path,
    photo_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    figure: Callable[[str], None],
) -> None:
    config = configuration(flux_folder, photo_folder, batch_size=4)
    assert "advice" not in estimate(config).as_dict()
    # One setting is enough, so that no two are tried together.
    limit = resource.RLIMIT_AS, (GIBI + 14 * 2**20, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limit[1])
    told = estimate(config).as_dict()
    assert "1.0 GiB that the device has" in told["advice"][0]
    assert len(told["saved_gib"]) == 3
    figure(told["advice"][1])
