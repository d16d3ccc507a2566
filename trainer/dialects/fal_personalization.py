"""fal-ai/personalization: its request, its machine defaults, and its answer.

Where the service's prose and its schema disagree, the schema's default stands here: its prose
names prodigy, batch size 1, an inverted class mask and variant fp16. Fields that the schema's
example leaves out have the falsy default of their type. That latents are not cached by default
counts only where windows move: where they stand still, the result is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field

from trainer import dialects
from trainer.config import TrainingConfig
from trainer.contracts import left_aside, missing
from trainer.errors import InputError
from trainer.job import Result, ResultFile, Role
from trainer.leaves import allowed
from trainer.resolve import Layer

NAMES: Mapping[str, Mapping[str, Any]] = {
    "fal_personalization": {},
    "fal": {},
    "fal-ai/personalization": {},
}
SERVICE = "fal-ai/personalization"

# Service field to leaf, and service field to the reason why it is not taken: every field is
# placed by its name.
RENAMED: Mapping[str, str] = {}
FIELDS = dialects.named(RENAMED, {})
NOT_USED: Mapping[str, str] = {}
# What null means in a field whose leaf knows no null: a mask of no prompt is no mask.
NULL_MEANS: Mapping[str, Any] = {"clip_seg_mask_prompt": ""}


class Input(BaseModel):
    """A training request."""

    images_data_url: str = Field(
        description="Zip archive of the training pictures, at least ten if possible."
    )
    data_archive_format: str | None = Field(
        None, description="File format of delivered folders of artifacts."
    )
    captions_file_url: str | None = Field(
        None, description="JSON lines with `file_name` and `text`; captions speak of TOK, TOK1 …"
    )
    caption_column: str = Field("text", description="Caption key in the captions file.")
    instance_prompt: str = Field(
        "A photograph of a TOK", description="Prompt for pictures without a caption."
    )
    rank: int = Field(32, description="Rank of the adapter.")
    model_url: str = Field(
        "stabilityai/stable-diffusion-xl-base-1.0", description="Base model: hub id or path."
    )
    vae_url: str | None = Field(
        "madebyollin/sdxl-vae-fp16-fix", description="VAE to encode the pictures with."
    )
    revision: str | None = Field(None, description="Revision of the base model.")
    variant: str | None = Field(None, description="Weight-file variant of the base model.")
    token_abstraction: str = Field("TOK", description="Identifiers of the subject.")
    num_new_tokens_per_abstraction: int = Field(2, description="New tokens per identifier.")
    seed: int = Field(42, description="Seed of the training.")
    resolution_width: int = Field(768, description="Trained width.")
    resolution_height: int = Field(768, description="Trained height.")
    center_crop: bool = Field(False, description="Crop in the middle.")
    random_flip: bool = Field(False, description="Mirror pictures at random.")
    train_text_encoder: bool = Field(False, description="Train the text encoders.")
    num_train_epochs: int | None = Field(None, description="Epochs; None: max_train_steps.")
    max_train_steps: int = Field(1000, description="Training steps.")
    learning_rate: float = Field(8e-5, description="Learning rate of the denoiser.")
    text_encoder_lr: float = Field(8e-5, description="Learning rate of the text encoders.")
    lr_scheduler: str = Field("constant", description="Course of the learning rate.")
    snr_gamma: float | None = Field(0.5, description="Min-SNR gamma of the loss.")
    lr_warmup_steps: int = Field(500, description="Warm-up steps.")
    lr_num_cycles: int = Field(1, description="Hard resets of the learning rate.")
    lr_power: float = Field(1.0, description="Power of the polynomial course.")
    train_text_encoder_ti: bool = Field(True, description="Use textual inversion.")
    train_text_encoder_ti_frac: float = Field(0.5, description="Share of textual inversion.")
    train_text_encoder_frac: float = Field(1.0, description="Share of text-encoder training.")
    optimizer: str = Field("adamw", description="Optimizer.")
    adam_beta1: float = Field(0.9, description="First-moment decay.")
    adam_beta2: float = Field(0.999, description="Second-moment decay.")
    prodigy_beta3: float | None = Field(None, description="Prodigy's own decay.")
    prodigy_decouple: bool = Field(True, description="Decoupled weight decay in Prodigy.")
    adam_weight_decay: float = Field(1e-4, description="Weight decay of the denoiser.")
    adam_weight_decay_text_encoder: float = Field(
        1e-3, description="Weight decay of the text encoders."
    )
    adam_epsilon: float = Field(1e-8, description="Epsilon of the optimizer.")
    prodigy_use_bias_correction: bool = Field(True, description="Bias correction in Prodigy.")
    prodigy_safeguard_warmup: bool = Field(True, description="Warm-up safeguard in Prodigy.")
    batch_size: int = Field(6, description="Pictures per batch.")
    caption_dropout: float = Field(0.0, description="Share of captions dropped.")
    skip_caption_generation: bool = Field(False, description="Do not write captions.")
    max_grad_norm: float = Field(1.0, description="Largest gradient norm.")
    with_prior_preservation: bool = Field(True, description="Use prior preservation.")
    prior_loss_weight: float = Field(1.0, description="Weight of the prior's loss.")
    photo_class: Literal["Man", "Woman", "Person", "Boy", "Girl", "Baby"] = Field(
        description="Class of the subject."
    )
    target_unet_modules: list[str] = Field(
        ["to_k", "to_q", "to_v", "to_out.0", "conv1", "conv2"],
        description="Layers of the denoiser that are adapted.",
    )
    target_text_encoder_modules: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "out_proj"],
        description="Layers of the text encoders that are adapted.",
    )
    cache_latents: bool = Field(False, description="Cache latents.")
    use_lora: bool = Field(True, description="Train an adapter.")
    debug_dataset: bool = Field(False, description="Deliver the trained pictures.")
    random_crop_offset_x: int = Field(0, description="Random crop offset to the side.")
    random_crop_offset_y: int = Field(0, description="Random crop offset up and down.")
    clip_seg_mask_prompt: str = Field("head", description="What the mask keeps.")
    class_image_mask_style: Literal["none", "normal", "invert"] = Field(
        "normal", description="Mask on class pictures."
    )
    clip_seg_mask_temperature: float = Field(1.0, description="Softness of the mask.")
    clip_seg_mask_bias: float = Field(0.001, description="Floor of the mask.")
    random_rotation_start: int = Field(-2, description="Smallest rotation in degrees.")
    random_rotation_end: int = Field(2, description="Largest rotation in degrees.")
    use_dora: bool = Field(True, description="Use DoRA.")
    lora_type: Literal["lora", "lokr", "loha"] = Field("lora", description="Kind of adapter.")
    face_aware_cropping: bool = Field(True, description="Crop around the face.")
    noise_offset: float = Field(0.0, description="Strength of the noise offset.")
    gradient_accumulation_steps: int = Field(1, description="Batches per step.")
    upscale_vae_32bit: bool = Field(True, description="Run the VAE in 32 bits.")
    debug_loss_masks: bool = Field(False, description="Deliver the masks.")
    max_timestep_trained: int = Field(1000, description="Bound above the largest timestep.")
    min_timestep_trained: int = Field(0, description="Smallest timestep.")
    disable_unet_during_ti_training: bool = Field(
        False, description="Train new tokens alone at first."
    )


class FileOrData(dialects.File):
    """A file of a result; this service's schema has one field more."""

    file_data: str | None = Field(None, exclude=True, description="Never sent: fetch `url`.")


