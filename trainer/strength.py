"""What finished runs learnt, put on a loaded base model at a strength, and taken off again.

A strength s means W + s * ΔW: of an adapter and of fully trained weights alike, and of several
runs their sum. ΔW comes from the result files alone, which outlive checkpoints. New tokens have
no strength: where s is 0 nothing of a run is there, its tokens neither, elsewhere they are whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from trainer import base_model
from trainer.base_model import BaseModel, Precision
from trainer.config import TrainingConfig
from trainer.config_files import read_config_file
from trainer.errors import InputError
from trainer.export.formula import FormatError, adapted_weight
from trainer.export.read import read_adapter, read_tensors
from trainer.export.state import LayerTensors, join_name
from trainer.families.base import Family
from trainer.generation import Trained
from trainer.job import Result, ResultFile, RunFolder
from trainer.resolve import resolve
from trainer.taught import Taught, TokenFile, teach

_TEXT_STEP = "text_model."
_WEIGHTS = "_weights"

# Component and parameter of the base model.
Place = tuple[str, str]
# A base weight, fp32, to the trained one.
Effect = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FinishedRun:
    """A run whose result can be used.

    Args:
        folder: where it is.
        config: what it was trained with.
        result: its files.
        strength: s.
    """

    folder: RunFolder
    config: TrainingConfig
    result: Result
    strength: float

    @property
    def identity(self) -> tuple[str, str, float]:
        """Equal for equal results at an equal strength."""
        digest = hashlib.sha256(self.result.model_dump_json().encode()).hexdigest()
        return str(self.folder.root.resolve()), digest, self.strength

    def path(self, file: ResultFile) -> Path:
        """Where a result file lies."""
        return self.folder.root / file.path

    def refusal(self, reason: str, hint: str = "") -> InputError:
        """Why the run cannot be used."""
        return InputError.of("trained", f"run `{self.folder.root}` {reason}", hint)


def finished_run(trained: Trained) -> FinishedRun:
    """A run as it lies on disk.

    Raises:
        InputError: it is not finished, or has no files of what it learnt.
    """
    folder = RunFolder(Path(trained.run))
    result = folder.read_result()
    if result is None or result.status != "done":
        state = "has no result" if result is None else f"ended as `{result.status}`"
        raise InputError.of(
            "trained", f"run `{trained.run}` {state}", "give the folder of a finished run"
        )
    config = resolve(read_config_file(folder.config))
    run = FinishedRun(folder, config, result, trained.strength)
    files = [*_whole_files(run), result.file("diffusers_lora"), result.file("embeddings")]
    known = [file for file in files if file is not None]
    missing = [file.path for file in known if not run.path(file).is_file()]
    if missing or not known:
        reason = f"has lost `{missing[0]}`" if missing else "has no files of trained weights"
        raise run.refusal(reason, "train it again")
    return run


class Applied:
    """What is on a base model, and how it comes off.

    Args:
        taught: words that stand for new tokens.
        left_out: parameters for which the base model has no place of their shape.
        undoing: puts everything back as it was loaded, to the bit.
    """

    def __init__(self, taught: Taught, left_out: Sequence[str], undoing: ExitStack) -> None:
        self.taught = taught
        self.left_out = tuple(left_out)
        self._undoing = undoing

    def undo(self) -> None:
        """Takes everything off again."""
        self._undoing.close()


@dataclass(frozen=True)
class _Learnt:
    """What a run learnt of one parameter.

    Args:
        component: of the pipeline.
        name: of the parameter.
        fits: whether it is for a parameter of such a shape.
        effect: of the run.
        is_relative: whether ΔW is the same whatever W is.
    """

    component: str
    name: str
    fits: Callable[[torch.Size], bool]
    effect: Effect
    is_relative: bool


def apply(family: Family, base: BaseModel, runs: Sequence[FinishedRun], *, guided: bool) -> Applied:
    """Puts runs on a loaded base model.

    Args:
        family: loaded, with nothing on it.
        base: what was loaded.
        runs: those of strength 0 are left out.
        guided: whether the base has a guiding picture's channels, which no run knows of: layers
            of other shapes are then left out.

    Raises:
        InputError: a run is of another family, its files are damaged, or words clash.
    """
    acting = [run for run in runs if run.strength != 0]
    states = {
        name: part.state_dict(keep_vars=True)
        for name, part in family.pipeline.components.items()
        if isinstance(part, torch.nn.Module)
    }
    effects: dict[Place, list[tuple[float, Effect]]] = {}
    left_out = [
        name for run in acting for name in _gather(effects, run, base, states, guided=guided)
    ]
    with ExitStack() as stack, torch.no_grad():
        for (component, name), parts in sorted(effects.items()):
            parameter = states[component][name]
            changed = strengthened(parameter.detach().float(), parts)
            # Where it is on the processor already this is the tensor itself, not a copy.
            stack.callback(_restore, parameter, parameter.detach().cpu())
            parameter.data = changed.to(parameter.dtype)
        taught = teach(family, list(_embeddings(acting)), stack)
        return Applied(taught, left_out, stack.pop_all())


def strengthened(weight: Tensor, effects: Sequence[tuple[float, Effect]]) -> Tensor:
    """W + Σ s * ΔW; the trained weight itself where there is one effect at strength 1.

    Args:
        weight: of the base model, fp32.
        effects: s, and what makes W + ΔW of W.
    """
    if len(effects) == 1 and effects[0][0] == 1:
        return effects[0][1](weight)
    change = torch.zeros_like(weight)
    for strength, effect in effects:
        change += strength * (effect(weight) - weight)
    return weight + change


def _restore(parameter: Tensor, original: Tensor) -> None:
    parameter.data = original.to(parameter.device)


def _embeddings(runs: Sequence[FinishedRun]) -> Iterator[TokenFile]:
    for run in runs:
        file = run.result.file("embeddings")
        if file is not None:
            pools_at_end = run.config.token.ti_pooling == "eos"
            yield TokenFile(str(run.folder.root), run.path(file), pools_at_end)


def _gather(
    effects: dict[Place, list[tuple[float, Effect]]],
    run: FinishedRun,
    base: BaseModel,
    states: Mapping[str, Mapping[str, Tensor]],
    *,
    guided: bool,
) -> list[str]:
    """Adds one run's effects; returns the parameters that have no place for them.

    Raises:
        InputError: the base model has no such parameters.
    """
    trained_on = _OwnBase(run, base)
    left_out = []
    for learnt in _learnt(run, base):
        component, state = learnt.component, states.get(learnt.component, {})
        name = _live(state, learnt.name)
        fits = name is not None and learnt.fits(state[name].shape)
        if name is None or not (fits or guided):
            raise run.refusal(
                f"was trained on another kind of base model than this `{base.family_name}`, which "
                f"has no `{component}.{learnt.name}` of that shape",
                "give the base model that it was trained on, or one of its kind",
            )
        if not fits:
            left_out.append(f"{component}.{name}")
            continue
        effect = learnt.effect
        if not (learnt.is_relative or trained_on.is_this):
            effect = _moved(effect, trained_on.weight(component, name))
        effects.setdefault((component, name), []).append((run.strength, effect))
    return left_out


class _OwnBase:
    """The base model that a run was trained on; loaded where another one is and only if asked."""

    def __init__(self, run: FinishedRun, loaded: BaseModel) -> None:
        self._settings = run.config.model
        self._states: dict[str, Mapping[str, Tensor]] = {}
        own, other = self._settings, loaded.settings
        places = [(each.model_url, each.revision, each.variant) for each in (own, other)]
        self.is_this = places[0] == places[1]

    def weight(self, component: str, name: str) -> Tensor:
        """One of its weights."""
        if component not in self._states:
            base = base_model.locate(self._settings, vae_is_explicit=False)
            parts = {base.family.denoiser_name, "vae", *base.family.text_encoder_names}
            # Their own numbers, or wider ones: nothing is rounded.
            exact = Precision(*[torch.float32] * 4)
            family = base_model.load(base, exact, without=parts - {component})
            self._states[component] = family.pipeline.components[component].state_dict()
        return self._states[component][name]


def _moved(effect: Effect, own: Tensor) -> Effect:
    """The change of a run's own base weight, on another one."""

    def moved(weight: Tensor) -> Tensor:
        wide = own.to(weight)
        return weight + (effect(wide) - wide)

    return moved


