"""The pictures of all concepts: their own and those of their classes, prepared and numbered.

Joins the configuration's concepts with the data room and, where class pictures have to be made,
with the base model. Knows no steps and no loss.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from accelerate import Accelerator

from trainer.cache import cache_folder
from trainer.class_images import ClassImages, class_images
from trainer.config import Concept, TrainingConfig
from trainer.data.plan import Portion
from trainer.data.prepare import Example, prepare
from trainer.events import Event
from trainer.families.base import Family
from trainer.job import RunFolder
from trainer.sampling import Sampler
from trainer.sections.subjects import class_data_of, data_of

Value = TypeVar("Value")


@dataclass(frozen=True)
class ClassSource:
    """Where class pictures come from; concepts with the same one share them.

    Args:
        prompt: their caption, and what they are made with.
        url: pictures of the user's own. None: the base model makes them.
        count: how many are made.
    """

    prompt: str
    url: str | None
    count: int

    @classmethod
    def of(cls, concept: Concept) -> ClassSource | None:
        """The source of a concept whose options are all filled in; None without prior."""
        if not concept.with_prior_preservation:
            return None
        assert concept.class_prompt is not None
        assert concept.num_class_images is not None
        count = concept.num_class_images if concept.class_images_url is None else 0
        return cls(concept.class_prompt, concept.class_images_url, count)


# Each class source's pictures.
ClassPictures = Mapping[ClassSource, tuple[Example, ...]]


def prepare_concepts(
    config: TrainingConfig, folder: RunFolder, accelerator: Accelerator
) -> Generator[
    Event, None, tuple[list[tuple[Example, ...]], dict[ClassSource, tuple[Example, ...]]]
]:
    """Prepares what the user gave: each concept's pictures, and class pictures of their own.

    Raises:
        InputError: pictures, captions or masks cannot be used.
    """
    instances: list[tuple[Example, ...]] = []
    classes: dict[ClassSource, tuple[Example, ...]] = {}
    concepts = config.subjects()
    width, height = _size(config)
    for number, concept in enumerate(concepts, start=1):
        place = folder.prepared if len(concepts) == 1 else folder.prepared / f"concept_{number}"
        data = data_of(concept, config.data)
        preparing = prepare(data, config.mask, place, width=width, height=height)
        instances.append((yield from _one_process_first(preparing, accelerator)))
    for source in _sources(concepts):
        if source.url is not None:
            classes[source] = yield from _prepare_class(
                config, folder, accelerator, source, source.url
            )
    return instances, classes


def make_classes(
    config: TrainingConfig,
    folder: RunFolder,
    accelerator: Accelerator,
    family: Family,
    base_contents: str,
) -> Generator[Event, None, dict[ClassSource, tuple[Example, ...]]]:
    """Makes with the base model the class pictures that the user did not give, and prepares them.

    Args:
        family: just loaded, without an adapter.
        base_contents: digest of the base model.
    """
    classes: dict[ClassSource, tuple[Example, ...]] = {}
    prior = config.prior
    width, height = _size(config)
    for source in _sources(config.subjects()):
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
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            device=accelerator.device,
        )
        accelerator.wait_for_everyone()
        classes[source] = yield from _prepare_class(config, folder, accelerator, source, str(made))
    return classes


def joined(
    concepts: Sequence[Concept], instances: Sequence[Sequence[Example]], classes: ClassPictures
) -> tuple[tuple[Example, ...], tuple[Portion, ...]]:
    """All examples under one numbering, and each concept's part of an epoch.

    Args:
        concepts: with all their options.
        instances: the pictures of each.
        classes: class pictures; a source that is not made yet has none.
    """
    examples: list[Example] = []

    def numbered(group: Sequence[Example]) -> tuple[int, ...]:
        start = len(examples)
        examples.extend(replace(e, number=start + place) for place, e in enumerate(group))
        return tuple(range(start, len(examples)))

    own = [numbered(group) for group in instances]
    of_class = {source: numbered(group) for source, group in classes.items()}
    portions = []
    for concept, numbers in zip(concepts, own, strict=True):
        source = ClassSource.of(concept)
        weight = concept.prior_loss_weight
        assert weight is not None
        portions.append(
            Portion(
                instances=numbers,
                repeats=concept.repeats,
                class_images=() if source is None else of_class.get(source, ()),
                prior_loss_weight=weight,
            )
        )
    return tuple(examples), tuple(portions)


def _sources(concepts: Sequence[Concept]) -> list[ClassSource]:
    sources = [ClassSource.of(concept) for concept in concepts]
    return list(dict.fromkeys(source for source in sources if source is not None))


def _number(config: TrainingConfig, source: ClassSource) -> str:
    return str(_sources(config.subjects()).index(source) + 1)


def _prepare_class(
    config: TrainingConfig,
    folder: RunFolder,
    accelerator: Accelerator,
    source: ClassSource,
    url: str,
) -> Generator[Event, None, tuple[Example, ...]]:
    data = class_data_of(source.prompt, url, config.data)
    width, height = _size(config)
    place = folder.prepared / f"class_{_number(config, source)}"
    preparing = prepare(data, config.mask, place, width=width, height=height, of_class=True)
    return (yield from _one_process_first(preparing, accelerator))


def _one_process_first(
    stage: Generator[Event, None, Value], accelerator: Accelerator
) -> Generator[Event, None, Value]:
    """A stage in one process; the others then find its work done."""
    if not accelerator.is_main_process:
        accelerator.wait_for_everyone()
    value = yield from stage
    if accelerator.is_main_process:
        accelerator.wait_for_everyone()
    return value


def _size(config: TrainingConfig) -> tuple[int, int]:
    """Width and height in pixels."""
    width, height = config.data.resolution_width, config.data.resolution_height
    assert width is not None
    assert height is not None
    return width, height
