"""What the denoiser is asked to predict, and the random numbers that go into the question.

Every draw is a pure function of seed, purpose and global example position. Knows neither
families nor the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler

from trainer import randomness
from trainer.errors import InputError

Target = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# Prediction type to the target from latents, noise, signal level and noise level.
TARGETS: Mapping[str, Target] = {
    "epsilon": lambda latents, noise, signal, sigma: noise,
    # Salimans & Ho 2022, section 4: v = alpha * epsilon - sigma * x.
    "v_prediction": lambda latents, noise, signal, sigma: signal * noise - sigma * latents,
    "sample": lambda latents, noise, signal, sigma: latents,
}


class Ddpm:
    """Denoising diffusion over a table of noise levels (Ho et al. 2020).

    Args:
        alphas_cumprod: (T,) share of the signal's power left at each timestep, falling.
        prediction_type: `epsilon`, `v_prediction` or `sample`.

    Raises:
        InputError: the checkpoint predicts something else.
    """

    def __init__(self, alphas_cumprod: torch.Tensor, prediction_type: str) -> None:
        if prediction_type not in TARGETS:
            raise InputError.of(
                "model_url",
                f"its scheduler says prediction_type `{prediction_type}`; "
                f"known are {', '.join(TARGETS)}",
                "give another checkpoint",
            )
        self.alphas_cumprod = alphas_cumprod.double()
        self.prediction_type = prediction_type

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> Ddpm:
        """The objective behind a diffusers scheduler, whatever sampler it implements."""
        return cls.from_config({**scheduler.config, "_class_name": type(scheduler).__name__})

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Ddpm:
        """The objective behind the configuration of a diffusers scheduler.

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

    def check_maximum(self, maximum: int) -> None:
        """Refuses a bound above the timesteps that is beyond the noise schedule.

        Raises:
            InputError: it is.
        """
        length = len(self.alphas_cumprod)
        if maximum > length:
            raise InputError.of(
                "max_timestep_trained",
                f"is {maximum}, but the base model's noise schedule has {length} timesteps",
                f"give at most {length}",
            )

    def sample_timesteps(
        self, seed: int, positions: Sequence[int], *, minimum: int, maximum: int
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
        share = self.alphas_cumprod.to(timesteps.device)[timesteps]
        return (share / (1 - share)).float()

    def _levels(
        self, latents: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Amplitudes of signal and noise, of the latents' dtype and shaped to multiply them."""
        share = self.alphas_cumprod.to(timesteps.device)[timesteps]
        share = share.view(-1, *[1] * (latents.ndim - 1))
        return share.sqrt().to(latents), (1 - share).sqrt().to(latents)


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
