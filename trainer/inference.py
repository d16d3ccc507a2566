"""Pictures with what was trained: a base model, finished runs at their strengths, a prompt.

`Worker` keeps the base model between requests; what runs changed in it is undone to the bit.
Part of its own room: names no family, and knows nothing of who asks.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from PIL import Image
from pydantic import ValidationError

from trainer import base_model, randomness
from trainer.base_model import BaseModel
from trainer.config import ModelConfig
from trainer.durable import write_bytes
from trainer.errors import InputError, Interrupted, OutOfMemoryError
from trainer.events import Event, FileEvent, NoteEvent, StageEvent
from trainer.families.base import MAX_SEQUENCE_LENGTH, Family
from trainer.generation import GenerationRequest, problems_of
from trainer.guides import Guiding, guiding
from trainer.job import RunFolder
from trainer.machine import inference_precision
from trainer.sampling import drawn
from trainer.strength import Applied, FinishedRun, apply, finished_run

STAGE = "generate"
# Of the memory that is free; the rest is for what is computed.
_SHARE_FOR_WEIGHTS = 0.8
# How files are written. Pillow puts nothing of the time or the machine into them.
_ENCODERS: Mapping[str, Mapping[str, Any]] = {
    "png": {"format": "PNG"},
    "jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "webp": {"format": "WEBP", "quality": 95},
}
_KARRAS = "use_karras_sigmas"
_OTHER_SPACINGS = ("use_exponential_sigmas", "use_beta_sigmas")
_MEMORY_HINT = "ask for a smaller picture, or leave the GPU to this program alone"

Stop = Callable[[], bool]
Keep = Callable[[int, Image.Image], FileEvent]


@dataclass
class _Loaded:
    """A base model in memory.

    Args:
        key: what was asked for.
        base: as it was found.
        family: loaded, on the device.
        applied: what is on it, if anything.
        runs: whose results these are.
    """

    key: tuple[ModelConfig, str | None]
    base: BaseModel
    family: Family
    applied: Applied | None = None
    runs: list[tuple[str, str, float]] = field(default_factory=list)


class Worker:
    """Makes pictures, and keeps the base model for the next ones."""

    def __init__(self) -> None:
        self._loaded: _Loaded | None = None
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def generate(
        self, request: GenerationRequest, folder: RunFolder, stop: Stop
    ) -> Iterator[Event]:
        """Makes the pictures of a request as `outputs/0.png` and so on.

        Args:
            request: what is wanted.
            folder: where to.
            stop: asked after each picture but the last; true ends it.

        Raises:
            TrainerError: as for `draw`.
            DiskError: a picture cannot be written.
        """

        def keep(number: int, picture: Image.Image) -> FileEvent:
            path = folder.outputs / f"{number}.{request.output_format}"
            write_bytes(path, encoded(picture, request.output_format))
            return FileEvent("picture", path.relative_to(folder.root).as_posix())

        yield from self.draw(request, keep, stop)

    def draw(self, request: GenerationRequest, keep: Keep, stop: Stop) -> Iterator[Event]:
        """Makes the pictures of a request, and hands each over.

        Picture n depends on seed and n alone, however many there are. Identifiers of runs with
        new tokens stand for these in the prompts; at strength 0 they are words like others.

        Args:
            request: what is wanted.
            keep: takes each picture with its number, and says where it is.
            stop: asked after each picture but the last; true ends it.

        Raises:
            InputError: the request, a run or a picture cannot be used.
            NonFiniteError: the denoiser or the VAE overflows.
            OutOfMemoryError: the base model is then dropped.
            Interrupted: it was stopped.
        """
        try:
            yield from self._pictures(request, keep, stop)
        except torch.OutOfMemoryError as error:
            self.drop()
            reason = f"the device has too little memory: {str(error).splitlines()[0]}"
            raise OutOfMemoryError(reason, _MEMORY_HINT) from error

    def drop(self) -> None:
        """Forgets the base model and frees its memory."""
        self._loaded = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _pictures(self, request: GenerationRequest, keep: Keep, stop: Stop) -> Iterator[Event]:
        for note in request.notes:
            yield NoteEvent(note.kind, note.field, note.message)
        runs, base, options = _judged(request)
        yield StageEvent(STAGE, 0, request.num_images)
        loaded = self._with(base, request.guide)
        for note in base.notes:
            yield NoteEvent(note.kind, note.field, note.message)
        applied = _put_on(loaded, runs, guided=request.guide is not None)
        for name in applied.left_out:
            message = f"`{name}` has another shape in this base model, and keeps its weights"
            yield NoteEvent("warning", "trained", message)
        yield from _unheard(request, base)
        yield from _of_other_lengths(runs, base)
        pipeline = loaded.family.pipeline
        chosen, notes = _scheduler(pipeline, request)
        yield from notes
        if "negative_prompt" in options:
            options["negative_prompt"] = applied.taught.replaced(options["negative_prompt"])
        with _with_scheduler(pipeline, chosen), _layers_found(loaded.family):
            for number in range(request.num_images):
                if number and stop():
                    raise Interrupted("stopped between two pictures", "ask for them again")
                key = randomness.key(request.seed, STAGE, number)
                picture = drawn(
                    loaded.family, applied.taught.replaced(request.prompt), options, key=key
                )
                yield keep(number, picture)
                yield StageEvent(STAGE, number + 1, request.num_images)

    def _with(self, base: BaseModel, guide: str | None) -> _Loaded:
        """The base model in memory, in place of any other."""
        key = (base.settings, guide)
        if self._loaded is None or self._loaded.key != key:
            self.drop()
            family = base_model.load(base, inference_precision(base.settings))
            _place(family, self._device)
            self._loaded = _Loaded(key, base, family)
        return self._loaded


def generate(request: GenerationRequest, folder: RunFolder, stop: Stop) -> Iterator[Event]:
    """Makes the pictures of one request; as `Worker.generate`, which keeps the base model."""
    yield from Worker().generate(request, folder, stop)


def size_of(request: GenerationRequest) -> tuple[int, int]:
    """The (width, height) of the pictures of a request; loads no model.

    Raises:
        InputError: the request, its base model or a run cannot be used.
    """
    _, _, options = _judged(request)
    return options["width"], options["height"]


def encoded(picture: Image.Image, output_format: str) -> bytes:
    """A picture as a file: the same bytes for the same pixels."""
    content = BytesIO()
    picture.save(content, **_ENCODERS[output_format])
    return content.getvalue()


def _judged(
    request: GenerationRequest,
) -> tuple[list[FinishedRun], BaseModel, dict[str, Any]]:
    """The runs and the base model of a request, and what the pipeline's call is told.

    Raises:
        InputError: one of these cannot be used.
    """
    runs = [finished_run(trained) for trained in request.trained]
    base = _base_of(request, runs)
    guide = guiding(request, base) if request.guide else None
    return runs, base, _options(request, base, guide)


def _base_of(request: GenerationRequest, runs: Sequence[FinishedRun]) -> BaseModel:
    """The base model of the request, or of its first run.

    Raises:
        InputError: neither says one, or it cannot be had.
    """
    given = dict(request.model)
    is_explicit = "vae_url" in given
    if "model_url" not in given:
        if not runs:
            message = "names no base model, and no run has one either"
            raise InputError.of("model", message, "give `model_url` or a run in `trained`")
        config = runs[0].config
        is_explicit = is_explicit or config.is_explicit("vae_url")
        given = config.model.model_dump() | given
    elif runs:
        # What captions were in training, prompts are on any base model.
        given = {"max_sequence_length": runs[0].config.model.max_sequence_length} | given
    try:
        # Bits are saved for what a training keeps beside the weights; here nothing else is.
        settings = ModelConfig(**given | {"quantization": "none"})
    except ValidationError as error:
        raise InputError(problems_of(error, "model")) from error
    return base_model.locate(settings, vae_is_explicit=is_explicit, guide=request.guide)


def _place(family: Family, device: torch.device) -> None:
    """Everything on the device, or where it does not fit, each part while it works."""
    if device.type == "cpu":
        return
    parts = [p for p in family.pipeline.components.values() if isinstance(p, torch.nn.Module)]
    needed = sum(t.numel() * t.element_size() for part in parts for t in part.parameters())
    free, _ = torch.cuda.mem_get_info(device)
    if needed > _SHARE_FOR_WEIGHTS * free:
        family.pipeline.enable_model_cpu_offload(device=device)
    else:
        family.pipeline.to(device)


def _put_on(loaded: _Loaded, runs: Sequence[FinishedRun], *, guided: bool) -> Applied:
    """Puts runs on the base model, where they are not on it already."""
    wanted = [run.identity for run in runs if run.strength != 0]
    if loaded.applied is not None and loaded.runs == wanted:
        return loaded.applied
    if loaded.applied is not None:
        loaded.applied.undo()
        loaded.applied = None
    loaded.applied = apply(loaded.family, loaded.base, runs, guided=guided)
    loaded.runs = wanted
    return loaded.applied


def _options(request: GenerationRequest, base: BaseModel, guide: Guiding | None) -> dict[str, Any]:
    """What the pipeline's call is told beside prompt and random numbers.

    Raises:
        InputError: it has no such argument, or a size or layer is out of its range.
    """
    taken = inspect.signature(base.family.pipeline_class.__call__).parameters
    wanted = {
        "negative_prompt": request.negative_prompt,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        # 1 is where every pipeline takes it.
        "clip_skip": None if request.clip_skip == 1 else request.clip_skip,
    }
    options: dict[str, Any] = {n: value for n, value in wanted.items() if value is not None}
    # Where guidance is told to the denoiser, a second prediction is made for no negative prompt.
    deaf = {"negative_prompt"} if "true_cfg_scale" in taken else set()
    for name in options:
        if name not in taken or name in deaf:
            pipeline = base.family.pipeline_class.__name__
            message = f"is nothing that a {pipeline} ({base.family_name}) takes"
            raise InputError.of(name, message, "leave it out")
    if "clip_skip" in options:
        options["clip_skip"] = _skipped_layers(options["clip_skip"], base)
    native = (base.native_size, base.native_size) if guide is None else guide.size
    options |= _sides(request, native, base.family.checkpoints.side_step)
    return options | ({} if guide is None else dict(guide.pictures))


def _sides(request: GenerationRequest, usual: tuple[int, int], step: int) -> dict[str, int]:
    sides = {}
    for name, given, own in zip(
        ("width", "height"), (request.width, request.height), usual, strict=True
    ):
        if given is not None and given % step:
            nearest = max(step, round(given / step) * step)
            message = f"is {given}, which is not a multiple of {step}"
            raise InputError.of(name, message, f"give {nearest}")
        sides[name] = given or max(step, own // step * step)
    return sides


def _skipped_layers(clip_skip: int, base: BaseModel) -> int:
    """`clip_skip` as diffusers counts it: one less.

    Raises:
        InputError: a text encoder has not so many layers.
    """
    layers = [
        base.configurations.read_json(f"{name}/config.json").get("num_hidden_layers", 0)
        for name in base.family.text_encoder_names
    ]
    most = min(layers)
    if clip_skip > most:
        message = f"is {clip_skip}; this base model allows 1 to {most}"
        raise InputError.of("clip_skip", message)
    return clip_skip - 1


def _scheduler(pipeline: Any, request: GenerationRequest) -> tuple[Any, list[NoteEvent]]:
    """The sampler that is asked for, over the base model's own noise schedule.

    One that is for other schedules gives way to the base model's own.

    Returns:
        The sampler, and what of the request it does not do.

    Raises:
        InputError: there is none of this name.
    """
    own, notes = pipeline.scheduler, list[NoteEvent]()
    fitting = {kind.__name__: kind for kind in own.compatibles}
    name = request.scheduler or type(own).__name__
    if name not in fitting and name in {kind.name for kind in KarrasDiffusionSchedulers}:
        message = f"`{name}` does not fit this base model, which keeps its own sampler"
        return own, [NoteEvent("ignored", "scheduler", message)]
    chosen = fitting.get(name)
    if chosen is None:
        message = f"`{name}` does not fit this base model; allowed: {', '.join(sorted(fitting))}"
        raise InputError.of("scheduler", message)
    options: dict[str, Any] = {}
    if request.karras and _KARRAS in inspect.signature(chosen.__init__).parameters:
        # Other spacings in the configuration would clash with it.
        options = dict.fromkeys(_OTHER_SPACINGS, False) | {_KARRAS: True}
    elif request.karras:
        message = f"`{name}` has no such spacing of noise levels"
        notes.append(NoteEvent("ignored", "karras", message))
    try:
        is_own = chosen is type(own) and not options
        return own if is_own else chosen.from_config(own.config, **options), notes
    except ImportError as error:
        message = f"`{name}` needs a package that is not installed: {error}"
        raise InputError.of("scheduler", message, "give another scheduler") from error


@contextmanager
def _with_scheduler(pipeline: Any, scheduler: Any) -> Iterator[None]:
    usual = pipeline.scheduler
    pipeline.register_modules(scheduler=scheduler)
    try:
        yield
    finally:
        pipeline.register_modules(scheduler=usual)


@contextmanager
def _layers_found(family: Family) -> Iterator[None]:
    """Lets text encoders have the step `text_model` that transformers 5 dropped.

    diffusers' `StableDiffusionPipeline.encode_prompt` takes it with `clip_skip`.
    """
    encoders = [family.pipeline.components[name] for name in family.text_encoder_names]
    without = [e for e in encoders if "text_model" not in dict(e.named_children())]
    for encoder in without:
        # Not as a part of itself, which its weights would then be listed under.
        vars(encoder)["text_model"] = encoder
    try:
        yield
    finally:
        for encoder in without:
            del vars(encoder)["text_model"]


def _of_other_lengths(runs: Sequence[FinishedRun], base: BaseModel) -> Iterator[Event]:
    """Warnings of runs that learnt from captions of another length than prompts have."""
    length = base.settings.max_sequence_length or MAX_SEQUENCE_LENGTH
    for run in runs if base.family.checkpoints.language_model else ():
        learnt = run.config.model.max_sequence_length or MAX_SEQUENCE_LENGTH
        if learnt != length:
            name = run.folder.root.name
            message = f"`{name}` learnt from captions of {learnt} tokens; prompts have {length}"
            yield NoteEvent("warning", "model.max_sequence_length", message)


def _unheard(request: GenerationRequest, base: BaseModel) -> Iterator[Event]:
    """Notes on guidance and lengths of text that the base model was not made to be told."""
    told = base.denoiser_config.get("guidance_embeds")
    if request.guidance_scale is not None and told is False:
        message = "this base model is not told of guidance"
        yield NoteEvent("ignored", "guidance_scale", message)
    if base.settings.max_sequence_length and not base.family.checkpoints.language_model:
        message = "CLIP alone reads prompts here"
        yield NoteEvent("ignored", "model.max_sequence_length", message)
