"""Pixels to latents and latents to tokens, against diffusers' own decoding and packing."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline

from trainer.families.base import latents_of, packed, unpacked

MEANS, DEVIATIONS = [0.1, -0.2, 0.3, 0.4], [1.5, 0.5, 2.0, 1.0]


def tiny_vae(**config: object) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, **config)
    return vae.requires_grad_(False).eval()


@pytest.mark.parametrize(
    ("config", "undone"),
    [
        ({"scaling_factor": 0.13025}, lambda z: z / 0.13025),
        ({"scaling_factor": 0.3611, "shift_factor": 0.1159}, lambda z: z / 0.3611 + 0.1159),
        (
            {"scaling_factor": 0.5, "latents_mean": MEANS, "latents_std": DEVIATIONS},
            lambda z: (
                z * torch.tensor(DEVIATIONS).view(1, 4, 1, 1) / 0.5
                + torch.tensor(MEANS).view(1, 4, 1, 1)
            ),
        ),
    ],
)
def test_latents_are_what_pipelines_undo_before_they_decode(config: dict, undone) -> None:  # type: ignore[no-untyped-def, type-arg]
    vae = tiny_vae(**config)
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    posterior = vae.encode(pixels).latent_dist
    ours = latents_of(vae, pixels)
    torch.testing.assert_close(undone(ours.mean), posterior.mean)
    shift = undone(torch.zeros_like(ours.std))
    torch.testing.assert_close(undone(ours.std) - shift, posterior.std)


def test_latents_are_packed_into_tokens_as_flux_does_it() -> None:
    latents = torch.arange(2 * 16 * 4 * 6).float().view(2, 16, 4, 6)
    expected = FluxPipeline._pack_latents(latents, 2, 16, 4, 6)
    assert torch.equal(packed(latents), expected)
    assert torch.equal(unpacked(expected, latents), latents)
