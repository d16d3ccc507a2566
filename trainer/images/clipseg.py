"""CLIPSeg: finds what words mean in a picture (Lüddecke and Ecker 2022, CVPR).

The map stays at the size that the model makes; laying it over the picture, and making a mask of
it, is not known here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from PIL import Image

from trainer.errors import InputError
from trainer.images import pretrained
from trainer.images.masks import Segmenter
from trainer.images.pretrained import Pretrained, Unusable

FIELD = "clipseg_url"
_HINT = (
    "give a local folder of CLIPSeg, masks of your own beside the pictures, or "
    '`clip_seg_mask_prompt: ""` to learn whole pictures'
)


@dataclass(frozen=True)
class _ClipSeg:
    """A loaded model with what prepares its inputs."""

    image_processor: Any
    tokenizer: Any
    model: Any

    def __call__(self, image: Image.Image, prompt: str) -> npt.NDArray[np.float32]:
        """The logits of the prompt against nothing, (352, 352) with the published model.

        cog-sdxl's `clipseg_mask_generator` (preprocess.py) takes the softmax over the prompt and
        the empty prompt: that is the sigmoid of their difference.

        Args:
            image: an upright picture of any shape; the model sees it squeezed to a square.
            prompt: what to find.

        Raises:
            InputError: the prompt is longer than the model can read.
        """
        words = self.tokenizer([prompt, ""], padding=True, return_tensors="pt")
        self._check_length(words["input_ids"].shape[1], prompt)
        with pretrained.quiet():
            pixels = self.image_processor(image.convert("RGB"), return_tensors="pt").pixel_values
        device = self.model.device
        with torch.no_grad():
            answer = self.model(
                **words.to(device), pixel_values=pixels.expand(2, -1, -1, -1).to(device)
            )
        logits: npt.NDArray[np.float32] = (
            (answer.logits[0] - answer.logits[1]).float().cpu().numpy()
        )
        return logits

    def _check_length(self, tokens: int, prompt: str) -> None:
        most = self.model.config.text_config.max_position_embeddings
        if tokens > most:
            raise InputError.of(
                "clip_seg_mask_prompt",
                f"`{prompt[:40]}…` has {tokens} tokens, of which CLIPSeg reads {most}",
                "name what to keep in a few words, such as `head`",
            )


def clipseg(url: str) -> Segmenter:
    """CLIPSeg made ready, on the GPU where there is one.

    Args:
        url: folder or hub id.

    Raises:
        InputError: it cannot be had, or is another model.
    """
    try:
        found = _found(url)
        return _ClipSeg(
            pretrained.load_image_processor(found),
            pretrained.load_tokenizer(found),
            pretrained.load_model(
                found,
                lambda: transformers.CLIPSegForImageSegmentation,
                dtype=torch.float32,
                device=pretrained.device_kind(),
            ),
        )
    except Unusable as error:
        raise InputError.of(FIELD, str(error), _HINT) from error


def identity_of(url: str) -> str:
    """What tells one CLIPSeg from another, without loading it: equal identities, equal masks.

    Raises:
        InputError: it cannot be had, or is another model.
    """
    try:
        return _found(url).identity
    except Unusable as error:
        raise InputError.of(FIELD, str(error), _HINT) from error


def _found(url: str) -> Pretrained:
    found = pretrained.find(url)
    if found.model_type != "clipseg":
        raise Unusable(f"`{url}` is a `{found.model_type}` model; allowed: `clipseg`")
    return found
