"""Captions as conditioning and pictures as latents.

Each caption is encoded once for all its uses in a batch, and for good once no text encoder and no
new token learns any more; a picture is encoded by itself, so that its latents do not depend on
what else is in the data set. Encoders that have done their work are given up.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from trainer.config import TokenConfig
from trainer.data.dataset import Dataset
from trainer.errors import NonFiniteError
from trainer.events import Event, NoteEvent, StageEvent
from trainer.families.base import (
    Conditioning,
    Family,
    LatentDistribution,
    adapted_encoders,
    token_encoders,
)
from trainer.names import tokenizer_name
from trainer.processes import ALONE, Processes
from trainer.rules.ordinary import is_ordinary
from trainer.tokens import TokenNames
from trainer.transfers import moved

# Caption to its conditioning, rows of one, on the processor.
EncodedCaptions = Mapping[str, Conditioning]
# (example number, mirrored) to its latents' distribution, rows of one, on the processor.
EncodedPictures = Mapping[tuple[int, bool], LatentDistribution]

# Tokens that the pipelines of transformers give their text encoders; tokenizers of language models
# have room for more.
_LONGEST_CAPTION = 512
# Characters of a caption that a message shows.
_SHOWN = 40


class Text:
    """The conditioning of captions, computed in each step while it may change, else kept.

    Args:
        family: with its text encoders.
        captions: every caption that a step may ask for, as the user wrote it.
        names: of the new tokens in them, if there are any.
        device: of the text encoders while they are needed.
        autocast: makes the context that sets the number formats of encoding.
        processes: those that share the encoding of what is kept.
    """

    def __init__(
        self,
        family: Family,
        captions: Sequence[str],
        names: TokenNames | None,
        device: torch.device,
        *,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        processes: Processes = ALONE,
    ) -> None:
        self._family = family
        self._captions = tuple(captions)
        self._names = names
        self._device = device
        self._autocast = autocast
        self._processes = processes
        self._kept: EncodedCaptions | None = None
        self._move_encoders(device)

    @property
    def is_live(self) -> bool:
        """Whether captions are still encoded in each step."""
        return self._kept is None

    def of(self, captions: Sequence[str]) -> Conditioning:
        """The conditioning of a batch, in the order of its captions; differentiable while live."""
        if self._kept is not None:
            return stack_conditioning(self._kept, captions, self._device)
        unique = list(dict.fromkeys(captions))
        rows = moved(torch.tensor([unique.index(caption) for caption in captions]), self._device)
        with self._autocast():
            conditioning = self._encode(unique)
        return {name: states.index_select(0, rows) for name, states in conditioning.items()}

    def keep(self) -> Generator[Event, None, None]:
        """Encodes every caption once and for all, and gives up the text encoders.

        Raises:
            NonFiniteError: a text encoder overflows.
        """
        kept: dict[str, Conditioning] = {}
        encoded = self._processes.shared(self._captions, self._encode_to_keep)
        for done, (caption, conditioning) in enumerate(encoded, start=1):
            kept[caption] = conditioning
            yield StageEvent("encode captions", done, len(self._captions))
        self._kept = kept
        # Trained ones are held elsewhere, and read again when the result is written.
        for name in {*adapted_encoders(self._family), *token_encoders(self._family)}:
            self._family.pipeline.components[name].to("cpu")
        self._family.pipeline.register_modules(**dict.fromkeys(self._family.text_encoder_names))

    def _encode_to_keep(self, caption: str) -> Conditioning:
        with torch.no_grad(), self._autocast():
            conditioning = self._encode([caption])
        if not all(bool(states.isfinite().all()) for states in conditioning.values()):
            raise NonFiniteError(
                f"a text encoder gives no finite states for `{_start_of(caption)}`",
                "set mixed_precision: bf16 or no",
            )
        return {name: states.cpu() for name, states in conditioning.items()}

    def _encode(self, captions: Sequence[str]) -> Conditioning:
        names = self._names
        return self._family.encode_text([names.replaced(c) if names else c for c in captions])

    def _move_encoders(self, device: torch.device) -> None:
        for name in self._family.text_encoder_names:
            self._family.pipeline.components[name].to(device)


@dataclass(frozen=True)
class Encodings:
    """What captions and pictures are to the denoiser.

    Args:
        text: the conditioning of the captions.
        pictures: encoded pictures, or nothing where they are encoded in each step.
    """

    text: Text
    pictures: EncodedPictures | None


def tokenizer_of(family: Family, text_encoder: str) -> Any:
    """The tokenizer beside a text encoder."""
    return family.pipeline.components[tokenizer_name(text_encoder)]


def cut_captions(
    family: Family, captions: Sequence[str], names: TokenNames | None, instance_prompt: str
) -> list[NoteEvent]:
    """What the user should know of captions longer than a tokenizer's limit: they are cut there."""
    ends = {caption: cut_off(family, caption, names) for caption in captions}
    return [_cut_caption(c, rest, instance_prompt) for c, rest in ends.items() if rest]


