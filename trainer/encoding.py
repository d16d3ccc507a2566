"""What is computed once before the first step: captions as conditioning, pictures as latents.

Each caption and each picture is encoded by itself, so that the values do not depend on what
else is in the data set. Afterwards the encoders are given up and their memory is free.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence

import torch

from trainer.data.dataset import Dataset
from trainer.errors import NonFiniteError
from trainer.events import Event, NoteEvent, StageEvent
from trainer.families.base import Conditioning, Family, LatentDistribution

# Caption to its conditioning, rows of one, on the processor.
EncodedCaptions = Mapping[str, Conditioning]
# (example number, mirrored) to its latents' distribution, rows of one, on the processor.
EncodedPictures = Mapping[tuple[int, bool], LatentDistribution]

# Characters of a caption that a message shows.
_SHOWN = 40


def encode_captions(
    family: Family, dataset: Dataset, device: torch.device
) -> Generator[Event, None, EncodedCaptions]:
    """Encodes every caption that a step may ask for and gives up the text encoders.

    A caption that is longer than a tokenizer's limit is cut there, and that is said.
    """
    for name in family.text_encoder_names:
        family.pipeline.components[name].to(device)
    captions = dataset.all_captions()
    encoded: dict[str, Conditioning] = {}
    for done, caption in enumerate(captions, start=1):
        rest = cut_off(family, caption)
        if rest:
            yield _cut_caption(caption, rest, dataset.data.instance_prompt)
        with torch.no_grad():
            conditioning = family.encode_text([caption])
        encoded[caption] = {name: states.cpu() for name, states in conditioning.items()}
        yield StageEvent("encode captions", done, len(captions))
    family.pipeline.register_modules(**dict.fromkeys(family.text_encoder_names))
    return encoded


def cut_off(family: Family, caption: str) -> str:
    """The end of a caption that a tokenizer of the family has no room for, or nothing.

    Where several cut the caption, it is the longest end.
    """
    ends = [""]
    for name, tokenizer in family.pipeline.components.items():
        if not name.startswith("tokenizer") or tokenizer is None:
            continue
        tokens = tokenizer(caption, add_special_tokens=False, verbose=False).input_ids
        room = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()
        ends.append(tokenizer.decode(tokens[room:]).strip())
    return max(ends, key=len)


def _cut_caption(caption: str, rest: str, instance_prompt: str) -> NoteEvent:
    field = "instance_prompt" if caption == instance_prompt else "captions_file_url"
    start = caption if len(caption) <= _SHOWN else f"{caption[:_SHOWN].rstrip()} …"
    message = f"the caption `{start}` is too long for the text encoder, which never sees: `{rest}`"
    return NoteEvent("warning", field, message)


def encode_pictures(
    family: Family, dataset: Dataset, device: torch.device
) -> Generator[Event, None, EncodedPictures]:
    """Encodes every picture, and its mirror image where flips are drawn; gives up the VAE.

    Raises:
        NonFiniteError: the VAE overflows on a picture.
    """
    family.pipeline.vae.to(device)
    views = dataset.all_views()
    encoded: dict[tuple[int, bool], LatentDistribution] = {}
    for done, (number, flipped) in enumerate(views, start=1):
        pixels = dataset.pixels_of(number, flipped)[None].to(device)
        latents = encode(family, pixels, [dataset.examples[number].name])
        encoded[number, flipped] = LatentDistribution(latents.mean.cpu(), latents.std.cpu())
        yield StageEvent("encode pictures", done, len(views))
    family.pipeline.register_modules(vae=None)
    return encoded


def encode(family: Family, pixels: torch.Tensor, names: Sequence[str]) -> LatentDistribution:
    """The family's latents of pixels, checked.

    Args:
        family: with its VAE on the pixels' device.
        pixels: (B, 3, H, W) in [-1, 1].
        names: of the pictures, for the message.

    Raises:
        NonFiniteError: the VAE overflows.
    """
    with torch.no_grad():
        latents = family.encode_image(pixels)
    finite = torch.isfinite(latents.mean).flatten(1).all(1)
    if not bool(finite.all()):
        name = names[int((~finite).nonzero()[0])]
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
    return {name: torch.cat([row[name] for row in rows]).to(device) for name in rows[0]}


def stack_latents(
    encoded: EncodedPictures, views: Sequence[tuple[int, bool]], device: torch.device
) -> LatentDistribution:
    """The latent distributions of a batch, in the order of its views."""
    rows = [encoded[view] for view in views]
    return LatentDistribution(
        torch.cat([row.mean for row in rows]).to(device),
        torch.cat([row.std for row in rows]).to(device),
    )
