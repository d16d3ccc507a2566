"""Noising, targets and signal-to-noise ratios, against diffusers and hand arithmetic."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from trainer import base_model, objectives
from trainer.config import LossConfig, ModelConfig
from trainer.errors import InputError
from trainer.objectives import Ddpm, RectifiedFlow

# FLUX.1 [dev]'s.
DYNAMIC: dict[str, Any] = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
}
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


# Rectified flow


def flow(loss: LossConfig | None = None, **scheduler: Any) -> RectifiedFlow:
    return RectifiedFlow.from_scheduler(FlowMatchEulerDiscreteScheduler(**scheduler), loss)


def drawn(objective: RectifiedFlow, count: int = 2000, **given: Any) -> torch.Tensor:
    bounds = {"minimum": 0, "maximum": 1000}
    return objective.sample_timesteps(7, range(count), **(bounds | given))


def test_flow_noises_as_diffusers_scheduler_does() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    latents, noise = latents_and_noise()
    # The scheduler noises at its own times only.
    timesteps = scheduler.timesteps[[0, 50, 700, 999]]
    expected = scheduler.scale_noise(latents, timesteps, noise)
    torch.testing.assert_close(flow().add_noise(latents, noise, timesteps), expected)


def test_flow_goes_straight_from_the_picture_to_noise_and_aims_along_the_way() -> None:
    objective = flow()
    latents, noise = torch.full((2, 1, 1, 1), 3.0), torch.full((2, 1, 1, 1), -1.0)
    timesteps = torch.tensor([250.0, 1000.0], dtype=torch.float64)
    # By hand: 3/4 of 3 and 1/4 of -1 is 2; at the end nothing is left but -1.
    assert objective.add_noise(latents, noise, timesteps).flatten().tolist() == [2.0, -1.0]
    assert objective.target(latents, noise, timesteps).flatten().tolist() == [-4.0, -4.0]
    # Of (3/4)^2 signal and (1/4)^2 noise.
    assert objective.snr(timesteps).tolist() == [9.0, 0.0]


def test_flow_keeps_the_latents_dtype() -> None:
    latents, noise = (tensor.bfloat16() for tensor in latents_and_noise())
    timesteps = drawn(flow(), 4)
    assert flow().add_noise(latents, noise, timesteps).dtype == torch.bfloat16
    assert flow().target(latents, noise, timesteps).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 48), (128, 128), (192, 192)])
def test_the_noise_is_shifted_by_the_number_of_tokens_as_diffusers_does(
    kind: str, height: int, width: int
) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**DYNAMIC, time_shift_type=kind)
    tokens = height * width // 4
    mu = calculate_shift(tokens, 256, 4096, 0.5, 1.15)
    plain = drawn(flow(LossConfig(timestep_shift=1.0)), 20) / 1000
    expected = scheduler.time_shift(mu, 1.0, plain) * 1000
    objective = RectifiedFlow.from_scheduler(scheduler)
    torch.testing.assert_close(drawn(objective, 20, latent_size=(height, width)), expected)


@pytest.mark.parametrize(("side", "mean"), [(512, 0.628), (768, 0.669), (1024, 0.723)])
def test_mean_times_are_those_of_kohyas_flux_shift(side: int, mean: float) -> None:
    # Measured with sd-scripts' `flux_shift`: the sigmoid of a normal number, then the shift.
    objective = flow(**DYNAMIC)
    times = drawn(objective, 20_000, latent_size=(side // 8, side // 8)) / 1000
    # 20000 draws of deviation 0.19 or less: five standard errors, and half a digit of the mean.
    assert times.mean().item() == pytest.approx(mean, abs=5 * 0.19 / math.sqrt(20_000) + 5e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_scheduler_with_one_shift_has_it_at_every_size(shift: float) -> None:
    # FLUX.1 [schnell] has 1, which is none; SD3 has 3.
    plain = drawn(flow(LossConfig(timestep_shift=1.0)), 50) / 1000
    expected = shift * plain / (1 + (shift - 1) * plain) * 1000
    for size in ((64, 64), (128, 128)):
        torch.testing.assert_close(drawn(flow(shift=shift), 50, latent_size=size), expected)


@pytest.mark.parametrize("scheduler", [{"shift": 3.0}, DYNAMIC], ids=["static", "dynamic"])
def test_a_chosen_shift_takes_the_place_of_the_schedulers(scheduler: dict[str, Any]) -> None:
    chosen = flow(LossConfig(timestep_shift=2.0), **scheduler)
    assert torch.equal(drawn(chosen, 50), drawn(flow(shift=2.0), 50))
    assert not torch.equal(drawn(chosen, 50), drawn(flow(**scheduler), 50))


def test_a_scheduler_file_that_says_little_means_what_diffusers_makes_of_it() -> None:
    short = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    short |= {"use_dynamic_shifting": True}
    brief = RectifiedFlow.from_config(short)
    assert torch.equal(drawn(brief, 50), drawn(flow(**DYNAMIC), 50))


def test_another_sampler_of_flow_matching_means_the_same() -> None:
    other = RectifiedFlow.from_scheduler(FlowMatchHeunDiscreteScheduler(shift=3.0))
    assert torch.equal(drawn(other, 50), drawn(flow(shift=3.0), 50))


@pytest.mark.parametrize("scheduler", [{"shift": 1.0}, {"shift": 5.0}, DYNAMIC], ids=str)
@pytest.mark.parametrize("density", ["logit_normal", "uniform", "mode", "cosmap"])
@pytest.mark.parametrize(("minimum", "maximum"), [(0, 1000), (300, 310), (0, 1), (999, 1000)])
def test_flow_timesteps_stay_within_their_bounds_after_the_shift(
    minimum: int, maximum: int, density: str, scheduler: dict[str, Any]
) -> None:
    objective = flow(LossConfig.model_validate({"timestep_density": density}), **scheduler)
    times = drawn(objective, 500, minimum=minimum, maximum=maximum, latent_size=(128, 128))
    assert times.dtype == torch.float64
    assert minimum <= times.min()
    assert times.max() <= maximum
    if maximum - minimum == 10:
        # The density is nearly even on so short a way, so that 500 draws come close to both ends.
        assert times.min() < minimum + 0.2
        assert times.max() > maximum - 0.2


def test_bounds_cut_the_density_off_and_leave_it_inside_as_it_is() -> None:
    objective = flow(**DYNAMIC)
    given = {"latent_size": (128, 128)}
    whole = drawn(objective, 20_000, **given)
    inside = whole[(whole >= 600) & (whole <= 900)]
    bound = drawn(objective, 5000, minimum=600, maximum=900, **given)
    shares = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    # Quantiles of 5000 and of some 10000 draws, on a way of 300.
    torch.testing.assert_close(bound.quantile(shares), inside.quantile(shares), rtol=0, atol=8)


def test_a_flow_timestep_belongs_to_its_global_position_alone() -> None:
    objective = flow()
    together = objective.sample_timesteps(1, [4, 5, 6], minimum=0, maximum=1000)
    alone = objective.sample_timesteps(1, [5], minimum=0, maximum=1000)
    other = objective.sample_timesteps(2, [5], minimum=0, maximum=1000)
    assert together[1] == alone[0] != other[0]
    assert len(set(together.tolist())) == 3


def test_flow_timesteps_beyond_noise_are_refused() -> None:
    with pytest.raises(InputError, match="max_timestep_trained.*1001.*1000"):
        flow().check_maximum(1001)


@pytest.mark.parametrize("sampler", [DDPMScheduler, EulerDiscreteScheduler])
def test_a_scheduler_without_a_shift_is_none_of_flow_matching(sampler: type) -> None:
    with pytest.raises(InputError, match=f"`{sampler.__name__}`.*no `shift`"):
        RectifiedFlow.from_scheduler(sampler())


@pytest.mark.parametrize(
    ("family", "scheduler"),
    [
        ("sd15", FlowMatchEulerDiscreteScheduler()),
        ("flux", DDPMScheduler(**SCHEDULE)),
        ("flux2", EulerDiscreteScheduler(**SCHEDULE)),
    ],
)
def test_a_model_with_a_scheduler_of_another_objective_is_refused_before_weights_are_read(
    family: str, scheduler: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    original = request.getfixturevalue(f"{family}_folder")
    without_weights = shutil.ignore_patterns("*.safetensors")
    folder = Path(shutil.copytree(original, tmp_path / "model", ignore=without_weights))
    name = type(scheduler).__name__
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({**scheduler.config, "_class_name": name})
    )
    with pytest.raises(InputError, match=rf"model_url.*`{name}`"):
        base_model.locate(ModelConfig(model_url=str(folder)))


@pytest.mark.parametrize(
    ("entries", "fault"),
    [
        ({"shift": None}, "contradicts itself"),
        ({"shift": 0}, "`shift` that is not above 0"),
        ({"use_dynamic_shifting": True, "base_shift": None}, "`base_shift` that is no number"),
        ({"use_dynamic_shifting": True, "max_image_seq_len": 256}, "is not below"),
        (
            {"use_dynamic_shifting": True, "time_shift_type": "linear", "base_shift": -0.5},
            "`base_shift` that is not above 0",
        ),
        ({"time_shift_type": "cosmic"}, "contradicts itself"),
    ],
)
def test_a_shift_that_is_none_is_refused_by_name(entries: dict[str, object], fault: str) -> None:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0, **entries}
    with pytest.raises(InputError, match=fault):
        RectifiedFlow.from_config(config)
