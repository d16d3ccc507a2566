"""FLUX.2 [klein]: a transformer that learns rectified flow, told by layers inside a Qwen3."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import Flux2KleinPipeline

from trainer.families.base import (
    Checkpoints,
    Conditioning,
    Family,
    Geometry,
    LatentDistribution,
    packed,
    text_options,
    unpacked,
)
from trainer.names import KohyaNames
from trainer.objectives import PATCH, RectifiedFlow

# Layers of diffusers' transformer under the names of the original implementation. Source:
# diffusers' `_convert_kohya_flux2_lora_to_diffusers` and `_convert_non_diffusers_flux2_lora_…`.
_BLOCK_LAYERS = {
    "transformer_blocks.*.attn.to_out.0": "double_blocks.*.img_attn.proj",
    "transformer_blocks.*.attn.to_add_out": "double_blocks.*.txt_attn.proj",
    "transformer_blocks.*.ff.linear_out": "double_blocks.*.img_mlp.2",
    "transformer_blocks.*.ff_context.linear_out": "double_blocks.*.txt_mlp.2",
    "single_transformer_blocks.*.attn.to_out": "single_blocks.*.linear2",
}
_OUTER_LAYERS = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "proj_out": "final_layer.linear",
}
# One for all blocks, or none in the distilled models.
_SHARED_LAYERS = {
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
_FUSIONS = {
    "double_blocks.*.img_attn.qkv": {
        "transformer_blocks.*.attn.to_q": 1,
        "transformer_blocks.*.attn.to_k": 1,
        "transformer_blocks.*.attn.to_v": 1,
    },
    "double_blocks.*.txt_attn.qkv": {
        "transformer_blocks.*.attn.add_q_proj": 1,
        "transformer_blocks.*.attn.add_k_proj": 1,
        "transformer_blocks.*.attn.add_v_proj": 1,
    },
    # Alone: what they have for each of their inputs tells the families apart.
    "single_blocks.*.linear1": {"single_transformer_blocks.*.attn.to_qkv_mlp_proj": 9},
    "double_blocks.*.img_mlp.0": {"transformer_blocks.*.ff.linear_in": 6},
    "double_blocks.*.txt_mlp.0": {"transformer_blocks.*.ff_context.linear_in": 6},
}


class Flux2Klein(Family):
    """FLUX.2 [klein] and [klein] base, of 4 and of 9 billion weights."""

    pipeline_class = Flux2KleinPipeline
    objective_class = RectifiedFlow
    denoiser_name = "transformer"
    text_encoder_names = ("text_encoder",)
    target_modules = ("to_k", "to_q", "to_v", "to_out.0", "to_qkv_mlp_proj", "attn.to_out")
    checkpoints = Checkpoints(
        denoiser={"_class_name": "Flux2Transformer2DModel", "in_channels": 128},
        language_model="text_encoder",
        side_step=16,
    )
    # Version and architecture are musubi-tuner's without the number of weights.
    kohya = KohyaNames(
        denoiser_prefix="lora_unet",
        text_encoder_prefixes={},
        base_model_version="flux_2_klein",
        architecture="Flux.2-klein",
        implementation="https://github.com/black-forest-labs/flux2",
        denoiser="transformer",
        layers=_BLOCK_LAYERS | _OUTER_LAYERS | _SHARED_LAYERS,
        fusions=_FUSIONS,
        # The original's last layer takes shift before scale, diffusers' scale before shift.
        swapped_halves=frozenset({"norm_out.linear"}),
        unfused_prefix="lycoris",
        network_module="networks.lora_flux_2",
        # diffusers' `_convert_kohya_flux2_lora_to_diffusers` has no name for these.
        diffusers_drops=frozenset(_SHARED_LAYERS),
        diffusers_reads=frozenset({"lora", "lokr"}),
        programs=("ComfyUI", "musubi-tuner"),
    )

    def encode_text(self, captions: Sequence[str]) -> Conditioning:
        """Three of the encoder's inner states side by side (B, max_sequence_length, 3 * width)."""
        encoder = self.pipeline.text_encoder
        states, _ = self.pipeline.encode_prompt(
            list(captions), device=encoder.device, **text_options(self)
        )
        return {"prompt_embeds": states}

    def encode_image(self, pixels: torch.Tensor) -> LatentDistribution:
        """The pipeline's VAE on pixels: each pixel of a 2 x 2 square is normalised by itself.

        Source: diffusers' `Flux2KleinPipeline._encode_vae_image`; its squares are undone here.
        """
        vae = self.pipeline.vae
        posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
        deviation = (vae.bn.running_var.float() + vae.config.batch_norm_eps).sqrt()
        mean = unpacked((packed(mean) - vae.bn.running_mean.float()) / deviation, mean)
        return LatentDistribution(mean=mean, std=unpacked(packed(std) / deviation, std))

    def predict(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        text: Conditioning,
        geometry: Geometry,
    ) -> torch.Tensor:
        """The transformer's velocity. Places are (time, row, column, word)."""
        states, device = text["prompt_embeds"], noisy_latents.device
        height, width = (side // PATCH for side in noisy_latents.shape[-2:])
        one = torch.arange(1, device=device)
        rows, columns = (torch.arange(side, device=device) for side in (height, width))
        words = torch.arange(states.shape[1], device=device)
        tokens: torch.Tensor = self.denoiser(
            hidden_states=packed(noisy_latents),
            encoder_hidden_states=states,
            timestep=(timesteps / 1000).to(noisy_latents.dtype),
            img_ids=torch.cartesian_prod(one, rows, columns, one),
            txt_ids=torch.cartesian_prod(one, one, one, words),
            guidance=geometry["guidance"] if self._is_guided else None,
            return_dict=False,
        )[0]
        return unpacked(tokens, noisy_latents)

    @property
    def _is_guided(self) -> bool:
        return bool(self.pipeline.transformer.config.guidance_embeds)


FAMILY = Flux2Klein
