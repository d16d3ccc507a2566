"""A forward pass: what is drawn for it, what it asks the denoiser, and the loss of the answer.

Everything random is a function of the seed and the positions of the examples; gradients and steps
are not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch

from trainer import loss, objectives
from trainer.config import LossConfig
from trainer.data.dataset import Batch
from trainer.encoding import Encodings
from trainer.families.base import Family
from trainer.images.crop import Size
from trainer.readings import finite_examples
from trainer.recording import Tensors
from trainer.resident import StepInputs, Where
from trainer.transfers import moved


@dataclass(frozen=True)
class Asked:
    """What one forward pass asks the denoiser, on the training device.

    Args:
        timesteps: (B,) see `Objective.sample_timesteps`.
        draw: standard normal (B, C, h, w), by which latents are drawn from their distribution.
        noise: (B, C, h, w).
        shown: pictures and captions, or where they lie.
    """

    timesteps: torch.Tensor
    draw: torch.Tensor
    noise: torch.Tensor
    shown: StepInputs | Where

    def flat(self) -> Tensors:
        """Its tensors by name, where it says but where its inputs lie."""
        assert isinstance(self.shown, Where)
        drawn = {name: value for name, value in vars(self).items() if torch.is_tensor(value)}
        return {**drawn, "rows": self.shown.rows, "shares": self.shown.shares}

    @classmethod
    def of_flat(cls, tensors: Mapping[str, torch.Tensor], start: str, size: Size) -> Self:
        """The question that `flat` gave these tensors of.

        Args:
            tensors: by name, among others.
            start: of their names.
            size: trained (height, width).
        """
        own = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
        where = Where(size, own.pop("rows"), own.pop("shares"))
        return cls(**own, shown=where)


class Passes:
    """The forward passes of one training.

    Args:
        settings: of the loss.
        family: the loaded base model; its denoiser is looked up anew in each pass.
        encodings: of captions and pictures.
        seed: of the run.
        device: that computes.
    """

    def __init__(
        self,
        settings: LossConfig,
        family: Family,
        encodings: Encodings,
        *,
        seed: int,
        device: torch.device,
    ) -> None:
        self._settings, self._family, self._encodings = settings, family, encodings
        self._seed, self._device = seed, device
        self.objective = family.objective_class.from_scheduler(family.pipeline.scheduler, settings)

    @property
    def resident(self) -> bool:
        """Whether all inputs lie on the device, so that a pass only says where."""
        return self._encodings.resident

    def ask(self, batch: Batch) -> Asked:
        """What is drawn for a forward pass, by the positions of its examples alone."""
        device, seed, positions = self._device, self._seed, batch.positions
        shown = self._encodings.shown(batch)
        shape = self._encodings.latents_shape(shown)
        draw = objectives.normal(seed, "posterior", positions, shape)
        noise = objectives.noise_for(seed, positions, shape, self._settings.noise_offset)
        timesteps = self._timesteps(batch)
        return Asked(moved(timesteps, device), moved(draw, device), moved(noise, device), shown)

    def loss(self, asked: Asked) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of a forward pass, and what of each example is finite, see `Figures`."""
        settings, timesteps, noise = self._settings, asked.timesteps, asked.noise
        shown = asked.shown
        inputs = shown if isinstance(shown, StepInputs) else self._encodings.at(shown)
        latents = inputs.mean + inputs.std * asked.draw
        noisy_latents = self.objective.add_noise(latents, noise, timesteps)
        guidance = torch.full((len(latents),), settings.guidance_scale, device=latents.device)
        geometry = {**inputs.geometry, "guidance": guidance}
        prediction = self._family.predict(noisy_latents, timesteps, inputs.text, geometry)
        batch_loss = loss.diffusion_loss(
            prediction,
            self.objective.target(latents, noise, timesteps),
            shares=inputs.shares,
            is_class=inputs.is_class,
            mask=inputs.mask,
            snr=self.objective.snr(timesteps),
            snr_gamma=settings.snr_gamma,
            prediction_type=self.objective.prediction_type,
        )
        text = torch.stack([finite_examples(states) for states in inputs.text.values()]).all(0)
        causes = (finite_examples(latents), text, finite_examples(prediction))
        return batch_loss, torch.stack(causes, 1)

    def _timesteps(self, batch: Batch) -> torch.Tensor:
        height, width = batch.size
        side = self._family.pipeline.vae_scale_factor
        return self.objective.sample_timesteps(
            self._seed,
            batch.positions,
            minimum=self._settings.min_timestep_trained,
            maximum=self._settings.max_timestep_trained,
            latent_size=(height // side, width // side),
        )
