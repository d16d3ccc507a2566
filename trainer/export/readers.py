"""Programs that read the written files, each as a way from file to effective weights.

diffusers, PEFT, transformers and LyCORIS do here what their users do with the files; nothing
of the exporters takes part.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)

from trainer.export.layer_names import expected_names, live_layers
from trainer.names import KohyaNames

_CONFIGS = {"lokr": peft.LoKrConfig, "hada": peft.LoHaConfig}


@dataclass(frozen=True)
class Reading:
    """One weight as a reader understands a file.

    Args:
        component: pipeline component.
        path: path of the weight's layer in the fresh pipeline; of the parameter itself where
            whole components are read; the token whose vector it is.
        before: the fresh weight, fp32; None for a new token.
        after: the weight with the file applied, fp32.
        keys: tensors of the file that went into it, alphas not counted.
    """

    component: str
    path: str
    before: Tensor | None
    after: Tensor
    keys: int


def reads_all(path: Path) -> str | None:
    """A reader that takes every file of the roles it is given."""
    return None


def loads_nothing(path: Path) -> None:
    """A reader that needs no look at the file before it has a base model."""


@dataclass(frozen=True)
class Reader:
    """A program or formula that reads files.

    Args:
        name: as `verify.json` calls it.
        read: fresh pipeline, file and names to readings.
        refuses: why it cannot read a file at all, if so.
        loads: what it does to a file while no base model is held beside it; raises where that
            goes wrong.
        changes_pipeline: whether a pipeline is spoilt by reading into it.
        reads_exactly: whether weights are stored as they are, so that rounding them is known.
    """

    name: str
    read: Callable[[Any, Path, KohyaNames], Iterator[Reading]]
    refuses: Callable[[Path], str | None] = reads_all
    loads: Callable[[Path], None] = loads_nothing
    changes_pipeline: bool = False
    reads_exactly: bool = False


def keys_of(path: Path) -> list[str]:
    """The names of a safetensors file's tensors."""
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the libraries' remarks on a file to themselves: here its effect is measured."""
    disabled, shows_bars = logging.root.manager.disable, is_progress_bar_enabled()
    logging.disable(logging.CRITICAL)
    disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if shows_bars:
            enable_progress_bar()


def _read_pipeline(pipeline: Any, path: Path, names: KohyaNames) -> Iterator[Reading]:
    """`load_lora_weights`, as every diffusers user calls it."""
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    yield from _merged(pipeline)


def _read_components(pipeline: Any, path: Path, names: KohyaNames) -> Iterator[Reading]:
    """LoKr and LoHa files, component by component, with the configuration in their header."""
    header = json.loads(metadata_of(path)["lora_adapter_metadata"])
    tensors = load_file(path)
    for component in sorted({key.partition(".")[0] for key in tensors}):
        config, state = _of_component(component, header), _of_component(component, tensors)
        kind = next(kind for kind in _CONFIGS if any(f".{kind}_" in key for key in state))
        model = pipeline.components[component]
        if isinstance(model, transformers.PreTrainedModel):
            live = {_live(model, key): tensor for key, tensor in state.items()}
            config = _CONFIGS[kind](**config)
            model.load_adapter(adapter_state_dict=live, peft_config=config)
        elif kind == "lokr":
            model.load_lora_adapter(str(path), prefix=component, use_safetensors=True)
        else:
            peft.inject_adapter_in_model(_CONFIGS[kind](**config), model)
            peft.set_peft_model_state_dict(model, state)
    yield from _merged(pipeline)


def _read_peft_folder(pipeline: Any, path: Path, names: KohyaNames) -> Iterator[Reading]:
    """A PEFT folder, named after its component, with `PeftModel.from_pretrained`."""
    component = path.parent.name
    model = pipeline.components[component]
    peft.PeftModel.from_pretrained(model, str(path.parent))
    yield from _merged(pipeline)


def _read_lycoris(pipeline: Any, path: Path, names: KohyaNames) -> Iterator[Reading]:
    """LyCORIS on a bare tree with the kohya names, whose leaves are the pipeline's own layers."""
    from lycoris import create_lycoris_from_weights  # noqa: PLC0415 - an optional package

    tensors = load_file(path)
    expected, layers = expected_names(pipeline, names), live_layers(pipeline)
    tree = nn.Module()
    for name, layer in expected.items():
        tree.add_module(name, layers[layer])
    prefixed = {f"lycoris_{key}": tensor for key, tensor in tensors.items()}
    network, _ = create_lycoris_from_weights(1.0, "", tree, weights_sd=prefixed)
    modules: list[Any] = network.loras
    for module in modules:
        name = module.lora_name.removeprefix("lycoris_")
        layer = expected[name]
        before = layers[layer].get_parameter("weight").detach()
        after, _ = module.get_merged_weight(shape=before.shape)
        keys = sum(key.startswith(f"{name}.") and not key.endswith(".alpha") for key in tensors)
        yield Reading(*layer, before, after.detach().reshape(before.shape), keys)


def _merged(pipeline: Any) -> Iterator[Reading]:
    """What fusing makes of every adapted layer, one at a time."""
    for component, model in pipeline.components.items():
        if not isinstance(model, nn.Module):
            continue
        adapted: list[tuple[str, Any]] = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, BaseTunerLayer)
        ]
        for name, module in adapted:
            weight = module.get_base_layer().weight
            before = weight.detach().clone()
            keys = sum("base_layer" not in part for part, _ in module.named_parameters())
            module.merge(safe_merge=True)
            after = module.get_base_layer().weight.detach()
            yield Reading(component, name.removeprefix("base_model.model."), before, after, keys)


def _of_component(component: str, entries: dict[str, Any]) -> dict[str, Any]:
    prefix = f"{component}."
    return {k.removeprefix(prefix): v for k, v in entries.items() if k.startswith(prefix)}


def _live(model: nn.Module, key: str) -> str:
    """A text-encoder key as the installed transformers names the layer."""
    has_step = any(name == "text_model" for name, _ in model.named_children())
    return key if has_step else key.removeprefix("text_model.")


def _diffusers_refuses(path: Path) -> str | None:
    if any(key.endswith(".dora_scale") for key in keys_of(path)):
        return "diffusers leaves out the DoRA magnitudes of kohya files"
    return None


def _lycoris_refuses(path: Path) -> str | None:
    if metadata_of(path).get("dora_convention") == "comfyui":
        return "the file is marked for ComfyUI; LyCORIS reads magnitudes as in the paper"
    if importlib.util.find_spec("lycoris") is None:
        return "the package `lycoris-lora` is not installed"
    rows = _rows(path)
    for key in [key for key in rows if key.endswith(".lokr_w1")]:
        second = key.replace("_w1", "_w2")
        if rows[key] > max(rows.get(second, 0), rows.get(f"{second}_a", 0)):
            return "LyCORIS cannot read LoKr whose first factor has more rows than the second"
    return None


def _rows(path: Path) -> dict[str, int]:
    """The first size of every tensor that has one, read from the file's header."""
    with safe_open(path, framework="pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    return {key: shape[0] for key, shape in shapes.items() if shape}


DIFFUSERS = Reader("diffusers", _read_pipeline, _diffusers_refuses, changes_pipeline=True)
DIFFUSERS_LOKR = Reader("diffusers", _read_components, changes_pipeline=True)
PEFT = Reader("peft", _read_components, changes_pipeline=True)
PEFT_FOLDER = Reader("peft", _read_peft_folder, changes_pipeline=True)
LYCORIS = Reader("lycoris", _read_lycoris, _lycoris_refuses)