def cut_off(family: Family, caption: str, names: TokenNames | None) -> str:
    """The end of a caption that no text encoder of the family sees, or nothing."""
    ends: list[str] = []
    text = names.replaced(caption) if names else caption
    for text_encoder in family.text_encoder_names:
        tokenizer = tokenizer_of(family, text_encoder)
        tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        length = min(tokenizer.model_max_length, _LONGEST_CAPTION)
        room = length - tokenizer.num_special_tokens_to_add()
        ends.append(tokenizer.decode(tokens[room:]).strip())
    return min(ends, key=len)


def _cut_caption(caption: str, rest: str, instance_prompt: str) -> NoteEvent:
    field = "instance_prompt" if caption == instance_prompt else "captions_file_url"
    start = _start_of(caption)
    message = f"the caption `{start}` is too long for the text encoder, which never sees: `{rest}`"
    return NoteEvent("warning", field, message)


def _start_of(caption: str) -> str:
    """As much of a caption as a message shows."""
    return caption if len(caption) <= _SHOWN else f"{caption[:_SHOWN].rstrip()} …"


def common_identifiers(family: Family, identifiers: Sequence[str]) -> list[NoteEvent]:
    """Warnings of identifiers that a tokenizer of the family has as one of its common tokens.

    For identifiers that get no new tokens. The default one is nobody's choice, and everyday words
    are warned of without a tokenizer.
    """
    default = TokenConfig().token_abstraction
    chosen = [name for name in identifiers if name not in default and not is_ordinary(name)]
    tokenizers = [tokenizer_of(family, name) for name in family.text_encoder_names]
    return [
        NoteEvent("warning", "token_abstraction", _COMMON.format(name))
        for name in dict.fromkeys(chosen)
        if any(_is_common(name, tokenizer) for tokenizer in tokenizers)
    ]


_COMMON = (
    "`{}` is a common word to the text encoder: what it means already mixes with the subject; "
    "a made-up word such as `SIDAI` is safer"
)


def _is_common(word: str, tokenizer: Any) -> bool:
    """Whether a word is one token in the commoner half of a tokenizer's vocabulary.

    Tokenizers number their tokens from the commonest on. A rare one, such as `sks`, is what
    DreamBooth recommends as an identifier (Ruiz et al. 2023, section 3.2).
    """
    tokens = tokenizer(word, add_special_tokens=False).input_ids
    return len(tokens) == 1 and tokens[0] < len(tokenizer) / 2


def encode_pictures(
    family: Family, dataset: Dataset, device: torch.device, processes: Processes = ALONE
) -> Generator[Event, None, EncodedPictures]:
    """Encodes every picture, and its mirror image where flips are drawn; gives up the VAE.

    Args:
        processes: those that share the work.

    Raises:
        NonFiniteError: the VAE overflows on a picture.
    """
    family.pipeline.vae.to(device)
    views = dataset.all_views()
    encoded: dict[tuple[int, bool], LatentDistribution] = {}

    def encoded_view(view: tuple[int, bool]) -> LatentDistribution:
        pixels = dataset.pixels_of(*view)[None].to(device)
        latents = _checked(encode(family, pixels), dataset.examples[view[0]].name)
        return LatentDistribution(latents.mean.cpu(), latents.std.cpu())

    for done, (view, latents) in enumerate(processes.shared(views, encoded_view), start=1):
        encoded[view] = latents
        yield StageEvent("encode pictures", done, len(views))
    family.pipeline.register_modules(vae=None)
    return encoded


def encode(family: Family, pixels: torch.Tensor) -> LatentDistribution:
    """The family's latents of pixels (B, 3, H, W) in [-1, 1], on the VAE's device."""
    with torch.no_grad():
        return family.encode_image(pixels)


def _checked(latents: LatentDistribution, name: str) -> LatentDistribution:
    """The latents of a picture of this name.

    Raises:
        NonFiniteError: the VAE overflows.
    """
    if not bool((latents.mean.isfinite() & latents.std.isfinite()).all()):
        raise NonFiniteError(
            f"the VAE gives no finite latents for `{name}`",
            "set upscale_vae_32bit: true, or give a vae_url made for half precision",
        )
    return latents


def stack_conditioning(
    encoded: EncodedCaptions, captions: Sequence[str], device: torch.device
) -> Conditioning:
    """The conditioning of a batch, in the order of its captions."""
    rows = [encoded[caption] for caption in captions]
    return {name: moved(torch.cat([row[name] for row in rows]), device) for name in rows[0]}


def stack_latents(
    encoded: EncodedPictures, views: Sequence[tuple[int, bool]], device: torch.device
) -> LatentDistribution:
    """The latent distributions of a batch, in the order of its views."""
    rows = [encoded[view] for view in views]
    return LatentDistribution(
        moved(torch.cat([row.mean for row in rows]), device),
        moved(torch.cat([row.std for row in rows]), device),
    )
