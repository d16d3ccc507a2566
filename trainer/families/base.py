"""What a model family must say: its facts, and three functions from captions and pixels to a
prediction. A family has no loop, no loss and no hooks; the diffusers pipeline is its bag of
components.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import torch

from trainer.config import AdapterConfig
from trainer.names import KohyaNames
from trainer.objectives import PATCH, Ddpm, Objective

# Tokens of a caption that language models among the text encoders read, unless told otherwise.
MAX_SEQUENCE_LENGTH = 512

# What a family makes of captions: tensors of shape (B, …), named as its pipeline's call takes them.
Conditioning = Mapping[str, torch.Tensor]

# What a denoiser may be told of each example beside its caption. Sizes and crop, int64 tensors
# (B, 2): `original_size` (height, width), `crop_top_left` (top, left) in the resized picture,
# `target_size` (height, width). `guidance`, fp32 (B,): what a guidance-distilled one is to follow.
Geometry = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class LatentDistribution:
    """The normal distribution of a picture's latents, in the denoiser's scale.

    Args:
        mean: (B, C, h, w).
        std: (B, C, h, w); one standard deviation.
    """

    mean: torch.Tensor
    std: torch.Tensor


@dataclass(frozen=True)
class Guided:
    """Checkpoints whose pictures follow another picture; nothing is trained on them.

    Args:
        pipeline_class: of diffusers; in `model_index.json` it tells these checkpoints.
        denoiser: entries of the denoiser's configuration, in place of the family's.
        image: what the pipeline's call names the guiding picture.
        mask: what it names the mask; empty where it takes none.
    """

    pipeline_class: type[Any]
    denoiser: Mapping[str, Any]
    image: str
    mask: str = ""


@dataclass(frozen=True)
class Checkpoints:
    """How a family's base models are known, and completed where they are one file.

    Args:
        denoiser: entries of the denoiser's configuration that set it apart from models of the
            same pipeline; null and false stand for an absent entry too.
        pipelines: names of other pipeline classes around the same components.
        file_key: a tensor that only this family's one-file checkpoints hold; empty where no such
            files are read.
        file_input: the denoiser's first convolution in such a file; its inputs are counted.
        file_config: hub repository with the configurations and tokenizers that such a file lacks.
        vaes: hub ids of well-known VAEs that speak of this family's latents.
        unused: components of the pipeline that no training needs.
        language_model: the text encoder that can be told how many tokens of a caption it reads,
            padding among them; empty: there is none.
        side_step: pixels; both sides of a trained picture are whole numbers of them.
        guided: what may guide a picture, such as `depth`, to the checkpoints for it.
    """

    denoiser: Mapping[str, Any]
    pipelines: frozenset[str] = frozenset()
    file_key: str = ""
    file_input: str = ""
    file_config: str = ""
    vaes: frozenset[str] = frozenset()
    unused: tuple[str, ...] = ()
    language_model: str = ""
    side_step: int = 8
    guided: Mapping[str, Guided] = field(default_factory=dict)

    def difference(self, config: Mapping[str, Any]) -> str | None:
        """Where a denoiser's configuration is not of this family, in words."""
        for name, wanted in self.denoiser.items():
            got = config.get(name)
            if (got or None) != (wanted or None):
                return f"has {name} `{got}` where this family has `{wanted}`"
        return None


@dataclass(frozen=True)
class UnreadModel:
    """A model of a pipeline that was left in its files.

    Args:
        contents: digest of what it holds.
        dtype: number format that it is read in.
    """

    contents: str
    dtype: torch.dtype


# Names of models to these models, read from their files.
Reader = Callable[[Collection[str]], Mapping[str, torch.nn.Module]]


def _nothing(names: Collection[str]) -> Mapping[str, torch.nn.Module]:
    return {}


@dataclass
class Unread:
    """The models of a pipeline that were left in their files until they are needed.

    Args:
        pipeline: that they belong to.
        models: by name; one that has been read is among them no more.
        read: reads them.
    """

    pipeline: Any
    models: dict[str, UnreadModel] = field(default_factory=dict)
    read: Reader = _nothing

    def have(self, *names: str) -> None:
        """Reads those of these models that were left in their files.

        Raises:
            InputError: files are missing or unreadable.
        """
        lacking = [name for name in names if name in self.models]
        if lacking:
            self.pipeline.register_modules(**self.read(lacking))
            for name in lacking:
                del self.models[name]

    def dtype_of(self, name: str) -> torch.dtype:
        """The number format of a model of the pipeline, read or not."""
        if name in self.models:
            return self.models[name].dtype
        dtype: torch.dtype = self.pipeline.components[name].dtype
        return dtype


