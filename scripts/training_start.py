"""Times a small training from its configuration to its first step, for bench_prepare.py.

Run in a process of its own, it prints JSON: seconds of all and of each stage.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench_prepare import Stages

from trainer import base_model, encoding, engine
from trainer.data.dataset import Dataset
from trainer.encoded import Shelf
from trainer.encoding import Text
from trainer.events import StepEvent
from trainer.families import family_names, load_family
from trainer.job import RunFolder
from trainer.resolve import Layer, resolve

# What is no preparation.
WEIGHTS = "read the weights"
STAGES: Mapping[str, tuple[tuple[Any, str], ...]] = {
    WEIGHTS: ((base_model, "load"),),
    "find the base model": ((base_model, "locate"),),
    "prepare pictures": ((engine, "prepare_concepts"),),
    "open pictures": ((Dataset, "pixels_of"),),
    "VAE": ((encoding, "encode"),),
    "text encoders": ((Text, "_encode_to_keep"),),
    "cache folder": ((Shelf, "get"), (Shelf, "put"), (Shelf, "prune")),
}


def measure(model: Path, photos: Path, folder: Path, resolution: int) -> dict[str, Any]:
    """Trains one step on photographs, and says what came before it.

    Args:
        model: a base model's folder.
        folder: an empty run folder.
    """
    stages = Stages()
    stages.watch(STAGES)
    given = {
        "model_url": str(model),
        "images_data_url": str(photos),
        "resolution_width": resolution,
        "resolution_height": resolution,
        "random_flip": True,
        "rank": 4,
        "max_train_steps": 1,
        "tensorboard": False,
    }
    # Imports are no preparation either, and these come later.
    for name in family_names():
        load_family(name)
    start = time.perf_counter()
    config = resolve([Layer("benchmark", given, explicit=True)])
    for event in engine.run(config, RunFolder(folder), lambda: False):
        if isinstance(event, StepEvent):
            break
    seconds = time.perf_counter() - start - event.seconds
    return {
        "seconds": seconds,
        "preparation": seconds - stages.passed[WEIGHTS],
        "stages": {stage: stages.passed[stage] for stage in STAGES},
    }


if __name__ == "__main__":
    places = map(Path, sys.argv[1:4])
    print(json.dumps(measure(*places, int(sys.argv[4]))))
