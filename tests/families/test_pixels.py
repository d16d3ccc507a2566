"""Pixels of latents: the inverse of what a VAE's configuration does to latents."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL

from trainer.families.base import latents_of, pixels_of

MEANS, DEVIATIONS = [0.1, -0.2, 0.3, 0.4], [1.5, 0.5, 2.0, 1.0]


def tiny_vae(**config: object) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, **config)
    return vae.requires_grad_(False).eval()


@pytest.mark.parametrize(
    "config",
    [
        {"scaling_factor": 0.13025},
        {"scaling_factor": 0.3611, "shift_factor": 0.1159},
        {"scaling_factor": 0.5, "latents_mean": MEANS, "latents_std": DEVIATIONS},
    ],
)
def test_scale_and_shift_of_latents_are_undone(config: dict[str, object]) -> None:
    vae = tiny_vae(**config)
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    torch.testing.assert_close(pixels_of(vae, latents_of(vae, pixels).mean), expected)


def test_pixels_are_clamped_and_in_32_bits_whatever_the_vae_is_in() -> None:
    vae = tiny_vae(scaling_factor=0.1).to(torch.bfloat16)
    vae.decoder.conv_out.bias.data.fill_(5)
    pixels = pixels_of(vae, torch.zeros(1, 4, 8, 8, dtype=torch.float16))
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, torch.ones(1, 3, 8, 8))


def test_what_is_not_finite_stays_so() -> None:
    latents = torch.full((1, 4, 8, 8), torch.nan)
    assert bool(pixels_of(tiny_vae(), latents).isnan().any())
