"""What a training would find among the pictures that the user gave, before anything is done.

Reads every picture and writes nothing; knows no model.
"""

from __future__ import annotations

from trainer.config import TrainingConfig
from trainer.data.prepare import DataReport, inspect
from trainer.sections.subjects import class_data_of, data_of


def inspect_pictures(config: TrainingConfig) -> DataReport:
    """The pictures of all concepts, and class pictures that are the user's own.

    Raises:
        InputError: pictures, captions or masks cannot be used.
    """
    concepts = config.subjects()
    reports = [inspect(data_of(concept, config.data), config.mask) for concept in concepts]
    of_classes = {
        (concept.class_prompt, concept.class_images_url)
        for concept in concepts
        if concept.with_prior_preservation
    }
    for prompt, url in sorted((p, u) for p, u in of_classes if p is not None and u is not None):
        data = class_data_of(prompt, url, config.data)
        reports.append(inspect(data, config.mask, of_class=True))
    return DataReport.joined(reports)
