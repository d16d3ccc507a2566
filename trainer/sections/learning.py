"""What is learnt and by which objective: tokens, adapters, prior, loss."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from trainer.fields import (
    Fraction,
    Names,
    PhotoClass,
    Section,
    Text,
    capitalized,
    clash,
)

# A CLIP caption has 77 positions, two of them for its begin and end marks.
CAPTION_TOKENS = 75


def steps_of_share(share: float, total_steps: int) -> int:
    """A share of a run in steps: the nearest whole number, and at least one."""
    return max(1, round(share * total_steps))


class TokenConfig(Section):
    """Pivotal tuning: new tokens for what is learnt."""

    token_abstraction: Names = Field(
        ("TOK",), min_length=1, description="Identifiers in the captions, comma-separated (fal)."
    )
    num_new_tokens_per_abstraction: int = Field(
        2,
        ge=1,
        le=CAPTION_TOKENS,
        description="New token vectors per identifier and text encoder (fal).",
    )
    train_text_encoder_ti: bool = Field(
        False, description="Learn new tokens by textual inversion; fal's default is true (fal)."
    )
    train_text_encoder_ti_frac: Fraction = Field(
        0.5, description="Share of the steps in which the new tokens learn (fal)."
    )
    disable_unet_during_ti_training: bool = Field(
        False, description="Train nothing but the new tokens until the pivot (fal)."
    )
    token_retraction: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Exponent of the pull, after each step, of the new vectors' deviation towards "
        "that of the text encoder's own; 0: none (ours; diffusers' advanced scripts).",
    )
    ti_pooling: Literal["diffusers", "eos"] = Field(
        "diffusers",
        description="Where CLIP takes its pooled vector in a checkpoint from before "
        "transformers 4.31: at the last new token, as diffusers' pipelines do, or at the end of "
        "the text, as ComfyUI does (ours).",
    )

    @model_validator(mode="after")
    def _identifiers(self) -> TokenConfig:
        names, vectors = self.token_abstraction, self.num_new_tokens_per_abstraction
        if len(set(names)) != len(names):
            raise clash("token_abstraction", ", ".join(names), "each identifier once")
        if any(re.fullmatch(r"<s\d*>?", name) for name in names):
            raise clash("token_abstraction", ", ".join(names), "names unlike the tokens' own, <s0>")
        if len(names) * vectors > CAPTION_TOKENS:
            allowed = f"at most {CAPTION_TOKENS} new tokens for all identifiers together"
            raise clash("num_new_tokens_per_abstraction", vectors, allowed)
        return self


class AdapterConfig(Section):
    """What is trained: an adapter of some form, or the weights themselves."""

    use_lora: bool = Field(
        True, description="Train an adapter; false trains all weights of the denoiser (fal)."
    )
    weights_dtype: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="Number format of weights that are all trained; bf16 takes half the memory "
        "and rounds each update up or down by chance, so that small ones are not lost (ours).",
    )
    lora_type: Literal["lora", "lokr", "loha"] = Field(
        "lora", description="Low-rank product, Kronecker product or Hadamard product (fal)."
    )
    use_dora: bool = Field(
        False,
        description="Learn magnitude and direction apart (DoRA); with lora_type lora only; fal's "
        "default is true (fal).",
    )
    rank: int = Field(32, ge=1, description="Inner dimension of the adapter (fal).")
    alpha: float | None = Field(
        None, gt=0, description="Strength alpha / rank. None: alpha = rank, strength 1 (ours)."
    )
    lokr_factor: Literal[-1] | Annotated[int, Field(ge=1)] = Field(
        -1,
        description="Size of LoKr's small factor; -1: the nearest to a square split (ours).",
    )
    target_unet_modules: Names = Field(
        ("to_k", "to_q", "to_v", "to_out.0", "conv1", "conv2"),
        min_length=1,
        description="Layers of the denoiser that get an adapter, by the end of their name (fal).",
    )
    adapter_layers: Literal["ours", "peft"] = Field(
        "ours",
        description="Whose code computes layers with an adapter: ours, which is faster and takes "
        "less memory, or PEFT's; weights and files are the same but for rounding (ours).",
    )
    train_text_encoder: bool = Field(
        False,
        description="Train the text encoders too: by an adapter, or all their weights without "
        "use_lora; excludes textual inversion (fal).",
    )
    train_text_encoder_frac: Fraction = Field(
        1.0, description="Share of the steps in which the text encoders learn (fal)."
    )
    target_text_encoder_modules: Names = Field(
        ("q_proj", "k_proj", "v_proj", "out_proj"),
        min_length=1,
        description="Layers of the text encoders that get an adapter (fal).",
    )
    text_encoder_rank: int | None = Field(
        None, ge=1, description="Rank of the text encoders' adapter. None: rank (Novita)."
    )
    text_encoder_alpha: float | None = Field(
        None,
        gt=0,
        description="Alpha of the text encoders' adapter. None: alpha, or its own rank where "
        "alpha is None (Novita).",
    )

    @property
    def scale(self) -> float:
        """The factor alpha / rank on the adapter's product."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def for_text_encoders(self) -> AdapterConfig:
        """The same form with the rank and alpha of the text encoders."""
        rank, alpha = self.text_encoder_rank, self.text_encoder_alpha
        return self.model_copy(
            update={
                "rank": self.rank if rank is None else rank,
                "alpha": self.alpha if alpha is None else alpha,
            }
        )