def _live(state: Mapping[str, Tensor], name: str) -> str | None:
    """A parameter's name in the loaded model: transformers 5 left `text_model.` out of some."""
    return next((n for n in (name, name.removeprefix(_TEXT_STEP)) if n in state), None)


def _whole_files(run: FinishedRun) -> list[ResultFile]:
    return [file for file in run.result.files if file.role.endswith(_WEIGHTS)]


def _learnt(run: FinishedRun, base: BaseModel) -> Iterator[_Learnt]:
    """All that a run's files hold but tokens; an adapter beside whole weights is an extract."""
    whole = _whole_files(run)
    for file in whole:
        tensors, _ = read_tensors(run.path(file))
        for name, tensor in tensors.items():
            component, effect = Path(file.path).parent.name, _whole(tensor)
            yield _Learnt(component, name, tensor.shape.__eq__, effect, is_relative=False)
    adapter = run.result.file("diffusers_lora")
    if whole or adapter is None:
        return
    try:
        state = read_adapter(
            run.path(adapter), {base.family_name: base.family.kohya}, base.family_name
        )
    except InputError as error:
        raise run.refusal("; ".join(problem.message for problem in error.problems)) from error
    for (component, path), tensors in state.layers().items():
        effect = _adapted(run, f"{component}.{path}", tensors)
        name, relative = f"{path}.weight", not state.use_dora
        yield _Learnt(component, name, partial(_fits, tensors), effect, is_relative=relative)


def _whole(trained: Tensor) -> Effect:
    return trained.to


def _adapted(run: FinishedRun, layer: str, tensors: LayerTensors) -> Effect:
    parts = {join_name("", part).removeprefix("."): tensor for part, tensor in tensors.items()}

    def effect(weight: Tensor) -> Tensor:
        there = {part: tensor.to(weight.device) for part, tensor in parts.items()}
        try:
            return adapted_weight(weight, there, 1.0)
        except FormatError as error:
            raise run.refusal(f"cannot change `{layer}`: {error}") from error

    return effect


def _fits(tensors: LayerTensors, shape: torch.Size) -> bool:
    """Whether an adapter is for a weight of this shape; of some only the size can be told."""
    if "lora_A" in tensors:
        return (tensors["lora_B"].shape[0], *tensors["lora_A"].shape[1:]) == tuple(shape)
    if "hada_w1_a" in tensors:
        return shape.numel() == tensors["hada_w1_a"].shape[0] * tensors["hada_w1_b"].shape[1]
    if "lokr_w2" in tensors:
        large = tensors["lokr_w2"].numel()
    else:
        large = tensors["lokr_w2_a"].shape[0] * tensors["lokr_w2_b"].shape[1]
    return shape.numel() == tensors["lokr_w1"].numel() * large
