"""What a training would find among the pictures that the user gave, before anything is done.

Reads every picture and writes nothing; knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from trainer.config import DataConfig, MaskConfig, TrainingConfig
from trainer.data.report import DataReport, inspect
from trainer.sections.subjects import (
    class_data_of,
    class_sources,
    data_of,
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
            data = class_data_of(source, source.url, config.data)
            fields = fields_of_class(source, config.data.concepts, concepts)
            reports.append(_inspected(data, config.mask, fields, of_class=True))
    return DataReport.joined(reports)


def inspect_concepts(config: TrainingConfig) -> list[DataReport]:
    """The pictures of each concept; errors as for `inspect_pictures`."""
    return [
        _inspected(
            data_of(concept, config.data),
            config.mask,
            fields_of_concept(config.data.concepts, place),
        )
        for place, concept in enumerate(config.subjects())
    ]


def _inspected(
    data: DataConfig, mask: MaskConfig, fields: Mapping[str, str], *, of_class: bool = False
) -> DataReport:
    """What pictures hold, with the options named as the user calls them, see `put_down_to`."""
    with put_down_to(fields):
        report = inspect(data, mask, of_class=of_class)
    notes = [n.model_copy(update={"field": fields.get(n.field, n.field)}) for n in report.notes]
    return replace(report, notes=tuple(notes))
