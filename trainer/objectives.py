"""What the denoiser is asked to predict, and the random numbers that go into the question.

Every draw is a pure function of seed, purpose and global example position. Knows neither
families nor the loss.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from trainer import randomness
from trainer.config import LossConfig
from trainer.densities import DENSITIES, Density, shifted
from trainer.errors import InputError

Target = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# Prediction type to the target from latents, noise, signal level and noise level.
TARGETS: Mapping[str, Target] = {
    "epsilon": lambda latents, noise, signal, sigma: noise,
    # Salimans & Ho 2022, section 4: v = alpha * epsilon - sigma * x.
    "v_prediction": lambda latents, noise, signal, sigma: signal * noise - sigma * latents,
    "sample": lambda latents, noise, signal, sigma: latents,
}


# Latent pixels on each side of a token of the transformers that learn rectified flow.
PATCH = 2


class Objective(ABC):
    """What the denoiser is asked, and what it should answer.

    Args:
        prediction_type: what the answer is, as `trainer.loss` calls it.
        num_timesteps: bound above every timestep.
        unused: the options that mean nothing for it.
        unasked: the options that are off unless somebody asks for them.
        learns: what such a model does, as messages say it.
        starts_from_plain_noise: whether pictures begin as noise without any trace of latents.
    """

    prediction_type: str
    num_timesteps: int
    unused: ClassVar[frozenset[str]]
    unasked: ClassVar[frozenset[str]] = frozenset()
    learns: ClassVar[str]
    starts_from_plain_noise: ClassVar[bool]

    @classmethod
    def from_scheduler(cls, scheduler: Any, loss: LossConfig | None = None) -> Self:
        """The objective behind a diffusers scheduler, whatever sampler it implements."""
        return cls.from_config({**scheduler.config, "_class_name": type(scheduler).__name__}, loss)

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any], loss: LossConfig | None = None) -> Self:
        """The objective behind the configuration of a diffusers scheduler.

        Args:
            config: of the scheduler.
            loss: how timesteps are drawn. None: by the engine's defaults.

        Raises:
            InputError: the scheduler is made for another objective.
        """

    @abstractmethod
    def sample_timesteps(
        self,
        seed: int,
        positions: Sequence[int],
        *,
        minimum: int,
        maximum: int,
        latent_size: tuple[int, int] = (1, 1),
    ) -> torch.Tensor:
        """Timesteps (B,) in [minimum, maximum), one draw per global position.

        Args:
            seed: the run's seed.
            positions: global example positions.
            minimum: at least 0.
            maximum: at most `num_timesteps`.
            latent_size: height and width of the examples' latents.
        """

    @abstractmethod
    def add_noise(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """What the denoiser is given, of the latents' shape and dtype."""

    @abstractmethod
    def target(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """What it should answer, of the latents' shape and dtype."""

    @abstractmethod
    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratios (B,), fp32: power of the latents over power of the noise."""

    def check_maximum(self, maximum: int) -> None:
        """Refuses a bound above the timesteps that is beyond the noise schedule.

        Raises:
            InputError: it is.
        """
        if maximum > self.num_timesteps:
            raise InputError.of(
                "max_timestep_trained",
                f"is {maximum}, but the base model's noise schedule has {self.num_timesteps} "
                "timesteps",
                f"give at most {self.num_timesteps}",
            )


class Ddpm(Objective):
    """Denoising diffusion over a table of noise levels (Ho et al. 2020).

    Args:
        alphas_cumprod: (T,) share of the signal's power left at each timestep, falling.
        prediction_type: `epsilon`, `v_prediction` or `sample`.

    Raises:
        InputError: the checkpoint predicts something else.
    """

    unused = frozenset(
        {"timestep_density", "logit_mean", "logit_std", "mode_scale", "timestep_shift"}
    )
    learns = "learns from a table of noise levels"
    starts_from_plain_noise = False

    def __init__(self, alphas_cumprod: torch.Tensor, prediction_type: str) -> None:
        if prediction_type not in TARGETS:
            raise InputError.of(
                "model_url",
                f"its scheduler says prediction_type `{prediction_type}`; "
                f"known are {', '.join(TARGETS)}",
                "give another checkpoint",
            )
        self.alphas_cumprod = alphas_cumprod.double()
        self.num_timesteps = len(alphas_cumprod)
        self.prediction_type = prediction_type

    @classmethod
    def from_config(cls, config: Mapping[str, Any], loss: LossConfig | None = None) -> Self:
        """The table of noise levels of a scheduler's configuration; timesteps are drawn evenly.

        Raises:
            InputError: it is no table of noise levels, or of an unknown one.
        """
        if "beta_schedule" not in config:
            raise _unknown_schedule(config, "has no `beta_schedule`")
        try:
            # Samplers patch their own tables (Euler lifts a zero); the training table is DDPM's.
            training = DDPMScheduler.from_config(dict(config))
        except NotImplementedError as error:
            known = f"has the unknown beta_schedule `{config['beta_schedule']}`"
            raise _unknown_schedule(config, known) from error
        return cls(training.alphas_cumprod, training.config.prediction_type)

    def sample_timesteps(
        self,
        seed: int,
        positions: Sequence[int],
        *,
        minimum: int,
        maximum: int,
        latent_size: tuple[int, int] = (1, 1),
    ) -> torch.Tensor:
        """Uniform timesteps (B,) int64 in [minimum, maximum), one draw per global position.

        Raises:
            InputError: `maximum` is beyond the checkpoint's noise schedule.
        """
        self.check_maximum(maximum)
        return torch.tensor(
            [
                randomness.source(seed, "timestep", position).randrange(minimum, maximum)
                for position in positions
            ]
        )

    def add_noise(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """sqrt(alphas_cumprod) * latents + sqrt(1 - alphas_cumprod) * noise."""
        signal, sigma = self._levels(latents, timesteps)
        return signal * latents + sigma * noise

    def target(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """The noise, the velocity or the latents themselves, after `prediction_type`."""
        signal, sigma = self._levels(latents, timesteps)
        return TARGETS[self.prediction_type](latents, noise, signal, sigma)

    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """alphas_cumprod / (1 - alphas_cumprod), fp32; 0 where no signal is left."""
        share = self._share_of_signal(timesteps)
        return (share / (1 - share)).float()

    def _share_of_signal(self, timesteps: torch.Tensor) -> torch.Tensor:
        if self.alphas_cumprod.device != timesteps.device:
            # For good: each copy to a GPU is waited for.
            self.alphas_cumprod = self.alphas_cumprod.to(timesteps.device)
        return self.alphas_cumprod[timesteps]

    def _levels(
        self, latents: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Amplitudes of signal and noise, of the latents' dtype and shaped to multiply them."""
        share = self._share_of_signal(timesteps)
        share = share.view(-1, *[1] * (latents.ndim - 1))
        return share.sqrt().to(latents), (1 - share).sqrt().to(latents)


class RectifiedFlow(Objective):
    """Straight ways from pictures to noise, and their velocity (Liu et al. 2022).

    A timestep is 1000 times the share of noise in what the denoiser is given.

    Args:
        density: of the times before they are shifted.
        shift_odds: number of tokens of an example to the odds by which its times are shifted, see
            `densities.shifted`.
    """

    prediction_type = "flow"
    num_timesteps = 1000
    unused = frozenset({"snr_gamma"})
    # Such models read captions by T5 or a language model, where a new vector says little
    # (huggingface/diffusers issue 10313).
    unasked = frozenset({"train_text_encoder_ti"})
    learns = "learns by flow matching"
    starts_from_plain_noise = True

    def __init__(self, density: Density, shift_odds: Callable[[int], float]) -> None:
        self.density = density
        self.shift_odds = shift_odds

    @classmethod
    def from_config(cls, config: Mapping[str, Any], loss: LossConfig | None = None) -> Self:
        """The shift of a scheduler's configuration, unless `loss` has one of its own.

        Raises:
            InputError: the scheduler does not shift times, so it is none of rectified flow.
        """
        if "shift" not in config:
            raise _no_flow(config, "has no `shift`")
        loss = loss or LossConfig()
        try:
            # Completes what an older file does not say, by diffusers' own defaults.
            whole = FlowMatchEulerDiscreteScheduler.from_config(dict(config)).config
        except (TypeError, ValueError) as error:
            raise _no_flow(config, f"contradicts itself ({error})") from error
        fault = None if loss.timestep_shift else _fault_of_shift(whole)
        if fault is not None:
            raise _no_flow(config, fault)
        return cls(DENSITIES[loss.timestep_density](loss), _shift_odds(whole, loss.timestep_shift))

    def sample_timesteps(
        self,
        seed: int,
        positions: Sequence[int],
        *,
        minimum: int,
        maximum: int,
        latent_size: tuple[int, int] = (1, 1),
    ) -> torch.Tensor:
        """Timesteps (B,) float64 in [minimum, maximum], one draw per global position.

        The bounds hold after the shift: the density is cut off there, by inverse transform.
        """
        odds = self.shift_odds(latent_size[0] * latent_size[1] // PATCH**2)
        low, high = (shifted(bound / self.num_timesteps, 1 / odds) for bound in (minimum, maximum))
        times = [
            self.density.drawn(randomness.source(seed, "timestep", position).random(), low, high)
            for position in positions
        ]
        drawn = torch.tensor([shifted(time, odds) for time in times], dtype=torch.float64)
        return (drawn * self.num_timesteps).clamp(minimum, maximum)

    def add_noise(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """(1 - s) * latents + s * noise, with s the share of noise."""
        share = self._shares(timesteps, latents)
        return (1 - share).to(latents) * latents + share.to(latents) * noise

    def target(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """The velocity noise - latents, the same all along the way."""
        return noise - latents

    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """((1 - s) / s)², fp32; infinite where no noise is."""
        share = timesteps.double() / self.num_timesteps
        return ((1 - share) / share).square().float()

    def _shares(self, timesteps: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        shape = (-1, *[1] * (latents.ndim - 1))
        return (timesteps.double() / self.num_timesteps).view(shape)


def _shift_odds(config: Mapping[str, Any], chosen: float | None) -> Callable[[int], float]:
    """Number of tokens to odds: the chosen ones, the scheduler's own, or by its line.

    Source of the line: diffusers' `calculate_shift`, which its pipelines pass to the scheduler as
    `mu`; of its two meanings: `FlowMatchEulerDiscreteScheduler.time_shift`.
    """
    if chosen is not None:
        return lambda tokens: chosen
    if not config.get("use_dynamic_shifting"):
        return lambda tokens: float(config["shift"])
    # FLUX.2's pipeline has a rule of its own for its samplers' steps, and does not read the line.
    first, last = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (last - first)
    is_exponent = config.get("time_shift_type", "exponential") == "exponential"

    def odds(tokens: int) -> float:
        mu = config["base_shift"] + slope * (tokens - first)
        return math.exp(mu) if is_exponent else mu

    return odds


def _fault_of_shift(config: Mapping[str, Any]) -> str | None:
    """Why a scheduler's shift is none: its odds are above 0 for any number of tokens."""
    names = ["shift"]
    if config.get("use_dynamic_shifting"):
        names = ["base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"]
    values = [config[name] for name in names]
    wrong = [
        n for n, value in zip(names, values, strict=True) if not isinstance(value, int | float)
    ]
    if wrong:
        return f"has a `{wrong[0]}` that is no number"
    if len(values) == 1:
        return None if values[0] > 0 else "has a `shift` that is not above 0"
    if values[2] >= values[3]:
        return "has a `base_image_seq_len` that is not below `max_image_seq_len`"
    is_line = config.get("time_shift_type") == "linear"
    return "has a `base_shift` that is not above 0" if is_line and min(values[:2]) <= 0 else None


def _no_flow(config: Mapping[str, Any], reason: str) -> InputError:
    return InputError.of(
        "model_url",
        f"its scheduler, `{config.get('_class_name')}`, {reason}: it is not made for flow matching",
        "give a checkpoint with a flow-matching scheduler",
    )


def _unknown_schedule(config: Mapping[str, Any], reason: str) -> InputError:
    return InputError.of(
        "model_url",
        f"its scheduler, `{config.get('_class_name')}`, {reason}: it does not noise by a table of "
        "steps as DDPM does",
        "give a checkpoint with a DDPM noise schedule",
    )


def normal(seed: int, purpose: str, positions: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """Standard normal numbers (B, *shape), fp32 on the processor, one draw per global position."""
    generator = torch.Generator()
    draws = []
    for position in positions:
        generator.manual_seed(randomness.key(seed, purpose, position))
        draws.append(torch.randn(*shape, generator=generator))
    return torch.stack(draws)


def noise_for(
    seed: int, positions: Sequence[int], shape: Sequence[int], noise_offset: float
) -> torch.Tensor:
    """The noise (B, *shape) of a step's examples; it is also what epsilon prediction aims at.

    Args:
        seed: the run's seed.
        positions: global example positions.
        shape: of one example's latents, channels first.
        noise_offset: strength of a normal draw per example and channel that all pixels share,
            which lets the model learn overall brightness; 0: none.
    """
    noise = normal(seed, "noise", positions, shape)
    if noise_offset == 0:
        return noise
    shared = normal(seed, "noise_offset", positions, (shape[0], *[1] * (len(shape) - 1)))
    return noise + noise_offset * shared