class Family(ABC):
    """A model family at work on one loaded pipeline.

    Args:
        pipeline: an instance of `pipeline_class`.
        unread: its models that were left in their files. None: none was.
        max_sequence_length: tokens of a caption that its language model reads, if it has one.
    """

    pipeline_class: ClassVar[type[Any]]
    objective_class: ClassVar[type[Objective]] = Ddpm
    denoiser_name: ClassVar[str]
    text_encoder_names: ClassVar[tuple[str, ...]]
    target_modules: ClassVar[tuple[str, ...]] = AdapterConfig().target_unet_modules
    checkpoints: ClassVar[Checkpoints]
    kohya: ClassVar[KohyaNames]

    def __init__(
        self,
        pipeline: Any,
        unread: Unread | None = None,
        max_sequence_length: int | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.denoiser: Any = pipeline.components[self.denoiser_name]
        self.unread = unread or Unread(pipeline)
        self.max_sequence_length = max_sequence_length or MAX_SEQUENCE_LENGTH

    @abstractmethod
    def encode_text(self, captions: Sequence[str]) -> Conditioning:
        """Captions as the pipeline tokenises and encodes them, one row each."""

    def encode_image(self, pixels: torch.Tensor) -> LatentDistribution:
        """Pixels (B, 3, H, W) in [-1, 1] as a distribution of latents, by the pipeline's VAE."""
        return latents_of(self.pipeline.vae, pixels)

    @abstractmethod
    def predict(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        text: Conditioning,
        geometry: Geometry,
    ) -> torch.Tensor:
        """The denoiser's prediction (B, C, h, w).

        Args:
            noisy_latents: (B, C, h, w).
            timesteps: (B,), in 0 … 1000.
            text: what `encode_text` gave for the captions.
            geometry: each example's sizes and crop.
        """


def guided_by(family: type[Family], guide: str) -> type[Family]:
    """The family as its checkpoints for a guiding picture have it; they keep its layers' names.

    Raises:
        KeyError: it has none for this guide.
    """
    guided = family.checkpoints.guided[guide]
    checkpoints = replace(
        family.checkpoints, denoiser=guided.denoiser, pipelines=frozenset(), unused=()
    )
    facts = {"pipeline_class": guided.pipeline_class, "checkpoints": checkpoints}
    return cast(type[Family], type(family.__name__, (family,), facts))


def adapted_encoders(family: type[Family] | Family) -> tuple[str, ...]:
    """The text encoders of a family that may learn: other programs know names for their layers."""
    return tuple(n for n in family.text_encoder_names if n in family.kohya.text_encoder_prefixes)


def token_encoders(family: type[Family] | Family) -> tuple[str, ...]:
    """The text encoders of a family that may learn new tokens: other programs know the keys."""
    return tuple(n for n in family.text_encoder_names if n in family.kohya.embedding_keys)


def text_options(family: Family) -> dict[str, int]:
    """What the pipeline is told of the length of captions, in its call and where it encodes."""
    if not family.checkpoints.language_model:
        return {}
    return {"max_sequence_length": family.max_sequence_length}


def latents_of(vae: Any, pixels: torch.Tensor) -> LatentDistribution:
    """What an AutoencoderKL says of pixels, shifted and scaled as its configuration asks.

    The scale is `scaling_factor`, after centring by `latents_mean` / `latents_std` or
    `shift_factor` where the configuration has them, as diffusers' pipelines undo it.
    """
    posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
    mean, std = posterior.mean.float(), posterior.std.float()
    shift, scale = _shift_and_scale(vae, mean)
    return LatentDistribution(mean=(mean - shift) * scale, std=std * scale)


def packed(latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, h, w) as tokens (B, h/2 * w/2, 4C): the four pixels of a square, by channel.

    Source of the order: diffusers' `FluxPipeline._pack_latents`.
    """
    batch, channels, height, width = latents.shape
    rows, columns = height // PATCH, width // PATCH
    squares = latents.view(batch, channels, rows, PATCH, columns, PATCH)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)


def unpacked(tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Tokens as latents of a shape (B, C, h, w): the inverse of `packed`."""
    batch, channels, height, width = like.shape
    rows, columns = height // PATCH, width // PATCH
    squares = tokens.view(batch, rows, columns, channels, PATCH, PATCH)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def _shift_and_scale(
    vae: Any, like: torch.Tensor
) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    shift: torch.Tensor | float = 0.0
    divisor: torch.Tensor | float = 1.0
    if vae.config.get("latents_mean") is not None:
        shift = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1).to(like)
        divisor = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1).to(like)
    elif vae.config.get("shift_factor") is not None:
        shift = vae.config.shift_factor
    return shift, vae.config.scaling_factor / divisor
