"""Adapters on the layers of a model: LoRA, DoRA, LoKr, LoHa through PEFT, or all weights.

PEFT makes them, names their weights and merges them; how they compute is `trainer.adapted`'s, or
PEFT's too. Takes modules and the adapter's own settings; knows no family. An adapter's weights are
always 32-bit floats, whatever the base model is kept in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer

from trainer import randomness
from trainer.adapted.layers import ADAPTER, take_over
from trainer.config import AdapterConfig, Note
from trainer.errors import InputError, Problem
from trainer.frozen import FrozenLinear


def _alpha(adapter: AdapterConfig) -> Any:
    # PEFT declares whole numbers, but only ever divides by the rank.
    return adapter.scale * adapter.rank


def _lora(adapter: AdapterConfig, layers: list[str]) -> PeftConfig:
    # Gaussian: A is normal with deviation 1/rank, B is zero (PEFT, `reset_lora_parameters`).
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=_alpha(adapter),
        target_modules=layers,
        init_lora_weights="gaussian",
        use_dora=adapter.use_dora,
    )


def _lokr(adapter: AdapterConfig, layers: list[str]) -> PeftConfig:
    return LoKrConfig(
        r=adapter.rank,
        alpha=_alpha(adapter),
        target_modules=layers,
        decompose_factor=adapter.lokr_factor,
    )


def _loha(adapter: AdapterConfig, layers: list[str]) -> PeftConfig:
    return LoHaConfig(r=adapter.rank, alpha=_alpha(adapter), target_modules=layers)


FORMS: Mapping[str, Callable[[AdapterConfig, list[str]], PeftConfig]] = {
    "lora": _lora,
    "lokr": _lokr,
    "loha": _loha,
}


def make_trainable(
    module: torch.nn.Module,
    adapter: AdapterConfig,
    targets: tuple[str, ...],
    *,
    field: str,
    component: str,
    seed: int,
    must_match: bool,
) -> tuple[Note, ...]:
    """Makes learn what the configuration says: an adapter, or all weights of a model.

    Args:
        module: changed in place.
        adapter: form, rank and strength.
        targets: see `target_layers`.
        field: the option the targets come from.
        component: the module's name in its pipeline; first weights differ by it.
        seed: the run's seed.
        must_match: see `target_layers`.

    Returns:
        Notes on targets that were dropped, and on a rank larger than a layer has use for.

    Raises:
        InputError: a target matches no layer.
    """
    if not adapter.use_lora:
        module.requires_grad_(True)
        return ()
    layers, notes = target_layers(module, targets, field=field, must_match=must_match)
    narrow = [name for name in layers if adapter.rank > min(_matrix(module, name).shape)]
    if narrow and adapter.lora_type == "lora":
        message = (
            f"{adapter.rank} is more than {len(narrow)} of {len(layers)} layers of {component} "
            f"have rows or columns, such as `{narrow[0]}`: there it costs memory without "
            "learning more"
        )
        notes.append(Note(kind="warning", field="rank", message=message))
    add_adapter(module, adapter, layers, component=component, seed=seed)
    return tuple(notes)


def adaptable_layers(module: torch.nn.Module) -> list[str]:
    """Names of the layers that an adapter can be put on, in the model's order."""
    return [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
    ]


def target_layers(
    module: torch.nn.Module, targets: tuple[str, ...], *, field: str, must_match: bool
) -> tuple[list[str], list[Note]]:
    """The linear and convolution layers whose names end in a target.

    Args:
        module: the model to be adapted.
        targets: ends of layer names, whole path steps: `to_out.0` matches `attn1.to_out.0`.
        field: the option the targets come from.
        must_match: a target without a layer is an error rather than dropped with a note.

    Raises:
        InputError: a target matches nothing and `must_match` is set, or none matches.
    """
    layers = adaptable_layers(module)
    found = {target: [name for name in layers if _ends_in(name, target)] for target in targets}
    missing = [target for target, names in found.items() if not names]
    if missing and (must_match or len(missing) == len(targets)):
        endings = sorted({name.rsplit(".", 1)[-1] for name in layers if not name[-1].isdigit()})
        raise InputError(
            [
                Problem(
                    field,
                    f"`{target}` is the end of no layer of {type(module).__name__}",
                    f"known endings are: {', '.join(endings)}",
                )
                for target in missing
            ]
        )
    notes = [
        Note(kind="yielded", field=field, message=f"the default `{target}` matches no layer here")
        for target in missing
    ]
    chosen = {name for names in found.values() for name in names}
    return [name for name in layers if name in chosen], notes


