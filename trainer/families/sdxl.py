"""Stable Diffusion XL: two CLIP encoders, pooled text and conditioning on sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers import StableDiffusionXLPipeline

from trainer.families.base import (
    Checkpoints,
    Conditioning,
    Family,
    Geometry,
)
from trainer.names import KohyaNames

_BLOCKS = 3
_LAYERS = 2
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def _original_layers() -> Mapping[str, str]:
    """Diffusers' UNet layers under the names of Stability AI's implementation.

    Source of the correspondence: the block layout of `sgm.modules.diffusionmodules.openaimodel`
    with two residual layers per block: every layer, downsampler or upsampler counts one block.
    """
    blocks: dict[str, str] = {}
    resnets = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    blocks["mid_block.attentions.0"] = "middle_block.1"
    for block in range(_BLOCKS):
        for layer in range(_LAYERS):
            place = f"input_blocks.{1 + block * (_LAYERS + 1) + layer}"
            resnets[f"down_blocks.{block}.resnets.{layer}"] = f"{place}.0"
            blocks[f"down_blocks.{block}.attentions.{layer}"] = f"{place}.1"
        place = f"input_blocks.{(block + 1) * (_LAYERS + 1)}"
        blocks[f"down_blocks.{block}.downsamplers.0.conv"] = f"{place}.0.op"
        for layer in range(_LAYERS + 1):
            place = f"output_blocks.{block * (_LAYERS + 1) + layer}"
            resnets[f"up_blocks.{block}.resnets.{layer}"] = f"{place}.0"
            blocks[f"up_blocks.{block}.attentions.{layer}"] = f"{place}.1"
        upsampler = f"output_blocks.{block * (_LAYERS + 1) + _LAYERS}.2.conv"
        blocks[f"up_blocks.{block}.upsamplers.0.conv"] = upsampler
    inside = {
        f"{ours}.{part}": f"{theirs}.{original}"
        for ours, theirs in resnets.items()
        for part, original in _RESNET.items()
    }
    ends = {
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }
    return blocks | inside | ends


class StableDiffusionXL(Family):
    """SDXL 1.0 and its fine-tunes."""

    pipeline_class = StableDiffusionXLPipeline
    denoiser_name = "unet"
    text_encoder_names = ("text_encoder", "text_encoder_2")
    checkpoints = Checkpoints(
        denoiser={
            "_class_name": "UNet2DConditionModel",
            "in_channels": 4,
            "addition_embed_type": "text_time",
        },
        file_key="conditioner.embedders.1.model.ln_final.weight",
        file_input="model.diffusion_model.input_blocks.0.0.weight",
        file_config="stabilityai/stable-diffusion-xl-base-1.0",
        vaes=frozenset({"madebyollin/sdxl-vae-fp16-fix", "stabilityai/sdxl-vae"}),
        unused=("feature_extractor", "image_encoder"),
    )
    kohya = KohyaNames(
        denoiser_prefix="lora_unet",
        text_encoder_prefixes={"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
        base_model_version="sdxl_base_v1-0",
        architecture="stable-diffusion-xl-v1-base",
        implementation="https://github.com/Stability-AI/generative-models",
        layers=_original_layers(),
        embedding_keys={"text_encoder": "clip_l", "text_encoder_2": "clip_g"},
    )

    def encode_text(self, captions: Sequence[str]) -> Conditioning:
        """Both encoders' penultimate states (B, 77, 2048) and the second's pooled (B, 1280)."""
        states, _, pooled, _ = self.pipeline.encode_prompt(
            list(captions),
            device=self.pipeline.text_encoder.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        return {"prompt_embeds": states, "pooled_prompt_embeds": pooled}

    def predict(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        text: Conditioning,
        geometry: Geometry,
    ) -> torch.Tensor:
        """The UNet's prediction, told each example's original size, crop corner and target size.

        Source of the order: Podell et al. 2023, section 2.2, and diffusers'
        `StableDiffusionXLPipeline._get_add_time_ids`; heights come before widths.
        """
        time_ids = torch.cat(
            [geometry["original_size"], geometry["crop_top_left"], geometry["target_size"]], dim=1
        )
        prediction: torch.Tensor = self.denoiser(
            noisy_latents,
            timesteps,
            text["prompt_embeds"],
            added_cond_kwargs={"text_embeds": text["pooled_prompt_embeds"], "time_ids": time_ids},
            return_dict=False,
        )[0]
        return prediction


FAMILY = StableDiffusionXL
