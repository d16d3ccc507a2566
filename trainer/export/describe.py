"""What is in an adapter file, and what about it will trouble the programs that read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.errors import InputError
from trainer.export.read import AdapterFile, ReadFormat, open_adapter, read_adapter, read_tensors
from trainer.export.recognition import family_of
from trainer.export.state import MAGNITUDE, layer_rank
from trainer.names import KohyaNames


@dataclass(frozen=True)
class Description:
    """An adapter file at a glance.

    Args:
        format: `diffusers`, `kohya`, or `original` for names of the original implementation.
        family: the family of the base model, where names or header tell it.
        algorithm: `lora`, `lokr` or `loha`.
        dora_convention: `paper`, `comfyui` or `unstated`; None without DoRA.
        ranks: rank to number of layers; full Kronecker factors count as none.
        alphas: alpha to number of layers, where the file states alphas.
        components: pipeline component to number of layers.
        num_layers: layers in all.
        num_parameters: numbers in all.
        dtypes: number formats of the tensors, the most common first.
        metadata: the header's strings.
        problems: what some reader will get wrong, one sentence each.
    """

    format: str
    family: str | None
    algorithm: str
    dora_convention: str | None
    ranks: dict[int, int]
    alphas: dict[float, int]
    components: dict[str, int]
    num_layers: int
    num_parameters: int
    dtypes: list[str]
    metadata: dict[str, str]
    problems: list[str]

    def as_dict(self) -> dict[str, Any]:
        """The description as JSON can hold it."""
        return asdict(self)


def describe(
    path: Path, candidates: Mapping[str, KohyaNames], family: str | None = None
) -> Description:
    """Reads an adapter file and tells what it holds.

    Args:
        path: a safetensors file of a format that `read` reads.
        candidates: the name tables of the known families, by family.
        family: the family, where names and header do not tell it.

    Raises:
        InputError: the file is of another kind.
    """
    file = open_adapter(path, candidates, family)
    tensors, metadata = read_tensors(path)
    ranks = Counter(rank for rank in map(layer_rank, file.layers.values()) if rank is not None)
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    components = Counter(component for component, _ in file.layers)
    return Description(
        format=file.format,
        family=family or file.family or _family(path, candidates),
        algorithm=file.algorithm,
        dora_convention=file.dora_convention,
        ranks=dict(sorted(ranks.items())),
        alphas=dict(sorted(Counter(_alphas(file)).items())),
        components=dict(sorted(components.items())),
        num_layers=len(file.layers),
        num_parameters=sum(tensor.numel() for tensor in tensors.values()),
        dtypes=[name for name, _ in dtypes.most_common()],
        metadata=dict(sorted(metadata.items())),
        problems=[*_problems(file), *_key_problems(list(tensors))],
    )


def _family(path: Path, candidates: Mapping[str, KohyaNames]) -> str | None:
    try:
        return family_of(read_adapter(path, candidates), candidates)
    except InputError:
        return None


def _alphas(file: AdapterFile) -> list[float]:
    """Alphas as the file states them: beside the tensors, or in the diffusers header."""
    if file.format != "diffusers":
        return list(file.alphas.values())
    if not file.adapter_metadata:
        return []
    ranks = ((layer, layer_rank(tensors)) for layer, tensors in file.layers.items())
    return [file.scale(layer) * rank for layer, rank in ranks if rank is not None]


# By what DoRA magnitudes mean.
_MISREAD_MAGNITUDES: Mapping[str, tuple[str, ...]] = {
    "paper": (
        "ComfyUI and Forge read DoRA magnitudes otherwise, and need a file that a training wrote "
        "with `kohya_dora: comfyui` or `both`",
    ),
    "comfyui": (
        "its DoRA magnitudes are ComfyUI's and Forge's; LyCORIS reads them otherwise, and needs a "
        "file that a training wrote with `kohya_dora: paper` or `both`",
    ),
}


def _problems(file: AdapterFile) -> Iterator[str]:
    for (component, path), tensors in file.layers.items():
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            yield f"`{component}.{path}` holds NaN or infinite numbers"
    yield from _PROBLEMS[file.format](file)
    parts = Counter(MAGNITUDE in tensors for tensors in file.layers.values())
    if len(parts) > 1:
        yield f"{parts[False]} of {len(file.layers)} layers have no DoRA magnitude"


def _kohya_problems(file: AdapterFile) -> Iterator[str]:
    missing = len(file.layers) - len(file.alphas)
    if missing:
        yield f"{missing} layers have no alpha; LyCORIS cannot load them"
    if file.algorithm == "lora" and len(set(file.alphas.values())) > 1:
        yield "alphas differ between layers; diffusers gives some layers the wrong one"
    if file.algorithm != "lora" and any(file.scale(layer) != 1 for layer in file.alphas):
        yield "alpha differs from rank; LyCORIS applies that scale twice when it merges"
    if "ss_base_model_version" not in file.metadata:
        yield "no `ss_base_model_version` in the header; user interfaces guess the base model"
    if file.dora_convention == "unstated":
        yield "DoRA magnitudes without a stated meaning; read as in the paper"
    if file.dora_convention is not None:
        yield "diffusers ignores DoRA magnitudes of kohya files; give it the diffusers file"
        yield from _MISREAD_MAGNITUDES.get(file.dora_convention, ())


def _diffusers_problems(file: AdapterFile) -> Iterator[str]:
    if not file.adapter_metadata:
        yield "no adapter configuration in the header; readers take alpha = rank"
        return
    refuted = sum(file.refuted_rank(layer) is not None for layer in file.layers)
    if refuted:
        yield f"{refuted} layers have another rank than the header says; PEFT cannot load them"
    elif any(file.scale(layer) != 1 for layer in file.layers):
        yield "alpha differs from rank and stands in the header alone; some readers ignore it"


def _original_problems(file: AdapterFile) -> Iterator[str]:
    yield (
        "layers have the original implementation's names, which sd-scripts and LyCORIS do not "
        "know; `trainer convert` gives them others"
    )


_PROBLEMS: Mapping[ReadFormat, Callable[[AdapterFile], Iterator[str]]] = {
    "kohya": _kohya_problems,
    "diffusers": _diffusers_problems,
    "original": _original_problems,
}


def _key_problems(keys: list[str]) -> Iterator[str]:
    bare = ("text_encoder.encoder.", "text_encoder_2.encoder.", "_te_encoder_", "_te1_encoder_")
    count = sum(any(mark in key for mark in (*bare, "_te2_encoder_")) for key in keys)
    if count:
        yield f"{count} text-encoder keys lack `text_model`; most readers skip them"
    count = sum(key.endswith(MAGNITUDE) for key in keys)
    if count:
        yield f"{count} DoRA magnitudes lack `.weight`; text encoders lose them"
    count = sum(".lora.down." in key or "_lora.down." in key for key in keys)
    if count and any(".lora_A." in key for key in keys):
        yield f"{count} layers have old diffusers keys beside PEFT keys; diffusers drops them"
