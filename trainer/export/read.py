"""Adapter files back into tensors, whoever wrote them, and from one format into the other.

What is read has its scale folded and alpha = rank: the many ways in which files state a scale
end here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.errors import InputError
from trainer.export.diffusers import METADATA_KEY, write_diffusers
from trainer.export.facts import TrainingFacts
from trainer.export.kohya import CONVENTION_KEY, write_kohya
from trainer.export.state import (
    FOLDS,
    MAGNITUDE,
    AdapterState,
    Algorithm,
    LayerName,
    LayerTensors,
    largest_ranks,
    layer_rank,
    split_name,
    with_text_model,
)
from trainer.names import KohyaNames

_PRODUCTS = (
    ("lora_A", "lora_B"),
    ("lokr_w1_a", "lokr_w1_b"),
    ("lokr_w2_a", "lokr_w2_b"),
    ("hada_w1_a", "hada_w1_b"),
    ("hada_w2_a", "hada_w2_b"),
    ("hada_w1_a", "hada_w2_a"),
)

Format = Literal["diffusers", "kohya"]

_KOHYA_KEY = re.compile(
    r"(?P<layer>lora_[^.]+)\."
    r"(?P<part>lora_down\.weight|lora_up\.weight|dora_scale|alpha|(?:lokr|hada)_\w+)"
)
_KOHYA_PARTS = {"lora_down.weight": "lora_A", "lora_up.weight": "lora_B", "dora_scale": MAGNITUDE}
_ALGORITHMS: Mapping[str, Algorithm] = {"lora_A": "lora", "lokr_w1": "lokr", "hada_w1_a": "loha"}
_OLD_DIFFUSERS = {
    "_lora.down.weight": ".lora_A.weight",
    "_lora.up.weight": ".lora_B.weight",
    ".lora.down.weight": ".lora_A.weight",
    ".lora.up.weight": ".lora_B.weight",
}


@dataclass(frozen=True)
class AdapterFile:
    """The content of an adapter file, grouped by layer and otherwise as it stands in the file.

    Args:
        format: whose keys it has.
        family: the best guess from a kohya file's names and header.
        layers: (component, layer path) to tensors by PEFT part.
        alphas: the layers' alphas, where stated beside the tensors.
        metadata: the header's strings.
    """

    format: Format
    family: str | None
    layers: Mapping[LayerName, LayerTensors]
    alphas: Mapping[LayerName, float]
    metadata: Mapping[str, str]

    @property
    def algorithm(self) -> Algorithm:
        """Told by the parts that occur.

        Raises:
            InputError: none or several algorithms occur.
        """
        parts = {part for tensors in self.layers.values() for part in tensors}
        found = {
            name for part, name in _ALGORITHMS.items() if part in parts or f"{part}_a" in parts
        }
        if len(found) != 1:
            raise InputError.of(
                "file",
                f"its layers are of {sorted(found) or 'no known kind'}, expected one of "
                "lora, lokr and loha",
            )
        return found.pop()

    @property
    def dora_convention(self) -> str | None:
        """What its DoRA magnitudes mean; `unstated` in a kohya file that does not say."""
        if not any(MAGNITUDE in tensors for tensors in self.layers.values()):
            return None
        if self.format == "diffusers":
            return "paper"
        return self.metadata.get(CONVENTION_KEY, "unstated")

    @property
    def adapter_metadata(self) -> dict[str, Any]:
        """The PEFT configuration in a diffusers file's header, flat; empty without one."""
        try:
            content = json.loads(self.metadata.get(METADATA_KEY, "{}"))
        except json.JSONDecodeError as error:
            raise InputError.of("file", f"`{METADATA_KEY}` in the header is not JSON") from error
        return content if isinstance(content, dict) else {}

    def scale(self, layer: LayerName) -> float:
        """The factor that the file's own program puts on a layer's product."""
        rank = layer_rank(self.layers[layer])
        if self.format == "kohya":
            # LyCORIS and ComfyUI apply no scale where both Kronecker factors are full.
            return 1.0 if rank is None else self.alphas.get(layer, float(rank)) / rank
        alpha, stated_rank = self._stated(layer, "alpha"), self._stated(layer, "rank")
        divisor = rank or stated_rank
        if alpha is None or divisor is None:
            return 1.0
        is_rs = self.adapter_metadata.get(f"{layer[0]}.use_rslora", False)
        return alpha / (divisor**0.5 if is_rs else divisor)

    def _stated(self, layer: LayerName, what: Literal["alpha", "rank"]) -> float | None:
        component, path = layer
        header = self.adapter_metadata
        pattern = header.get(f"{component}.{what}_pattern") or {}
        for key, value in pattern.items():
            # The rule by which PEFT lets a pattern stand for a layer (peft.utils.get_pattern_key).
            if re.match(rf"(.*\.)?({key})$", path):
                return float(value)
        names = {"alpha": ("lora_alpha", "alpha"), "rank": ("r",)}[what]
        values = [
            header[f"{component}.{name}"] for name in names if f"{component}.{name}" in header
        ]
        return float(values[0]) if values else None


