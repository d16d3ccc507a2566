"""Pictures made with the loaded base model, as it stands and as its own pipeline makes them.

Each picture is made by itself from a key of its own, so that it depends neither on its
neighbours nor on who made them. Knows nothing of what the pictures are for.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from trainer import randomness
from trainer.errors import NonFiniteError
from trainer.families.base import Family, pixels_of


@dataclass(frozen=True)
class Sampler:
    """How pictures are made.

    Args:
        width: in pixels, a multiple of 8.
        height: in pixels, a multiple of 8.
        steps: of denoising.
        guidance_scale: of classifier-free guidance (Ho and Salimans 2022); 1 or less: none.
    """

    width: int
    height: int
    steps: int
    guidance_scale: float


def sample(
    family: Family,
    prompt: str,
    sampler: Sampler,
    *,
    seed: int,
    purpose: str,
    number: int,
    negative_prompt: str | None = None,
) -> Image.Image:
    """One picture in RGB. Weights, scheduler and global random states stay as they are.

    Args:
        family: with text encoders, denoiser and VAE on one device, in whatever number formats.
        prompt: what the picture shows.
        sampler: size, steps and guidance.
        seed: the run's seed.
        purpose: what the picture is for, see `randomness.key`.
        number: of the picture among those of its purpose.
        negative_prompt: what guidance leads away from. None: what the pipeline takes then.

    Raises:
        NonFiniteError: the denoiser or the VAE overflows.
    """
    generator = torch.Generator().manual_seed(randomness.key(seed, purpose, number))
    with _scheduler_of_its_own(family.pipeline), _one_number_format(family):
        latents = family.pipeline(
            prompt,
            negative_prompt=negative_prompt,
            width=sampler.width,
            height=sampler.height,
            num_inference_steps=sampler.steps,
            guidance_scale=sampler.guidance_scale,
            generator=generator,
            output_type="latent",
        ).images
    _check(latents, f"`{prompt}`: the denoiser gives no finite latents", "mixed_precision: no")
    # The pipeline's own decoding wants latents and VAE in one number format.
    with torch.no_grad():
        pixels = pixels_of(family.pipeline.vae, latents)
    _check(
        pixels,
        f"`{prompt}`: the VAE gives no finite picture",
        "upscale_vae_32bit: true, or give a vae_url made for half precision",
    )
    return _picture(pixels[0])


@contextmanager
def _scheduler_of_its_own(pipeline: Any) -> Iterator[None]:
    """Lets a copy of the scheduler do the steps: it keeps timesteps and past predictions."""
    scheduler = pipeline.scheduler
    pipeline.set_progress_bar_config(disable=True)
    pipeline.register_modules(scheduler=copy.deepcopy(scheduler))
    try:
        yield
    finally:
        pipeline.register_modules(scheduler=scheduler)


def _one_number_format(family: Family) -> torch.autocast:
    """Autocast where text encoders and denoiser are kept in different number formats.

    Otherwise the pipeline computes as it would for anybody who loads it.
    """
    encoders = [family.pipeline.components[name] for name in family.text_encoder_names]
    denoiser = family.pipeline.components[family.denoiser_name]
    formats = {module.dtype for module in (denoiser, *encoders)}
    narrowest = min(formats, key=lambda dtype: dtype.itemsize)
    return torch.autocast(denoiser.device.type, narrowest, enabled=len(formats) > 1)


def _check(values: torch.Tensor, message: str, remedy: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(message, f"set {remedy}")


def _picture(pixels: torch.Tensor) -> Image.Image:
    """Pixels (3, H, W) in [-1, 1] as a picture of 8 bits a channel."""
    scaled = ((pixels + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(np.ascontiguousarray(scaled.permute(1, 2, 0).cpu().numpy()))
