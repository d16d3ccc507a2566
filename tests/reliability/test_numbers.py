"""Numbers that are not finite never reach the weights nor a file, and are told by name."""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import TWO_LAYERS, compose, configuration, digests, never, steps, train
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from trainer import cli, tensorfile
from trainer.config import OptimConfig
from trainer.errors import CheckpointError, InputError, NonFiniteError
from trainer.events import StepEvent
from trainer.faults import VARIABLE, wanted_fault
from trainer.job import RunFolder
from trainer.optim import ParameterGroup
from trainer.training import _MOST_ATTEMPTS, Training
from trainer.updates import Updates

ROOT = Path(__file__).parent.parent.parent
Figure = Callable[[str], None]
# Optimizers whose step is left out as a whole, and those that go on with their momentum.
LEFT_OUT, GOING_ON = ("adamw", "prodigy"), ("adafactor", "adamw8bit")


def told(training: Training, folder: Path) -> tuple[list[StepEvent], NonFiniteError]:
    """The steps that are told before a value that is not finite ends the training."""
    seen: list[StepEvent] = []
    with pytest.raises(NonFiniteError) as caught:
        for event in training.steps(RunFolder(folder), never):
            if isinstance(event, StepEvent):
                seen.append(event)
    return seen, caught.value


def weights(training: Training) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in training.parameters]


def test_a_loss_that_is_not_finite_ends_the_run_with_exit_code_3_and_the_same_command_goes_on(
    sdxl_folder: Path,
    photo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    figure: Figure,
) -> None:
    def command(output: str) -> list[str]:
        values = f"train --model-url {sdxl_folder} --images-data-url {photo_folder} --rank 4"
        lengths = "--max-train-steps 6 --checkpointing-steps 2 --tensorboard false"
        method = "--use-dora true --train-text-encoder-ti true"
        layers = f"--target-unet-modules {','.join(TWO_LAYERS['target_unet_modules'])}"
        output = f"--output {tmp_path / output}"
        return f"{values} {lengths} {method} {layers} {output}".split()

    assert cli.run(command("whole")) == 0
    monkeypatch.setenv(VARIABLE, "nan@5")
    assert cli.run(command("struck")) == 3
    error = capsys.readouterr().err
    monkeypatch.delenv(VARIABLE)

    assert "error[non-finite]" in error
    assert "Traceback" not in error
    for word in ("step 5", "photo_", "timestep", "learning_rate", "step 4"):
        assert word in error
    result = json.loads((tmp_path / "struck" / "result.json").read_text())
    assert (result["status"], result["exit_code"], result["step"]) == ("failed", 3, 4)
    assert not (tmp_path / "struck" / "outputs").exists()
    assert all(
        bool(tensor.isfinite().all())
        for path in (tmp_path / "struck" / "checkpoints").glob("*/weights.safetensors")
        for tensor in load_file(path).values()
    )
    assert cli.run(command("struck")) == 0
    ours, theirs = (digests(tmp_path / run / "outputs") for run in ("whole", "struck"))
    assert ours == theirs
    figure(f"told after step 4; {len(ours)} files of the same bytes after going on")


@pytest.mark.parametrize("every", [1, 2], ids=["with a checkpoint", "without one"])
def test_what_the_hint_says_of_the_same_command_and_of_changed_settings_is_so(
    every: int, sd15_folder: Path, photo_folder: Path, tmp_path: Path, figure: Figure
) -> None:
    # The first step makes weights that are finite, and a prediction that is not.
    leaves = {"max_train_steps": 3, "checkpointing_steps": every, **TWO_LAYERS}

    def begun(folder: str, learning_rate: float) -> Training:
        config = configuration(
            sd15_folder, photo_folder, **{**leaves, "learning_rate": learning_rate}
        )
        training, _ = compose(config, tmp_path / folder)
        list(training.resume(RunFolder(tmp_path / folder)))
        return training

    (_, error), (_, again) = (told(begun("run", 1e30), tmp_path / "run") for _ in range(2))
    assert "lower learning_rate" in error.hint
    assert again.hint == error.hint
    if every == 1:
        assert "with another --output" in error.hint
        assert "the last checkpoint, step 1, which is intact, and would meet this" in error.hint
        assert begun("run", 1e30).step == 1
        with pytest.raises(CheckpointError, match="learning_rate"):
            begun("run", 1e-3)
    else:
        assert "the same --output takes changed settings" in error.hint
    changed = begun("another" if every == 1 else "run", 1e-3)
    assert len(list(changed.steps(RunFolder(tmp_path / "end"), never))) >= 3
    figure("met again; refused" if every == 1 else "met again; taken")


