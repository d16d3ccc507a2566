"""Models made by others, from a folder or the hub: found, told apart, and loaded whole.

Knows neither what a model is for nor which option names it: what goes wrong is `Unusable`.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError
from transformers.utils import logging as bars
from transformers.utils.import_utils import is_bitsandbytes_available

from trainer.errors import DiskError
from trainer.images.findings import first_line

# Blocks of a file of weights that enter its digest, and their bytes.
_SAMPLES, _SAMPLE = 64, 4096
_SHOWN_TENSORS = 3
# Parts that stay whole where the rest is kept in 4 bits, as beginnings of layers' names: what sees
# is small beside what writes, and SigLIP reads weights past their layers, which fails where those
# are packed; the last layer may share its weights with the first.
_NEVER_PACKED = [
    *("lm_head", "text_decoder.cls"),
    *("vision_model", "model.visual", "model.vision_tower", "model.multi_modal_projector"),
]

# Kind of error and what it means; the first that fits counts, so special ones come first.
_OUT_OF_REACH = "`{url}` is neither a folder nor in the cache, and the hub is out of reach"
_HUB_ANSWERS: tuple[tuple[type[Exception], str], ...] = (
    (GatedRepoError, "`{url}` is gated: accept its licence on its page, then run `hf auth login`"),
    (RepositoryNotFoundError, "`{url}` is neither a folder nor on the hub"),
    (LocalEntryNotFoundError, _OUT_OF_REACH),
    (OfflineModeIsEnabled, _OUT_OF_REACH),
    (EntryNotFoundError, "`{url}` on the hub has no `config.json`"),
    (HFValidationError, "there is no folder `{url}`"),
    (HfHubHTTPError, "the hub answered for `{url}`: {error}"),
)


class Unusable(Exception):
    """A model that cannot be had; its text is the reason."""


@dataclass(frozen=True)
class Pretrained:
    """A model that was found but not loaded.

    Args:
        url: folder or hub id.
        revision: its commit on the hub; a folder has none.
        config: what its `config.json` says.
        identity: changes with what the model holds.
    """

    url: str
    revision: str | None
    config: Mapping[str, Any]
    identity: str

    @property
    def model_type(self) -> str:
        """The architecture's name in transformers; empty where the model tells none."""
        return str(self.config.get("model_type", ""))

    @property
    def place(self) -> dict[str, Any]:
        """How transformers is told where it is: the same commit for all its files."""
        return {
            "pretrained_model_name_or_path": self.url,
            "revision": self.revision or "main",
            "trust_remote_code": False,
        }


def find(url: str) -> Pretrained:
    """Finds a model by its small description; fetches no weights.

    Args:
        url: folder or hub id.

    Raises:
        Unusable: it cannot be had, or is no model.
    """
    folder = Path(url)
    if folder.is_dir():
        path = folder / "config.json"
        if not path.is_file():
            raise Unusable(f"the folder `{url}` has no `config.json`")
        return Pretrained(url, None, _read(path, url), _digest(folder))
    try:
        with quiet():
            path = Path(hf_hub_download(url, "config.json"))
    except tuple(kind for kind, _ in _HUB_ANSWERS) as error:
        (text, *_) = [text for kind, text in _HUB_ANSWERS if isinstance(error, kind)]
        raise Unusable(text.format(url=url, error=first_line(error))) from error
    except OSError as error:
        raise _unreadable(url, error) from error
    commit = path.parent.name
    return Pretrained(url, commit, _read(path, url), f"{url}@{commit}")


def weight_bytes(url: str) -> int | None:
    """What the weights of a local model take on disk; nothing is known of one on the hub."""
    return sum(path.stat().st_size for path in Path(url).glob("*.safetensors")) or None


