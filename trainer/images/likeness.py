"""How alike pictures are, as CLIP sees them (Radford et al. 2021): the cosine of its embeddings.

DreamBooth (Ruiz et al. 2023) calls the measure CLIP-I. Only numbers of one model can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor

from trainer.errors import InputError
from trainer.images import pretrained
from trainer.images.pretrained import Unusable

FIELD = "--likeness"
_HINT = (
    "give a local folder or hub id of a CLIP model, such as openai/clip-vit-large-patch14, "
    f"or leave {FIELD} out"
)
# Kind of model to its class. That of both halves says the size of its embeddings elsewhere.
_CLASSES: Mapping[str, Callable[[], Any]] = {
    "clip": lambda: transformers.CLIPModel,
    "clip_vision_model": lambda: transformers.CLIPVisionModelWithProjection,
}


class Looker:
    """CLIP's image half; on the processor, so that it takes no memory from a base model.

    Args:
        url: folder or hub id.

    Raises:
        InputError: it cannot be had, or is another model.
    """

    def __init__(self, url: str) -> None:
        try:
            found = pretrained.find(url)
            if found.model_type not in _CLASSES:
                kinds = " or ".join(f"`{kind}`" for kind in _CLASSES)
                raise Unusable(f"`{url}` is a `{found.model_type}` model; allowed: {kinds}")
            self._processor: Any = pretrained.load_image_processor(found)
            model_class = _CLASSES[found.model_type]
            self._model: Any = pretrained.load_model(
                found, model_class, dtype=torch.float32, device="cpu"
            )
        except Unusable as error:
            raise InputError.of(FIELD, str(error), _HINT) from error

    def embedding(self, picture: Image.Image) -> Tensor:
        """The embedding (D,) of a picture of any shape, of length 1."""
        with pretrained.quiet(), torch.no_grad():
            pixels = self._processor(picture.convert("RGB"), return_tensors="pt").pixel_values
            seen = self._model.vision_model(pixel_values=pixels).pooler_output
            embedding: Tensor = self._model.visual_projection(seen)[0]
        return torch.nn.functional.normalize(embedding, dim=0)


def likeness(embedding: Tensor, others: Sequence[Tensor]) -> float:
    """The mean cosine in [-1, 1] between a picture and others.

    Args:
        embedding: (D,), of length 1.
        others: the same of each other picture; at least one.
    """
    return float(torch.stack(list(others)).double().matmul(embedding.double()).mean())
