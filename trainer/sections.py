"""Every hyperparameter once: its name, type, range, default, meaning and source.

The sections are frozen; code takes just the section it works on. Leaf names are unique over
the sections and carry the names of fal-ai/personalization where it has the field, so a flat
request, a file and a flag all say `snr_gamma`. `trainer.config` joins the sections to one
configuration; how several sources become one is the business of `trainer.resolve`.

Sources of defaults and meanings: "fal" is the input schema of fal-ai/personalization, "ours"
marks what this project adds.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from trainer.fields import (
    WATCHING_ONLY,
    Fraction,
    Names,
    Section,
    Text,
    capitalized,
    clash,
    lowered,
)

OptimizerName = Literal["adamw", "adamw8bit", "prodigy"]
SchedulerName = Literal[
    "constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup"
]
PhotoClass = Literal["Man", "Woman", "Person", "Boy", "Girl", "Baby"]

# A CLIP caption has 77 positions, two of them for its begin and end marks.
CAPTION_TOKENS = 75

# The file for diffusers has this name whatever the result is called: its pipelines look for it.
DIFFUSERS_NAME = "pytorch_lora_weights"


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
    upscale_vae_32bit: bool = Field(
        True,
        description="Run the VAE in 32-bit floats whatever mixed_precision says (fal).",
    )

    @property
    def is_single_file(self) -> bool:
        """Whether `model_url` is one checkpoint file, not a folder or a hub id."""
        return self.model_url.endswith(".safetensors")


class DataConfig(Section):
    """Pictures, captions and geometry."""

    images_data_url: Text | None = Field(
        None,
        description="Training pictures: folder, .zip, .tar, .tar.gz or data: URI; required (fal).",
    )
    captions_file_url: Text | None = Field(
        None,
        description="JSON lines with `file_name` and a caption column; matched by path, or by "
        "base name where that is unique. Same-stem .txt files are read without it (fal).",
    )
    caption_column: Text = Field("text", description="Caption key in captions_file_url (fal).")
    instance_prompt: Text = Field(
        "A photograph of a TOK",
        description="Caption of every picture that has none of its own (fal).",
    )
    skip_caption_generation: bool = Field(
        True,
        description="Do not write captions with a captioning model for pictures without one; "
        "fal's default is false (fal).",
    )
    caption_dropout: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of examples trained with an empty caption, drawn each step (fal).",
    )
    resolution_width: int | None = Field(
        None,
        ge=64,
        multiple_of=8,
        description="Trained width in pixels. None: the base model's own size (fal).",
    )
    resolution_height: int | None = Field(
        None,
        ge=64,
        multiple_of=8,
        description="Trained height in pixels. None: the base model's own size (fal).",
    )
    center_crop: bool = Field(
        True,
        description="Take the middle window instead of a random one each time; fal's default is "
        "false (fal).",
    )
    face_aware_cropping: bool = Field(
        False, description="Put the window over the largest face; fal's default is true (fal)."
    )
    random_flip: bool = Field(
        False, description="Mirror half of the examples left to right, drawn each step (fal)."
    )
    random_crop_offset_x: int = Field(
        0, ge=0, description="Move the window by up to this many pixels left or right (fal)."
    )
    random_crop_offset_y: int = Field(
        0, ge=0, description="Move the window by up to this many pixels up or down (fal)."
    )
    random_rotation_start: int = Field(
        0, ge=-180, le=180, description="Smallest rotation in degrees; fal's default is -2 (fal)."
    )
    random_rotation_end: int = Field(
        0, ge=-180, le=180, description="Largest rotation in degrees; fal's default is 2 (fal)."
    )
    cache_latents: bool = Field(
        True,
        description="Encode each picture once and sample from its stored posterior; flips are "
        "stored as twins, other random geometry cannot be cached; fal's default is false (fal).",
    )

    @model_validator(mode="after")
    def _rotation_range(self) -> DataConfig:
        if self.random_rotation_start > self.random_rotation_end:
            allowed = f"at most random_rotation_end, {self.random_rotation_end}"
            raise clash("random_rotation_start", self.random_rotation_start, allowed)
        return self


class MaskConfig(Section):
    """Which pixels of a picture the loss counts."""

    clip_seg_mask_prompt: str = Field(
        "",
        description="What to keep of each picture, in words; empty: the whole picture; fal's "
        "default is head (fal).",
    )
    clip_seg_mask_temperature: float = Field(
        1.0, gt=0, description="Softness of the mask: larger is flatter (fal)."
    )
    clip_seg_mask_bias: float = Field(
        0.001, ge=0, le=1, description="Weight that every pixel keeps before normalising (fal)."
    )
    class_image_mask_style: Literal["none", "normal", "invert"] = Field(
        "normal", description="Mask on the class pictures of prior preservation (fal)."
    )


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
    train_text_encoder: bool = Field(
        False,
        description="Give the text encoders an adapter too; excludes textual inversion (fal).",
    )
    train_text_encoder_frac: Fraction = Field(
        1.0, description="Share of the steps in which the text encoders learn (fal)."
    )
    target_text_encoder_modules: Names = Field(
        ("q_proj", "k_proj", "v_proj", "out_proj"),
        min_length=1,
        description="Layers of the text encoders that get an adapter (fal).",
    )

    @property
    def scale(self) -> float:
        """The factor alpha / rank on the adapter's product."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