def read_adapter(
    path: Path, candidates: Mapping[str, KohyaNames], denoiser: str = "unet"
) -> AdapterState:
    """The adapter in a diffusers or kohya file, with its scale folded in.

    Args:
        path: a safetensors file.
        candidates: the name tables of the known families, by family.
        denoiser: component behind the denoiser's keys in a kohya file.

    Raises:
        InputError: not such a file, or one whose magnitudes need the base weights.
    """
    file = open_adapter(path, candidates, denoiser)
    if file.dora_convention == "comfyui":
        raise InputError.of(
            "file",
            f"`{path.name}` carries DoRA magnitudes for ComfyUI, which cannot be taken back "
            "without the base model",
            "give the plain kohya file or the diffusers file of the same training",
        )
    layers: dict[LayerName, LayerTensors] = {}
    for layer, tensors in file.layers.items():
        _require_factors(layer, tensors)
        plain = {part: tensor.to(torch.float32) for part, tensor in tensors.items()}
        layers[layer] = FOLDS[file.algorithm](plain, file.scale(layer))
    return AdapterState.of_layers(file.algorithm, largest_ranks(layers), layers)


def _require_factors(layer: LayerName, tensors: LayerTensors) -> None:
    """Every first factor of a product needs its second, and LoHa both products."""
    for first, second in _PRODUCTS:
        for one, other in ((first, second), (second, first)):
            if one in tensors and other not in tensors:
                raise InputError.of(
                    "file", f"layer `{'.'.join(layer)}` has `{one}` but no `{other}`"
                )


