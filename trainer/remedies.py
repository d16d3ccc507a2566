"""What a training that needs too much memory could do without, computed for this configuration.

Each candidate is put over the configuration as if its user had set it, and what is then foreseen is
compared. Candidates are options in a table; no model, machine or arithmetic of memory is known.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch

from trainer import base_model, recomputing
from trainer.base_model import BaseModel
from trainer.capacity import fits
from trainer.config import LEAVES, ModelConfig, TrainingConfig
from trainer.errors import InputError
from trainer.frozen import repeated_blocks
from trainer.leaves import shown
from trainer.machine import completed, precision_of
from trainer.memory import CLASS_PICTURES, ENCODING, STEPS, Footprint, Forecast
from trainer.resolve import Layer, resolve

# Of the peak: what saves less is not worth a setting.
_LEAST_SHARE = 0.01
# Of a saving: what differs by less is as good.
_TIE = 0.05
_SHOWN = 3
# A side of pictures that every family here still learns from.
_SMALL_SIDE = 512

Options = Mapping[str, Any]
# What of the memory in steps a setting acts on; "all" where it may be any of it. Pictures are
# encoded in steps only where their latents are not kept.
Part = Literal["activations", "weights", "state", "pictures", "all"]

# How much a setting changes: nothing but rounding, the numbers' formats, what is learnt.
SAME, FORMATS, OTHER = range(3)


@dataclass(frozen=True)
class Candidate:
    """Settings that may save memory.

    Args:
        options: leaf to value; empty where the settings mean nothing. Takes the completed
            configuration and the base model.
        change: `SAME`, `FORMATS` or `OTHER`.
        part: what it can save of in the steps.
        stages: where else than in the steps it can save.
        worse: options of another candidate that always saves more, where it is possible.
    """

    options: Callable[[TrainingConfig, BaseModel], Options]
    change: int
    part: Part
    stages: tuple[str, ...] = ()
    worse: Options = field(default_factory=dict)


def _always(**options: Any) -> Callable[[TrainingConfig, BaseModel], Options]:
    return lambda config, base: options


def _where(leaf: str, value: Any, **options: Any) -> Callable[[TrainingConfig, BaseModel], Options]:
    return lambda config, base: options if config.leaf(leaf) == value else {}


def _all_recomputed(config: TrainingConfig, base: BaseModel) -> Options:
    some = config.run.checkpointing_share < 1
    return {"gradient_checkpointing": True} | ({"checkpointing_share": 1.0} if some else {})


def _picture_by_picture(config: TrainingConfig, base: BaseModel) -> Options:
    passes = config.run.batch_size * config.run.gradient_accumulation_steps
    if config.run.batch_size == 1:
        return {}
    return {"batch_size": 1, "gradient_accumulation_steps": passes}


def _all_blocks_offloaded(config: TrainingConfig, base: BaseModel) -> Options:
    denoiser = base_model.skeleton(base, base.family.denoiser_name)
    return {"offload_blocks": len(repeated_blocks(denoiser))}


def _paged(config: TrainingConfig, base: BaseModel) -> Options:
    # Only a GPU shares memory, and of adapters too little would be there.
    if config.adapter.use_lora or not torch.cuda.is_available():
        return {}
    return {"optimizer": "paged_adamw8bit"} if config.optim.optimizer == "adamw8bit" else {}


def _smaller_pictures(config: TrainingConfig, base: BaseModel) -> Options:
    if config.data.priority is not None:
        return {"priority": "speed"}
    width, height = config.data.resolution_width or 0, config.data.resolution_height or 0
    if min(width, height) <= _SMALL_SIDE:
        return {}
    return {"resolution_width": _SMALL_SIDE, "resolution_height": _SMALL_SIDE}


def _lower_rank(config: TrainingConfig, base: BaseModel) -> Options:
    return {"rank": 8} if config.adapter.rank > 8 else {}


_NF4 = {"quantization": "nf4"}
_BF16_IN_BACKWARD = {"weights_dtype": "bf16", "fused_backward": True}
# Formats of less and less memory; only one that is smaller than what is set saves.
CANDIDATES: Sequence[Candidate] = (
    Candidate(_all_recomputed, SAME, "activations"),
    Candidate(_picture_by_picture, SAME, "activations"),
    Candidate(_always(cache_latents=True), SAME, "all"),
    Candidate(_all_blocks_offloaded, SAME, "weights", (CLASS_PICTURES,)),
    Candidate(_always(offload_models=True), SAME, "all", (CLASS_PICTURES,)),
    Candidate(_always(mixed_precision="bf16"), FORMATS, "all", (CLASS_PICTURES, ENCODING)),
    Candidate(_always(**_NF4), FORMATS, "weights", (CLASS_PICTURES,)),
    Candidate(_always(quantization="fp8"), FORMATS, "weights", (CLASS_PICTURES,), worse=_NF4),
    Candidate(_where("use_lora", False, **_BF16_IN_BACKWARD), FORMATS, "all", (CLASS_PICTURES,)),
    Candidate(_where("use_lora", False, fused_backward=True), FORMATS, "all"),
    Candidate(_where("optimizer", "adamw", optimizer="adamw8bit"), FORMATS, "state"),
    Candidate(_where("optimizer", "adamw", optimizer="adafactor"), FORMATS, "state"),
    Candidate(_paged, SAME, "state"),
    Candidate(_always(upscale_vae_32bit=False), FORMATS, "pictures", (CLASS_PICTURES, ENCODING)),
    Candidate(_smaller_pictures, OTHER, "activations", (CLASS_PICTURES, ENCODING)),
    Candidate(_lower_rank, OTHER, "all"),
    Candidate(_always(train_text_encoder=False), OTHER, "all", (ENCODING,)),
    Candidate(_always(train_text_encoder_ti=False), OTHER, "all", (ENCODING,)),
    Candidate(_always(with_prior_preservation=False), OTHER, "activations", (CLASS_PICTURES,)),
    Candidate(_where("use_lora", False, use_lora=True), OTHER, "all", (CLASS_PICTURES,)),
)


@dataclass(frozen=True)
class Remedy:
    """Settings that save memory here.

    Args:
        options: leaf to value.
        saved_bytes: by how much they lower the peak.
        change: see `Candidate`.
    """

    options: Options
    saved_bytes: int
    change: int

    @property
    def setting(self) -> str:
        """The options as a configuration file has them."""
        return " and ".join(f"{leaf}: {_plain(value)}" for leaf, value in self.options.items())

    def __str__(self) -> str:
        """What is saved, as a sentence without its period."""
        verb = "saves" if len(self.options) == 1 else "save"
        return f"`{self.setting}` {verb} {in_units(self.saved_bytes)}"


@dataclass(frozen=True)
class Advice:
    """What would help a training that needs too much memory.

    Args:
        peak_bytes: foreseen with the settings as they are, on each device.
        stage: what takes the most: class pictures, encoding or steps.
        capacity: memory of the device.
        remedies: at most three, the first the one to try first.
        together: settings that fit only together; empty where one is enough or all are not.
        reached_bytes: the peak with the best one, or with `together`.
    """

    peak_bytes: int
    stage: str
    capacity: int
    remedies: tuple[Remedy, ...]
    together: Options
    reached_bytes: int

    def saved_gib(self) -> dict[str, float]:
        """What each setting saves, in GiB."""
        return {each.setting: round(each.saved_bytes / 2**30, 3) for each in self.remedies}

    def lines(self, kept_step: int = 0) -> list[str]:
        """The advice, a sentence a line.

        Args:
            kept_step: of the last checkpoint, so that each setting tells whether the training goes
                on from it; 0: there is none.
        """
        told = f"these settings take about {in_units(self.peak_bytes)} in the {self.stage}, of "
        told += f"{in_units(self.capacity)} that the device has"
        if fits(self.peak_bytes, self.capacity):
            told += ": something else may hold memory there"
        lines = [told, *(f"{each}{_way_on(each.options, kept_step)}" for each in self.remedies)]
        if self.together:
            settings = ", ".join(f"{leaf}: {_plain(v)}" for leaf, v in self.together.items())
            reached = f"together `{settings}` take {in_units(self.reached_bytes)}"
            lines.append(f"{reached}{_way_on(self.together, kept_step)}")
        if not fits(self.reached_bytes, self.capacity):
            lines.append("no setting known here is enough: a device with more memory is needed")
        return lines


def _keep_checkpoints(options: Options) -> bool:
    """Whether a training goes on from its checkpoints with these options."""
    return not any(LEAVES[leaf].changes_result for leaf in options)


def _way_on(options: Options, kept_step: int) -> str:
    """What becomes of a training with these options, to be put behind what they save."""
    if not kept_step:
        return ""
    if _keep_checkpoints(options):
        return f": the training goes on from step {kept_step}"
    return ": the training begins anew, with another --output"


def in_units(size: int) -> str:
    """Bytes in the largest unit of which there is a tenth: `5.2 GiB`."""
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if size >= 2**power / 10:
            return f"{size / 2**power:.1f} {unit}"
    return f"{size / 2**10:.1f} KiB"


def with_options(config: TrainingConfig, options: Options) -> TrainingConfig:
    """The configuration as it would be had its user set these options too.

    Raises:
        InputError: they contradict what the user set.
    """
    explicit = config.resolved.explicit
    values = {leaf: config.leaf(leaf) for leaf in LEAVES}
    others = {leaf: value for leaf, value in values.items() if leaf not in explicit}
    chosen = {leaf: values[leaf] for leaf in explicit}
    layers = [
        Layer("configuration", others, explicit=False, is_written=True),
        Layer("configuration", chosen, explicit=True, is_written=True),
        Layer("advice", options, explicit=True),
    ]
    return resolve(layers)


def advise(
    config: TrainingConfig,
    base: BaseModel,
    *,
    capacity: int,
    device: torch.device,
    forecast: Forecast | None = None,
    refuse: Callable[[TrainingConfig], None] = lambda _: None,
    seconds: float = math.inf,
    has_checkpoint: bool = False,
) -> Advice:
    """The settings that would save most memory here, and what each saves.

    Settings that leave alone what is learnt come before those that change it, however much these
    save; among either kind the one that saves most comes first, and of two that save the same
    within a twentieth the one that changes less. Of several values of one option the best counts.
    Those that change what is learnt are looked at only where fewer than three others help, or
    where all others together are not enough. Where there is a checkpoint, those with which the
    training goes on from it come first of all.

    Args:
        config: resolved, as its user gave it.
        base: as found.
        capacity: the device's memory.
        device: where it would run.
        forecast: of this base model and device, if there is one.
        refuse: raises InputError for a completed configuration that cannot be launched here.
        seconds: after which no more settings are tried.
        has_checkpoint: whether the training has come as far as one.

    Raises:
        InputError: this training cannot be foreseen.
        OSError: a configuration or tokenizer is neither here nor on the hub.
    """
    deadline = time.monotonic() + seconds
    forecast = forecast or Forecast(base, device)
    decided = recomputing.decided(completed(config, base), forecast, capacity, device)
    for leaf in recomputing.LEAVES:
        config = config.with_leaf(leaf, decided.leaf(leaf))
    search = _Search(config, base, forecast, refuse, deadline)
    return search.advice(capacity, has_checkpoint=has_checkpoint)


class _Search:
    """Candidates tried on one training."""

    def __init__(
        self,
        config: TrainingConfig,
        base: BaseModel,
        forecast: Forecast,
        refuse: Callable[[TrainingConfig], None],
        deadline: float,
    ) -> None:
        self._refuse, self._deadline = refuse, deadline
        self._config, self._base, self._forecast = config, base, forecast
        self._known: dict[tuple[tuple[str, Any], ...], Footprint | None] = {}
        self._completed = completed(config, base)
        self._now = forecast.footprint(self._completed, precision_of(self._completed))

    def advice(self, capacity: int, *, has_checkpoint: bool) -> Advice:
        now = self._now
        found = self._going_on() if has_checkpoint else []
        found += [each for each in self._ranked((SAME, FORMATS)) if each not in found]
        if len(found) < _SHOWN:
            found += self._ranked((OTHER,))
        best = min((now.peak_bytes - each.saved_bytes for each in found), default=now.peak_bytes)
        together: Options = {}
        if not fits(now.peak_bytes, capacity) and not fits(best, capacity):
            together, best = self._joined([each.options for each in found], capacity)
        if together and not fits(best, capacity):
            other = self._ranked((OTHER,))
            settings = self._options_of([*other[:1], *found, *other[1:]])
            with_other = self._joined(settings, capacity)
            together, best = min((together, best), with_other, key=lambda reached: reached[1])
        stage = max(now.stages, key=lambda name: now.stages[name])
        shown_first = tuple(found[:_SHOWN])
        return Advice(now.peak_bytes, stage, capacity, shown_first, together, best)

    def _going_on(self) -> list[Remedy]:
        """What helps without a new beginning, best first, however little it saves."""
        options = [(each, each.options(self._completed, self._base)) for each in CANDIDATES]
        tried = [self._tried(each) for each, its in options if its and _keep_checkpoints(its)]
        return _in_order(remedy for remedy in tried if remedy is not None)

    def _options_of(self, remedies: Sequence[Remedy]) -> list[Options]:
        """Their options, then those of candidates that can only save beside others."""
        options = [remedy.options for remedy in remedies]
        known = {leaf for each in options for leaf in each}
        more = [c.options(self._completed, self._base) for c in CANDIDATES if c.part == "weights"]
        return options + [each for each in more if not known & each.keys()]

    def _ranked(self, changes: tuple[int, ...]) -> list[Remedy]:
        """What helps, best first, as far as it can be among the first three."""
        candidates = [c for c in CANDIDATES if c.change in changes]
        most_saved = partial(_most_saved, self._now, self._completed.data.cache_latents)
        candidates.sort(key=most_saved, reverse=True)
        found: dict[frozenset[str], Remedy] = {}
        for candidate in candidates:
            ranked = _in_order(found.values())
            enough = ranked[_SHOWN - 1].saved_bytes if len(ranked) >= _SHOWN else 0
            if most_saved(candidate) < max(enough, _LEAST_SHARE * self._now.peak_bytes):
                break
            remedy = self._tried(candidate)
            if remedy is not None:
                key = frozenset(remedy.options)
                found[key] = _in_order([remedy, *([found[key]] if key in found else [])])[0]
        return _in_order(found.values())

    def _tried(self, candidate: Candidate) -> Remedy | None:
        options = candidate.options(self._completed, self._base)
        if candidate.worse and self._footprint(candidate.worse) is not None:
            return None
        after = self._footprint(options) if options else None
        saved = 0 if after is None else self._now.peak_bytes - after.peak_bytes
        if saved < _LEAST_SHARE * self._now.peak_bytes:
            return None
        return Remedy(options, saved, candidate.change)

    def _footprint(self, options: Options) -> Footprint | None:
        """What is foreseen with these options; None where refused, idle or too late."""
        key = tuple(sorted(options.items()))
        if key not in self._known and time.monotonic() < self._deadline:
            self._known[key] = self._foreseen(options)
        return self._known.get(key)

    def _foreseen(self, options: Options) -> Footprint | None:
        if all(self._completed.leaf(leaf) == value for leaf, value in options.items()):
            return None
        try:
            config = with_options(self._config, options)
            of_model = {n: v for n, v in options.items() if n in ModelConfig.model_fields}
            settings = self._base.settings.model_copy(update=of_model)
            config = completed(config, replace(self._base, settings=settings))
            ignored = config.resolved.ignored_options
            if any(n in ignored or config.leaf(n) != value for n, value in options.items()):
                return None
            self._refuse(config)
            return self._forecast.footprint(config, precision_of(config))
        except InputError:
            return None

    def _joined(self, settings: Sequence[Options], capacity: int) -> tuple[Options, int]:
        """One setting after the other, each kept if it saves beside those before, until it fits."""
        options: dict[str, Any] = {}
        reached = self._now.peak_bytes
        for setting in settings:
            if setting.keys() & options.keys():
                continue
            after = self._footprint({**options, **setting})
            if after is not None and after.peak_bytes < (1 - _LEAST_SHARE) * reached:
                options |= setting
                reached = after.peak_bytes
            if fits(reached, capacity):
                break
        return options, reached


def _most_saved(now: Footprint, keeps_latents: bool, candidate: Candidate) -> int:
    """What a candidate can save at most, without trying it."""
    touched = {STEPS, *candidate.stages}
    left = max((peak for name, peak in now.stages.items() if name not in touched), default=0)
    activations = now.stages[STEPS] - now.weights_bytes - now.state_bytes
    parts = {
        "activations": activations,
        "weights": now.weights_bytes,
        "state": now.state_bytes,
        "pictures": 0 if keeps_latents else now.stages[STEPS],
        "all": now.stages[STEPS],
    }
    others = [peak for name, peak in now.stages.items() if name != STEPS]
    if now.stages[STEPS] < max(others, default=0):
        return now.peak_bytes - left
    return min(now.peak_bytes - left, parts[candidate.part])


def _in_order(remedies: Iterable[Remedy]) -> list[Remedy]:
    """Most saved first; of two as good, the one that changes less."""
    ordered = sorted(remedies, key=lambda r: (r.change == OTHER, -r.saved_bytes))
    for place in range(len(ordered) - 1, 0, -1):
        before, after = ordered[place - 1 : place + 1]
        if after.saved_bytes >= (1 - _TIE) * before.saved_bytes and after.change < before.change:
            ordered[place - 1 : place + 1] = [after, before]
    return ordered


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else shown(value)
