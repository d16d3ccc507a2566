"""Everything that learns in one training, by part: modules, parameters, tensors.

The denoiser learns by an adapter or wholly; text encoders do so too, or new tokens are learnt
beside them. Which part learns in which step is `trainer.schedule`'s to say; knows no loss.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer import adapters, shards, tokens
from trainer.config import Note, OptimConfig, TrainingConfig
from trainer.encoding import tokenizer_of
from trainer.families.base import Family, adapted_encoders, token_encoders
from trainer.frozen import repeated_blocks
from trainer.optim import ParameterGroup
from trainer.schedule import Part
from trainer.tokens import NewTokens, TokenNames

# What new tokens are called among the components of a checkpoint.
_TOKENS = "new_tokens"

# Component to name to tensor.
Tensors = Mapping[str, Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Trainables:
    """What learns; the parameters themselves belong to the modules.

    Args:
        denoiser: name of the component and the module.
        text_encoders: component to module, for those that learn by an adapter or wholly.
        new_tokens: component to its new tokens.
        whole: whether all weights learn, not an adapter.
        parameters: part to what learns in it, by component.
        notes: what was dropped or deserves a warning.
    """

    denoiser: tuple[str, torch.nn.Module]
    text_encoders: Mapping[str, torch.nn.Module]
    new_tokens: Mapping[str, NewTokens]
    whole: bool
    parameters: Mapping[Part, Mapping[str, tuple[torch.nn.Parameter, ...]]]
    notes: tuple[Note, ...]

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        """Component to module, for those that learn by an adapter or wholly."""
        name, denoiser = self.denoiser
        return {name: denoiser, **self.text_encoders}

    def learn(self, parts: Collection[Part]) -> None:
        """Lets these parts learn and freezes the others: they get no gradient at all."""
        for part, components in self.parameters.items():
            for group in components.values():
                for parameter in group:
                    parameter.requires_grad_(part in parts)

    def of(self, parts: Collection[Part]) -> list[torch.nn.Parameter]:
        """Everything that learns in these parts, in a fixed order."""
        return [
            p
            for part, components in self.parameters.items()
            if part in parts
            for group in components.values()
            for p in group
        ]

    def groups(self, optim: OptimConfig) -> list[ParameterGroup]:
        """The optimizer's groups: the denoiser, and each text encoder or its new tokens."""
        settings = {
            "denoiser": (optim.learning_rate, optim.adam_weight_decay),
            "text_encoders": (optim.text_encoder_lr, optim.adam_weight_decay_text_encoder),
            "tokens": (optim.text_encoder_lr, optim.adam_weight_decay_text_encoder),
        }
        return [
            ParameterGroup(f"{part} {component}", parameters, *settings[part])
            for part, components in self.parameters.items()
            for component, parameters in components.items()
        ]

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """Everything learnt so far, new tokens included; sharded weights as parts."""
        learnt = self.weights()
        if self.new_tokens:
            learnt[_TOKENS] = {name: new.rows.detach() for name, new in self.new_tokens.items()}
        return learnt

    def weights(self) -> dict[str, dict[str, torch.Tensor]]:
        """What the modules have learnt: adapters, or all weights."""
        read = _whole_tensors if self.whole else adapters.adapter_tensors
        return {name: read(module) for name, module in self.modules.items()}

    def load(self, tensors: Tensors) -> None:
        """Puts back what `tensors` gave, every tensor whole."""
        for name, module in self.modules.items():
            if self.whole:
                shards.put(tensors[name], _whole_tensors(module))
            else:
                adapters.load_adapter_tensors(module, tensors[name])
        for name, new in self.new_tokens.items():
            with torch.no_grad():
                new.rows.copy_(tensors[_TOKENS][name])


