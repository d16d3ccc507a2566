"""What only a GPU can show: half precision, its scaler, 8-bit state, resume on the device.

And that it agrees with the processor: frozen weights in few bits, offloading, updates by chance;
and that it is as reliable: the same bytes where asked for, no waiting, no memory, no numbers.
"""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny import SMALL, compose, configuration, digests, losses, never, steps, train
from torch.nn import Linear, Parameter

from trainer import affordable, base_model, engine
from trainer.base_model import Precision
from trainer.capacity import SPARE
from trainer.class_images import ClassImages, class_images
from trainer.config import ModelConfig, OptimConfig
from trainer.errors import Interrupted
from trainer.events import StepEvent, VerifyEvent
from trainer.frozen import FrozenLinear, frozen_layers
from trainer.job import RunFolder
from trainer.optim import ParameterGroup
from trainer.runner import supervise
from trainer.sampling import Sampler
from trainer.updates import Updates, rounded_by_chance

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

CPU, GPU = torch.device("cpu"), torch.device("cuda")

FORMS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "lokr": {"lora_type": "lokr", "lokr_factor": 4},
    "loha": {"lora_type": "loha"},
    "all weights": {"use_lora": False, "learning_rate": 1e-5},
    "8-bit": {"optimizer": "adamw8bit"},
    "uncached": {"cache_latents": False, "gradient_checkpointing": True},
    "pivotal": {
        "train_text_encoder_ti": True,
        "with_prior_preservation": True,
        "photo_class": "Woman",
        "num_class_images": 2,
        "class_inference_steps": 2,
        "segmenter": "luminance",
        "clip_seg_mask_prompt": "head",
    },
    "pivotal, waiting denoiser": {
        "train_text_encoder_ti": True,
        "disable_unet_during_ti_training": True,
        "gradient_checkpointing": True,
    },
    "text encoders": {"train_text_encoder": True, "train_text_encoder_frac": 0.5},
    "all text weights": {
        "use_lora": False,
        "train_text_encoder": True,
        "extract_rank": 4,
        "learning_rate": 1e-5,
    },
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_every_precision_trains_on_the_gpu_and_its_files_are_verified(
    precision: str, form: str, sdxl_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    leaves = {"mixed_precision": precision, **FORMS[form]}
    events = train(configuration(sdxl_folder, photo_folder, **leaves), tmp_path)
    statuses = {event.status for event in events if isinstance(event, VerifyEvent)}
    assert len(losses(events)) == 4
    assert all(math.isfinite(loss) for loss in losses(events))
    assert "passed" in statuses
    assert "failed" not in statuses


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "prodigy"])
def test_a_stopped_run_goes_on_on_the_gpu(
    optimizer: str, sdxl_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    rate = 1.0 if optimizer == "prodigy" else 1e-3
    config = configuration(
        sdxl_folder, photo_folder, optimizer=optimizer, learning_rate=rate, mixed_precision="fp16"
    )
    whole = train(config, tmp_path / "whole")
    first: list[Any] = []

    def wished() -> bool:
        return any(isinstance(event, StepEvent) and event.step >= 2 for event in first)

    with pytest.raises(Interrupted):
        for event in engine.run(config, RunFolder(tmp_path / "parts"), wished):
            first.append(event)
    rest = train(config, tmp_path / "parts")
    assert losses(rest) == pytest.approx(losses(whole)[2:], rel=1e-3)


def test_a_step_whose_fp16_gradients_overflow_is_tried_again_until_it_counts(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    # The scaler starts at 2**16: the first attempts overflow, and still every step is taken.
    config = configuration(sd15_folder, photo_folder, mixed_precision="fp16")
    events = train(config, tmp_path)
    norms = [event.grad_norm for event in events if isinstance(event, StepEvent)]
    assert len(norms) == 4
    assert all(math.isfinite(norm) for norm in norms)


# FLUX.1

WHOLE: dict[str, Any] = {"use_lora": False, "learning_rate": 1e-4, "max_grad_norm": 0.0}
FLUX_FORMS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "lokr": {"lora_type": "lokr", "lokr_factor": 4},
    "loha": {"lora_type": "loha"},
    "int8": {"quantization": "int8"},
    "fp8": {"quantization": "fp8"},
    "nf4": {"quantization": "nf4"},
    "offloaded": {"offload_blocks": 3},
    "offloaded nf4, recomputed": {
        "quantization": "nf4",
        "offload_blocks": 4,
        "gradient_checkpointing": True,
    },
    "all weights": WHOLE,
    "all weights, fused": {**WHOLE, "fused_backward": True, "optimizer": "adafactor"},
}
BF16_FORMS: dict[str, dict[str, Any]] = {
    **FLUX_FORMS,
    "8-bit": {"optimizer": "adamw8bit", "quantization": "fp8"},
    "all weights in bf16, fused": {
        **WHOLE,
        "weights_dtype": "bf16",
        "fused_backward": True,
        "optimizer": "adafactor",
        "gradient_checkpointing": True,
        "save_dtype": "bf16",
        "extract_rank": 4,
    },
}
# Of the losses of four steps; the levels of NF4 are found by another rule on each device.
TOLERANCE = {"nf4": 5e-3, "offloaded nf4, recomputed": 5e-3}


@pytest.fixture
def whole_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in 32 bits, not in the 19 that cuDNN takes of them by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@contextmanager
def without_gpu() -> Iterator[None]:
    """A machine without a GPU, for what asks torch and accelerate."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("whole_numbers")
@pytest.mark.parametrize("form", FLUX_FORMS)
def test_flux_learns_on_the_gpu_what_it_learns_on_the_processor(
    form: str, flux_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    config = configuration(flux_folder, photo_folder, mixed_precision="no", **FLUX_FORMS[form])
    with without_gpu():
        expected = losses(steps(config, tmp_path / "cpu"))
    on_gpu, _ = compose(config, tmp_path / "gpu")
    assert on_gpu.accelerator.device.type == GPU.type
    got = losses(list(on_gpu.steps(RunFolder(tmp_path / "gpu"), never)))
    assert len(got) == 4
    assert got == pytest.approx(expected, rel=TOLERANCE.get(form, 1e-3))


@pytest.mark.parametrize("form", BF16_FORMS)
def test_flux_trains_in_bf16_on_the_gpu_and_its_files_are_verified(
    form: str, flux_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    leaves = {"mixed_precision": "bf16", **BF16_FORMS[form]}
    events = train(configuration(flux_folder, photo_folder, **leaves), tmp_path)
    statuses = {event.status for event in events if isinstance(event, VerifyEvent)}
    assert len(losses(events)) == 4
    assert all(math.isfinite(loss) for loss in losses(events))
    assert "passed" in statuses
    assert "failed" not in statuses


def test_flux_2_trains_in_bf16_on_the_gpu_and_its_files_are_verified(
    flux2_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    config = configuration(flux2_folder, photo_folder, mixed_precision="bf16", quantization="fp8")
    events = train(config, tmp_path)
    statuses = {event.status for event in events if isinstance(event, VerifyEvent)}
    assert len(losses(events)) == 4
    assert "passed" in statuses
    assert "failed" not in statuses


# Frozen weights

# How far a widened weight may be from the processor's, by its norm.
APART = {"none": 0.0, "int8": 1e-6, "fp8": 1e-6, "nf4": 1e-3}


@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize("quantization", APART)
def test_a_frozen_layer_computes_on_the_gpu_what_it_computes_on_the_processor(
    quantization: str, offloaded: bool
) -> None:
    torch.manual_seed(0)
    plain = Linear(128, 256).requires_grad_(False)
    x, y = torch.randn(2, 3, 128), torch.randn(2, 3, 256)
    found = {}
    for device in (CPU, GPU):
        layer = FrozenLinear(plain, quantization, offloaded=offloaded, device=device).to(device)
        asked = x.to(device).requires_grad_()
        product = layer(asked)
        product.backward(y.to(device))
        assert asked.grad is not None
        found[device] = [t.detach().cpu() for t in (layer.weight, product, asked.grad)]
    weight, *others = found[CPU]
    assert float((found[GPU][0] - weight).norm() / weight.norm()) <= APART[quantization]
    for one, other in zip(found[GPU][1:], others, strict=True):
        assert float((one - other).norm() / other.norm()) < max(1e-5, 2 * APART[quantization])


@pytest.mark.parametrize("quantization", ["int8", "fp8", "nf4"])
def test_the_gpu_packs_the_same_weight_into_the_same_bytes(quantization: str) -> None:
    torch.manual_seed(0)
    plain = Linear(256, 512).requires_grad_(False)
    one, other = (
        FrozenLinear(plain, quantization, offloaded=False, device=GPU).parts for _ in range(2)
    )
    for first, second in zip(one, other, strict=True):
        assert torch.equal(first.float(), second.float())


def test_what_is_offloaded_stays_in_pinned_memory_and_the_rest_is_on_the_gpu(
    flux_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    leaves = {"mixed_precision": "bf16", "quantization": "fp8", "offload_blocks": 3}
    training, _ = compose(configuration(flux_folder, photo_folder, **leaves), tmp_path)
    assert len(losses(list(training.steps(RunFolder(tmp_path), never)))) == 4
    layers = list(frozen_layers(training.denoiser))
    assert {layer.offloaded for layer in layers} == {False, True}
    for layer in layers:
        for part in layer.parts:
            assert part.device.type == (CPU if layer.offloaded else GPU).type
            assert part.is_pinned() == layer.offloaded


# Updates


@pytest.mark.usefixtures("whole_numbers")
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "paged_adamw8bit", "adafactor"])
@pytest.mark.parametrize("weights_dtype", ["fp32", "bf16"])
def test_updates_in_the_backward_pass_are_those_after_it_on_the_gpu(
    weights_dtype: str, optimizer: str, flux_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    leaves = WHOLE | {"weights_dtype": weights_dtype, "optimizer": optimizer}
    leaves |= {"mixed_precision": "bf16" if weights_dtype == "bf16" else "no"}
    ends = []
    for fused in (False, True):
        config = configuration(flux_folder, photo_folder, fused_backward=fused, **leaves)
        training, _ = compose(config, tmp_path / str(fused))
        assert training.updates.in_backward == fused
        got = losses(list(training.steps(RunFolder(tmp_path / str(fused)), never)))
        ends.append((got, torch.cat([p.detach().float().flatten() for p in training.parameters])))
    (after, expected), (during, found) = ends
    # Attention's backward pass adds in no fixed order on a GPU.
    assert during == pytest.approx(after, rel=1e-4 if weights_dtype == "fp32" else 1e-2)
    apart = float((found - expected).norm() / expected.norm())
    assert apart < (1e-4 if weights_dtype == "fp32" else 1e-2)


def test_rounding_by_chance_gives_the_same_bytes_again_and_on_average_the_value() -> None:
    # Between 1 and 1 + 2**-7, bf16's next number, at three eighths of the way.
    values = torch.full((1 << 16,), 1 + 3 / 8 * 2**-7, device=GPU)
    rounded = rounded_by_chance(values, key=5)
    assert torch.equal(rounded_by_chance(values, key=5), rounded)
    assert not torch.equal(rounded_by_chance(values, key=6), rounded)
    assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
    # Five deviations of the mean of so many draws.
    bound = 5 * math.sqrt(3 / 8 * 5 / 8 / (1 << 16))
    assert float((rounded > 1).float().mean()) == pytest.approx(3 / 8, abs=bound)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "adafactor"])
def test_the_same_gradients_give_bf16_weights_the_same_bytes_again(optimizer: str) -> None:
    grads = [torch.randn(128, 256, generator=torch.Generator().manual_seed(n)) for n in range(4)]
    ends = []
    for _ in range(2):
        weight = Parameter(torch.ones(128, 256, dtype=torch.bfloat16, device=GPU))
        group = ParameterGroup("denoiser", [weight], learning_rate=1e-3, weight_decay=0.0)
        updates = Updates([group], OptimConfig(optimizer=optimizer), seed=3, in_backward=False)
        for step, grad in enumerate(grads):
            updates.begin(step)
            weight.grad = grad.to(GPU, torch.bfloat16)
            updates.apply()
        ends.append(weight.detach())
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], torch.ones_like(ends[0]))


# Models that take turns


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_models_in_turns_make_the_same_class_pictures_and_leave_nothing_on_the_gpu(
    flux_folder: Path, tmp_path: Path
) -> None:
    precision = Precision(*[torch.bfloat16] * 4)
    base = base_model.locate(ModelConfig(model_url=str(flux_folder)))
    sampler = Sampler(width=64, height=64, steps=2, guidance_scale=3.5)
    wanted = ClassImages("a photo of a man", count=2, sampler=sampler, seed=0, base_contents="flux")
    pictures, left = {}, {}
    for in_turns in (False, True):
        family = base_model.load(base, precision)
        place = tmp_path / str(in_turns)
        gc.collect()
        before = torch.cuda.memory_allocated()
        making = class_images(
            family,
            wanted,
            place / "cache",
            place / "class",
            process_index=0,
            num_processes=1,
            device=GPU,
            in_turns=in_turns,
        )
        assert len(list(making)) == 3
        parts = [p for p in family.pipeline.components.values() if isinstance(p, torch.nn.Module)]
        assert {p.device for part in parts for p in part.parameters()} == {CPU}
        gc.collect()
        left[in_turns] = torch.cuda.memory_allocated() - before
        pictures[in_turns] = [p.read_bytes() for p in sorted((place / "class").iterdir())]
    # In the first round libraries take memory for good, to work in.
    assert left[True] == 0
    assert pictures[True] == pictures[False]
    assert pictures[True][0] != pictures[True][1]


def test_a_training_whose_models_took_turns_goes_on_as_any_other(
    flux_folder: Path, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves = {
        "mixed_precision": "bf16",
        "with_prior_preservation": True,
        "photo_class": "Woman",
        "num_class_images": 2,
        "class_inference_steps": 2,
    }
    found = []
    for offload in (False, True):
        # Or the pictures of the first would be those of the second.
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache {offload}"))
        config = configuration(flux_folder, photo_folder, offload_models=offload, **leaves)
        found.append(losses(steps(config, tmp_path / str(offload))))
    assert found[1] == pytest.approx(found[0], rel=1e-2)


# Reliability


def commanded(output: Path, cache: Path, **leaves: Any) -> subprocess.CompletedProcess[str]:
    """A training as a program of its own: torch asks for cuBLAS's workspace once in a process."""
    flags = []
    for name, value in leaves.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        flags += [f"--{name.replace('_', '-')}", text]
    return subprocess.run(
        [sys.executable, "-m", "trainer", "train", "--output", str(output), *flags],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("form", ["lora", "uncached", "text encoders", "all weights"])
@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_two_deterministic_trainings_on_the_gpu_leave_the_same_bytes(
    family: str, form: str, photo_folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    leaves = {**SMALL, **FORMS[form], "deterministic": True, "mixed_precision": "bf16"}
    leaves |= {"model_url": request.getfixturevalue(f"{family}_folder")}
    found = []
    for turn in range(2):
        run = tmp_path / f"run {turn}"
        # Each prepares its pictures itself.
        done = commanded(run, tmp_path / f"cache {turn}", images_data_url=photo_folder, **leaves)
        assert done.returncode == 0, done.stderr
        found.append((digests(run / "outputs"), digests(run / "checkpoints")))
    assert found[0] == found[1]
    assert all(found[0])


def test_a_step_does_not_wait_for_the_gpu(
    sdxl_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    leaves = {"mixed_precision": "bf16", "max_train_steps": 8, "optimizer": "adamw"}
    training, _ = compose(configuration(sdxl_folder, photo_folder, **leaves), tmp_path)
    list(training._enter_phase(training.schedule.parts_at(0)))
    for _ in range(3):
        training._one_step(training.dataset[training.step])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            training._one_step(training.dataset[training.step])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(training.readings.read()) == 7


def test_a_gpu_without_memory_ends_a_run_with_exit_code_4_and_the_same_command_goes_on(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    leaves = {"resolution_width": 1024, "resolution_height": 1024, "mixed_precision": "bf16"}
    config = configuration(sd15_folder, photo_folder, **leaves)
    folder = RunFolder(tmp_path / "run")
    gc.collect()
    torch.cuda.empty_cache()
    # The VAE of the tiny model alone needs more for a picture of this size.
    room = torch.cuda.memory_reserved() + (64 << 20)
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.mem_get_info()[1])
    try:
        result = supervise(config, folder, [], engine=engine.run, stop=never)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert (result.exit_code, result.error_kind) == (4, "memory"), result.error
    assert folder.read_result() == result
    assert supervise(config, folder, [], engine=engine.run, stop=never).status == "done"


# With Prodigy adapters alone learn, in 32 bits.
@pytest.mark.parametrize(
    ("weights_dtype", "optimizer"),
    [
        *((torch.float32, name) for name in ("adamw", "prodigy", "adamw8bit", "adafactor")),
        *((torch.bfloat16, name) for name in ("adamw", "adamw8bit", "adafactor")),
    ],
)
def test_a_gradient_that_is_not_finite_leaves_weights_on_the_gpu_finite(
    weights_dtype: torch.dtype, optimizer: Any
) -> None:
    torch.manual_seed(0)
    weight = Parameter(torch.randn(64, 128, dtype=weights_dtype, device=GPU))
    group = ParameterGroup("denoiser", [weight], learning_rate=0.1, weight_decay=0.1)
    updates = Updates([group], OptimConfig(optimizer=optimizer), seed=0, in_backward=False)
    for step in range(4):
        before = weight.detach().clone()
        weight.grad = torch.randn_like(weight)
        if step == 3:
            weight.grad[5, 7] = math.nan
        allowed = torch.tensor(step < 3, device=GPU)
        updates.begin(step, allowed)
        updates.apply(allowed)
        if step < 3 or optimizer in ("adamw", "prodigy"):
            assert torch.equal(weight.detach(), before) == (step == 3)
    assert weight.isfinite().all()


def test_a_paged_optimizer_keeps_its_state_in_shared_memory_also_when_it_is_loaded() -> None:
    ends = []
    for optimizer in ("adamw8bit", "paged_adamw8bit"):
        weight = Parameter(torch.ones(512, 512, device=GPU))
        group = ParameterGroup("denoiser", [weight], learning_rate=1e-3, weight_decay=0.0)
        updates = Updates([group], OptimConfig(optimizer=optimizer), seed=0, in_backward=False)
        for step in range(4):
            updates.begin(step)
            weight.grad = torch.randn(512, 512, generator=torch.Generator().manual_seed(step)).to(
                GPU
            )
            updates.apply()
            if step == 1:
                updates.load(updates.state(keep=True))
            is_paged = getattr(updates.optimizer.state[weight]["state1"], "is_paged", False)
            assert is_paged is (optimizer == "paged_adamw8bit")
        ends.append(weight.detach())
    assert torch.equal(*ends)


def test_a_training_that_would_not_fit_recomputes_by_itself(
    flux_folder: Path, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = {"resolution_width": 256, "resolution_height": 256}
    config = configuration(flux_folder, photo_folder, **size)
    roomy, _ = compose(config, tmp_path / "roomy")
    assert roomy.config.run.gradient_checkpointing is False
    assert roomy.spread.room is not None
    # One byte less than it was foreseen to take.
    least = roomy.spread.room.steps + SPARE - 1
    monkeypatch.setattr(affordable, "device_memory", lambda _: least)
    tight, _ = compose(config, tmp_path / "tight")
    assert tight.config.run.gradient_checkpointing is True
    told = [
        losses(list(each.steps(RunFolder(tmp_path / name), never)))
        for name, each in (("roomy", roomy), ("tight", tight))
    ]
    assert told[1] == pytest.approx(told[0], rel=1e-3)
