"""What a model family must say: its facts, and three functions from captions and pixels to a
prediction. A family has no loop, no loss and no hooks; the diffusers pipeline is its bag of
components.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from trainer.names import KohyaNames
from trainer.objectives import Ddpm

# What a family makes of captions: named tensors of shape (B, …) that only it can read.
Conditioning = Mapping[str, torch.Tensor]

# Sizes and crop of each example, int64 tensors (B, 2): `original_size` (height, width),
# `crop_top_left` (top, left) in the resized picture, `target_size` (height, width).
Geometry = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class LatentDistribution:
    """The normal distribution of a picture's latents, in the denoiser's scale.

    Args:
        mean: (B, C, h, w).
        std: (B, C, h, w); one standard deviation.
    """

    mean: torch.Tensor
    std: torch.Tensor


@dataclass(frozen=True)
class Checkpoints:
    """How a family's base models are known, and completed where they are one file.

    Args:
        denoiser: entries of the denoiser's configuration that set it apart from models of the
            same pipeline; null and false stand for an absent entry too.
        file_key: a tensor that only this family's one-file checkpoints hold.
        file_input: the denoiser's first convolution in such a file; its inputs are counted.
        file_config: hub repository with the configurations and tokenizers that such a file lacks.
        vaes: hub ids of well-known VAEs that speak of this family's latents.
    """

    denoiser: Mapping[str, Any]
    file_key: str
    file_input: str
    file_config: str
    vaes: frozenset[str] = frozenset()

    def difference(self, config: Mapping[str, Any]) -> str | None:
        """Where a denoiser's configuration is not of this family, in words."""
        for name, wanted in self.denoiser.items():
            got = config.get(name)
            if (got or None) != (wanted or None):
                return f"has {name} `{got}` where this family has `{wanted}`"
        return None


class Family(ABC):
    """A model family at work on one loaded pipeline.

    Args:
        pipeline: an instance of `pipeline_class`.
    """

    pipeline_class: ClassVar[type[Any]]
    objective_class: ClassVar[type[Ddpm]] = Ddpm
    denoiser_name: ClassVar[str]
    text_encoder_names: ClassVar[tuple[str, ...]]
    unused_components: ClassVar[tuple[str, ...]] = ()
    checkpoints: ClassVar[Checkpoints]
    kohya: ClassVar[KohyaNames]

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.denoiser: Any = pipeline.components[self.denoiser_name]

    @abstractmethod
    def encode_text(self, captions: Sequence[str]) -> Conditioning:
        """Captions as the pipeline tokenises and encodes them, one row each."""

    @abstractmethod
    def encode_image(self, pixels: torch.Tensor) -> LatentDistribution:
        """Pixels (B, 3, H, W) in [-1, 1] as a distribution of latents."""

    @abstractmethod
    def predict(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        text: Conditioning,
        geometry: Geometry,
    ) -> torch.Tensor:
        """The denoiser's prediction (B, C, h, w).

        Args:
            noisy_latents: (B, C, h, w).
            timesteps: (B,), in 0 … 1000.
            text: what `encode_text` gave for the captions.
            geometry: each example's sizes and crop.
        """


def latents_of(vae: Any, pixels: torch.Tensor) -> LatentDistribution:
    """What an AutoencoderKL says of pixels, shifted and scaled as its configuration asks.

    The scale is `scaling_factor`, after centring by `latents_mean` / `latents_std` or
    `shift_factor` where the configuration has them, as diffusers' pipelines undo it.
    """
    posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
    mean, std = posterior.mean.float(), posterior.std.float()
    shift, scale = _shift_and_scale(vae, mean)
    return LatentDistribution(mean=(mean - shift) * scale, std=std * scale)


def pixels_of(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents in the denoiser's scale as pixels: float32 (B, 3, H, W) in [-1, 1].

    The inverse of `latents_of`, computed in the VAE's own number format.

    Args:
        latents: (B, C, h, w).
    """
    latents = latents.float()
    shift, scale = _shift_and_scale(vae, latents)
    pixels: torch.Tensor = vae.decode((latents / scale + shift).to(vae.dtype)).sample
    return pixels.float().clamp(-1, 1)


def _shift_and_scale(
    vae: Any, like: torch.Tensor
) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    shift: torch.Tensor | float = 0.0
    divisor: torch.Tensor | float = 1.0
    if vae.config.get("latents_mean") is not None:
        shift = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1).to(like)
        divisor = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1).to(like)
    elif vae.config.get("shift_factor") is not None:
        shift = vae.config.shift_factor
    return shift, vae.config.scaling_factor / divisor