def build(config: TrainingConfig, family: Family, names: TokenNames | None) -> Trainables:
    """Makes trainable what the configuration says, and nothing else.

    Args:
        config: what learns, and from which seed.
        family: as loaded, everything frozen; its components are changed in place.
        names: of the new tokens, if any are to be learnt.

    Raises:
        InputError: a target matches no layer, or a new token is a word already.
    """
    denoiser_name, denoiser = family.denoiser_name, family.denoiser
    new_tokens: dict[str, NewTokens] = {}
    for name in token_encoders(family) if names else ():
        assert names is not None
        new_tokens[name] = tokens.add_new_tokens(
            family.pipeline.components[name],
            tokenizer_of(family, name),
            names,
            seed=config.run.seed,
            component=name,
        )
    text_encoders = {
        name: family.pipeline.components[name]
        for name in adapted_encoders(family)
        if config.adapter.train_text_encoder
    }
    if config.run.gradient_checkpointing:
        share = config.run.checkpointing_share
        denoiser.enable_gradient_checkpointing(recomputing(denoiser, share))
        for name in dict.fromkeys([*text_encoders, *new_tokens]):
            recompute_activations(family.pipeline.components[name])
    notes = [*_make_trainable(config, denoiser_name, denoiser, is_text=False)]
    for name, text_encoder in text_encoders.items():
        notes += _make_trainable(config, name, text_encoder, is_text=True)
    return Trainables(
        denoiser=(denoiser_name, denoiser),
        text_encoders=text_encoders,
        new_tokens=new_tokens,
        whole=not config.adapter.use_lora,
        parameters={
            "denoiser": {denoiser_name: _learning(denoiser)},
            "text_encoders": {name: _learning(module) for name, module in text_encoders.items()},
            "tokens": {name: (new.rows,) for name, new in new_tokens.items()},
        },
        notes=tuple(dict.fromkeys(notes)),
    )


def gathered_anew(trainables: Trainables) -> Trainables:
    """What learns after the denoiser, which learns wholly, was given other parameters."""
    name, denoiser = trainables.denoiser
    return replace(
        trainables, parameters={**trainables.parameters, "denoiser": {name: _learning(denoiser)}}
    )


def _make_trainable(
    config: TrainingConfig, component: str, module: torch.nn.Module, *, is_text: bool
) -> tuple[Note, ...]:
    adapter = config.adapter
    field = "target_text_encoder_modules" if is_text else "target_unet_modules"
    return adapters.make_trainable(
        module,
        adapter.for_text_encoders() if is_text else adapter,
        adapter.target_text_encoder_modules if is_text else adapter.target_unet_modules,
        field=field,
        component=component,
        seed=config.run.seed,
        must_match=config.is_explicit(field),
    )


def _whole_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}


def _learning(module: torch.nn.Module) -> tuple[torch.nn.Parameter, ...]:
    return tuple(parameter for parameter in module.parameters() if parameter.requires_grad)


def recomputing(denoiser: Any, share: float) -> Callable[..., Any]:
    """What calls the blocks of a denoiser so that of some, backward keeps the inputs only.

    States of random generators are not kept: nothing is drawn inside, where a CUDA graph would not
    allow it either.

    Args:
        denoiser: of diffusers, before anything in it learns.
        share: of its repeated blocks that do, and of each size of them; they are the first of the
            model, so that in a transformer what later blocks kept is gone when they compute again.
    """
    sizes: dict[int, list[torch.nn.Module]] = defaultdict(list)
    for block in repeated_blocks(denoiser):
        sizes[sum(parameter.numel() for parameter in block.parameters())].append(block)
    keeping = {
        block for blocks in sizes.values() for block in blocks[math.ceil(share * len(blocks)) :]
    }

    def called(block: torch.nn.Module, *inputs: Any) -> Any:
        if block in keeping:
            return block(*inputs)
        return checkpoint(block.__call__, *inputs, use_reentrant=False, preserve_rng_state=False)

    return called


def recompute_activations(text_encoder: Any, **settings: bool) -> None:
    """Lets a text encoder of transformers keep the inputs of its layers only.

    Args:
        text_encoder: changed in place.
        settings: for `torch.utils.checkpoint`, beside its own.
    """
    text_encoder.activation_checkpointing_enable({"use_reentrant": False, **settings})
    for module in text_encoder.modules():
        # transformers recomputes in training mode only, which would wake dropout inside a layer.
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
