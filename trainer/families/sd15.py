"""Stable Diffusion 1.x: one CLIP encoder, no conditioning on sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import StableDiffusionPipeline

from trainer.families.base import (
    Checkpoints,
    Conditioning,
    Family,
    Geometry,
)
from trainer.names import KohyaNames


class StableDiffusion15(Family):
    """Stable Diffusion 1.x and its fine-tunes."""

    pipeline_class = StableDiffusionPipeline
    denoiser_name = "unet"
    text_encoder_names = ("text_encoder",)
    checkpoints = Checkpoints(
        denoiser={
            "_class_name": "UNet2DConditionModel",
            "in_channels": 4,
            "use_linear_projection": False,
            "addition_embed_type": None,
        },
        file_key="cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
        file_input="model.diffusion_model.input_blocks.0.0.weight",
        file_config="stable-diffusion-v1-5/stable-diffusion-v1-5",
        vaes=frozenset({"stabilityai/sd-vae-ft-mse", "stabilityai/sd-vae-ft-ema"}),
        unused=("safety_checker", "feature_extractor", "image_encoder"),
    )
    kohya = KohyaNames(
        denoiser_prefix="lora_unet",
        text_encoder_prefixes={"text_encoder": "lora_te"},
        base_model_version="sd_v1",
        architecture="stable-diffusion-v1",
        implementation="diffusers",
        embedding_keys={"text_encoder": "clip_l"},
    )

    def encode_text(self, captions: Sequence[str]) -> Conditioning:
        """The encoder's last hidden states (B, 77, width)."""
        states, _ = self.pipeline.encode_prompt(
            list(captions),
            device=self.pipeline.text_encoder.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        return {"prompt_embeds": states}

    def predict(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        text: Conditioning,
        geometry: Geometry,
    ) -> torch.Tensor:
        """The UNet's prediction; sizes play no part."""
        prediction: torch.Tensor = self.denoiser(
            noisy_latents, timesteps, text["prompt_embeds"], return_dict=False
        )[0]
        return prediction


FAMILY = StableDiffusion15