class PriorConfig(Section):
    """Prior preservation: what the base model knows of the class is kept."""

    with_prior_preservation: bool = Field(
        False, description="Train on pictures of the class beside; fal's default is true (fal)."
    )
    prior_loss_weight: float = Field(
        1.0, ge=0, description="Weight of the class pictures' loss (fal)."
    )
    photo_class: Annotated[PhotoClass | None, BeforeValidator(capitalized)] = Field(
        None, description="Class of the subject; required by fal (fal)."
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
        1000, ge=1, le=1000, description="Bound above the largest timestep, itself left out (fal)."
    )

    @model_validator(mode="after")
    def _timestep_range(self) -> LossConfig:
        if self.min_timestep_trained >= self.max_timestep_trained:
            allowed = f"below max_timestep_trained, {self.max_timestep_trained}"
            raise clash("min_timestep_trained", self.min_timestep_trained, allowed)
        return self


class OptimConfig(Section):
    """Optimizer, learning rates and their course."""

    optimizer: Annotated[OptimizerName, BeforeValidator(lowered)] = Field(
        "adamw", description="Update rule; adamw8bit keeps its state in 8 bits (fal, ours)."
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="Learning rate of the denoiser. None: 1e-4 for an adapter, 1e-6 for all "
        "weights, 1.0 with prodigy; fal's default is 8e-5 (fal).",
    )
    text_encoder_lr: float | None = Field(
        None,
        gt=0,
        description="Learning rate of text encoders and new tokens. None: learning_rate (fal).",
    )
    lr_scheduler: Annotated[SchedulerName, BeforeValidator(lowered)] = Field(
        "constant", description="Course of the learning rate over the steps (fal)."
    )
    lr_warmup_steps: int = Field(
        0, ge=0, description="Steps of linear warm-up; fal's default is 500 (fal)."
    )
    lr_num_cycles: int = Field(1, ge=1, description="Restarts of cosine_with_restarts (fal).")
    lr_power: float = Field(1.0, gt=0, description="Exponent of polynomial (fal).")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment (fal).")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Decay of the second moment (fal).")
    adam_epsilon: float = Field(1e-8, gt=0, description="Floor of the denominator (fal).")
    adam_weight_decay: float = Field(
        1e-4, ge=0, description="Decoupled weight decay of the denoiser's group (fal)."
    )
    adam_weight_decay_text_encoder: float = Field(
        1e-3, ge=0, description="Weight decay of text encoders and new tokens (fal)."
    )
    prodigy_beta3: float | None = Field(
        None, ge=0, lt=1, description="Decay of Prodigy's statistics. None: sqrt(beta2) (fal)."
    )
    prodigy_decouple: bool = Field(True, description="Decay as AdamW does, not as L2 (fal).")
    prodigy_use_bias_correction: bool = Field(True, description="Adam's bias correction (fal).")
    prodigy_safeguard_warmup: bool = Field(
        True, description="Keep the warm-up out of Prodigy's estimate of d (fal)."
    )
    max_grad_norm: float = Field(
        1.0, ge=0, description="Largest norm of all gradients together; 0: no clipping (fal)."
    )