def open_adapter(
    path: Path, candidates: Mapping[str, KohyaNames], denoiser: str = "unet"
) -> AdapterFile:
    """A file's tensors sorted into layers; arguments and errors as for `read_adapter`."""
    tensors, metadata = read_tensors(path)
    if any(_KOHYA_KEY.fullmatch(key) for key in tensors):
        return _open_kohya(path, tensors, metadata, candidates, denoiser)
    layers: dict[LayerName, LayerTensors] = {}
    for key, tensor in tensors.items():
        component, name = _peft_name(path, key)
        layer_path, part = split_name(name)
        layers.setdefault((component, with_text_model(layer_path)), {})[part] = tensor
    return AdapterFile("diffusers", None, dict(sorted(layers.items())), {}, metadata)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file.

    Raises:
        InputError: there is no such file, or it is of another kind.
    """
    if not path.is_file():
        raise InputError.of("file", f"`{path}` does not exist or is not a file")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError.of("file", f"`{path}` is not a safetensors file: {error}") from error


def convert(
    source: Path,
    target: Path,
    to: Format,
    candidates: Mapping[str, KohyaNames],
    *,
    family: str | None = None,
    dtype: torch.dtype | None = None,
) -> AdapterState:
    """Writes the adapter of one file in the other format.

    Args:
        source: a diffusers or kohya file.
        target: the file to write.
        to: its format.
        candidates: the name tables of the known families, by family.
        family: the family, where the layers alone do not tell it.
        dtype: number format of the weights; None: that of the source.

    Returns:
        What was read, folded.

    Raises:
        InputError: see `read_adapter`; or the family cannot be told.
    """
    state = read_adapter(source, candidates)
    tensors, _ = read_tensors(source)
    dtype = dtype or next(t.dtype for key, t in tensors.items() if _is_weight(key))
    if to == "diffusers":
        write_diffusers(target, state, dtype)
    else:
        names = candidates[family or family_of(state, candidates)]
        write_kohya(target, state, names, TrainingFacts(output_name=target.stem), dtype)
    return state


def family_of(state: AdapterState, candidates: Mapping[str, KohyaNames]) -> str:
    """The one family whose table fits the adapted layers.

    Raises:
        InputError: none fits, or several do.
    """
    fitting = [family for family, names in candidates.items() if _fits(state, names)]
    # A table that renames layers fits only where it knows every block, so it says more.
    renaming = [family for family in fitting if candidates[family].layers]
    decided = renaming or fitting
    if len(decided) != 1:
        raise InputError.of(
            "family",
            f"the layers of this file fit {decided or 'none'} of {sorted(candidates)}",
            "name the family of the base model with --family",
        )
    return decided[0]


def _is_weight(key: str) -> bool:
    return not key.endswith(("alpha", "dora_scale", MAGNITUDE, f"{MAGNITUDE}.weight"))


def _fits(state: AdapterState, names: KohyaNames) -> bool:
    known = {*names.text_encoder_prefixes}
    text_encoders = {component for component in state.components if "text_encoder" in component}
    if not text_encoders <= known:
        return False
    if not names.layers:
        return True
    denoiser_layers = [layer for layer in state.layers() if layer[0] not in known]
    return all(_is_renamed(layer, names) for layer in denoiser_layers)


def _is_renamed(layer: LayerName, names: KohyaNames) -> bool:
    plain = f"{names.denoiser_prefix}_{layer[1].replace('.', '_')}"
    return names.of_layer(*layer) != plain


def _peft_name(path: Path, key: str) -> tuple[str, str]:
    """Component and PEFT name behind a diffusers key, those of its first formats included."""
    for old, new in _OLD_DIFFUSERS.items():
        if key.endswith(old):
            key = key.removesuffix(old).replace(".processor.", ".") + new
    component, _, name = key.partition(".")
    try:
        split_name(name)
    except ValueError as error:
        raise InputError.of(
            "file",
            f"`{path.name}` holds `{key}`, which no LoRA, LoKr or LoHa file has",
            "give a diffusers or kohya adapter file, not a whole model",
        ) from error
    return component, name


def _open_kohya(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    candidates: Mapping[str, KohyaNames],
    denoiser: str,
) -> AdapterFile:
    keys: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KOHYA_KEY.fullmatch(key)
        if match is None:
            raise InputError.of("file", f"`{path.name}` holds the unknown key `{key}`")
        keys.setdefault(match["layer"], {})[match["part"]] = tensor
    family = _kohya_family(path, keys, metadata, candidates, denoiser)
    layers: dict[LayerName, LayerTensors] = {}
    alphas: dict[LayerName, float] = {}
    for name, parts in keys.items():
        layer = candidates[family].layer_of(name, denoiser)
        if "alpha" in parts:
            alphas[layer] = float(parts.pop("alpha"))
        layers[layer] = _peft_parts(path, name, parts)
    return AdapterFile("kohya", family, dict(sorted(layers.items())), alphas, metadata)


def _kohya_family(
    path: Path,
    keys: Mapping[str, Mapping[str, Tensor]],
    metadata: Mapping[str, str],
    candidates: Mapping[str, KohyaNames],
    denoiser: str,
) -> str:
    """The family that wrote these names: by its header, else the one whose names come back."""
    version = metadata.get("ss_base_model_version")
    for family, names in candidates.items():
        if version == names.base_model_version:
            return family
    for family, names in candidates.items():
        if all(_comes_back(name, names, denoiser) for name in keys):
            return family
    raise InputError.of(
        "file",
        f"`{path.name}` has kohya keys of a family other than {sorted(candidates)}, "
        f"such as `{next(iter(keys))}`",
    )


def _comes_back(name: str, names: KohyaNames, denoiser: str) -> bool:
    try:
        layer = names.layer_of(name, denoiser)
    except KeyError:
        return False
    return names.of_layer(*layer) == name


def _peft_parts(path: Path, name: str, parts: Mapping[str, Tensor]) -> LayerTensors:
    renamed = {_KOHYA_PARTS.get(part, part): tensor for part, tensor in parts.items()}
    if MAGNITUDE in renamed:
        scale, rows = renamed[MAGNITUDE], renamed["lora_B"].shape[0]
        if scale.shape[0] != rows or scale.numel() != rows:
            raise InputError.of(
                "file",
                f"`{path.name}`: dora_scale of `{name}` has shape {tuple(scale.shape)}, expected "
                f"({rows}, 1, …): it belongs to the input axis",
                "only DoRA on the output axis can be expressed in diffusers",
            )
        is_convolution = renamed["lora_B"].ndim == 4
        renamed[MAGNITUDE] = scale.reshape((1, -1, 1, 1) if is_convolution else (-1,))
    return renamed
