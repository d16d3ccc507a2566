"""Adapter files back into tensors, whoever wrote them, and from one format into the other.

What is read has its scale folded and alpha = rank: the many ways in which files state a scale
end here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.errors import InputError
from trainer.export.diffusers import METADATA_KEY, write_diffusers
from trainer.export.facts import TrainingFacts
from trainer.export.fusing import can_split, split, with_swapped_halves
from trainer.export.kohya import CONVENTION_KEY, BaseWeightsNeeded, write_kohya
from trainer.export.recognition import family_of, kohya_families, refuse_t5
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
    without_text_model,
)
from trainer.names import KohyaNames, undot

_PRODUCTS = (
    ("lora_A", "lora_B"),
    ("lokr_w1_a", "lokr_w1_b"),
    ("lokr_w2_a", "lokr_w2_b"),
    ("hada_w1_a", "hada_w1_b"),
    ("hada_w2_a", "hada_w2_b"),
    ("hada_w1_a", "hada_w2_a"),
)

Format = Literal["diffusers", "kohya"]
# Some programs name layers as the original implementation does, with dots.
ReadFormat = Literal["diffusers", "kohya", "original"]

_KOHYA_KEY = re.compile(
    r"(?P<layer>(?:lora|lycoris)_[^.]+)\."
    r"(?P<part>lora_down\.weight|lora_up\.weight|dora_scale|alpha|(?:lokr|hada)_\w+)"
)
# Those of ai-toolkit and ComfyUI. Source: diffusers' `_convert_non_diffusers_flux2_lora_to_…`.
_ORIGINAL = "diffusion_model."
_ORIGINAL_KEY = re.compile(
    rf"{re.escape(_ORIGINAL)}(?P<layer>.+)\."
    r"(?P<part>lora_(?:A|B|down|up)\.weight|dora_scale|alpha|(?:lokr|hada)_\w+)"
)
# What every family's denoiser is called in kohya files, whose names are the same without dots.
_KOHYA_DENOISER = "lora_unet_"
_ORIGINAL_PARTS = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
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
        family: what its names and header tell; None for a diffusers file.
        layers: (component, layer path) to tensors by PEFT part.
        alphas: the layers' alphas, where stated beside the tensors.
        metadata: the header's strings.
        stated_ranks: the inner dimension of the file's layer that its alpha speaks of, where
            several layers are one in the file.
    """

    format: ReadFormat
    family: str | None
    layers: Mapping[LayerName, LayerTensors]
    alphas: Mapping[LayerName, float]
    metadata: Mapping[str, str]
    stated_ranks: Mapping[LayerName, int] = field(default_factory=dict)

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
        if self.format != "diffusers":
            # LyCORIS and ComfyUI apply no scale where both Kronecker factors are full.
            stated = self.stated_ranks.get(layer, rank)
            return 1.0 if stated is None else self.alphas.get(layer, float(stated)) / stated
        alpha, divisor = self._stated(layer, "alpha"), rank or self._stated(layer, "rank")
        if alpha is None or divisor is None:
            return 1.0
        is_rs = self.adapter_metadata.get(f"{layer[0]}.use_rslora", False)
        return alpha / (divisor**0.5 if is_rs else divisor)

    def refuted_rank(self, layer: LayerName) -> float | None:
        """The rank that the header states of a layer whose tensors have another."""
        rank, stated = layer_rank(self.layers[layer]), self._stated(layer, "rank")
        return None if rank is None or stated == rank else stated

    def _stated(self, layer: LayerName, what: Literal["alpha", "rank"]) -> float | None:
        component, path = layer
        header = self.adapter_metadata
        pattern = header.get(f"{component}.{what}_pattern") or {}
        for key, value in pattern.items():
            if _stands_for(key, path) or _stands_for(key, without_text_model(path)):
                return float(value)
        names = {"alpha": ("lora_alpha", "alpha"), "rank": ("r",)}[what]
        values = [
            header[f"{component}.{name}"] for name in names if f"{component}.{name}" in header
        ]
        return float(values[0]) if values else None