def add_adapter(
    module: torch.nn.Module,
    adapter: AdapterConfig,
    layers: list[str],
    *,
    component: str,
    seed: int,
) -> None:
    """Puts an adapter that changes nothing yet on the named layers, the only part that learns.

    Args:
        module: the model, changed in place.
        adapter: form, rank and strength.
        layers: full layer names.
        component: the module's name in its pipeline.
        seed: the run's seed; the same seed and component give the same first weights.
    """
    # PEFT initialises from torch's global generator: give it one state, and give ours back.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(randomness.key(seed, f"adapter {component}"))
        inject_adapter_in_model(FORMS[adapter.lora_type](adapter, layers), module, ADAPTER)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if adapter.use_dora:
        _start_at_row_norms(module)
    if adapter.adapter_layers == "ours":
        take_over(module)


def adapter_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's weights under PEFT's names without prefix: `….to_q.lora_A.weight`."""
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(module, adapter_name=ADAPTER)
    return {
        f"{name}.weight" if name.endswith("lora_magnitude_vector") else name: tensor.detach()
        for name, tensor in state.items()
    }


def load_adapter_tensors(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Puts weights from `adapter_tensors` back, all of them."""
    assert tensors.keys() == adapter_tensors(module).keys()
    state = {
        name.removesuffix(".weight") if "lora_magnitude_vector" in name else name: tensor
        for name, tensor in tensors.items()
    }
    answer: Any = set_peft_model_state_dict(module, state, adapter_name=ADAPTER)
    assert not answer.unexpected_keys, answer.unexpected_keys


class EffectiveWeights(Mapping[str, torch.Tensor]):
    """Layer name to its weight with the adapter merged in, computed in 32 bits when asked for.

    Args:
        module: a model with an adapter; left as it is.
        original: parameter name to weight of the model before it was quantised, which is what
            others put the adapter on; read a layer at a time. None: the module's own weights.
    """

    def __init__(
        self, module: torch.nn.Module, original: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        self._module, self._layers = module, _adapted_layers(module)
        self._original = original

    def __getitem__(self, name: str) -> torch.Tensor:
        """The merged weight, on the processor."""
        layer = self._layers[name]
        own = layer.get_base_layer()
        # Of a quantised layer the weight would be widened to be asked.
        device = own.device if isinstance(own, FrozenLinear) else own.weight.device
        weight = self._weight(name).to(device)
        # PEFT merges into the layer that it finds here: one that only has the weight's shape.
        layer.base_layer = _with_weight(own, weight)
        try:
            layer.merge(safe_merge=True)
            merged: torch.Tensor = layer.base_layer.weight
            return merged.detach().cpu().clone()
        finally:
            layer.merged_adapters.clear()
            layer.base_layer = own

    def __iter__(self) -> Iterator[str]:
        """Layer names in the model's order."""
        return iter(self._layers)

    def __len__(self) -> int:
        """Number of adapted layers."""
        return len(self._layers)

    def base(self, name: str) -> torch.Tensor:
        """A layer's weight without an adapter, 32 bits, on the processor; of any layer."""
        return self._weight(name).cpu()

    def _weight(self, name: str) -> torch.Tensor:
        if self._original is not None:
            return self._original[f"{name}.weight"].detach().float()
        adapted = self._layers.get(name)
        layer: Any = adapted.get_base_layer() if adapted else self._module.get_submodule(name)
        weight: torch.Tensor = layer.weight
        return weight.detach().float()


def _with_weight(layer: torch.nn.Module, weight: torch.Tensor) -> torch.nn.Module:
    """A layer of the same kind around another weight; the given one stays as it is."""
    if isinstance(layer, FrozenLinear):
        layer = torch.nn.Linear(layer.in_features, layer.out_features, device="meta")
    other = copy.copy(layer)
    other._parameters = {**layer._parameters, "weight": torch.nn.Parameter(weight.clone(), False)}
    return other


def _start_at_row_norms(module: torch.nn.Module) -> None:
    """DoRA magnitudes as 32-bit norms of the rows: PEFT rounds them to the base's precision.

    Of a quantised layer they are those of the weight that it computes with: an adapter that has
    learnt nothing changes nothing there.
    """
    for layer in _adapted_layers(module).values():
        rows = layer.get_base_layer().weight.detach().float().flatten(1)
        magnitude = layer.lora_magnitude_vector[ADAPTER].weight
        magnitude.data = torch.linalg.vector_norm(rows, dim=1).view_as(magnitude)


def _adapted_layers(module: torch.nn.Module) -> dict[str, Any]:
    named = module.named_modules()
    return {name: layer for name, layer in named if isinstance(layer, BaseTunerLayer)}


def _matrix(module: torch.nn.Module, name: str) -> torch.Tensor:
    """A layer's weight as a matrix (out, in), convolutions with their windows beside in."""
    layer: Any = module.get_submodule(name)
    if isinstance(layer, torch.nn.Linear):
        # A quantised layer's weight would be widened to be looked at.
        return torch.empty(layer.out_features, layer.in_features, device="meta")
    return torch.empty(layer.weight.shape, device="meta").flatten(1)


def _ends_in(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
