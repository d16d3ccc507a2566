"""Noising, targets and signal-to-noise ratios, against diffusers and hand arithmetic."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

from trainer import objectives
from trainer.errors import InputError
from trainer.objectives import Ddpm

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TIMESTEPS = torch.tensor([0, 50, 700, 999])


def latents_and_noise() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(4, 4, 8, 8, generator=generator),
        torch.randn(4, 4, 8, 8, generator=generator),
    )


@pytest.mark.parametrize("sampler", [DDPMScheduler, PNDMScheduler, EulerDiscreteScheduler])
def test_noising_agrees_with_diffusers_whatever_the_checkpoints_sampler(sampler: type) -> None:
    objective = Ddpm.from_scheduler(sampler(**SCHEDULE))
    latents, noise = latents_and_noise()
    expected = DDPMScheduler(**SCHEDULE).add_noise(latents, noise, TIMESTEPS)
    torch.testing.assert_close(objective.add_noise(latents, noise, TIMESTEPS), expected)


def test_the_noise_schedule_is_the_scaled_linear_one() -> None:
    # By hand: betas are squares of numbers evenly spaced between the roots of first and last.
    first, last = 0.00085**0.5, 0.012**0.5
    left = 1.0
    for number in range(51):
        left *= 1 - (first + (last - first) * number / 999) ** 2
    objective = Ddpm.from_scheduler(DDPMScheduler(**SCHEDULE))
    assert objective.snr(torch.tensor([50])).item() == pytest.approx(left / (1 - left), rel=1e-4)


def test_epsilon_prediction_aims_at_the_noise() -> None:
    objective = Ddpm.from_scheduler(DDPMScheduler(**SCHEDULE))
    latents, noise = latents_and_noise()
    assert torch.equal(objective.target(latents, noise, TIMESTEPS), noise)


def test_sample_prediction_aims_at_the_latents() -> None:
    objective = Ddpm.from_scheduler(DDPMScheduler(**SCHEDULE, prediction_type="sample"))
    latents, noise = latents_and_noise()
    assert torch.equal(objective.target(latents, noise, TIMESTEPS), latents)


def test_v_prediction_aims_at_diffusers_velocity() -> None:
    scheduler = DDPMScheduler(**SCHEDULE, prediction_type="v_prediction")
    latents, noise = latents_and_noise()
    expected = scheduler.get_velocity(latents, noise, TIMESTEPS)
    target = Ddpm.from_scheduler(scheduler).target(latents, noise, TIMESTEPS)
    torch.testing.assert_close(target, expected)


def test_an_unknown_prediction_type_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="`flow`.*epsilon, v_prediction, sample"):
        Ddpm(torch.tensor([0.9, 0.5]), "flow")


@pytest.mark.parametrize("sampler", [EDMEulerScheduler, FlowMatchEulerDiscreteScheduler])
def test_a_sampler_without_a_table_of_noise_levels_is_refused_by_name(sampler: type) -> None:
    with pytest.raises(InputError, match=f"`{sampler.__name__}`.*no `beta_schedule`"):
        Ddpm.from_scheduler(sampler())


def test_an_unknown_table_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="unknown beta_schedule `cosmic`"):
        Ddpm.from_config({"_class_name": "DDPMScheduler", "beta_schedule": "cosmic"})


def test_a_written_configuration_means_the_same_as_its_scheduler() -> None:
    scheduler = EulerDiscreteScheduler(**SCHEDULE, prediction_type="v_prediction")
    written = Ddpm.from_config({"_class_name": "EulerDiscreteScheduler", **scheduler.config})
    assert written.prediction_type == "v_prediction"
    assert torch.equal(written.alphas_cumprod, Ddpm.from_scheduler(scheduler).alphas_cumprod)


def test_a_zero_terminal_schedule_ends_without_any_signal() -> None:
    scheduler = EulerDiscreteScheduler(**SCHEDULE, rescale_betas_zero_snr=True)
    objective = Ddpm.from_scheduler(scheduler)
    latents, noise = latents_and_noise()
    last = torch.full((4,), 999)
    assert objective.snr(last).tolist() == [0.0] * 4
    assert torch.equal(objective.add_noise(latents, noise, last), noise)


def test_noising_keeps_the_latents_dtype() -> None:
    objective = Ddpm.from_scheduler(DDPMScheduler(**SCHEDULE))
    latents, noise = (tensor.bfloat16() for tensor in latents_and_noise())
    assert objective.add_noise(latents, noise, TIMESTEPS).dtype == torch.bfloat16


def test_video_latents_are_noised_example_by_example() -> None:
    objective = Ddpm(torch.tensor([1.0, 0.0]), "epsilon")
    latents, noise = torch.ones(2, 4, 3, 2, 2), torch.zeros(2, 4, 3, 2, 2)
    noisy = objective.add_noise(latents, noise, torch.tensor([0, 1]))
    assert noisy.flatten(1).mean(1).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(("minimum", "maximum"), [(0, 1000), (300, 310), (0, 1), (999, 1000)])
def test_timesteps_reach_both_bounds_and_nothing_beyond(minimum: int, maximum: int) -> None:
    objective = Ddpm.from_scheduler(DDPMScheduler(**SCHEDULE))
    drawn = objective.sample_timesteps(7, range(2000), minimum=minimum, maximum=maximum)
    assert drawn.dtype == torch.int64
    assert drawn.min() >= minimum
    assert drawn.max() <= maximum - 1
    # 2000 uniform draws miss the lowest or highest hundredth with probability 2 * 0.99**2000.
    margin = (maximum - minimum) // 100
    assert drawn.min() <= minimum + margin
    assert drawn.max() >= maximum - 1 - margin


def test_timesteps_are_uniform() -> None:
    objective = Ddpm.from_scheduler(DDPMScheduler(**SCHEDULE))
    drawn = objective.sample_timesteps(7, range(4000), minimum=0, maximum=1000)
    counts = torch.histc(drawn.float(), bins=10, min=0, max=1000)
    # Each tenth expects 400 with a standard deviation of sqrt(4000 * 0.1 * 0.9) = 19.
    assert (counts - 400).abs().max() < 5 * 19


def test_a_timestep_belongs_to_its_global_position_alone() -> None:
    objective = Ddpm.from_scheduler(DDPMScheduler(**SCHEDULE))
    together = objective.sample_timesteps(1, [4, 5, 6], minimum=0, maximum=1000)
    alone = objective.sample_timesteps(1, [5], minimum=0, maximum=1000)
    assert together[1] == alone[0]
    assert len(set(together.tolist())) == 3


def test_timesteps_beyond_the_checkpoints_schedule_are_refused() -> None:
    objective = Ddpm.from_scheduler(DDPMScheduler(num_train_timesteps=500))
    with pytest.raises(InputError, match="max_timestep_trained.*1000.*500"):
        objective.sample_timesteps(1, [0], minimum=0, maximum=1000)


def test_noise_belongs_to_its_global_position_alone() -> None:
    together = objectives.normal(1, "noise", [0, 9], (4, 8, 8))
    assert torch.equal(together[1], objectives.normal(1, "noise", [9], (4, 8, 8))[0])
    assert not torch.equal(together[0], together[1])


def test_noise_differs_between_seeds_and_purposes() -> None:
    draws = [
        objectives.normal(seed, purpose, [0], (4,))
        for seed, purpose in [(1, "noise"), (2, "noise"), (1, "posterior")]
    ]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 3


def test_drawing_noise_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    objectives.noise_for(1, [0, 1], (4, 8, 8), 0.1)
    assert torch.equal(torch.rand(1), expected)


def test_without_an_offset_the_noise_is_plain() -> None:
    plain = objectives.normal(1, "noise", [0, 1], (4, 8, 8))
    assert torch.equal(objectives.noise_for(1, [0, 1], (4, 8, 8), 0.0), plain)


def test_an_offset_is_shared_by_all_pixels_of_a_channel() -> None:
    offset = objectives.noise_for(1, [0, 1], (4, 8, 8), 0.5) - objectives.noise_for(
        1, [0, 1], (4, 8, 8), 0.0
    )
    assert offset.flatten(2).std(2).max() < 1e-6
    assert len({round(value, 4) for value in offset.mean((2, 3)).flatten().tolist()}) == 8


@pytest.mark.parametrize("strength", [0.1, 0.5])
def test_an_offset_adds_its_square_to_the_variance_of_channel_means(strength: float) -> None:
    # Of 64 pixels the plain mean has variance 1/64; 4000 means estimate a variance to
    # sqrt(2 / 4000) = 2.2 percent.
    noise = objectives.noise_for(3, range(1000), (4, 8, 8), strength)
    assert noise.mean((2, 3)).var().item() == pytest.approx(1 / 64 + strength**2, rel=0.1)


def test_epsilon_prediction_aims_at_the_offset_noise() -> None:
    objective = Ddpm.from_scheduler(DDPMScheduler(**SCHEDULE))
    latents, _ = latents_and_noise()
    noise = objectives.noise_for(1, range(4), (4, 8, 8), 0.5)
    noisy = objective.add_noise(latents, noise, TIMESTEPS)
    target = objective.target(latents, noise, TIMESTEPS)
    share = DDPMScheduler(**SCHEDULE).alphas_cumprod[TIMESTEPS].view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy - share.sqrt() * latents, (1 - share).sqrt() * target)
