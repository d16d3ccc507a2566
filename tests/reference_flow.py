"""What a picture's latents cost by flow matching, by the methods of diffusers' own pipelines."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Flux2KleinPipeline, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor


def time_of(pipe: Any, uniform: float, tokens: int) -> float:
    """A logit-normal time, shifted by the number of tokens."""
    config = pipe.scheduler.config
    ends = (config.base_image_seq_len, config.max_image_seq_len)
    mu = calculate_shift(tokens, *ends, config.base_shift, config.max_shift)
    plain = torch.special.ndtri(torch.tensor(uniform, dtype=torch.float64)).sigmoid()
    return float(pipe.scheduler.time_shift(mu, 1.0, plain))


def flux_errors(pipe: Any, latents: Tensor, noise: Tensor, caption: str, uniform: float) -> Tensor:
    """Squared errors (1, 16, h, w) of the velocity; guidance is 1."""
    vae, (height, width) = pipe.vae, latents.shape[-2:]
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    time = time_of(pipe, uniform, height * width // 4)
    noisy = (1 - time) * latents + time * noise
    words = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    clip = pipe.tokenizer(caption, max_length=77, **words).input_ids
    t5 = pipe.tokenizer_2(caption, max_length=512, **words).input_ids
    tokens = pipe.transformer(
        hidden_states=pipe._pack_latents(noisy, 1, 16, height, width),
        timestep=torch.tensor([time]),
        guidance=torch.ones(1),
        pooled_projections=pipe.text_encoder(clip).pooler_output,
        encoder_hidden_states=pipe.text_encoder_2(t5)[0],
        txt_ids=torch.zeros(512, 3),
        img_ids=pipe._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32),
    ).sample
    prediction = pipe._unpack_latents(tokens, height * 8, width * 8, 8)
    return (prediction - (noise - latents)).square()


def flux2_errors(pipe: Any, latents: Tensor, noise: Tensor, caption: str, uniform: float) -> Tensor:
    """Squared errors (1, 32, h, w) of the velocity."""
    norm, (height, width) = pipe.vae.bn, latents.shape[-2:]
    time = time_of(pipe, uniform, height * width // 4)
    deviation = (norm.running_var + pipe.vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
    mean = norm.running_mean.view(1, -1, 1, 1)
    squares = (pipe._patchify_latents(latents) - mean) / deviation
    noise_squares = pipe._patchify_latents(noise)
    places = pipe._prepare_latent_ids(squares)
    states, words = pipe.encode_prompt(caption, device="cpu")
    tokens = pipe.transformer(
        hidden_states=pipe._pack_latents((1 - time) * squares + time * noise_squares),
        timestep=torch.tensor([time]),
        encoder_hidden_states=states,
        txt_ids=words,
        img_ids=places,
    ).sample
    prediction = pipe._unpack_latents_with_ids(tokens, places, height // 2, width // 2)
    return pipe._unpatchify_latents((prediction - (noise_squares - squares)).square())


ERRORS = {FluxPipeline: flux_errors, Flux2KleinPipeline: flux2_errors}