@pytest.mark.parametrize("optimizer", [*LEFT_OUT, *GOING_ON])
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf], ids=str)
def test_a_gradient_that_is_not_finite_leaves_the_weights_finite(
    optimizer: Any, odd: float, figure: Figure
) -> None:
    torch.manual_seed(0)
    weight, other = (torch.nn.Parameter(torch.randn(64, 128)) for _ in range(2))
    group = ParameterGroup("all", [weight, other], learning_rate=0.1, weight_decay=0.1)
    updates = Updates([group], OptimConfig(optimizer=optimizer), seed=0, in_backward=False)
    for step in range(4):
        before = [p.detach().clone() for p in (weight, other)]
        weight.grad, other.grad = torch.randn(64, 128), torch.randn(64, 128)
        if step == 3:
            other.grad[5, 7] = odd
        allowed = torch.tensor(step < 3)
        updates.begin(step, allowed)
        updates.apply(allowed)
        after = [p.detach() for p in (weight, other)]
        changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        if step < 3 or optimizer in LEFT_OUT:
            assert changed == [step < 3] * 2
    assert weight.isfinite().all()
    assert other.isfinite().all()
    figure("all finite, untouched" if optimizer in LEFT_OUT else "all finite")


@pytest.mark.parametrize("together", [1, 4])
def test_the_step_of_a_bad_gradient_and_those_before_it_is_read_leave_every_weight_as_it_was(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path, together: int, figure: Figure
) -> None:
    leaves = {"max_train_steps": 8, "report_steps": together, **TWO_LAYERS}
    # The pull on new tokens is an update, too.
    leaves |= {"train_text_encoder_ti": True, "token_retraction": 0.5}
    leaves |= {"train_text_encoder_ti_frac": 1.0}
    training, _ = compose(configuration(sd15_folder, photo_folder, **leaves), tmp_path)
    kept: list[list[torch.Tensor]] = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        kept.append(weights(training))
        return gradient * math.nan if training.step == 5 else gradient

    training.parameters[0].register_hook(spoil)
    seen, error = told(training, tmp_path)

    assert "step 6" in error.message
    assert "loss or gradients are not finite" in error.message
    assert [event.step for event in seen] == [1, 2, 3, 4, 5]
    # Steps are taken until the device is asked: here at the next multiple of what is read at once.
    assert training.step == {1: 6, 4: 8}[together]
    after = weights(training)
    assert all(torch.equal(a, b) for a, b in zip(kept[5], after, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(kept[4][1:], after[1:], strict=True))
    assert not (tmp_path / "checkpoints").exists()
    figure(f"struck in step 6, told after step {training.step}, weights those of step 5")


def scaled(model: Path, photos: Path, folder: Path, **leaves: Any) -> Training:
    """A training whose loss a scaler multiplies, as fp16 has it, which is for GPUs alone."""
    training, _ = compose(configuration(model, photos, **TWO_LAYERS, **leaves), folder)
    accelerator = training.accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    training.stepper.scaled_optimizer = accelerator.prepare_optimizer(training.optimizer)
    return training


@dataclass(frozen=True)
class _Overflow:
    """A fault: a loss that is not finite, with gradients that are."""

    step: int

    def strike(self, loss: torch.Tensor, *, step: int, is_last_process: bool) -> torch.Tensor:
        return loss + math.inf if step == self.step else loss


def test_under_a_scaler_a_loss_that_is_not_finite_updates_nothing_though_its_gradients_are(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path, figure: Figure
) -> None:
    training = scaled(sd15_folder, photo_folder, tmp_path, max_train_steps=3)
    training.stepper.fault = _Overflow(step=2)
    before: list[list[torch.Tensor]] = []
    training.parameters[0].register_hook(lambda _: before.append(weights(training)))
    seen, error = told(training, tmp_path)
    assert [event.step for event in seen] == [1]
    assert "in step 2" in error.message
    assert "loss inf" in error.message
    assert math.isfinite(float(error.message.partition("gradient norm ")[2].split(")")[0]))
    assert len(before) == 2
    assert not torch.equal(before[0][1], before[1][1])
    assert all(torch.equal(a, b) for a, b in zip(before[1], weights(training), strict=True))
    # Another scale would change nothing of a loss.
    assert training.accelerator.scaler.get_scale() == 4.0
    figure("loss inf, gradients finite: weights those of step 1")


@pytest.mark.parametrize("overflows", [2, _MOST_ATTEMPTS])
def test_gradients_that_overflow_are_tried_again_with_half_the_scale_until_there_are_no_attempts(
    overflows: int, sd15_folder: Path, photo_folder: Path, tmp_path: Path, figure: Figure
) -> None:
    training = scaled(sd15_folder, photo_folder, tmp_path, max_train_steps=2)
    before: list[list[torch.Tensor]] = []

    def overflow(gradient: torch.Tensor) -> torch.Tensor:
        before.append(weights(training))
        return gradient * math.inf if 1 <= len(before) - 1 <= overflows else gradient

    training.parameters[0].register_hook(overflow)
    if overflows < _MOST_ATTEMPTS:
        list(training.steps(RunFolder(tmp_path), never))
    else:
        _, error = told(training, tmp_path)
        assert "loss or gradients are not finite in step 2" in error.message
    assert all(torch.equal(a, b) for a, b in zip(before[1], before[-1], strict=True))
    changed = not torch.equal(before[1][1], weights(training)[1])
    assert changed is (overflows < _MOST_ATTEMPTS)
    assert training.accelerator.scaler.get_scale() == 4.0 / 2**overflows
    figure(f"{overflows} overflows: {'updated' if changed else 'exit 3, nothing updated'}")


def test_latents_that_are_not_finite_are_told_with_their_picture(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path, figure: Figure
) -> None:
    leaves = {"batch_size": 2, "cache_latents": False, "enable_bucket": False, **TWO_LAYERS}
    training, _ = compose(configuration(sd15_folder, photo_folder, **leaves), tmp_path)

    def spoil(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        output[1] = math.inf
        return output

    training.family.pipeline.vae.encoder.register_forward_hook(spoil)
    (batch,) = training.dataset[0]
    name = training.dataset.examples[batch.numbers[1]].name
    other = training.dataset.examples[batch.numbers[0]].name
    _, error = told(training, tmp_path)
    assert "no finite latents in step 1" in error.message
    assert f"`{name}` at timestep" in error.message
    assert other not in error.message
    assert "upscale_vae_32bit" in error.hint
    figure("told after step 1: picture and timestep")


def test_text_states_that_are_not_finite_are_told_with_their_caption(
    sdxl_folder: Path, photo_folder: Path, tmp_path: Path, figure: Figure
) -> None:
    leaves = {"train_text_encoder_ti": True, **TWO_LAYERS}
    training, _ = compose(configuration(sdxl_folder, photo_folder, **leaves), tmp_path)
    (rows,) = [new.rows for new in list(training.trainables.new_tokens.values())[:1]]
    with torch.no_grad():
        rows[0, 0] = math.nan
    (batch,) = training.dataset[0]
    _, error = told(training, tmp_path)
    assert "no finite states in step 1" in error.message
    assert batch.captions[0] in error.message
    figure("told after step 1: picture, caption and timestep")


def test_an_optimizers_state_that_is_not_finite_is_not_published(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path, figure: Figure
) -> None:
    leaves = {"max_train_steps": 1, **TWO_LAYERS}
    training, _ = compose(configuration(sd15_folder, photo_folder, **leaves), tmp_path)

    def overflow(*_: Any) -> None:
        next(iter(training.optimizer.state.values()))["exp_avg_sq"].fill_(math.inf)

    training.optimizer.register_step_post_hook(overflow)
    with pytest.raises(NonFiniteError, match="what the optimizer keeps"):
        list(training.steps(RunFolder(tmp_path), never))
    assert not (tmp_path / "checkpoints").exists()
    figure("no checkpoint")


@pytest.mark.parametrize(
    ("value", "dtype"), [(math.nan, None), (math.inf, None), (1e6, torch.float16)]
)
def test_no_file_of_tensors_holds_what_is_not_finite_in_its_number_format(
    value: float, dtype: torch.dtype | None, tmp_path: Path, figure: Figure
) -> None:
    tensors = {"fine": torch.ones(3), "odd": torch.tensor([1.0, value])}
    with pytest.raises(NonFiniteError, match="`odd`(?s:.)*save_dtype"):
        tensorfile.write(tmp_path / "file.safetensors", tensors, {}, dtype)
    assert list(tmp_path.iterdir()) == []
    tensorfile.write(tmp_path / "file.safetensors", {"odd": torch.tensor([1e6])}, {})
    figure("no file")


class _Copies(TorchFunctionMode):
    """Collects copies to a device that the processor would wait for, made by code in a folder."""

    def __init__(self, folder: Path = ROOT / "trainer") -> None:
        super().__init__()
        self._folder = folder
        self.waited_for: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        moves = any(isinstance(p, torch.device | str) for p in (*args[1:], *named.values()))
        caller = traceback.extract_stack(limit=2)[0]
        is_ours = Path(caller.filename).is_relative_to(self._folder)
        if func is torch.Tensor.to and moves and is_ours and not named.get("non_blocking"):
            self.waited_for.append(f"{caller.filename}:{caller.lineno}")
        return func(*args, **named)


class _HostReads(TorchDispatchMode):
    """Counts how often a number is read from a tensor, for which a GPU would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def waits_per_step(training: Training) -> Iterator[tuple[int, list[str]]]:
    """Numbers read from tensors, and copies waited for, in each of the remaining steps."""
    while training.step < training.total_steps:
        batches = training.dataset[training.step]
        with _HostReads() as reads, _Copies() as copies:
            training._one_step(batches)
        yield reads.count, copies.waited_for


def test_no_step_waits_for_the_device_until_several_are_read_at_once(
    sdxl_folder: Path, photo_folder: Path, tmp_path: Path, figure: Figure
) -> None:
    leaves = {"report_steps": 4, "use_dora": True, "snr_gamma": 5.0, **TWO_LAYERS}
    training, _ = compose(configuration(sdxl_folder, photo_folder, **leaves), tmp_path)
    training.trainables.learn({"denoiser"})
    assert list(waits_per_step(training)) == [(0, [])] * 4
    # The count counts: reading the four losses takes one transfer, but each of them is a number.
    with _HostReads() as reads:
        assert len(training.readings.read()) == 4
        assert float(torch.ones(())) == 1
    assert reads.count >= 1
    with _Copies(Path(__file__).parent) as copies:
        torch.ones(()).to("cpu")
    assert copies.waited_for != []
    figure("nothing read and no copy waited for in 4 steps")


@pytest.mark.parametrize("wanted", ["nan", "nan@0", "nan@x", "other@3"])
def test_an_unknown_fault_is_refused_by_name(
    wanted: str, monkeypatch: pytest.MonkeyPatch, figure: Figure
) -> None:
    monkeypatch.setenv(VARIABLE, wanted)
    with pytest.raises(InputError, match=VARIABLE):
        wanted_fault()
    monkeypatch.setenv(VARIABLE, "")
    assert wanted_fault() is None
    figure("refused")


def test_losses_read_together_are_those_read_one_by_one(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path, figure: Figure
) -> None:
    leaves = {"max_train_steps": 5, "checkpointing_steps": 3, **TWO_LAYERS}
    one_by_one, together = (
        [
            event
            for event in steps(
                configuration(sd15_folder, photo_folder, report_steps=every, **leaves),
                tmp_path / str(every),
            )
            if isinstance(event, StepEvent)
        ]
        for every in (1, 4)
    )
    assert [event.step for event in together] == [1, 2, 3, 4, 5]
    assert [e.loss for e in one_by_one] == [e.loss for e in together]
    assert [e.grad_norm for e in one_by_one] == [e.grad_norm for e in together]
    kept = [digests(tmp_path / str(every) / "checkpoints") for every in (1, 4)]
    assert [part for part in kept[0].items() if "manifest" not in part[0]] == [
        part for part in kept[1].items() if "manifest" not in part[0]
    ]
    figure("5 losses and norms, checkpoints of 2 steps: equal")


def test_a_learning_rate_beyond_reason_leaves_no_file_that_is_not_finite(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path, figure: Figure
) -> None:
    config = configuration(
        sd15_folder, photo_folder, learning_rate=1e30, max_train_steps=8, checkpointing_steps=1
    )
    with pytest.raises(NonFiniteError):
        train(config, tmp_path)
    for path in tmp_path.rglob("*.safetensors"):
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(path).values())
    figure("every tensor in every file is finite")
