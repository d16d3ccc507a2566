"""How diffusers and transformers read components all of whose weights were trained.

A folder is loaded while no base model is held beside it, and every tensor compared bit for bit
with the file; the file's own tensors are then what is compared with the trained weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from trainer.export.readers import Reader, Reading, keys_of
from trainer.names import KohyaNames

_TEXT_STEP = "text_model."


def _load_denoiser(path: Path) -> None:
    """`from_pretrained` gets from a component's folder every tensor of its file, bit for bit."""
    model = diffusers.AutoModel.from_pretrained(
        str(path.parent), torch_dtype=torch.float32, local_files_only=True
    )
    _require_same(path, model.state_dict(), lambda name: name)


def _load_text_encoder(path: Path) -> None:
    """transformers gets every tensor from the folder, and names are those that all versions read.

    transformers 5 reads shorter names too; older versions take random weights instead.
    """
    names = keys_of(path)
    short = [name for name in names if not name.startswith((_TEXT_STEP, "text_projection."))]
    if short:
        raise ValueError(f"{len(short)} names lack `text_model.`, such as `{short[0]}`")
    projects = any(name.startswith("text_projection.") for name in names)
    kind = transformers.CLIPTextModelWithProjection if projects else transformers.CLIPTextModel
    model = kind.from_pretrained(str(path.parent), dtype=torch.float32, local_files_only=True)
    stated = model.config.architectures
    if stated != [kind.__name__]:
        raise ValueError(f"the configuration says {stated}, the weights are a {kind.__name__}")
    _require_same(path, model.state_dict(), lambda name: _live(model, name))


def _require_same(
    path: Path, loaded: Mapping[str, Tensor], live_name: Callable[[str], str]
) -> None:
    with safe_open(path, framework="pt") as file:
        names = {live_name(name): name for name in file.keys()}  # noqa: SIM118
        if names.keys() != loaded.keys():
            different = sorted(names.keys() ^ loaded.keys())
            raise ValueError(f"{len(different)} tensors too few or many, such as `{different[0]}`")
        for live, name in sorted(names.items()):
            if not torch.equal(loaded[live], file.get_tensor(name).float()):
                raise ValueError(f"`{name}` is loaded with other values than the file has")


def _read_file(pipeline: Any, path: Path, names: KohyaNames) -> Iterator[Reading]:
    """A component's file, tensor by tensor, under the names of the installed libraries."""
    component = path.parent.name
    model = pipeline.components[component]
    base = model.state_dict()
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            live = _live(model, name)
            yield Reading(component, live, base[live].float(), file.get_tensor(name).float(), 1)


def _live(model: nn.Module, name: str) -> str:
    """A tensor's name in this model: transformers 5 left `text_model.` out of some."""
    has_step = any(child == "text_model" for child, _ in model.named_children())
    return name if has_step else name.removeprefix(_TEXT_STEP)


WHOLE_DENOISER = Reader("diffusers", _read_file, loads=_load_denoiser, reads_exactly=True)
WHOLE_TEXT_ENCODER = Reader(
    "transformers", _read_file, loads=_load_text_encoder, reads_exactly=True
)
