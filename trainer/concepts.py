"""The pictures of all concepts: their own and those of their classes, prepared and numbered.

Joins the configuration's concepts with the data room and, where class pictures have to be made,
with the base model. Knows no steps and no loss.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from trainer.cache import cache_folder
from trainer.class_images import ClassImages, class_images
from trainer.config import Concept, TrainingConfig
from trainer.data.buckets import native_side
from trainer.data.holding import Picture, held_out
from trainer.data.picture_set import class_pictures_of, pictures_of
from trainer.data.plan import Portion
from trainer.data.prepare import forget, prepare
from trainer.data.prepared import Example
from trainer.data.store import Store
from trainer.durable import disk_errors
from trainer.events import Event, NoteEvent
from trainer.families.base import Family
from trainer.job import RunFolder
from trainer.processes import Processes
from trainer.sampling import Sampler
from trainer.sections.subjects import (
    ClassSource,
    class_sources,
    fields_of_class,
    fields_of_concept,
    put_down_to,
)
from trainer.stages import Value, retold

# Each class source's pictures.
ClassPictures = Mapping[ClassSource, tuple[Example, ...]]


def prepare_concepts(
    config: TrainingConfig, folder: RunFolder, processes: Processes
) -> Generator[
    Event, None, tuple[list[tuple[Example, ...]], dict[ClassSource, tuple[Example, ...]]]
]:
    """Prepares what the user gave: each concept's pictures, and class pictures of their own.

    Folders that concepts and classes of an earlier configuration left are removed.

    Raises:
        InputError: pictures, captions or masks cannot be used.
        DiskError: a folder cannot be written.
    """
    instances: list[tuple[Example, ...]] = []
    classes: dict[ClassSource, tuple[Example, ...]] = {}
    concepts = config.subjects()
    said: set[Event] = set()
    if processes.is_main:
        _remove_others(config, folder)
    folders = prepared_folders(config, folder)
    # A training on what was prepared goes on with just that.
    settled = folder.checkpoints.exists()
    for place, concept in enumerate(concepts):
        wanted = pictures_of(config, concept)
        preparing = prepare(wanted, folders[place], store(), settled=settled)
        told = _told_as(preparing, fields_of_concept(config.data.concepts, place))
        instances.append((yield from _one_process_first(_said_once(told, said), processes)))
    for source in class_sources(concepts):
        if source.url is not None:
            classes[source] = yield from _prepare_class(
                config, folder, processes, source, source.url
            )
    return instances, classes


def make_classes(
    config: TrainingConfig,
    folder: RunFolder,
    processes: Processes,
    family: Family,
    base_contents: str,
    device: torch.device,
) -> Generator[Event, None, dict[ClassSource, tuple[Example, ...]]]:
    """Makes with the base model the class pictures that the user did not give, and prepares them.

    Args:
        family: just loaded, without an adapter.
        base_contents: digest of the base model.
        device: where pictures are made.

    Raises:
        NonFiniteError: the base model overflows.
        DiskError: a folder cannot be written.
    """
    classes: dict[ClassSource, tuple[Example, ...]] = {}
    prior = config.prior
    width, height = _size(config)
    assert prior.class_guidance_scale is not None
    for source in class_sources(config.subjects()):
        if source.url is not None:
            continue
        wanted = ClassImages(
            prompt=source.prompt,
            count=source.count,
            sampler=Sampler(
                width=width,
                height=height,
                steps=prior.class_inference_steps,
                guidance_scale=prior.class_guidance_scale,
            ),
            seed=config.run.seed,
            base_contents=base_contents,
        )
        made = yield from class_images(
            family,
            wanted,
            cache_folder(),
            folder.class_images / _number(config, source),
            process_index=processes.index,
            num_processes=processes.count,
            device=device,
            in_turns=config.run.offload_models and device.type == "cuda",
        )
        processes.wait()
        classes[source] = yield from _prepare_class(config, folder, processes, source, str(made))
    return classes


def joined(
    concepts: Sequence[Concept], instances: Sequence[Sequence[Example]], classes: ClassPictures
) -> tuple[tuple[Example, ...], tuple[Portion, ...]]:
    """All examples under one numbering, and each concept's part of an epoch, by scale.

    Args:
        concepts: with all their options.
        instances: the pictures of each.
        classes: class pictures; a source that is not made yet has none.
    """
    examples: list[Example] = []

    def numbered(group: Sequence[Example]) -> tuple[Example, ...]:
        start = len(examples)
        examples.extend(replace(e, number=start + place) for place, e in enumerate(group))
        return tuple(examples[start:])

    own = [numbered(group) for group in instances]
    of_class = {source: numbered(group) for source, group in classes.items()}
    portions = []
    for place, (concept, group) in enumerate(zip(concepts, own, strict=True), start=1):
        source = ClassSource.of(concept)
        beside = () if source is None else of_class.get(source, ())
        weight = concept.prior_loss_weight
        assert weight is not None
        portions += [
            Portion(
                instances=_uses(group, scale),
                repeats=concept.repeats,
                class_images=_uses(beside, scale),
                prior_loss_weight=weight,
                concept=place,
            )
            for scale in sorted({example.scale for example in group})
        ]
    return tuple(examples), tuple(portions)


def hold_out(
    portions: Sequence[Portion], examples: Sequence[Example], *, count: int, seed: int
) -> tuple[tuple[Portion, ...], tuple[int, ...]]:
    """Takes pictures out of training at all their sizes, see `data.holding`.

    Args:
        portions: every concept's part of an epoch.
        examples: by number.
        count: how many pictures are kept out.
        seed: of the run.

    Returns:
        The portions without them, and the numbers of those kept out, each at its first size.

    Raises:
        InputError: there are not so many.
    """
    pictures: dict[Picture, list[int]] = {}
    for portion in portions:
        for number in dict.fromkeys(portion.instances):
            pictures.setdefault((portion.concept, examples[number].name), []).append(number)
    held = [pictures[picture] for picture in held_out(tuple(pictures), count=count, seed=seed)]
    out = {number for numbers in held for number in numbers}
    kept = (replace(p, instances=tuple(n for n in p.instances if n not in out)) for p in portions)
    return tuple(p for p in kept if p.instances), tuple(numbers[0] for numbers in held)


def _uses(group: Sequence[Example], scale: int) -> tuple[int, ...]:
    """The numbers of the pictures at one scale, each as often as it is repeated."""
    return tuple(e.number for e in group if e.scale == scale for _ in range(e.repeats))


def prepared_folders(config: TrainingConfig, folder: RunFolder) -> list[Path]:
    """Where the pictures of each concept are prepared."""
    count = len(config.subjects())
    if count == 1:
        return [folder.prepared]
    return [folder.prepared / f"concept_{number}" for number in range(1, count + 1)]


def prepared_sets(
    config: TrainingConfig, folder: RunFolder
) -> list[tuple[Path, Mapping[str, str]]]:
    """Where each set that `prepare_concepts` prepares lies, and what the user calls its options."""
    given, concepts = config.data.concepts, config.subjects()
    sets = [
        (path, fields_of_concept(given, place))
        for place, path in enumerate(prepared_folders(config, folder))
    ]
    for source in class_sources(concepts):
        if source.url is not None:
            path = folder.prepared / f"class_{_number(config, source)}"
            sets.append((path, fields_of_class(source, given, concepts)))
    return sets


def _remove_others(config: TrainingConfig, folder: RunFolder) -> None:
    """Removes the folders of concepts and classes that are not of this configuration."""
    sources = class_sources(config.subjects())
    prepared = {path.name for path in prepared_folders(config, folder)}
    prepared |= {f"class_{_number(config, source)}" for source in sources}
    made = {_number(config, source) for source in sources if source.url is None}
    if folder.prepared not in prepared_folders(config, folder):
        forget(folder.prepared)
    with disk_errors(folder.root):
        for place, pattern, kept in (
            (folder.prepared, r"(concept|class)_\d+", prepared),
            (folder.class_images, r"\d+", made),
        ):
            for path in place.iterdir() if place.is_dir() else ():
                is_ours = re.fullmatch(pattern, path.name) and not path.is_symlink()
                if is_ours and path.is_dir() and path.name not in kept:
                    shutil.rmtree(path)


def store() -> Store:
    """What was found out about pictures in earlier trainings."""
    return Store(cache_folder() / "pictures")


def _number(config: TrainingConfig, source: ClassSource) -> str:
    return str(class_sources(config.subjects()).index(source) + 1)


def _prepare_class(
    config: TrainingConfig,
    folder: RunFolder,
    processes: Processes,
    source: ClassSource,
    url: str,
) -> Generator[Event, None, tuple[Example, ...]]:
    wanted = class_pictures_of(config, source, url)
    place = folder.prepared / f"class_{_number(config, source)}"
    settled = folder.checkpoints.exists()
    preparing = prepare(wanted, place, store(), settled=settled)
    fields = fields_of_class(source, config.data.concepts, config.subjects())
    return (yield from _one_process_first(_told_as(preparing, fields), processes))


def _told_as(
    stage: Generator[Event, None, Value], fields: Mapping[str, str]
) -> Generator[Event, None, Value]:
    """A stage whose notes and errors name options as the user calls them, see `put_down_to`."""

    def tell(event: Event) -> Iterator[Event]:
        if isinstance(event, NoteEvent):
            event = replace(event, field=fields.get(event.field, event.field))
        yield event

    with put_down_to(fields):
        return (yield from retold(stage, tell))


def _said_once(
    stage: Generator[Event, None, Value], said: set[Event]
) -> Generator[Event, None, Value]:
    """A stage without the notes that earlier ones said already.

    Args:
        said: they, and then those of this stage.
    """

    def tell(event: Event) -> Iterator[Event]:
        if not isinstance(event, NoteEvent) or event not in said:
            yield event
        if isinstance(event, NoteEvent):
            said.add(event)

    return retold(stage, tell)


def _one_process_first(
    stage: Generator[Event, None, Value], processes: Processes
) -> Generator[Event, None, Value]:
    """A stage in one process; the others then find its work done."""
    if not processes.is_main:
        processes.wait()
    value = yield from stage
    if processes.is_main:
        processes.wait()
    return value


def _size(config: TrainingConfig) -> tuple[int, int]:
    """Width and height of class pictures that are made, in pixels.

    Where a priority decides, the base model's own, which it paints best; they are trained as small
    as the subject's.
    """
    width, height = config.data.resolution_width, config.data.resolution_height
    assert width is not None
    assert height is not None
    priority = config.data.priority
    return native_side(width, priority), native_side(height, priority)