def _stands_for(key: str, path: str) -> bool:
    """The rule by which PEFT lets the key of a pattern stand for a layer (`get_pattern_key`).

    A key is an expression for the end of a path, or with `^` for a whole one.
    """
    try:
        return re.match(rf"(.*\.)?({key})$", path) is not None
    except re.error as error:
        raise InputError.of(
            "file", f"`{key}` in the header is no expression for layer names: {error}"
        ) from error


def read_adapter(
    path: Path, candidates: Mapping[str, KohyaNames], family: str | None = None
) -> AdapterState:
    """The adapter in a diffusers or kohya file, with its scale folded in.

    Args:
        path: a safetensors file.
        candidates: the name tables of the known families, by family.
        family: whose names a kohya file has; None: its header and names tell.

    Raises:
        InputError: not such a file, or one whose magnitudes need the base weights.
    """
    file = open_adapter(path, candidates, family)
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
        _require_stated_rank(path, file, layer)
        plain = {part: tensor.to(torch.float32) for part, tensor in tensors.items()}
        layers[layer] = FOLDS[file.algorithm](plain, file.scale(layer))
    return AdapterState.of_layers(file.algorithm, largest_ranks(layers), layers)


def _require_stated_rank(path: Path, file: AdapterFile, layer: LayerName) -> None:
    """PEFT builds layers of the ranks in the header, and takes tensors of no other."""
    stated = file.refuted_rank(layer)
    if stated is not None:
        rank = layer_rank(file.layers[layer])
        raise InputError.of(
            "file",
            f"`{path.name}`: layer `{'.'.join(layer)}` is of rank {rank}, where the header says "
            f"{stated:g}, so that its alpha cannot be told",
            f"give a file whose `{METADATA_KEY}` fits its tensors",
        )


def _require_factors(layer: LayerName, tensors: LayerTensors) -> None:
    """Every first factor of a product needs its second, and LoHa both products."""
    for first, second in _PRODUCTS:
        for one, other in ((first, second), (second, first)):
            if one in tensors and other not in tensors:
                raise InputError.of(
                    "file", f"layer `{'.'.join(layer)}` has `{one}` but no `{other}`"
                )


def open_adapter(
    path: Path, candidates: Mapping[str, KohyaNames], family: str | None = None
) -> AdapterFile:
    """A file's tensors sorted into layers; arguments and errors as for `read_adapter`."""
    tensors, metadata = read_tensors(path)
    if any(_KOHYA_KEY.fullmatch(key) for key in tensors):
        return _open_kohya(path, tensors, metadata, candidates, family)
    if any(key.startswith(_ORIGINAL) for key in tensors):
        return _open_original(path, tensors, metadata, candidates, family)
    tables = [candidates[family]] if family else list(candidates.values())
    known = {name for names in tables for name in (names.denoiser, *names.text_encoder_prefixes)}
    layers: dict[LayerName, LayerTensors] = {}
    for key, tensor in tensors.items():
        component, name = _peft_name(path, key)
        if component not in known:
            raise InputError.of(
                "file",
                f"`{path.name}` holds `{key}`, and `{component}` is no component whose adapters "
                f"are read: {', '.join(sorted(known))}",
                "give a diffusers or kohya adapter file of one of these base models: "
                + ", ".join([family] if family else sorted(candidates)),
            )
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
        source: a file of either format, or with the original implementation's names.
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
    state = read_adapter(source, candidates, family)
    tensors, _ = read_tensors(source)
    dtype = dtype or next(t.dtype for key, t in tensors.items() if _is_weight(key))
    if to == "diffusers":
        write_diffusers(target, state, dtype)
    else:
        names = candidates[family or family_of(state, candidates)]
        facts = TrainingFacts(output_name=target.stem)
        try:
            write_kohya(target, state, names, facts, dtype)
        except BaseWeightsNeeded as error:
            raise InputError.of(
                "file",
                f"`{source.name}` has DoRA on some only of layers that are one in a kohya file; "
                "the magnitudes of the others are those of the base model, which is not at hand",
                "take the kohya file that the training itself writes",
            ) from error
    return state


