"""Programs that read the written files, each as a way from file to effective weights.

diffusers, PEFT, transformers and LyCORIS do here what their users do with the files; nothing
of the exporters takes part.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
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

from trainer.export.layer_names import UnknownStructureError, expected_names, live_layers
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
        keys: tensors of the file that went into it, alphas not counted; those that went into
            several weights are counted at the first.
    """

    component: str
    path: str
    before: Tensor | None
    after: Tensor
    keys: int


def reads_all(path: Path, names: KohyaNames) -> str | None:
    """A reader that takes every file of the roles it is given."""
    return None


def loads_nothing(path: Path) -> None:
    """A reader that needs no look at the file before it has a base model."""


@dataclass(frozen=True)
class Reader:
    """A program or formula that reads files.

    A pipeline's weights may be in any precision; readings are in 32 bits, one layer at a time.

    Args:
        name: as `verify.json` calls it.
        read: fresh pipeline, file and names to readings.
        refuses: why it cannot read a file of such names at all, if so.
        loads: what it does to a file while no base model is held beside it; raises where that
            goes wrong.
        changes_pipeline: whether a pipeline is spoilt by reading into it.
        reads_exactly: whether weights are stored as they are, so that rounding them is known.
    """

    name: str
    read: Callable[[Any, Path, KohyaNames], Iterator[Reading]]
    refuses: Callable[[Path, KohyaNames], str | None] = reads_all
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


@contextmanager
def _seeming_wide(models: Iterable[nn.Module]) -> Iterator[None]:
    """Gives models 32-bit weights without content meanwhile, so that adapters keep their bits.

    Loaders round an adapter to the precision of its model, which must not be widened as a whole.
    """
    stored = [
        (parameter, parameter.data)
        for model in models
        for parameter in model.parameters()
        if parameter.is_floating_point() and parameter.dtype != torch.float32
    ]
    for parameter, data in stored:
        parameter.data = torch.zeros((), dtype=torch.float32).expand(data.shape)
    try:
        yield
    finally:
        for parameter, data in stored:
            parameter.data = data


def _read_pipeline(pipeline: Any, path: Path, names: KohyaNames) -> Iterator[Reading]:
    """`load_lora_weights`, as every diffusers user calls it."""
    models = [model for model in pipeline.components.values() if isinstance(model, nn.Module)]
    with _seeming_wide(models):
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    yield from _merged(pipeline)


def _read_pipeline_from_kohya(pipeline: Any, path: Path, names: KohyaNames) -> Iterator[Reading]:
    """The same with a kohya file, one layer of which may go into several of the pipeline."""
    ahead = Counter(key.split(".")[0] for key in keys_of(path) if not key.endswith(".alpha"))
    expected = expected_names(pipeline, names)
    homes = {layer: name for name in ahead if name in expected for layer in expected[name].layers}
    try:
        for reading in _read_pipeline(pipeline, path, names):
            keys = ahead.pop(homes[reading.component, reading.path], 0)
            yield replace(reading, keys=keys)
    except ValueError as error:
        # diffusers' `_create_lokr_config` finds the factor by trying, and not every one.
        if "decompose_factor" not in str(error):
            raise
        raise UnknownStructureError("diffusers cannot tell the factor of this LoKr") from error


def _read_components(pipeline: Any, path: Path, names: KohyaNames) -> Iterator[Reading]:
    """LoKr and LoHa files, component by component, with the configuration in their header."""
    header = json.loads(metadata_of(path)["lora_adapter_metadata"])
    tensors = load_file(path)
    for component in sorted({key.partition(".")[0] for key in tensors}):
        config, state = _of_component(component, header), _of_component(component, tensors)
        kind = next(kind for kind in _CONFIGS if any(f".{kind}_" in key for key in state))
        model = pipeline.components[component]
        with _seeming_wide([model]):
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
    with _seeming_wide([model]):
        peft.PeftModel.from_pretrained(model, str(path.parent))
    yield from _merged(pipeline)


def _read_lycoris(pipeline: Any, path: Path, names: KohyaNames) -> Iterator[Reading]:
    """LyCORIS on bare trees, each of which has one layer of the file under its name."""
    tensors = load_file(path)
    expected, live = expected_names(pipeline, names), live_layers(pipeline)
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        groups.setdefault(key.split(".")[0], {})[key] = tensor
    for name in [name for name in groups if name in expected]:
        layer = expected[name]
        before = layer.weight(live)
        after = _merged_by_lycoris(name, groups[name], before)
        if after is None:
            continue
        keys = sum(not key.endswith(".alpha") for key in groups[name])
        for (part, old), (_, new) in zip(
            layer.parts(before, live), layer.parts(after, live), strict=True
        ):
            yield Reading(*part, old, new, keys)
            keys = 0


