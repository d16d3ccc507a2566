"""How a training runs and what it leaves: optimizer, length, numerics, files."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from trainer.fields import WATCHING_ONLY, Section, clash, lowered

OptimizerName = Literal["adamw", "adamw8bit", "paged_adamw8bit", "adafactor", "prodigy"]
SchedulerName = Literal[
    "constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup"
]

# The file for diffusers has this name whatever the result is called: its pipelines look for it.
DIFFUSERS_NAME = "pytorch_lora_weights"

# The hub's rules: `-` and `.` stand between other letters, one at a time.
_HUB_NAME = r"[A-Za-z0-9_]+([.-][A-Za-z0-9_]+)*"
HUB_ID = rf"^({_HUB_NAME}/)?{_HUB_NAME}$"
_LONGEST_HUB_ID = 96


class OptimConfig(Section):
    """Optimizer, learning rates and their course."""

    optimizer: Annotated[OptimizerName, BeforeValidator(lowered)] = Field(
        "adamw",
        description="Update rule; adamw8bit keeps its state in 8 bits, paged_adamw8bit in "
        "memory that a GPU shares with the computer, for training all weights; adafactor keeps the "
        "second moment as rows and columns (fal, ours).",
    )
    fused_backward: bool = Field(
        False,
        description="Update each weight as soon as its gradient is there, and give that up: no "
        "gradients are kept, so they are neither clipped nor accumulated; for training all "
        "weights (ours).",
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
    deterministic: bool = Field(
        False,
        description="Use only operations that give the same bits each time on one GPU: the same "
        "seed then gives the same bytes there, more slowly; a processor's are the same anyway "
        "(ours).",
    )
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
        description="Arithmetic of the forward pass; what learns stays in 32 bits, unless "
        "weights_dtype says otherwise. auto: bf16 where the GPU has it, else fp16 on a GPU, no on "
        "a CPU (ours).",
    )
    gradient_checkpointing: bool | None = Field(
        None,
        description="Recompute activations backward: less memory, more time. None: on a GPU whose "
        "memory the steps would not fit otherwise, in as many blocks as that takes (ours).",
    )
    checkpointing_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the denoiser's transformer blocks that recompute, of each size of "
        "them; what stands between them and text encoders that learn recompute anyway (ours).",
    )
    cuda_graph: bool | None = Field(
        None,
        description="Record a step as a CUDA graph, one for each size of pictures, and play it: a "
        "small batch then does not wait for the processor. None: on a GPU wherever a step can be "
        "recorded and memory is enough (ours).",
        json_schema_extra=WATCHING_ONLY,
    )
    compile_blocks: bool | None = Field(
        None,
        description="Compile the denoiser's repeated blocks; what was compiled is kept for later "
        "trainings. None: on a GPU that has all of it, where the run is long enough to gain by "
        "it (ours).",
    )
    channels_last: bool | None = Field(
        None,
        description="Keep convolutions' frozen weights with channels last, as a GPU multiplies "
        "them; of a denoiser that is whole and frozen. None: on a GPU in half precision (ours).",
    )
    tf32: bool | None = Field(
        None,
        description="Let a GPU multiply what stays in 32 bits with 10 bits of mantissa. None: in "
        "mixed precision (ours).",
    )
    attention: Literal["auto", "flash", "cudnn", "efficient", "math"] = Field(
        "auto",
        description="Which of torch's kernels computes attention; auto: torch chooses (ours).",
    )
    offload_models: bool = Field(
        False,
        description="Keep on the GPU only the part at work while class pictures are made: text "
        "encoders, denoiser and VAE take turns (ours).",
        json_schema_extra=WATCHING_ONLY,
    )
    offload_blocks: int = Field(
        0,
        ge=0,
        description="Blocks of the denoiser whose frozen weights stay in the computer's memory "
        "and go to the GPU one layer at a time: less GPU memory, more time (ours).",
        json_schema_extra=WATCHING_ONLY,
    )
    num_workers: int = Field(
        0,
        ge=0,
        le=64,
        description="Processes that read pictures ahead where latents are not cached (ours).",
        json_schema_extra=WATCHING_ONLY,
    )
    report_steps: int | None = Field(
        None,
        ge=1,
        description="Steps whose losses are read from the device at once; in between it is not "
        "waited for. None: 10 on a GPU, 1 elsewhere (ours).",
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
    rank_timeout: float = Field(
        300,
        ge=5,
        description="Seconds after which a process that does not come to a step, or gives no sign "
        "of life, ends the training of all that were launched together (ours).",
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
        False,
        description="Deliver the pictures of the first steps exactly as they were trained (fal).",
        json_schema_extra=WATCHING_ONLY,
    )
    debug_loss_masks: bool = Field(
        False,
        description="Deliver the masks of the first steps exactly as the loss used them (fal).",
        json_schema_extra=WATCHING_ONLY,
    )
    data_archive_format: Literal["zip", "tar", "tar.gz"] = Field(
        "zip",
        description="Container of delivered folders (fal).",
        json_schema_extra=WATCHING_ONLY,
    )
    extract_rank: int | None = Field(
        None,
        ge=1,
        description="Deliver a LoRA of this rank beside fully trained weights, taken from their "
        "change by singular values. None: no LoRA (ours; BFL's lora_rank).",
        json_schema_extra=WATCHING_ONLY,
    )
    push_to_hub: bool = Field(
        False,
        description="Send the result files with their model card to the Hugging Face hub once they "
        "are verified; pictures stay here. The token is that of `hf auth login` or HF_TOKEN "
        "(diffusers).",
        json_schema_extra=WATCHING_ONLY,
    )
    hub_model_id: str | None = Field(
        None,
        pattern=HUB_ID,
        max_length=_LONGEST_HUB_ID,
        description="Repository on the hub, `name` or `owner/name`. None: output_name, of the "
        "token's owner (diffusers).",
        json_schema_extra=WATCHING_ONLY,
    )
    hub_private: bool = Field(
        True,
        description="Make a new repository that nobody else sees, and send nothing to one that "
        "others see; false: everybody sees it (ours; diffusers' are public).",
        json_schema_extra=WATCHING_ONLY,
    )

    @model_validator(mode="after")
    def _name_of_its_own(self) -> OutputConfig:
        # Letters are compared without their case, as the file systems of macOS and Windows do.
        if self.output_name.lower() == DIFFUSERS_NAME:
            allowed = f"another name: `{DIFFUSERS_NAME}.safetensors` is the file for diffusers"
            raise clash("output_name", self.output_name, allowed)
        return self

    @model_validator(mode="after")
    def _name_on_the_hub(self) -> OutputConfig:
        name = self.hub_model_id or self.output_name
        is_one = re.fullmatch(HUB_ID, name) and not name.endswith(".git")
        if self.push_to_hub and (not is_one or len(name) > _LONGEST_HUB_ID):
            allowed = "`name` or `owner/name`: letters, digits, `_`, single `-` and `.` between"
            raise clash("hub_model_id", f"`{name}`, which the hub does not allow", allowed)
        return self