def _is_weight(key: str) -> bool:
    return not key.endswith(("alpha", "dora_scale", MAGNITUDE, f"{MAGNITUDE}.weight"))


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
    family: str | None,
) -> AdapterFile:
    keys: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KOHYA_KEY.fullmatch(key)
        if match is None:
            raise InputError.of("file", f"`{path.name}` holds the unknown key `{key}`")
        keys.setdefault(match["layer"], {})[match["part"]] = tensor
    refuse_t5(path, keys, candidates.values())
    families = [family] if family else kohya_families(path, keys, metadata, candidates)
    names = candidates[families[0]]
    layers: dict[LayerName, LayerTensors] = {}
    alphas: dict[LayerName, float] = {}
    ranks: dict[LayerName, int] = {}
    for name, parts in keys.items():
        alpha = parts.pop("alpha", None)
        renamed = _peft_parts(path, name, parts)
        for layer, tensors_of_layer in _live_parts(path, name, renamed, names):
            layers[layer] = tensors_of_layer
            if alpha is not None:
                alphas[layer] = float(alpha)
            rank = layer_rank(renamed)
            if rank is not None:
                ranks[layer] = rank
    known = families[0] if len(families) == 1 else None
    return AdapterFile("kohya", known, dict(sorted(layers.items())), alphas, metadata, ranks)


def _open_original(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    candidates: Mapping[str, KohyaNames],
    family: str | None,
) -> AdapterFile:
    """A file whose names are those of a kohya file with dots in them."""
    # Tables without entries have diffusers' names.
    tables = {name: names for name, names in candidates.items() if names.layers}
    if family is not None and family not in tables:
        raise InputError.of(
            "file",
            f"`{path.name}` names layers as the original implementation does (`{_ORIGINAL}…`), "
            f"whose names are not known of `{family}`, only of: {', '.join(tables)}",
            "give a diffusers or kohya adapter file",
        )
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = _ORIGINAL_KEY.fullmatch(key)
        if match is None:
            raise InputError.of("file", f"`{path.name}` holds the unknown key `{key}`")
        part = _ORIGINAL_PARTS.get(match["part"], match["part"])
        renamed[f"{_KOHYA_DENOISER}{undot(match['layer'])}.{part}"] = tensor
    return replace(_open_kohya(path, renamed, metadata, tables, family), format="original")


def _live_parts(
    path: Path, name: str, tensors: LayerTensors, names: KohyaNames
) -> Iterator[tuple[LayerName, LayerTensors]]:
    """The adapters of the layers behind one of a kohya file."""
    try:
        shares = names.layers_of(name)
    except KeyError as error:
        raise InputError.of(
            "file", f"`{path.name}` holds `{name}`, which is of no component that is read"
        ) from error
    if len(shares) == 1:
        [layer] = shares
        swaps = can_split(tensors) and names.swaps_halves(*layer)
        yield layer, with_swapped_halves(tensors) if swaps else tensors
        return
    if not can_split(tensors):
        raise InputError.of(
            "file",
            f"`{path.name}`: the Kronecker product of `{name}` spans {len(shares)} layers, and "
            "cannot be divided among them",
        )
    _require_factors((names.denoiser, name), tensors)
    try:
        parts = split(tensors, list(shares.values()))
    except ValueError as error:
        raise InputError.of("file", f"`{path.name}`: `{name}`: {error}") from error
    for layer, part in zip(shares, parts, strict=True):
        if part is not None:
            yield layer, part


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
