"""Updates one by one: rounding by chance, updates in the backward pass, and what they refuse."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import compose, configuration, digests, losses, never, steps, train
from torch.nn import Parameter

from trainer import machine
from trainer.config import OptimConfig
from trainer.errors import InputError, Interrupted, NonFiniteError
from trainer.events import CheckpointEvent, Event
from trainer.job import RunFolder
from trainer.optim import ParameterGroup, build_optimizer
from trainer.updates import Updates, rounded_by_chance

WHOLE: dict[str, Any] = {"use_lora": False, "learning_rate": 1e-5}
FUSED: dict[str, Any] = WHOLE | {"fused_backward": True}
BF16: dict[str, Any] = WHOLE | {"weights_dtype": "bf16", "mixed_precision": "bf16"}


def updates_of(
    *weights: Parameter, step: int = 0, in_backward: bool = False, lr: float = 1e-3, **options: Any
) -> Updates:
    group = ParameterGroup("denoiser", weights, learning_rate=lr, weight_decay=0.0)
    made = Updates([group], OptimConfig(**options), seed=3, in_backward=in_backward)
    made.begin(step)
    return made


def bf16(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.bfloat16)


def test_rounding_gives_one_of_the_two_neighbours_and_on_average_the_value() -> None:
    # Between 1 and 1 + 2**-7, bf16's next number, at three eighths of the way.
    values = torch.full((1 << 16,), 1 + 3 / 8 * 2**-7)
    for sign in (1, -1):
        rounded = (sign * rounded_by_chance(sign * values, key=5)).float()
        assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
        share = float((rounded > 1).float().mean())
        # Five deviations of the mean of so many draws.
        assert share == pytest.approx(3 / 8, abs=5 * math.sqrt(3 / 8 * 5 / 8 / (1 << 16)))


def test_what_bf16_can_hold_keeps_every_bit_and_what_is_not_finite_stays_so() -> None:
    held = torch.randn(4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(rounded_by_chance(held.float(), key=1), held)
    largest = torch.finfo(torch.float32).max
    # The last NaN has its payload in bits that bf16 does not have.
    odd = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    rest = torch.tensor([math.inf, -math.inf, 0.0, -0.0, largest, -largest, math.nan])
    for key in range(20):
        assert bool(rounded_by_chance(odd, key).isnan().all())
        rounded = rounded_by_chance(rest, key)
        edge = torch.finfo(torch.bfloat16).max
        assert rounded[:6].tolist() == [math.inf, -math.inf, 0.0, 0.0, edge, -edge]
        assert rounded[:6].signbit().tolist() == [False, True] * 3
        assert bool(rounded[6].isnan())


def test_the_smallest_numbers_round_without_a_bias_too() -> None:
    smallest = torch.tensor([2.0**-133], dtype=torch.float64)
    rounded = rounded_by_chance((smallest * 0.25).float().repeat(1 << 14), key=2).double()
    assert float(rounded.mean() / smallest) == pytest.approx(0.25, abs=0.02)


def test_a_step_that_nearest_rounding_loses_moves_the_weight_by_itself_on_average() -> None:
    weight = Parameter(torch.ones(1 << 16, dtype=torch.bfloat16))
    updates = updates_of(weight, lr=1e-5, adam_epsilon=1e-12)
    weight.grad = torch.full_like(weight, 0.5)
    updates.apply()
    assert bf16(1 - 1e-5).item() == 1.0
    # Adam's first step is as long as the rate; below 1 bf16's numbers are 2**-8 apart.
    chance = 1e-5 * 2**8
    deviation = 2**-8 * math.sqrt(chance * (1 - chance) / (1 << 16))
    moved = float((weight.detach().double() - 1).mean())
    assert moved == pytest.approx(-1e-5, abs=5 * deviation)
    assert weight.grad is None


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "adafactor"])
def test_a_hundred_steps_of_bf16_weights_end_where_those_of_32_bits_do(optimizer: str) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(64, 128, generator=generator).bfloat16()
    goal = torch.randn(64, 128, generator=generator) * 0.02
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        weight = Parameter(start.to(dtype, copy=True))
        updates = updates_of(weight, lr=1e-4, optimizer=optimizer)
        for step in range(100):
            weight.grad = (weight.detach().float() - start.float() - goal).to(dtype)
            updates.begin(step)
            updates.apply()
        ends.append((weight.detach().float() - start.float()).flatten())
    full, rounded = ends
    # Rounding to nearest would leave most weights where they were: 1e-4 is far below 2**-8.
    assert float(rounded @ full / (full @ full)) == pytest.approx(1, abs=0.05)
    assert float(full.abs().mean()) > 5e-3


def test_random_bits_depend_on_seed_step_and_parameter_and_on_nothing_else() -> None:
    def ends(step: int, only: int | None = None, seed: int = 3) -> list[torch.Tensor]:
        weights = [Parameter(torch.ones(512, dtype=torch.bfloat16)) for _ in range(2)]
        group = ParameterGroup("denoiser", weights, learning_rate=1e-3, weight_decay=0.0)
        updates = Updates([group], OptimConfig(), seed=seed, in_backward=False)
        updates.begin(step)
        for number, weight in enumerate(weights):
            weight.grad = torch.ones_like(weight) if only in (None, number) else None
        updates.apply()
        return [weight.detach() for weight in weights]

    first, second = ends(4)
    assert not torch.equal(first, second)
    assert torch.equal(ends(4, only=1)[1], second)
    assert torch.equal(ends(4)[0], first)
    assert not torch.equal(ends(5)[0], first)
    assert not torch.equal(ends(4, seed=8)[0], first)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "adafactor"])
def test_the_state_of_bf16_weights_is_loaded_in_its_own_format(optimizer: str) -> None:
    weight = Parameter(torch.ones(64, 128, dtype=torch.bfloat16))
    grads = [torch.randn(64, 128, generator=torch.Generator().manual_seed(n)) for n in range(4)]
    updates = updates_of(weight, optimizer=optimizer)
    for step, grad in enumerate(grads):
        if step == 2:
            file = io.BytesIO()
            torch.save(updates.optimizer.state_dict(), file)
            copy = Parameter(weight.detach().clone())
            file.seek(0)
            resumed = updates_of(copy, optimizer=optimizer)
            resumed.optimizer.load_state_dict(torch.load(file, weights_only=True))
        updates.begin(step)
        weight.grad = grad.bfloat16()
        updates.apply()
        if step >= 2:
            resumed.begin(step)
            copy.grad = grad.bfloat16()
            resumed.apply()
    assert torch.equal(weight, copy)
    (shell,) = updates.optimizer.state
    assert shell.numel() == 0
    assert shell.dtype == torch.float32


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "adafactor"])
def test_steps_taken_alone_are_those_of_the_whole_optimizer(optimizer: str) -> None:
    start = [torch.randn(70, 60, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    ends = []
    for alone in (False, True):
        weights = [Parameter(tensor.clone()) for tensor in start]
        groups = [
            ParameterGroup("denoiser", weights[:2], learning_rate=1e-2, weight_decay=0.1),
            ParameterGroup("text", weights[2:], learning_rate=1e-3, weight_decay=0.0),
        ]
        optim = OptimConfig(optimizer=optimizer)
        updates = Updates(groups, optim, seed=0, in_backward=alone)
        plain = build_optimizer(groups, optim)
        for _ in range(3):
            sum(weight.square().sum() for weight in weights).backward()
            if not alone:
                plain.step()
                plain.zero_grad()
        assert alone == updates.in_backward
        assert all(weight.grad is None for weight in weights)
        ends.append(torch.stack([weight.detach() for weight in weights]))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], torch.stack(start))


def test_a_weight_that_is_used_twice_is_updated_once_by_the_sum() -> None:
    weight, other = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    updates = updates_of(weight, other, in_backward=True, adam_epsilon=1.0, lr=1.0)
    loss = (weight * 3).sum() + (weight * other).sum()
    loss.backward()
    # Adam's first step is lr * g / (|g| + eps).
    assert weight.tolist() == pytest.approx([1 - 4 / 5] * 2)
    assert other.tolist() == pytest.approx([1 - 1 / 2] * 2)
    assert float(updates.norm()) == pytest.approx(math.sqrt(2 * 4**2 + 2 * 1**2))
    updates.begin(1)
    assert float(updates.norm()) == 0


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_fused_trainings_take_the_steps_of_others_to_the_bit(
    family: str, photo_folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(f"{family}_folder")
    ends, norms = [], []
    for fused in (False, True):
        leaves = WHOLE | {"fused_backward": fused, "max_grad_norm": 0.0, "max_train_steps": 2}
        if family == "sd15":
            leaves |= {"train_text_encoder": True}
        config = configuration(model, photo_folder, gradient_checkpointing=fused, **leaves)
        training, _ = compose(config, tmp_path / str(fused))
        events = list(training.steps(RunFolder(tmp_path / str(fused)), never))
        ends.append([parameter.detach().clone() for parameter in training.parameters])
        norms.append([(e.loss, e.grad_norm) for e in events if hasattr(e, "grad_norm")])
        assert all(parameter.grad is None for parameter in training.parameters)
    assert norms[0] == norms[1]
    assert len(norms[0]) == 2
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize(
    "leaves",
    [FUSED | {"train_text_encoder_ti": True}, FUSED | BF16 | {"optimizer": "adafactor"}],
    ids=["fused with tokens", "fused bf16 adafactor"],
)
def test_a_stopped_run_of_such_updates_goes_on_to_the_same_bytes(
    leaves: dict[str, Any], sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    config = configuration(sd15_folder, photo_folder, **leaves)
    whole = steps(config, tmp_path / "whole")
    training, _ = compose(config, tmp_path / "parts")
    with pytest.raises(Interrupted):
        list(training.steps(RunFolder(tmp_path / "parts"), lambda: training.step == 2))
    again, _ = compose(config, tmp_path / "parts")
    list(again.resume(RunFolder(tmp_path / "parts")))
    rest = list(again.steps(RunFolder(tmp_path / "parts"), never))
    assert losses(rest) == losses(whole)[2:]
    kept = [digests(tmp_path / run / "checkpoints" / "step-4") for run in ("whole", "parts")]
    assert len(kept[0]) == 4
    assert kept[0] == kept[1]


def test_bf16_weights_are_bf16_from_training_to_files_unless_said_otherwise(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    leaves = WHOLE | {"weights_dtype": "bf16", "train_text_encoder": True, "learning_rate": 1e-3}
    config = configuration(sd15_folder, photo_folder, extract_rank=4, **leaves)
    assert config.run.mixed_precision == config.output.save_dtype == "bf16"
    events = train(config, tmp_path)
    assert not [e for e in events if getattr(e, "status", "") == "failed"]
    for component, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        written = load_file(tmp_path / "outputs" / component / f"{name}.safetensors")
        assert {t.dtype for t in written.values() if t.is_floating_point()} == {torch.bfloat16}


class TestNonFinite:
    """A value that is not finite ends a fused run, and the last checkpoint is gone on from."""

    def spoilt(self, config: Any, folder: Path, *, at: int) -> list[Event]:
        """A run in which the gradient of one weight becomes infinite in a step."""
        training, events = compose(config, folder)
        events += training.resume(RunFolder(folder))

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            return gradient * math.inf if training.step == at else gradient

        training.parameters[len(training.parameters) // 2].register_hook(spoil)
        said: list[Event] = []
        with pytest.raises(NonFiniteError) as caught:
            for event in training.steps(RunFolder(folder), never):
                said.append(event)
        self.error = caught.value
        assert all(bool(p.isfinite().all()) for p in training.parameters)
        return said

    def test_it_ends_at_once_and_the_same_command_goes_on_to_the_bytes_of_an_undisturbed_run(
        self, sd15_folder: Path, photo_folder: Path, tmp_path: Path
    ) -> None:
        config = configuration(sd15_folder, photo_folder, checkpointing_steps=2, **FUSED)
        whole = steps(config, tmp_path / "whole")
        said = self.spoilt(config, tmp_path / "parts", at=3)
        assert [e.step for e in said if isinstance(e, CheckpointEvent)] == [2]
        assert "from the last checkpoint, step 2" in str(self.error.hint)
        assert "only finite values reached the weights" in str(self.error)
        assert [p.name for p in (tmp_path / "parts" / "checkpoints").iterdir()] == ["step-2"]
        training, _ = compose(config, tmp_path / "parts")
        list(training.resume(RunFolder(tmp_path / "parts")))
        assert (
            losses(list(training.steps(RunFolder(tmp_path / "parts"), never)))
            == (losses(whole)[2:])
        )
        kept = [digests(tmp_path / run / "checkpoints" / "step-4") for run in ("whole", "parts")]
        assert kept[0] == kept[1]

    def test_without_a_checkpoint_it_says_that_there_is_none(
        self, sd15_folder: Path, photo_folder: Path, tmp_path: Path
    ) -> None:
        config = configuration(sd15_folder, photo_folder, **FUSED)
        self.spoilt(config, tmp_path, at=1)
        assert "no checkpoint was made yet" in str(self.error.hint)
        assert not (tmp_path / "checkpoints").exists()

    def test_weights_that_the_last_update_made_infinite_are_not_published(
        self, sd15_folder: Path, photo_folder: Path, tmp_path: Path
    ) -> None:
        config = configuration(sd15_folder, photo_folder, **(FUSED | {"max_train_steps": 1}))
        training, _ = compose(config, tmp_path)
        with torch.no_grad():
            training.parameters[0].register_post_accumulate_grad_hook(
                lambda weight: weight.fill_(math.inf)
            )
        with pytest.raises(NonFiniteError, match="not finite after step 1"):
            list(training.steps(RunFolder(tmp_path), never))
        assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("leaves", "processes", "message"),
    [({"mixed_precision": "fp16"}, 1, "scaler"), ({}, 2, "2 processes")],
)
def test_what_only_the_machine_can_tell_is_refused(
    leaves: dict[str, Any], processes: int, message: str, tmp_path: Path
) -> None:
    config = configuration(tmp_path, tmp_path, **FUSED)
    run = config.run.model_copy(update=leaves)
    config = config.model_copy(update={"run": run})
    with pytest.raises(InputError, match=message):
        machine.refuse_updates_in_backward(config, processes)
    machine.refuse_updates_in_backward(config.with_leaf("fused_backward", False), processes)
