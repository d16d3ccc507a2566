"""Pictures made with the loaded base model, as it stands and as its own pipeline makes them.

Each picture is made by itself from a key of its own, so that it depends neither on its
neighbours nor on who made them. Knows nothing of what the pictures are for.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from trainer import randomness
from trainer.errors import NonFiniteError
from trainer.families.base import Conditioning, Family, text_options


@dataclass(frozen=True)
class Sampler:
    """How pictures are made.

    Args:
        width: in pixels, a multiple of the family's step.
        height: in pixels, a multiple of the family's step.
        steps: of denoising.
        guidance_scale: of classifier-free guidance (Ho and Salimans 2022); 1 or less: none.

    Steps and guidance of None: as the pipeline has it.
    """

    width: int
    height: int
    steps: int | None
    guidance_scale: float | None

    def options(self) -> dict[str, Any]:
        """As arguments of the pipeline's call."""
        named = {
            "width": self.width,
            "height": self.height,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
        }
        return {name: value for name, value in named.items() if value is not None}


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
    options = sampler.options()
    if negative_prompt is not None:
        options["negative_prompt"] = negative_prompt
    return drawn(family, prompt, options, key=randomness.key(seed, purpose, number))


def sample_encoded(
    family: Family,
    prompt: Conditioning,
    empty: Conditioning,
    sampler: Sampler,
    *,
    key: int,
    told: str,
) -> Image.Image:
    """One picture in RGB of an encoded prompt; text encoders need not be there.

    Args:
        family: with denoiser and VAE on one device.
        prompt: its conditioning, of one row.
        empty: that of no text, which guidance leads away from.
        sampler: size, steps and guidance.
        key: of the picture's random numbers.
        told: the prompt as messages quote it.

    Raises:
        NonFiniteError: the denoiser or the VAE overflows.
    """
    options: dict[str, Any] = {**sampler.options(), **prompt}
    taken = inspect.signature(type(family.pipeline).__call__).parameters
    # Where guidance is told to the denoiser, nothing is predicted for no text.
    if "true_cfg_scale" not in taken:
        zeros = family.pipeline.config.get("force_zeros_for_empty_prompt", False)
        options |= {f"negative_{n}": t.new_zeros(t.shape) if zeros else t for n, t in empty.items()}
    return drawn(family, None, options, key=key, told=told)


def drawn(
    family: Family, prompt: str | None, options: Mapping[str, Any], *, key: int, told: str = ""
) -> Image.Image:
    """One picture in RGB, from what the pipeline's call is to be told beside the prompt.

    Weights, scheduler and global random states stay as they are.

    Args:
        family: as for `sample`.
        prompt: what the picture shows. None: `options` have it encoded.
        options: arguments of the pipeline's call.
        key: of its random numbers.
        told: the prompt as messages quote it. Empty: as it is.

    Raises:
        NonFiniteError: the denoiser or the VAE overflows.
    """
    generator = torch.Generator().manual_seed(key)
    pipeline = family.pipeline
    decoding = _checked_vae(pipeline.vae, told or f"{prompt}")
    with _scheduler_of_its_own(pipeline), _one_number_format(family), decoding:
        pixels: torch.Tensor = pipeline(
            prompt=prompt,
            generator=generator,
            output_type="pt",
            **text_options(family),
            **options,
        ).images
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


@contextmanager
def _checked_vae(vae: Any, prompt: str) -> Iterator[None]:
    """Lets the VAE decode finite latents to finite pixels only, and in its own number format.

    Pipelines hand it latents in the denoiser's.

    Raises:
        NonFiniteError: they are not finite.
    """
    decode = vae.decode

    def checked(latents: torch.Tensor, *given: Any, **named: Any) -> Any:
        message = f"`{prompt}`: the denoiser gives no finite latents"
        _check(latents, message, "mixed_precision: no")
        with torch.autocast(latents.device.type, enabled=False):
            decoded = decode(latents.to(vae.dtype), *given, **named)
        _check(
            decoded[0],
            f"`{prompt}`: the VAE gives no finite picture",
            "upscale_vae_32bit: true, or give a vae_url made for half precision",
        )
        return decoded

    vae.decode = checked
    try:
        yield
    finally:
        del vae.decode


def _one_number_format(family: Family) -> torch.autocast:
    """Autocast where text encoders and denoiser are kept in different number formats.

    Otherwise the pipeline computes as it would for anybody who loads it.
    """
    names = (family.denoiser_name, *family.text_encoder_names)
    parts = [family.pipeline.components[name] for name in names]
    # Text encoders that have done their work are gone.
    formats = {module.dtype for module in parts if module is not None}
    narrowest = min(formats, key=lambda dtype: dtype.itemsize)
    device = family.pipeline._execution_device
    return torch.autocast(device.type, narrowest, enabled=len(formats) > 1)


def _check(values: torch.Tensor, message: str, remedy: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(message, f"set {remedy}")


def _picture(pixels: torch.Tensor) -> Image.Image:
    """Pixels (3, H, W) in [0, 1] as a picture of 8 bits a channel."""
    scaled = (pixels.float() * 255).round().to(torch.uint8)
    return Image.fromarray(np.ascontiguousarray(scaled.permute(1, 2, 0).cpu().numpy()))