class Output(BaseModel):
    """A result, in the service's order.

    Only `config_file` is named in the service's page and `diffusers_lora_file` by its sister
    trainers; the other names are this project's, in their manner.
    """

    diffusers_lora_file: FileOrData | None = Field(None, description="The diffusers LoRA weights.")
    kohya_lora_file: FileOrData | None = Field(None, description="The kohya LoRA weights.")
    unet_file: FileOrData | None = Field(None, description="The weights of the trained denoiser.")
    text_encoder_file: FileOrData | None = Field(
        None, description="The first text encoder's weights."
    )
    text_encoder_2_file: FileOrData | None = Field(None, description="The second's weights.")
    text_embeddings_file: FileOrData | None = Field(None, description="The new tokens' embeddings.")
    config_file: FileOrData = Field(description="The training configuration.")
    debug_dataset_file: FileOrData | None = Field(None, description="The pictures as trained.")
    debug_masks_file: FileOrData | None = Field(None, description="The masks as used.")
    ignored_options: dialects.IGNORED = None


OUTPUT_ROLES: Mapping[str, Role] = {
    "diffusers_lora_file": "diffusers_lora",
    "kohya_lora_file": "kohya_lora",
    "unet_file": "denoiser_weights",
    "text_encoder_file": "text_encoder_weights",
    "text_encoder_2_file": "text_encoder_2_weights",
    "text_embeddings_file": "embeddings",
    "config_file": "config",
    "debug_dataset_file": "debug_dataset",
    "debug_masks_file": "debug_masks",
}


def to_layers(payload: Mapping[str, Any]) -> list[Layer]:
    """The service's defaults, then the request's own fields.

    A field that the service does not know is left aside, as the service does, with a note, and
    with a warning where it is nearly one that the service knows; a required one that is missing
    becomes a problem of its layer.
    """
    fields = Input.model_fields
    problems = [
        missing(name, SERVICE, _allowed(name))
        for name, info in fields.items()
        if info.is_required() and payload.get(name) is None
    ]
    notes = left_aside(payload, Input, NOT_USED, SERVICE)
    defaults = {
        name: info.default
        for name, info in fields.items()
        if not info.is_required() and info.default is not None
    }
    given = {
        name: NULL_MEANS.get(name) if value is None else value
        for name, value in payload.items()
        if name in fields and (value is not None or name in defaults)
    }
    return [
        Layer(f"{SERVICE} defaults", defaults, explicit=False),
        Layer("request", given, explicit=True, notes=notes, problems=problems),
    ]


def to_output(result: Result, url_for: Callable[[ResultFile], str]) -> Output:
    """The service's answer for a finished run."""
    return Output.model_validate(dialects.described(result, OUTPUT_ROLES, url_for, FIELDS))


def to_request(config: TrainingConfig) -> dict[str, Any]:
    """The request for the same training, see `Dialect`."""
    problems = dialects.only_these(config, {"concepts": None}, SERVICE)
    if problems:
        # They bring pictures and class of their own.
        raise InputError(problems)
    values = {**config.values(), "token_abstraction": ",".join(config.token.token_abstraction)}
    request = {
        name: values[name]
        for name, info in Input.model_fields.items()
        if values[name] is not None or info.default is not None
    }
    words = {name: _allowed(name) for name in request}
    return dialects.sayable(request, Input, SERVICE, words=words, leaf_of=str)


def _allowed(name: str) -> str:
    return allowed(name).removesuffix(", or null")