def _merged_by_lycoris(name: str, tensors: dict[str, Tensor], weight: Tensor) -> Tensor | None:
    """What LyCORIS makes of a weight; nothing where it finds no adapter for it."""
    from lycoris import create_lycoris_from_weights  # noqa: PLC0415 - an optional package

    bare = name.removeprefix("lycoris_")
    tree = nn.Module()
    tree.add_module(bare, _bare_layer(weight))
    prefixed = {
        f"lycoris_{bare}.{key.partition('.')[2]}": tensor for key, tensor in tensors.items()
    }
    network, _ = create_lycoris_from_weights(1.0, "", tree, weights_sd=prefixed)
    modules: list[Any] = network.loras
    if not modules:
        return None
    merged, _ = modules[0].get_merged_weight(shape=weight.shape)
    after: Tensor = merged.detach().reshape(weight.shape)
    return after


def _bare_layer(weight: Tensor) -> nn.Module:
    """A layer of a weight alone."""
    rows, columns, *window = weight.shape
    layer: nn.Module
    if window:
        layer = nn.Conv2d(columns, rows, (window[0], window[1]), bias=False, device="meta")
    else:
        layer = nn.Linear(columns, rows, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _merged(pipeline: Any) -> Iterator[Reading]:
    """What fusing makes of every adapted layer, one at a time; the layers keep their weights."""
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
            stored = weight.data
            before = stored.detach().float()
            weight.data = before.clone()
            keys = sum("base_layer" not in part for part, _ in module.named_parameters())
            module.merge(safe_merge=True)
            after = module.get_base_layer().weight.detach()
            module.get_base_layer().weight.data = stored
            yield Reading(component, name.removeprefix("base_model.model."), before, after, keys)


def _of_component(component: str, entries: dict[str, Any]) -> dict[str, Any]:
    prefix = f"{component}."
    return {k.removeprefix(prefix): v for k, v in entries.items() if k.startswith(prefix)}


def _live(model: nn.Module, key: str) -> str:
    """A text-encoder key as the installed transformers names the layer."""
    has_step = any(name == "text_model" for name, _ in model.named_children())
    return key if has_step else key.removeprefix("text_model.")


def _diffusers_refuses(path: Path, names: KohyaNames) -> str | None:
    rows = _rows(path)
    if any(".lokr_" in key for key in rows):
        return _diffusers_refuses_lokr(rows, names)
    if any(key.endswith(".dora_scale") for key in rows):
        return "diffusers leaves out the DoRA magnitudes of kohya files"
    dropped = {names.of_layer(names.denoiser, layer) for layer in names.diffusers_drops}
    found = sorted(key for key in rows if key.split(".")[0] in dropped)
    if found:
        return f"diffusers leaves out some layers of kohya files, here `{found[0].split('.')[0]}`"
    width = names.diffusers_width
    # Names that are of no component are for the reading to find.
    ours = [key for key in rows if key.startswith(f"{names.denoiser_prefix}_")]
    for key in [key for key in ours if width and key.endswith(".lora_up.weight")]:
        shares = names.layers_of(key.split(".")[0]).values()
        if width and len(set(shares)) > 1 and rows[key] != width * sum(shares):
            return (
                f"diffusers takes layers such as `{key.split('.')[0]}` apart at width {width} only"
            )
    return None


def _diffusers_refuses_lokr(rows: Mapping[str, int], names: KohyaNames) -> str | None:
    if "lokr" not in names.diffusers_reads:
        return "diffusers reads no LoKr in kohya files of this family"
    outside = sorted(key for key in rows if not re.search(r"_\d+_", key))
    if outside:
        layer = outside[0].split(".")[0]
        return f"diffusers reads LoKr of the blocks' layers only, and `{layer}` is in none"
    return None


def _lycoris_refuses(path: Path, names: KohyaNames) -> str | None:
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


DIFFUSERS = Reader("diffusers", _read_pipeline, changes_pipeline=True)
DIFFUSERS_KOHYA = Reader(
    "diffusers", _read_pipeline_from_kohya, _diffusers_refuses, changes_pipeline=True
)
DIFFUSERS_LOKR = Reader("diffusers", _read_components, changes_pipeline=True)
PEFT = Reader("peft", _read_components, changes_pipeline=True)
PEFT_FOLDER = Reader("peft", _read_peft_folder, changes_pipeline=True)
LYCORIS = Reader("lycoris", _read_lycoris, _lycoris_refuses)
