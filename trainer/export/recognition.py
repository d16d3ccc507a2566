"""Whose file it is: the family of a base model, told by names, shapes and header."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from trainer.errors import InputError
from trainer.export.state import AdapterState
from trainer.names import KohyaNames

# T5's layers in kohya files, whatever the family (sd-scripts, `lora_flux.py` and `lora_sd3.py`).
_T5_PREFIX = "lora_te3"
# The factor with a layer's rows to the one with its inputs.
_FACTORS = {"lora_up.weight": "lora_down.weight", "hada_w1_a": "hada_w1_b"}


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


def kohya_families(
    path: Path,
    keys: Mapping[str, Mapping[str, Tensor]],
    metadata: Mapping[str, str],
    candidates: Mapping[str, KohyaNames],
) -> list[str]:
    """The families that write these names: by the header, else those whose names come back.

    Several only where they mean the same layers.

    Args:
        path: the file, for messages.
        keys: tensors by part, by layer of the file.
        metadata: the file's header.
        candidates: the name tables of the known families, by family.

    Raises:
        InputError: no family writes such names, or several that mean different layers.
    """
    version = metadata.get("ss_base_model_version", "")
    for family, names in candidates.items():
        # Versions may go on with a size.
        if version.startswith(names.base_model_version):
            return [family]
    fitting = [
        family
        for family, names in candidates.items()
        if all(_comes_back(name, names) for name in keys) and _has_their_rows(keys, names)
    ]
    # A table that renames layers fits only where it knows every block, so it says more.
    decided = [family for family in fitting if candidates[family].layers] or fitting[:1]
    meanings = [[candidates[family].layers_of(name) for name in keys] for family in decided]
    if decided and all(meaning == meanings[0] for meaning in meanings):
        return decided
    found = f"of each of {decided}" if decided else f"of a family other than {sorted(candidates)}"
    raise InputError.of(
        "file",
        f"`{path.name}` has layers {found}, such as `{next(iter(keys))}`",
        "name the family of the base model with --family" if decided else "",
    )


def refuse_t5(path: Path, keys: Iterable[str], candidates: Iterable[KohyaNames]) -> None:
    """Tells of layers of a T5, which sd-scripts can train, unless a family adapts them.

    Args:
        path: the file, for messages.
        keys: the file's layers.
        candidates: the name tables in question.

    Raises:
        InputError: there are such layers.
    """
    if any(_T5_PREFIX in names.text_encoder_prefixes.values() for names in candidates):
        return
    found = sorted(key for key in keys if key.startswith(f"{_T5_PREFIX}_"))
    if found:
        raise InputError.of(
            "file",
            f"`{path.name}` adapts {len(found)} layers of T5, such as `{found[0]}`; T5 layers are "
            "not read",
            f"give a file without the keys that start with `{_T5_PREFIX}_`",
        )


def _fits(state: AdapterState, names: KohyaNames) -> bool:
    adapted = {*names.text_encoder_prefixes, names.denoiser}
    if not state.components.keys() <= adapted:
        return False
    layers = [layer for layer in state.layers() if layer[0] == names.denoiser]
    return not names.layers or all(names.is_own(*layer) for layer in layers)


def _has_their_rows(keys: Mapping[str, Mapping[str, Tensor]], names: KohyaNames) -> bool:
    """Whether layers whose rows the table knows by their inputs have that many."""
    for name, parts in keys.items():
        if not name.startswith(f"{names.denoiser_prefix}_"):
            continue
        share = sum(names.layers_of(name).values())
        for first, second in _FACTORS.items():
            if share > 1 and first in parts:
                inputs = parts[second].shape[1] if second in parts else 0
                if parts[first].shape[0] != share * inputs:
                    return False
    return True


def _comes_back(name: str, names: KohyaNames) -> bool:
    """Whether the table has this name, and speaks of its layers."""
    try:
        layers = names.layers_of(name)
    except KeyError:
        return False
    is_fused = not (names.unfused_prefix and name.startswith(f"{names.unfused_prefix}_"))
    return all(
        names.of_layer(*layer, fused=is_fused) == name
        and (not names.layers or layer[0] != names.denoiser or names.is_own(*layer))
        for layer in layers
    )
