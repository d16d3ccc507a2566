"""What a training would find among the pictures that the user gave, before anything is done.

Reads every picture and writes nothing; knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from trainer.config import TrainingConfig
from trainer.data.holding import Picture, held_out
from trainer.data.picture_set import PictureSet, class_pictures_of, pictures_of
from trainer.data.report import DataReport, inspect
from trainer.sections.subjects import (
    class_sources,
    fields_of_class,
    fields_of_concept,
    put_down_to,
)


def inspect_pictures(config: TrainingConfig) -> DataReport:
    """The pictures of all concepts, and class pictures that are the user's own.

    Raises:
        InputError: pictures, captions or masks cannot be used.
    """
    reports = inspect_concepts(config)
    concepts = config.subjects()
    for source in class_sources(concepts):
        if source.url is not None:
            fields = fields_of_class(source, config.data.concepts, concepts)
            reports.append(_inspected(class_pictures_of(config, source, source.url), fields))
    return DataReport.joined(reports)


def inspect_concepts(config: TrainingConfig) -> list[DataReport]:
    """The pictures of each concept; errors as for `inspect_pictures`."""
    reports = [
        _inspected(pictures_of(config, concept), fields_of_concept(config.data.concepts, place))
        for place, concept in enumerate(config.subjects())
    ]
    held_out_of(config, reports)
    return reports


def held_out_of(config: TrainingConfig, reports: Sequence[DataReport]) -> tuple[Picture, ...]:
    """The pictures that are kept out of a training.

    Args:
        reports: on the pictures of each concept.

    Raises:
        InputError: there are not so many.
    """
    usable = [
        (concept, picture.name)
        for concept, report in enumerate(reports, start=1)
        for picture in report.usable
    ]
    return held_out(usable, count=config.sample.validation_images, seed=config.run.seed)


def _inspected(wanted: PictureSet, fields: Mapping[str, str]) -> DataReport:
    """What pictures hold, with the options named as the user calls them, see `put_down_to`."""
    with put_down_to(fields):
        report = inspect(wanted)
    notes = [n.model_copy(update={"field": fields.get(n.field, n.field)}) for n in report.notes]
    return replace(report, notes=tuple(notes))
