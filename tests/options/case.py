"""One row at work: its two trainings, each run once for all rows that ask for it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from options import onlookers
from options.matrix import ADAPTER_FORMS, Leaves, Own, Place, Row
from options.probe import Delivery, Probe, deliver, probe
from options.world import OWN, SIDE, World
from tiny import compose

from trainer import base_model
from trainer.base_model import BaseModel, Precision
from trainer.config import ModelConfig, TrainingConfig
from trainer.errors import InputError
from trainer.families.base import Conditioning, Family, adapted_encoders, token_encoders
from trainer.resolve import Layer, resolve

STEPS = 2
# Two pictures, so that a step sees both of them.
COMMON: Leaves = {
    "model_url": Place("model"),
    "images_data_url": Place("pictures"),
    "rank": 4,
    "batch_size": 2,
    "resolution_width": SIDE,
    "resolution_height": SIDE,
    "max_train_steps": 8,
    "learning_rate": 1e-3,
    "tensorboard": False,
    "target_unet_modules": Own("layers"),
}
FULL = Precision(*[torch.float32] * 4)


@dataclass
class Lab:
    """Everything that rows share: places, and trainings by what they were asked for."""

    worlds: Mapping[str, World]
    root: Path
    probes: dict[str, Probe] = field(default_factory=dict, repr=False)
    deliveries: dict[str, Delivery] = field(default_factory=dict, repr=False)
    pipelines: dict[str, Family] = field(default_factory=dict, repr=False)
    texts: dict[str, Conditioning] = field(default_factory=dict, repr=False)

    def folder(self) -> Path:
        """A new run folder."""
        return self.root / f"run-{len(list(self.root.iterdir()))}"

    @contextmanager
    def encoding_once(self) -> Iterator[None]:
        """While this lasts, text encoders that never learn encode a caption once."""
        load = base_model.load

        def loaded(base: BaseModel, precision: Precision, **named: Any) -> Family:
            family = load(base, precision, **named)
            if not adapted_encoders(family) and not token_encoders(family):
                name = base.settings.model_dump_json(), precision, repr(named)
                self._encode_once(family, repr(name))
            return family

        with patch.object(base_model, "load", loaded):
            yield

    def _encode_once(self, family: Family, model: str) -> None:
        """Keeps what text encoders that never learn say of captions: one has 28 layers."""
        encode = family.encode_text

        def remembered(captions: Sequence[str]) -> Conditioning:
            name = f"{model} {torch.is_autocast_enabled('cpu')} {list(captions)}"
            if name not in self.texts:
                self.texts[name] = encode(captions)
            return {part: states.clone() for part, states in self.texts[name].items()}

        listening: Any = family
        listening.encode_text = remembered


@dataclass(frozen=True)
class Case:
    """A row for one family.

    Args:
        row: what is claimed.
        family: the name of the family.
        lab: what rows share.
    """

    row: Row
    family: str
    lab: Lab = field(repr=False)

    @property
    def world(self) -> World:
        """The family's places."""
        return self.lab.worlds[self.family]

    def leaves(self, *more: Leaves) -> dict[str, Any]:
        """The leaves of a training, places filled in; a leaf that is `...` is left out."""
        joined: dict[str, Any] = dict(COMMON) | dict(ADAPTER_FORMS[self.row.form])
        for layer in (self.row.base, *more):
            joined |= layer
        filled: dict[str, Any] = self._filled(joined)
        return {name: value for name, value in filled.items() if value is not ...}

    def config(self, *more: Leaves) -> TrainingConfig:
        """The configuration of the row's base with further leaves."""
        return resolve([Layer("test", self.leaves(*more), explicit=True)])

    def before(self, num_steps: int | None = STEPS) -> Probe:
        """The training without the flip."""
        return self.probe({}, num_steps)

    def after(self, num_steps: int | None = STEPS) -> Probe:
        """The training with the flip."""
        return self.probe(self.row.flipped, num_steps)

    def probe(self, more: Leaves, num_steps: int | None = STEPS) -> Probe:
        """The row's base with other leaves."""
        leaves = self.leaves(more)
        name = f"{self.family} {num_steps} {json.dumps(leaves, sort_keys=True)}"
        if name not in self.lab.probes:
            config = resolve([Layer("test", leaves, explicit=True)])
            with self._surroundings(), self.lab.encoding_once():
                self.lab.probes[name] = probe(config, self.lab.folder(), num_steps)
        return self.lab.probes[name]

    def delivered(self, more: Leaves) -> Delivery:
        """The result files of the row's base with other leaves."""
        leaves = self.leaves(more)
        name = f"{self.family} {json.dumps(leaves, sort_keys=True)}"
        if name not in self.lab.deliveries:
            config = resolve([Layer("test", leaves, explicit=True)])
            with self._surroundings(), self.lab.encoding_once():
                self.lab.deliveries[name] = deliver(config, self.lab.folder())
        return self.lab.deliveries[name]

    def pipeline(self, place: str = "model") -> Family:
        """A base model just loaded; must not be changed."""
        name = f"{self.family} {place}"
        if name not in self.lab.pipelines:
            settings = ModelConfig(model_url=str(self.world.path(place)))
            self.lab.pipelines[name] = base_model.load(base_model.locate(settings), FULL)
        return self.lab.pipelines[name]

    def encoded(self, captions: Sequence[str], place: str = "model") -> Conditioning:
        """The base model's conditioning of captions, one by one as an engine may keep them."""
        names = [f"{self.family} {place} {caption}" for caption in captions]
        for name, caption in zip(names, captions, strict=True):
            if name not in self.lab.texts:
                with torch.no_grad():
                    self.lab.texts[name] = self.pipeline(place).encode_text([caption])
        rows = [self.lab.texts[name] for name in names]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def is_refused(self, leaf: str, message: str) -> None:
        """Asserts that the flipped configuration is refused by name, and no model is loaded."""
        self.config()
        with (
            self._surroundings(has_spandrel=False),
            self.lab.encoding_once(),
            patch.object(base_model, "load", side_effect=AssertionError("a model was loaded")),
            pytest.raises(InputError, match=message) as caught,
        ):
            compose(self.config(self.row.flipped), self.lab.folder())
        assert leaf in {problem.field for problem in caught.value.problems}

    def is_ignored(self, leaf: str, reason: str) -> None:
        """Asserts that the run reports an option as without effect, and why."""
        assert self.config({leaf: self.row.flipped[leaf]}).leaf(leaf) is not None
        assert self.after().ignored[leaf] == reason
        assert self.after().config.resolved.ignored_options[leaf] == reason

    def changes_nothing(self) -> None:
        """Asserts that the flip leaves every input, gradient and trained number as it was."""
        ours, theirs = self.before(), self.after()
        assert ours.names == theirs.names
        assert self.config().values() != self.config(self.row.flipped).values()
        for one, other in zip(ours.steps, theirs.steps, strict=True):
            for a, b in zip(one.passes, other.passes, strict=True):
                same(a.tensors(), b.tensors())
            same(one.gradients, other.gradients)
            same(one.clipped, other.clipped)
            same(one.after, other.after)
            assert one.rates == other.rates

    @contextmanager
    def _surroundings(self, *, has_spandrel: bool = True) -> Iterator[None]:
        """While this lasts, the hub holds what the tests put there, whatever the machine has."""
        place = str(self.world.hub())
        with (
            patch("huggingface_hub.constants.HF_HUB_CACHE", place),
            onlookers.spandrel(is_installed=has_spandrel),
        ):
            yield

    def _filled(self, value: Any) -> Any:
        if isinstance(value, Place):
            return str(self.world.path(value.name))
        if isinstance(value, Own):
            return OWN[value.name][self.family]
        if isinstance(value, dict):
            return {name: self._filled(part) for name, part in value.items()}
        if isinstance(value, list):
            return [self._filled(part) for part in value]
        return value


def same(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    """Asserts that two sets of tensors are equal to the bit."""
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert different == []


def chosen(tensors: Mapping[str, torch.Tensor], rows: Any) -> dict[str, torch.Tensor]:
    """Some rows of every tensor."""
    return {name: tensor[rows] for name, tensor in tensors.items()}


def near(
    ours: torch.Tensor | Mapping[str, torch.Tensor],
    theirs: torch.Tensor | Mapping[str, torch.Tensor],
    rtol: float = 1e-5,
    atol: float = 1e-6,
) -> None:
    """Asserts that tensors are equal up to rounding."""
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def columns(pixels: torch.Tensor) -> list[int]:
    """The first column seen of each grid picture, unless it is mirrored."""
    return [round(float((red + 1) * 127.5)) for red in pixels[:, 0, 0, 0]]


def rows(pixels: torch.Tensor) -> list[int]:
    """The first row seen of each grid picture."""
    return [round(float((green + 1) * 127.5)) for green in pixels[:, 1, 0, 0]]


def pictures(pixels: torch.Tensor) -> list[str]:
    """Which grid picture each one is."""
    return ["landscape" if float(blue) < 0 else "portrait" for blue in pixels[:, 2, 0, 0]]
