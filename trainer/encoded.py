"""What encoders made of pictures and captions, kept for the next training: on disk, by content.

An entry's key is a digest of what was encoded and of all that decides what comes of it: weights,
number formats, device, libraries. What entries are used for is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import diffusers
import PIL
import safetensors.torch
import torch
import transformers
from safetensors import SafetensorError

from trainer import tensorfile
from trainer.cache import cache_folder
from trainer.contents import contents_digest
from trainer.data.store import Store, key_of
from trainer.families.base import Family, text_options
from trainer.names import tokenizer_name

Item = TypeVar("Item")
Tensors = Mapping[str, torch.Tensor]

# Part of every key: raised when the same input comes to something else by other code here.
VERSION = 2
# A picture takes 0.5 MB at 1024 x 1024 for SDXL and 2 MB for FLUX.1, a caption at most 4 MB.
MAX_BYTES = 8 * 2**30


class Shelf:
    """The encodings of one kind by one set of encoders.

    Args:
        store: where they lie.
        kind: what they are, such as `picture`.
        encoders: all that decides what an input comes to, as JSON can hold it.
    """

    def __init__(self, store: Store, kind: str, encoders: Mapping[str, Any]) -> None:
        self._store = store
        self._kind = kind
        self._encoders = encoders

    def get(self, encoded: Any) -> Tensors | None:
        """The encoding, or nothing where there is none or it is damaged.

        Args:
            encoded: what was encoded, as JSON can hold it.
        """
        content = self._store.get(self._key(encoded))
        if content is None:
            return None
        try:
            return safetensors.torch.load(content)
        except SafetensorError:
            return None

    def put(self, encoded: Any, encoding: Tensors) -> None:
        """Keeps an encoding, whose values are finite, if the folder can be written."""
        self._store.put(self._key(encoded), tensorfile.serialize(encoding, {}))

    def prune(self) -> None:
        """Keeps the folder within its limit."""
        self._store.prune()

    def _key(self, encoded: Any) -> str:
        return key_of(self._kind, {"encoded": encoded, "encoders": self._encoders})


def store_of_encodings() -> Store:
    """In the user's cache folder; all trainings share it."""
    return Store(cache_folder() / "encodings", MAX_BYTES)


def shelf_of_pictures(family: Family, device: torch.device) -> Shelf:
    """Of what the VAE makes of pictures.

    Args:
        family: with its VAE as loaded, or unread.
        device: where it encodes.
    """
    return _shelf("picture", family, ("vae",), device)


def shelf_of_captions(family: Family, device: torch.device) -> Shelf:
    """Of what the text encoders make of captions.

    Args:
        family: with its text encoders as loaded, or unread: nothing in them learns.
        device: where they encode.
    """
    return _shelf("caption", family, family.text_encoder_names, device, text_options(family))


def _shelf(
    kind: str,
    family: Family,
    models: Sequence[str],
    device: torch.device,
    options: Mapping[str, Any] | None = None,
) -> Shelf:
    """Of what some models of a family make.

    Args:
        options: what else decides what they make.
    """
    components = family.pipeline.components
    tokenizers = [tokenizer_name(name) for name in models if name in family.text_encoder_names]
    encoders = {
        "version": VERSION,
        "family": type(family).__name__,
        "contents": contents_digest(family, {*models, *tokenizers}),
        # How those of language models word a prompt.
        "templates": [str(components[name].chat_template) for name in tokenizers],
        "number formats": [str(family.unread.dtype_of(name)) for name in models],
        "arithmetic": _arithmetic(device),
        **(options or {}),
        "libraries": [m.__version__ for m in (torch, diffusers, transformers, PIL)],
    }
    return Shelf(store_of_encodings(), kind, encoders)


def _arithmetic(device: torch.device) -> list[Any]:
    """What decides the last bits of a result on a device."""
    exact = torch.are_deterministic_algorithms_enabled()
    if device.type != "cuda":
        capability = torch.backends.cpu.get_cpu_capability()
        return [device.type, capability, torch.get_num_threads(), exact]
    narrowed = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    return [torch.cuda.get_device_name(device), torch.version.cuda, *narrowed, exact]