def load_model(
    found: Pretrained,
    model_class: Callable[[], Any],
    *,
    dtype: torch.dtype,
    device: str,
    in_4bit: bool = False,
) -> Any:
    """The model with all of its weights, for use only.

    Args:
        found: where it is.
        model_class: gives its class in transformers.
        dtype: of its weights, or in 4 bits of what is computed with them.
        device: where it is to live.
        in_4bit: keep the weights of the layers that write in NormalFloat of 4 bits.

    Raises:
        Unusable: files are missing or of another model.
        torch.OutOfMemoryError: it does not fit.
    """
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True}
    if in_4bit or device != "cpu":
        options["device_map"] = {"": device}
    with readable(found.url):
        if in_4bit:
            options["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=dtype,
                llm_int8_skip_modules=_NEVER_PACKED,
            )
        model, report = model_class().from_pretrained(
            **found.place, **options, output_loading_info=True
        )
    absent = sorted([*report["missing_keys"], *(str(key[0]) for key in report["mismatched_keys"])])
    if absent:
        shown = ", ".join(f"`{name}`" for name in absent[:_SHOWN_TENSORS])
        raise Unusable(
            f"the weights in `{found.url}` are not those of this model: {len(absent)} tensors "
            f"are missing, such as {shown}"
        )
    return model.requires_grad_(False).eval()


def load_image_processor(found: Pretrained) -> Any:
    """What makes tensors of pictures as the model wants them; by Pillow, on every machine alike.

    Raises:
        Unusable: the model does not say how.
    """
    with readable(found.url):
        return transformers.AutoImageProcessor.from_pretrained(**found.place, backend="pil")


def load_tokenizer(found: Pretrained) -> Any:
    """The model's tokenizer.

    Raises:
        Unusable: it has none that can be read.
    """
    with readable(found.url):
        return transformers.AutoTokenizer.from_pretrained(**found.place)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps libraries from talking, and from showing bars, while something is done."""
    disabled, has_bars = logging.root.manager.disable, bars.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    bars.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if has_bars:
            bars.enable_progress_bar()


@contextmanager
def readable(url: str) -> Iterator[None]:
    """Quiet, with everything that transformers' loaders raise turned into `Unusable`.

    Args:
        url: of the model that is read.
    """
    try:
        with quiet():
            yield
    except torch.OutOfMemoryError:
        raise
    # What transformers raises of files that do not fit its classes is any of these.
    except (
        *(OSError, ValueError, RuntimeError, SafetensorError),
        *(ImportError, AttributeError, KeyError, TypeError),
    ) as error:
        raise _unreadable(url, error) from error


def device_kind() -> str:
    """Where models run here: `cuda` or `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def has_torchvision() -> bool:
    """Whether torchvision can be imported: one made for another torch counts as none."""
    try:
        with quiet():
            importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError, AttributeError):
        return False
    return True


def has_bitsandbytes() -> bool:
    """Whether transformers can keep weights in 4 bits here."""
    return bool(is_bitsandbytes_available())


def free_bytes() -> int:
    """Memory that a model could have now, of the GPU or else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    # Memory that the system uses for files counts as free.
    described = Path("/proc/meminfo")
    for line in described.read_text().splitlines() if described.is_file() else []:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _read(path: Path, url: str) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise Unusable(f"`config.json` of `{url}` cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise Unusable(f"`config.json` of `{url}` holds no object of names and values")
    return content


def _digest(folder: Path) -> str:
    """sha256 over the small files of a folder, and the size and samples of its weights."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        step = max(_SAMPLE, size // _SAMPLES)
        with path.open("rb") as file:
            for start in range(0, size, step):
                file.seek(start)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def _unreadable(url: str, error: Exception) -> DiskError | Unusable:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskError(f"there is no room to download `{url}`", "make room, or move HF_HOME")
    # transformers then fails to import its own classes, and blames those.
    if importlib.util.find_spec("torchvision") is not None and not has_torchvision():
        return Unusable(
            "the installed torchvision does not fit the installed torch: uninstall it, or "
            "install the one that belongs to it"
        )
    return Unusable(f"`{url}` could not be loaded: {first_line(error)}")