class RunConfig(Section):
    """Length, batches, numerics and book-keeping of a run."""

    seed: int = Field(42, ge=0, le=2**32 - 1, description="Seed of everything random (fal).")
    max_train_steps: int = Field(1000, ge=1, description="Optimizer steps (fal).")
    num_train_epochs: int | None = Field(
        None,
        ge=1,
        description="Passes over the pictures; decides over max_train_steps when set (fal).",
    )
    batch_size: int = Field(
        1, ge=1, description="Pictures per process and forward pass; fal's default is 6 (fal)."
    )
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="Forward passes per optimizer step (fal)."
    )
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = Field(
        "auto",
        description="Arithmetic of the forward pass; trained weights stay in 32 bits. auto: bf16 "
        "where the GPU has it, else fp16 on a GPU, no on a CPU (ours).",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations backward: less memory, more time (ours)."
    )
    num_workers: int = Field(
        0,
        ge=0,
        le=64,
        description="Processes that read pictures ahead where latents are not cached (ours).",
        json_schema_extra=WATCHING_ONLY,
    )
    checkpointing_steps: int = Field(
        250,
        ge=1,
        description="Steps between two checkpoints (ours).",
        json_schema_extra=WATCHING_ONLY,
    )
    checkpoints_total_limit: int = Field(
        2,
        ge=1,
        description="Checkpoints kept; an older one goes only after a newer one is safe (ours).",
        json_schema_extra=WATCHING_ONLY,
    )
    tensorboard: bool = Field(
        True, description="Write TensorBoard curves (ours).", json_schema_extra=WATCHING_ONLY
    )
    wandb: bool = Field(
        False,
        description="Send curves to Weights & Biases (ours).",
        json_schema_extra=WATCHING_ONLY,
    )


class OutputConfig(Section):
    """The files that come out."""

    output_name: str = Field(
        "lora",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._ -]{0,99}$",
        description="Name of the result, in file names and headers (ours).",
        json_schema_extra=WATCHING_ONLY,
    )
    save_dtype: Literal["fp32", "fp16", "bf16"] = Field(
        "fp32",
        description="Number format of the written weights (ours).",
        json_schema_extra=WATCHING_ONLY,
    )
    kohya_dora: Literal["paper", "comfyui", "both"] = Field(
        "both",
        description="Meaning of DoRA magnitudes in the kohya file: the paper's (LyCORIS, PEFT), "
        "ComfyUI's, or one file of each (ours).",
        json_schema_extra=WATCHING_ONLY,
    )
    debug_dataset: bool = Field(
        False, description="Deliver the pictures exactly as they were trained (fal)."
    )
    debug_loss_masks: bool = Field(
        False, description="Deliver the masks exactly as the loss used them (fal)."
    )
    data_archive_format: Literal["zip", "tar", "tar.gz"] = Field(
        "zip", description="Container of delivered folders (fal)."
    )

    @model_validator(mode="after")
    def _name_of_its_own(self) -> OutputConfig:
        # Letters are compared without their case, as the file systems of macOS and Windows do.
        if self.output_name.lower() == DIFFUSERS_NAME:
            allowed = f"another name: `{DIFFUSERS_NAME}.safetensors` is the file for diffusers"
            raise clash("output_name", self.output_name, allowed)
        return self
