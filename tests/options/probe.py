"""A tiny training, composed once per configuration, whose first steps are recorded.

The engine composes and trains as for a user. What the denoiser, the VAE, the text encoders and
the loss are given is listened to on the way; nothing of it is replaced.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from tiny import never

from trainer import encoded, encoding, engine, loss, optim, results
from trainer.config import TrainingConfig
from trainer.data.dataset import Batch, Dataset
from trainer.data.store import Store
from trainer.engine import Composition
from trainer.events import NoteEvent, StepEvent
from trainer.frozen import repeated_blocks
from trainer.job import RunFolder
from trainer.training import Training

Tensors = dict[str, torch.Tensor]

# A part of the denoiser that computes twice where activations are recomputed, by its component.
FIRST_BLOCKS = {"unet": "down_blocks.0.resnets.0", "transformer": "transformer_blocks.0"}
# What a denoiser is told beside latents, timesteps and captions.
TOLD = ("time_ids", "guidance")


@dataclass(repr=False)
class Pass:
    """One forward and backward pass: what went into the denoiser and into the loss.

    Args:
        text: the conditioning that the family was given.
        told: what else the denoiser itself was given, such as sizes and guidance.
    """

    noisy_latents: torch.Tensor
    timesteps: torch.Tensor
    text: Tensors
    told: Tensors
    prediction: torch.Tensor
    target: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    shares: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    is_class: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    mask: torch.Tensor | None = None

    @property
    def hidden_states(self) -> torch.Tensor:
        """The captions word by word (B, words, width)."""
        return self.text["prompt_embeds"]

    @property
    def time_ids(self) -> torch.Tensor | None:
        """Sizes and crops as the denoiser is told them, where it is."""
        return self.told.get("time_ids")

    def tensors(self) -> Tensors:
        """Everything in it by name."""
        alone = {n: value for n, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return alone | self.text | self.told


@dataclass(repr=False)
class Step:
    """One optimizer step; parameters are called `denoiser.…`, `text_encoder.…`, `tokens.…`."""

    before: Tensors
    passes: list[Pass] = field(default_factory=list)
    pixels: list[torch.Tensor] = field(default_factory=list)
    token_ids: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    gradients: Tensors = field(default_factory=dict)
    clipped: Tensors = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    inner_calls: int = 0
    block_calls: Counter[int] = field(default_factory=Counter)
    after: Tensors = field(default_factory=dict)
    event: StepEvent | None = None

    @property
    def loss(self) -> float:
        """As the run told it."""
        assert self.event is not None
        return self.event.loss

    def moved(self, part: str = "") -> Tensors:
        """How far each parameter went whose name has this part."""
        return {n: self.after[n] - self.before[n] for n in self.after if part in n}


@dataclass(frozen=True, repr=False)
class Probe:
    """What was seen of a training.

    Args:
        config: as the engine completed it.
        ignored: what the run told to be without effect: option to reason.
        dataset: its batches.
        steps: the recorded ones.
        encoded: pictures that the VAE was given before the first step.
        frozen: digest of every weight that does not learn, before and after the steps.
        dtypes: of the denoiser's weights, frozen and trained.
        optimizer_state: dtypes of the optimizer's larger state tensors.
        new_tokens: component to the deviation of its own table.
        files: of the run folder at the end, by relative path.
        reading: how often this process itself read a step's pictures.
        kernels: of attention, those that were allowed inside the denoiser.
        layouts: of the convolutions' frozen weights: whether channels are last.
        compiled: how many parts of the denoiser were to be compiled.
        adapted_by: the packages whose code computes layers with an adapter.
    """

    config: TrainingConfig
    ignored: Mapping[str, str]
    dataset: Dataset
    steps: list[Step]
    encoded: int
    frozen: tuple[str, str]
    dtypes: tuple[set[torch.dtype], set[torch.dtype]]
    optimizer_state: set[torch.dtype]
    new_tokens: Mapping[str, float]
    files: frozenset[str]
    reading: int
    kernels: set[str]
    layouts: set[bool]
    compiled: int
    adapted_by: set[str]

    @property
    def first(self) -> Step:
        """The first step."""
        return self.steps[0]

    @property
    def seen(self) -> Pass:
        """The first pass of the first step."""
        return self.steps[0].passes[0]

    @property
    def batch(self) -> Batch:
        """The first batch of the first step."""
        return self.dataset[0][0]

    @property
    def passes(self) -> list[Pass]:
        """All passes of all recorded steps."""
        return [one for step in self.steps for one in step.passes]

    @property
    def names(self) -> set[str]:
        """Of everything that learns."""
        return set(self.first.before)


def probe(config: TrainingConfig, root: Path, num_steps: int | None) -> Probe:
    """Composes a training and records its first steps.

    Args:
        root: the run folder.
        num_steps: how many. None: all, with the checkpoints that a run publishes.
    """
    recorder = _Recorder()
    with recorder.listening():
        composed, notes = composed_of(config, root)
        training = composed.training
        encoded = len(recorder.pixels)
        recorder.attach(training)
        before = recorder.digest(training)
        for event in training.steps(RunFolder(root), never):
            if isinstance(event, StepEvent):
                recorder.finish(event)
                if len(recorder.steps) == num_steps:
                    break
    states = training.optimizer.state.values()
    return Probe(
        config=composed.config,
        ignored={note.field: note.message for note in notes if note.note == "ignored"},
        dataset=training.dataset,
        steps=recorder.steps,
        encoded=encoded,
        frozen=(before, recorder.digest(training)),
        dtypes=_dtypes(training),
        optimizer_state={
            tensor.dtype
            for state in states
            for tensor in state.values()
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= 4096
        },
        new_tokens={n: new.deviation for n, new in training.trainables.new_tokens.items()},
        files=frozenset(p.relative_to(root).as_posix() for p in root.rglob("*")),
        reading=recorder.reading,
        kernels=recorder.kernels,
        layouts=_layouts(training.denoiser),
        adapted_by=_adapted_by(training.denoiser),
        compiled=sum(part._compiled_call_impl is not None for part in training.denoiser.modules()),
    )


def composed_of(config: TrainingConfig, root: Path) -> tuple[Composition, list[NoteEvent]]:
    """A training before its first step, and what the user is told until then."""
    composing = engine.compose(config, RunFolder(root))
    notes: list[NoteEvent] = []
    while True:
        try:
            event = next(composing)
            if isinstance(event, NoteEvent):
                notes.append(event)
        except StopIteration as end:
            composition: Composition = end.value
            return composition, notes


def _adapted_by(denoiser: torch.nn.Module) -> set[str]:
    layers = [layer for layer in denoiser.modules() if isinstance(layer, BaseTunerLayer)]
    return {type(layer).__module__.partition(".")[0] for layer in layers}


def _layouts(denoiser: torch.nn.Module) -> set[bool]:
    """Whether channels are last, of windows of more than one pixel."""
    windows = [p for p in denoiser.parameters() if p.ndim == 4 and p.shape[-1] > 1]
    return {
        weight.is_contiguous(memory_format=torch.channels_last)
        for weight in windows
        if not weight.requires_grad and weight.shape[1] > 1
    }


def _dtypes(training: Training) -> tuple[set[torch.dtype], set[torch.dtype]]:
    trained = {id(parameter) for parameter in training.parameters}
    weights = list(training.denoiser.parameters())
    return (
        {p.dtype for p in weights if id(p) not in trained},
        {p.dtype for p in weights if id(p) in trained},
    )


class _Recorder:
    """Listens to one training."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.pixels: list[torch.Tensor] = []
        self.reading = 0
        self.kernels: set[str] = set()
        self._named: dict[str, torch.nn.Parameter] = {}
        self._training: Training | None = None
        self._step = Step({})
        self._told: Tensors = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While this lasts, what the VAE and the loss are given and what is clipped is heard.

        Encodings are kept nowhere: the VAE would be given nothing that was encoded before.
        """
        with ExitStack() as stack:
            for module, name, listener in (
                (encoding, "encode", self._encode),
                (loss, "diffusion_loss", self._loss),
                (optim, "clip", self._clip),
                (Dataset, "__getitem__", self._read),
                (encoded, "store_of_encodings", lambda _: lambda: Store(Path(os.devnull))),
            ):
                original = getattr(module, name)
                stack.enter_context(patch.object(module, name, listener(original)))
            yield

    def attach(self, training: Training) -> None:
        """Hooks itself onto what is composed."""
        self.pixels = []
        self._training = training
        learning = {id(parameter) for parameter in training.parameters}
        for component, module in training.trainables.modules.items():
            place = "denoiser" if component == training.family.denoiser_name else component
            for name, parameter in module.named_parameters():
                if id(parameter) in learning:
                    self._named[f"{place}.{name}"] = parameter
        for component, new in training.trainables.new_tokens.items():
            self._named[f"tokens.{component}"] = new.rows
        family: Any = training.family
        family.predict = self._predict(family.predict)
        training.denoiser.register_forward_pre_hook(self._is_told, with_kwargs=True)
        block = training.denoiser.get_submodule(FIRST_BLOCKS[family.denoiser_name])
        block.register_forward_pre_hook(self._inside)
        for number, each in enumerate(repeated_blocks(training.denoiser)):
            each.register_forward_pre_hook(partial(self._in_block, number))
        for component in training.family.text_encoder_names:
            encoder = training.family.pipeline.components[component]
            if encoder is not None:
                encoder.register_forward_pre_hook(self._hears_ids(component), with_kwargs=True)
        self._step = Step(self._values())

    def finish(self, event: StepEvent) -> None:
        """Ends a step."""
        self._step.after, self._step.event = self._values(), event
        self._step.pixels, self.pixels = self.pixels[-len(self._step.passes) :], []
        self.steps.append(self._step)
        self._step = Step(self._step.after)

    def digest(self, training: Training) -> str:
        """sha256 of the weights that do not learn."""
        whole = hashlib.sha256()
        learning = {id(parameter) for parameter in self._named.values()}
        modules = {"denoiser": training.denoiser, **training.trainables.modules}
        for name, new in training.trainables.new_tokens.items():
            modules[f"table {name}"] = new.table
        for _, module in sorted(modules.items()):
            for parameter in module.parameters():
                if id(parameter) not in learning:
                    whole.update(parameter.detach().float().contiguous().numpy().tobytes())
        return whole.hexdigest()

    def _values(self) -> Tensors:
        return {name: p.detach().clone() for name, p in self._named.items()}

    def _gradients(self) -> Tensors:
        return {n: p.grad.clone() for n, p in self._named.items() if p.grad is not None}

    def _encode(self, original: Any) -> Any:
        def listen(family: Any, pixels: torch.Tensor) -> Any:
            self.pixels.append(pixels.clone())
            return original(family, pixels)

        return listen

    def _loss(self, original: Any) -> Any:
        def listen(prediction: torch.Tensor, target: torch.Tensor, **given: Any) -> Any:
            one = self._step.passes[-1]
            one.target, one.shares = target.detach().clone(), given["shares"].clone()
            one.is_class, one.mask = given["is_class"].clone(), given["mask"]
            return original(prediction, target, **given)

        return listen

    def _clip(self, original: Any) -> Any:
        def listen(parameters: Any, max_norm: float) -> Any:
            assert self._training is not None
            self._step.gradients = self._gradients()
            groups = self._training.optimizer.param_groups
            self._step.rates = {group["name"]: float(group["lr"]) for group in groups}
            norm = original(parameters, max_norm)
            self._step.clipped = self._gradients()
            return norm

        return listen

    def _read(self, original: Any) -> Any:
        recorder = self

        def listen(self: Dataset, step: int) -> Any:
            recorder.reading += 1
            return original(self, step)

        return listen

    def _predict(self, original: Any) -> Any:
        def listen(latents: torch.Tensor, timesteps: torch.Tensor, text: Any, geometry: Any) -> Any:
            prediction = original(latents, timesteps, text, geometry)
            copies = {name: states.detach().clone() for name, states in text.items()}
            values = (value.detach().clone() for value in (latents, timesteps))
            seen = Pass(*values, copies, self._told, prediction.detach().clone())
            self._step.passes.append(seen)
            return prediction

        return listen

    def _is_told(self, _: Any, __: Any, named: dict[str, Any]) -> None:
        allowed = {
            "flash": torch.backends.cuda.flash_sdp_enabled(),
            "math": torch.backends.cuda.math_sdp_enabled(),
        }
        self.kernels |= {name for name, is_allowed in allowed.items() if is_allowed}
        told = {**named, **(named.get("added_cond_kwargs") or {})}
        self._told = {n: told[n].detach().clone() for n in TOLD if told.get(n) is not None}

    def _in_block(self, number: int, *_: Any) -> None:
        self._step.block_calls[number] += 1

    def _inside(self, *_: Any) -> None:
        self._step.inner_calls += 1

    def _hears_ids(self, component: str) -> Any:
        def listen(_: Any, given: Any, named: dict[str, Any]) -> None:
            ids = given[0] if given else named["input_ids"]
            self._step.token_ids.setdefault(component, []).append(ids.clone())

        return listen


@dataclass(frozen=True, repr=False)
class Delivery:
    """The result files of a training that went to its end; none was read back by the engine."""

    folder: Path
    tensors: Mapping[str, Tensors]
    steps: list[Step]

    @property
    def files(self) -> set[str]:
        """Relative paths of all of them."""
        found = self.folder.rglob("*")
        return {p.relative_to(self.folder).as_posix() for p in found if p.is_file()}


def deliver(config: TrainingConfig, folder: Path) -> Delivery:
    """Trains to the end and writes the result files, without their verification."""
    root = RunFolder(folder)
    recorder = _Recorder()

    def unread(*_: Any, **__: Any) -> Iterator[Any]:
        yield from ()
        return []

    composed, _ = composed_of(config, folder)
    with recorder.listening(), patch.object(results, "_verified", unread):
        recorder.attach(composed.training)
        for event in composed.training.steps(root, never):
            if isinstance(event, StepEvent):
                recorder.finish(event)
        list(
            results.deliver(
                composed.config, composed.base, composed.precision, composed.training, root
            )
        )
    tensors = {
        path.relative_to(root.outputs).as_posix(): load_file(path)
        for path in root.outputs.rglob("*.safetensors")
    }
    return Delivery(root.outputs, tensors, recorder.steps)
