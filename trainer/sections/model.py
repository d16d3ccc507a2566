"""The base checkpoint and how it is read."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainer.fields import Section, Text


class ModelConfig(Section):
    """The base checkpoint and how it is read."""

    model_url: Text = Field(
        "stabilityai/stable-diffusion-xl-base-1.0",
        description="Base model: hub id, local diffusers folder or one .safetensors file (fal).",
    )
    model_family: Text | None = Field(
        None,
        description="Expected family, such as sdxl; the checkpoint decides, and a contradiction "
        "is an error. None: whatever the checkpoint is (ours).",
    )
    single_file_config: Text | None = Field(
        None,
        description="Hub id or local folder with the configurations and tokenizers for a "
        "single-file model_url. None: the public repository of its family (ours).",
    )
    revision: Text | None = Field(
        None, description="Git branch, tag or commit of model_url on the hub (fal)."
    )
    variant: Text | None = Field(
        None, description="Weight-file variant of model_url, such as fp16 (fal)."
    )
    vae_url: Text | None = Field(
        None,
        description="VAE to encode the pictures with: hub id, folder or .safetensors file. Must "
        "share the base model's latent space. None: the base model's own (fal).",
    )
    max_sequence_length: int | None = Field(
        None,
        ge=16,
        le=512,
        description="Tokens of a caption that a language model reads, T5 of FLUX.1 or Qwen3 of "
        "FLUX.2 [klein], padding among them and the dozen in which Qwen3 is asked. Fewer make "
        "steps faster; what is longer is cut off, and pictures should be made with as many. None: "
        "512 (diffusers).",
    )
    quantization: Literal["none", "int8", "fp8", "nf4"] = Field(
        "none",
        description="Keep the linear layers of the denoiser's blocks in 8 bits, with a scale for "
        "each row, or in 4 bits (bitsandbytes' NF4); they are widened where a layer computes; with "
        "an adapter only (ours).",
    )
    upscale_vae_32bit: bool = Field(
        True,
        description="Run the VAE in 32-bit floats whatever mixed_precision says (fal).",
    )

    @property
    def is_single_file(self) -> bool:
        """Whether `model_url` is one checkpoint file, not a folder or a hub id."""
        return self.model_url.endswith(".safetensors")