class PriorConfig(Section):
    """Prior preservation: what the base model knows of the class is kept."""

    with_prior_preservation: bool = Field(
        False, description="Train on pictures of the class beside; fal's default is true (fal)."
    )
    prior_loss_weight: float = Field(
        1.0, ge=0, description="Weight of the class pictures' loss (fal)."
    )
    photo_class: Annotated[PhotoClass | None, BeforeValidator(capitalized)] = Field(
        None,
        description="Class of the subject; prior preservation needs it or class_prompt; required "
        "by fal (fal).",
    )
    class_prompt: Text | None = Field(
        None,
        description="Caption of the class pictures, and the prompt they are made with. None: "
        "`a photo of a` and the class (diffusers).",
    )
    num_class_images: int = Field(
        100, ge=1, description="Class pictures that the base model makes (diffusers)."
    )
    class_images_url: Text | None = Field(
        None,
        description="Class pictures of your own, as images_data_url. None: the base model makes "
        "them (ours).",
    )
    class_inference_steps: int = Field(
        30, ge=1, le=1000, description="Denoising steps of a class picture (ours)."
    )
    class_guidance_scale: float | None = Field(
        None,
        ge=0,
        description="Guidance of class pictures. None: the base model's pipeline decides, 7.5 for "
        "SD1.5, 5 for SDXL, 3.5 for FLUX.1 (diffusers).",
    )


class LossConfig(Section):
    """The training objective."""

    snr_gamma: float | None = Field(
        5.0,
        ge=0,
        description="Min-SNR weight of the loss (Hang et al. 2023, equation 9; 5 is the paper's "
        "value, fal's default is 0.5). None or 0: off (fal).",
    )
    noise_offset: float = Field(
        0.0, ge=0, description="Strength of noise shared by all pixels of a channel (fal)."
    )
    min_timestep_trained: int = Field(0, ge=0, le=999, description="Smallest timestep (fal).")
    max_timestep_trained: int = Field(
        1000,
        ge=1,
        le=1000,
        description="Bound above the largest timestep; with flow matching, 1000 times the share of "
        "noise, it can be reached, otherwise it is left out (fal).",
    )

    timestep_density: Literal["logit_normal", "uniform", "mode", "cosmap"] = Field(
        "logit_normal",
        description="How timesteps of flow matching are drawn, before timestep_shift (Esser et "
        "al. 2024, section 3.1; diffusers' weighting_scheme).",
    )
    logit_mean: float = Field(
        0.0, description="Mean of logit_normal: larger, more noise (diffusers)."
    )
    logit_std: float = Field(1.0, gt=0, description="Deviation of logit_normal (diffusers).")
    mode_scale: float = Field(
        1.29,
        ge=-1,
        le=1.75,
        description="Strength of mode: above 0 favours the middle, below 0 the ends (diffusers).",
    )
    timestep_shift: float | None = Field(
        None,
        gt=0,
        description="Odds by which flow matching's noise levels are moved: above 1 to more noise, "
        "1 leaves them. None: by the line in the checkpoint's scheduler, FLUX.1 [dev] and FLUX.2 "
        "by the number of pixels (ours; SD3's shift).",
    )
    guidance_scale: float = Field(
        1.0,
        ge=0,
        description="Guidance that a guidance-distilled denoiser such as FLUX.1 [dev] is told "
        "while it trains (diffusers, sd-scripts).",
    )

    @model_validator(mode="after")
    def _timestep_range(self) -> LossConfig:
        if self.min_timestep_trained >= self.max_timestep_trained:
            allowed = f"below max_timestep_trained, {self.max_timestep_trained}"
            raise clash("min_timestep_trained", self.min_timestep_trained, allowed)
        return self
