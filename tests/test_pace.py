"""How steps are computed: what is chosen where nobody chose, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import snapshots
import torch
from tiny import compose, configuration, losses, never

from trainer import pace
from trainer.capacity import Room
from trainer.config import TrainingConfig
from trainer.errors import InputError
from trainer.job import RunFolder
from trainer.pace import Pace, Work, pace_of, unrecordable
from trainer.resolve import Layer, resolve

PLAIN = Pace(False, False, False, False, "auto")
CONVOLVES = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3))
TRANSFORMS = torch.nn.Sequential(torch.nn.Linear(1, 1))


def config_of(**leaves: Any) -> TrainingConfig:
    given = {"model_url": "m", "images_data_url": "p", "mixed_precision": "bf16", **leaves}
    return resolve([Layer("test", given, explicit=True)])


def work_of(denoiser: torch.nn.Module = CONVOLVES, **facts: Any) -> Work:
    return Work(denoiser, **{"steps": 1000, "sizes": [(1024, 1024)], "examples": 1, **facts})


def large(module: torch.nn.Module, weights: float) -> torch.nn.Module:
    """As many weights as a model of true size, without data."""
    module.register_parameter(
        "many", torch.nn.Parameter(torch.empty(int(weights), device="meta"), False)
    )
    return module


def on_gpu(config: TrainingConfig, work: Work, num_processes: int = 1) -> Pace:
    return pace_of(config, work, on_gpu=True, num_processes=num_processes)


def test_a_processor_computes_plainly_unless_asked() -> None:
    chosen = pace_of(config_of(), work_of(), on_gpu=False, num_processes=1)
    assert chosen == PLAIN
    assert str(chosen) == "plain"
    asked = config_of(channels_last=True, attention="math", compile_blocks=True)
    chosen = pace_of(asked, work_of(), on_gpu=False, num_processes=1)
    assert str(chosen) == "compiled blocks, channels last, math attention"


def test_a_gpu_records_steps_and_computes_in_its_own_layout_and_format() -> None:
    assert str(on_gpu(config_of(), work_of())) == "CUDA graph, channels last, TF32"
    assert str(on_gpu(config_of(), work_of(TRANSFORMS))) == "CUDA graph, TF32"
    assert str(on_gpu(config_of(mixed_precision="no"), work_of())) == "CUDA graph"


@pytest.mark.parametrize(
    ("leaf", "word"),
    [("cuda_graph", "CUDA graph"), ("channels_last", "channels last"), ("tf32", "TF32")],
)
def test_every_choice_can_be_forced(leaf: str, word: str) -> None:
    assert word in str(on_gpu(config_of(**{leaf: True, "mixed_precision": "no"}), work_of()))
    assert word not in str(on_gpu(config_of(**{leaf: False}), work_of()))


def test_a_run_of_few_steps_is_over_before_a_recording_has_paid() -> None:
    assert not on_gpu(config_of(), work_of(steps=49)).cuda_graph
    assert on_gpu(config_of(), work_of(steps=50)).cuda_graph


def test_steps_of_several_sizes_are_recorded_where_their_activations_fit_twice() -> None:
    several, gib = [(1024, 1024), (768, 1280)], 2**30

    def records(capacity: int, sizes: list[tuple[int, int]], **leaves: Any) -> bool:
        # 32 GiB, 20 of activations once more, and a spare one.
        room = Room(capacity * gib, steps=32 * gib, activations=20 * gib)
        return on_gpu(config_of(**leaves), work_of(sizes=sizes, room=room)).cuda_graph

    assert (records(53, several), records(52, several)) == (True, False)
    assert records(33, several[:1])
    assert records(52, several, cuda_graph=True)


UNRECORDABLE: dict[str, dict[str, Any]] = {
    "fp16": {"mixed_precision": "fp16"},
    "adafactor": {"optimizer": "adafactor"},
    "adamw8bit": {"optimizer": "adamw8bit"},
    "one by one": {"use_lora": False, "fused_backward": True, "max_grad_norm": 0},
    "bf16": {"use_lora": False, "weights_dtype": "bf16"},
    "not cached": {"cache_latents": False},
    "the computer's memory": {"offload_blocks": 2},
    "text encoders learn": {"train_text_encoder": True},
    "new tokens learn": {"train_text_encoder_ti": True, "train_text_encoder_ti_frac": 1.0},
}


@pytest.mark.parametrize("leaves", UNRECORDABLE.values(), ids=list(UNRECORDABLE))
def test_what_cannot_be_recorded_is_computed_and_refused_where_somebody_asked_for_it(
    leaves: dict[str, Any],
) -> None:
    config = config_of(**leaves)
    assert not on_gpu(config, work_of()).cuda_graph
    pace.refuse_impossible(config, 1, on_gpu=True)
    reason = unrecordable(config, 1)
    assert reason is not None
    with pytest.raises(InputError, match=reason):
        pace.refuse_impossible(config_of(**leaves, cuda_graph=True), 1, on_gpu=True)


def test_weights_keep_their_layout_where_all_learn_or_each_gpu_has_a_part() -> None:
    assert not on_gpu(config_of(use_lora=False), work_of()).channels_last
    whole = config_of(use_lora=False, channels_last=True)
    assert not on_gpu(whole, work_of()).channels_last
    assert "channels_last" in whole.resolved.ignored_options
    assert pace.without_meaning(whole, TRANSFORMS) == whole
    large_model = large(torch.nn.Conv2d(1, 1, 3), 11.9e9)
    shared = pace_of(
        config_of(), work_of(large_model), on_gpu=True, num_processes=2, in_shards=True
    )
    assert str(shared) == "TF32"


def test_several_processes_do_not_record() -> None:
    assert not on_gpu(config_of(), work_of(), num_processes=2).cuda_graph
    with pytest.raises(InputError, match="several processes"):
        pace.refuse_impossible(config_of(cuda_graph=True), 2, on_gpu=True)


def test_compiling_pays_for_large_models_and_long_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "_compiler", lambda on_gpu: True)
    flux, sdxl = large(torch.nn.Linear(1, 1), 11.9e9), large(torch.nn.Conv2d(1, 1, 3), 2.57e9)

    def compiles(denoiser: torch.nn.Module, leaves: dict[str, Any], **facts: Any) -> bool:
        return on_gpu(config_of(**leaves), work_of(denoiser, **facts)).compile_blocks

    assert compiles(flux, {}, steps=1000)
    assert not compiles(flux, {}, steps=100)
    assert not compiles(sdxl, {}, steps=1000)
    assert compiles(sdxl, {}, steps=1000, examples=12)
    # Each size is compiled for itself.
    assert not compiles(flux, {}, steps=1000, sizes=[(1024, 1024)] * 9)
    assert not compiles(flux, {"quantization": "nf4"}, steps=1000)


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "_compiler", lambda on_gpu: False)
    for on_gpu_, needed in ((True, "Triton"), (False, "C\\+\\+ compiler")):
        with pytest.raises(InputError, match=needed):
            pace.refuse_impossible(config_of(compile_blocks=True), 1, on_gpu=on_gpu_)
    pace.refuse_impossible(config_of(), 1, on_gpu=True)


def test_torchs_switches_come_back_after_each_step() -> None:
    def switches() -> tuple[bool, ...]:
        cuda = torch.backends.cuda
        return (
            cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            cuda.flash_sdp_enabled(),
            cuda.math_sdp_enabled(),
        )

    before = switches()
    for tf32 in (True, False):
        with pace.arithmetic(Pace(False, False, False, tf32, "math")):
            assert switches() == (tf32, tf32, False, True)
        assert switches() == before


def test_an_attention_that_this_machine_has_not_is_refused_by_name(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    config = configuration(sd15_folder, photo_folder, attention="cudnn")
    training, _ = compose(config, tmp_path)
    with pytest.raises(InputError, match="attention") as raised:
        list(training.steps(RunFolder(tmp_path), never))
    assert "`cudnn` cannot be computed here" in str(raised.value)


# Torch's compiler warns of what it does itself.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.thorough
def test_compiled_blocks_learn_what_others_learn(
    sdxl_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    leaves = {"max_train_steps": 3, "use_dora": True, "rank": 2}
    told = []
    for number, compiles in enumerate((False, True)):
        config = configuration(sdxl_folder, photo_folder, compile_blocks=compiles, **leaves)
        training, _ = compose(config, tmp_path / str(number))
        told.append(losses(snapshots.watched(training, tmp_path / str(number))[1]))
    assert told[1] == pytest.approx(told[0], rel=1e-4)
