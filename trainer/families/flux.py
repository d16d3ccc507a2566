"""FLUX.1: a transformer that learns rectified flow, told by CLIP's pooled vector and by T5."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import FluxControlPipeline, FluxFillPipeline, FluxPipeline

from trainer.families.base import (
    Checkpoints,
    Conditioning,
    Family,
    Geometry,
    Guided,
    packed,
    text_options,
    unpacked,
)
from trainer.names import KohyaNames
from trainer.objectives import PATCH, RectifiedFlow

# Layers of diffusers' transformer under the names of the original implementation.
# Source: sd-scripts' `convert_flux_lora.py`, diffusers' `_convert_kohya_flux_lora_to_diffusers`.
_BLOCK_LAYERS = {
    "transformer_blocks.*.attn.to_out.0": "double_blocks.*.img_attn.proj",
    "transformer_blocks.*.attn.to_add_out": "double_blocks.*.txt_attn.proj",
    "transformer_blocks.*.ff.net.2": "double_blocks.*.img_mlp.2",
    "transformer_blocks.*.ff_context.net.2": "double_blocks.*.txt_mlp.2",
    "transformer_blocks.*.norm1.linear": "double_blocks.*.img_mod.lin",
    "transformer_blocks.*.norm1_context.linear": "double_blocks.*.txt_mod.lin",
    "single_transformer_blocks.*.proj_out": "single_blocks.*.linear2",
    "single_transformer_blocks.*.norm.linear": "single_blocks.*.modulation.lin",
}
_OUTER_LAYERS = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
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
    "single_blocks.*.linear1": {
        "single_transformer_blocks.*.attn.to_q": 1,
        "single_transformer_blocks.*.attn.to_k": 1,
        "single_transformer_blocks.*.attn.to_v": 1,
        "single_transformer_blocks.*.proj_mlp": 4,
    },
    # Alone: what they have for each of their inputs tells the families apart.
    "double_blocks.*.img_mlp.0": {"transformer_blocks.*.ff.net.0.proj": 4},
    "double_blocks.*.txt_mlp.0": {"transformer_blocks.*.ff_context.net.0.proj": 4},
}

_CLASS = "FluxTransformer2DModel"
# The picture's latents beside the noisy ones, as channels of their own; a mask has 256 more.
_CONTROLLED = Guided(
    FluxControlPipeline, {"_class_name": _CLASS, "in_channels": 128}, image="control_image"
)
_FILLED = Guided(
    FluxFillPipeline,
    {"_class_name": _CLASS, "in_channels": 384},
    image="image",
    mask="mask_image",
)


class Flux1(Family):
    """FLUX.1 [dev], [schnell] and others of their architecture, such as [Krea] and [Kontext]."""

    pipeline_class = FluxPipeline
    objective_class = RectifiedFlow
    denoiser_name = "transformer"
    text_encoder_names = ("text_encoder", "text_encoder_2")
    target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    checkpoints = Checkpoints(
        denoiser={"_class_name": _CLASS, "in_channels": 64},
        pipelines=frozenset({"FluxKontextPipeline"}),
        unused=("feature_extractor", "image_encoder"),
        language_model="text_encoder_2",
        side_step=16,
        guided={"depth": _CONTROLLED, "canny": _CONTROLLED, "fill": _FILLED},
    )
    kohya = KohyaNames(
        denoiser_prefix="lora_unet",
        text_encoder_prefixes={"text_encoder": "lora_te1"},
        base_model_version="flux1",
        architecture="flux-1-dev",
        implementation="https://github.com/black-forest-labs/flux",
        denoiser="transformer",
        layers=_BLOCK_LAYERS | _OUTER_LAYERS,
        fusions=_FUSIONS,
        # The original's last layer takes shift before scale, diffusers' scale before shift.
        swapped_halves=frozenset({"norm_out.linear"}),
        unfused_prefix="lycoris",
        network_module="networks.lora_flux",
        # diffusers' `_convert_kohya_flux_lora_to_diffusers`: names them without `transformer.`.
        diffusers_drops=frozenset(_OUTER_LAYERS),
        diffusers_width=3072,
        programs=("ComfyUI", "Forge", "InvokeAI", "sd-scripts"),
        embedding_keys={"text_encoder": "clip_l", "text_encoder_2": "t5xxl"},
    )

    def encode_text(self, captions: Sequence[str]) -> Conditioning:
        """T5's last states (B, max_sequence_length, 4096) and CLIP's pooled vector (B, 768)."""
        states, pooled, _ = self.pipeline.encode_prompt(
            list(captions), device=self.pipeline.text_encoder.device, **text_options(self)
        )
        return {"prompt_embeds": states, "pooled_prompt_embeds": pooled}

    def predict(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        text: Conditioning,
        geometry: Geometry,
    ) -> torch.Tensor:
        """The transformer's velocity; guidance is told where the checkpoint is distilled for it."""
        states = text["prompt_embeds"]
        height, width = (side // PATCH for side in noisy_latents.shape[-2:])
        places = torch.zeros(height, width, 3, device=noisy_latents.device)
        places[..., 1] = torch.arange(height, device=places.device)[:, None]
        places[..., 2] = torch.arange(width, device=places.device)[None, :]
        tokens: torch.Tensor = self.denoiser(
            hidden_states=packed(noisy_latents),
            timestep=(timesteps / 1000).to(noisy_latents.dtype),
            guidance=geometry["guidance"] if self._is_guided else None,
            pooled_projections=text["pooled_prompt_embeds"],
            encoder_hidden_states=states,
            txt_ids=torch.zeros(states.shape[1], 3, device=places.device),
            img_ids=places.view(-1, 3),
            return_dict=False,
        )[0]
        return unpacked(tokens, noisy_latents)

    @property
    def _is_guided(self) -> bool:
        return bool(self.pipeline.transformer.config.guidance_embeds)


FAMILY = Flux1
