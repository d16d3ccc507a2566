"""A base model that has shapes but no data, as a training would make it: with what learns in it.

Knows no family. Of a row of equal blocks few are left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from trainer import adapters
from trainer.adapted.layers import Copies
from trainer.base_model import BaseModel
from trainer.config import TrainingConfig
from trainer.families.base import Family, adapted_encoders, token_encoders
from trainer.frozen import freeze, frozen_layers, repeated_blocks
from trainer.live_bytes import LiveBytes, StandIn, allocated, repeated, shorten
from trainer.outcomes import Outcomes, without_data
from trainer.tokens import NewTokens

Made = TypeVar("Made")


@dataclass(frozen=True)
class Encoded(Generic[Made]):
    """What encoders make, and the bytes that it takes.

    Args:
        peak: the most at one time.
        weights: of that, those of the encoders.
        made: what they made.
    """

    peak: int
    weights: int
    made: Made


@dataclass(frozen=True)
class Model:
    """A base model that has shapes but no data.

    Args:
        family: its real tokenizers around models whose rows of equal blocks are shortened.
        stand_ins: the blocks that stand for those taken out.
        outcomes: what is known of operations on tensors without data.
    """

    family: Family
    stand_ins: tuple[StandIn, ...]
    outcomes: Outcomes

    def counter(self) -> LiveBytes:
        """Counts what its parts make."""
        return LiveBytes(self.stand_ins, self.outcomes)

    def encoded(
        self, encoders: Iterable[torch.nn.Module], work: Callable[[], Made]
    ) -> Encoded[Made]:
        """Counts work beside these parts, from which nothing learns."""
        with self.counter() as counter, torch.no_grad():
            for encoder in encoders:
                counter.hold(encoder)
            weights = counter.now
            made = work()
        return Encoded(int(counter.peak), int(weights), made)

    def copies(
        self, modules: Sequence[torch.nn.Module], dtype: torch.dtype, counter: LiveBytes
    ) -> Copies:
        """What adapted layers compute with; counts those of the blocks taken out."""
        for each in self.stand_ins:
            with LiveBytes(outcomes=self.outcomes) as alone:
                alone.hold(each.block)
                weights = alone.now
                kept = Copies([each.block], dtype)
                counter.add(each.others * (alone.now - weights))
            del kept
        return Copies(modules, dtype)

    def count(self, parameters: Sequence[torch.nn.Parameter]) -> int:
        """How many numbers these are, those of the blocks taken out included."""
        times = repeated(self.stand_ins)
        return sum(times.get(parameter, 1) * parameter.numel() for parameter in parameters)

    def give_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> int:
        """Gives parameters gradients; returns the bytes of those of the blocks taken out."""
        times = repeated(self.stand_ins)
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        return sum((times.get(p, 1) - 1) * allocated(p.nbytes) for p in parameters)


def able_encoders(family: type[Family], config: TrainingConfig) -> tuple[str, ...]:
    """The text encoders in which something learns."""
    adapted = adapted_encoders(family) if config.adapter.train_text_encoder else ()
    with_tokens = token_encoders(family) if config.token.train_text_encoder_ti else ()
    return (*adapted, *with_tokens)


def prepare_denoiser(
    base: BaseModel, denoiser: torch.nn.Module, config: TrainingConfig, *, learns: bool
) -> tuple[StandIn, ...]:
    """Keeps frozen weights as they will be, puts adapters on, and leaves few of equal blocks."""
    freeze(
        denoiser,
        quantization=config.model.quantization,
        offload_blocks=config.run.offload_blocks,
        device=torch.device("meta"),
    )
    adapter = config.adapter
    if not learns or not adapter.use_lora:
        denoiser.requires_grad_(learns)
        return shorten(denoiser, repeated_blocks(denoiser))
    # Blocks are taken out before adapters are made, which takes time for each layer.
    names, _ = adapters.target_layers(
        denoiser, adapter.target_unet_modules, field="", must_match=False
    )
    adapted = {denoiser.get_submodule(name) for name in names}
    stand_ins = shorten(denoiser, repeated_blocks(denoiser), adapted)
    left = [name for name, layer in denoiser.named_modules() if layer in adapted]
    component = base.family.denoiser_name
    with torch.device("meta"):
        adapters.add_adapter(denoiser, adapter, left, component=component, seed=0)
    # As it is trained; otherwise PEFT's LoKr and LoHa draw whether they take part, which is data.
    denoiser.eval()
    return stand_ins


def make_text_trainable(
    family: type[Family], text_encoder: Any, name: str, config: TrainingConfig
) -> None:
    """Gives a text encoder new tokens, or an adapter, or lets all of it learn."""
    adapter, token = config.adapter, config.token
    if token.train_text_encoder_ti and name in token_encoders(family):
        table = text_encoder.get_input_embeddings()
        count = len(token.token_abstraction) * token.num_new_tokens_per_abstraction
        rows = torch.empty(count, table.embedding_dim, device="meta")
        new = NewTokens(table, rows, first_id=table.num_embeddings, deviation=1.0)
        text_encoder.set_input_embeddings(new)
    if adapter.train_text_encoder and name in adapted_encoders(family):
        targets = adapter.target_text_encoder_modules
        with torch.device("meta"):
            adapters.make_trainable(
                text_encoder,
                adapter.for_text_encoders(),
                targets,
                field="",
                component=name,
                seed=0,
                must_match=False,
            )


def give_tensors(model: torch.nn.Module, mode: FakeTensorMode, device: torch.device) -> None:
    """Puts tensors without data on a device in the place of those without a device.

    Args:
        model: changed in place.
        mode: of the new tensors.
        device: theirs.
    """
    made: dict[torch.Tensor, torch.Tensor] = {}

    def make(like: torch.Tensor) -> torch.Tensor:
        return without_data(like, mode, device)

    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            # Text encoders look words up in the table that they know as two.
            if parameter not in made:
                made[parameter] = make(parameter)
            setattr(module, name, made[parameter])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, make(buffer))
    for layer in frozen_layers(model):
        layer.rebuild(make)
