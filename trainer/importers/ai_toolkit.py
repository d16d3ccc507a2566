"""ai-toolkit: the YAML file of a job, whose process has a section for each part of a training.

Source: `toolkit/config_modules.py`, `toolkit/optimizer.py`, `toolkit/scheduler.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.errors import InputError
from trainer.importers import folders, reasons
from trainer.importers.ai_toolkit_network import LAYERS_KNOWN, OTHER_MODELS, model_says
from trainer.importers.ai_toolkit_rows import with_trigger
from trainer.importers.ai_toolkit_table import TABLE
from trainer.importers.desk import Desk, Kind
from trainer.importers.documents import Document
from trainer.importers.lengths import Lengths
from trainer.importers.pictures import (
    Pictures,
    joined,
    repeats_of,
    take_pictures,
    tell_others,
)
from trainer.importers.rows import is_true
from trainer.leaves import shown

_TRAINERS = ("sd_trainer", "diffusion_trainer", "ui_trainer")
# Sections of a process whose options are rows of their own.
_SECTIONS = ("network", "save", "train", "model", "sample", "logging")
DEFAULTS: Mapping[str, Any] = {
    "network.type": "lora",
    "network.linear": 4,
    "network.linear_alpha": 1.0,
    "save.dtype": "float16",
    "train.lr": 1e-6,
    "train.optimizer": "adamw",
    "train.dtype": "fp32",
    "train.min_snr_gamma": 0,
    "train.timestep_type": "sigmoid",
    "train.train_text_encoder": False,
    "datasets.resolution": 512,
    "datasets.buckets": True,
    "datasets.alpha_mask": False,
}
# What a job without a network does not have.
_OF_NETWORKS = ("network.linear", "network.linear_alpha")
# Of its constant_with_warmup, where nothing is said.
_WARMUP = 1000
# How a model says what it learns by.
# Side of the pictures of those that are not Stable Diffusion 1.5.
_NATIVE = 1024
_FLOW = (*LAYERS_KNOWN, "model.arch=flux2_klein_4b", "model.arch=flux2_klein_9b")
_XL = ("model.is_xl=True", "model.arch=sdxl")
_TABLE = (*_XL, "model.arch=sd1", "model.arch=None")
# What a data set says of itself alone.
_SIZE = "resolution"
_OWN = ("folder_path", "dataset_path", "num_repeats", "default_caption", "is_reg", "trigger_word")


def speaks(document: Document) -> bool:
    """Whether a document is the file of a job."""
    config = document.content.get("config")
    return document.form in ("yaml", "json") and isinstance(config, Mapping) and "process" in config


def read(documents: Sequence[Document]) -> Desk:
    """Makes the desk of an import from the one process of a job.

    Raises:
        InputError: it is no job, there are several, or it is no training.
    """
    if not all(map(speaks, documents)):
        message = "is no job: a mapping `config` with a `process`"
        raise InputError.of(documents[0].name, message, "give the YAML file of a job")
    if len(documents) != 1:
        raise InputError.of("FILE", "got several files; allowed: one job", reasons.ONE_BY_ONE)
    given, datasets = _flattened(documents[0])
    subjects = [d for d in datasets if not d.get("is_reg")]
    differ = _join(given, subjects)
    given = {name: value for name, value in given.items() if value not in (None, "", [])}
    desk = Desk(given, DEFAULTS, _kind(given))
    desk.native = _NATIVE if desk.kind == "flow" or model_says(given) & set(_XL) else None
    gone = ["train.min_snr_gamma"] if desk.kind == "flow" else []
    if not any(name.startswith("network.") for name in given):
        gone += _OF_NETWORKS
    desk.defaults = {n: v for n, v in DEFAULTS.items() if n not in gone}
    trigger = given.get("trigger_word")
    sets = joined([_pictures(dataset, trigger) for dataset in subjects])
    classes = joined([_pictures(dataset, None) for dataset in datasets if dataset.get("is_reg")])
    desk.lengths = Lengths(with_class=bool(classes), halved=bool(classes))
    desk.run(TABLE)
    for name, values in differ:
        tell_others(desk, TABLE, f"datasets.{name}", f"datasets: {name}", values)
    warms = desk.values.get("lr_scheduler") == "constant_with_warmup"
    if warms and "lr_warmup_steps" not in desk.values:
        desk.assume("train.lr_scheduler: num_warmup_steps", "lr_warmup_steps", _WARMUP)
    _say(desk, sets, classes)
    _take_only_repeats(desk, sets)
    take_pictures(desk, sets, classes, "datasets.folder_path", "datasets.is_reg")
    return desk


def _flattened(document: Document) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Options as `section.option`, and the data sets."""
    config = document.content["config"]
    processes = config["process"]
    processes = processes if isinstance(processes, list) else [processes]
    if len(processes) != 1 or not isinstance(processes[0], Mapping):
        message = f"got {len(processes)} processes; allowed: one training"
        raise InputError.of("config.process", message, "keep one in the file")
    process = processes[0]
    if process.get("type") not in _TRAINERS:
        message = f"got {shown(process.get('type'))}; allowed: {', '.join(_TRAINERS)}"
        raise InputError.of("config.process.type", message, "only trainings are read")
    others = {**document.content, **config}
    given = {str(n): v for n, v in others.items() if n not in ("config", "process")}
    for name, value in process.items():
        if name in _SECTIONS and isinstance(value, Mapping):
            given |= {f"{name}.{option}": inner for option, inner in value.items()}
        elif name not in ("datasets", "type"):
            given[str(name)] = value
    if isinstance(process.get("network"), Mapping):
        given["network.type"] = given.get("network.type") or DEFAULTS["network.type"]
    datasets = process.get("datasets") or []
    if not isinstance(datasets, list) or not all(isinstance(d, Mapping) for d in datasets):
        raise InputError.of("datasets", "is no list of data sets", "write - folder_path: photos")
    return given, [{str(n): v for n, v in d.items() if v not in (None, "")} for d in datasets]


def _join(
    given: dict[str, Any], datasets: Sequence[Mapping[str, Any]]
) -> list[tuple[str, list[Any]]]:
    """Puts options of data sets among the others: the first one's, and all sizes.

    Returns:
        The options that differ, each with its values.
    """
    differ = []
    for name in dict.fromkeys(name for dataset in datasets for name in dataset):
        values = [dataset[name] for dataset in datasets if name in dataset]
        given[f"datasets.{name}"] = values if name in _OWN else values[0]
        if name == _SIZE:
            lists = [value if isinstance(value, list) else [value] for value in values]
            sizes = [size for several in lists for size in several]
            given[f"datasets.{name}"] = sizes if len(values) > 1 else values[0]
        elif name not in _OWN and any(dataset.get(name) != values[0] for dataset in datasets):
            differ.append((name, [dataset.get(name) for dataset in datasets]))
    return differ


def _kind(given: Mapping[str, Any]) -> Kind | None:
    says = model_says(given)
    if any(is_true(given.get(f"model.{name}")) for name in OTHER_MODELS):
        return None
    if says & set(_FLOW):
        return "flow"
    return "table" if says & set(_TABLE) else None


def _pictures(dataset: Mapping[str, Any], trigger: str | None) -> Pictures:
    word = dataset.get("trigger_word", trigger)
    trigger_name = "datasets.trigger_word" if "trigger_word" in dataset else "trigger_word"
    if not isinstance(word, str | None):
        raise InputError.of(trigger_name, f"got {word!r}; allowed: text", "write it in quotes")
    caption = with_trigger(str(dataset.get("default_caption", "")), word)
    return Pictures(
        str(dataset.get("folder_path", dataset.get("dataset_path", ""))),
        repeats=repeats_of(dataset.get("num_repeats", 1), "datasets.num_repeats"),
        prompt=caption or None,
        token=word,
        prompt_name="datasets.default_caption" if dataset.get("default_caption") else trigger_name,
        token_name=trigger_name,
    )


def _say(desk: Desk, sets: Sequence[Pictures], classes: Sequence[Pictures]) -> None:
    bare = [p.folder for p in sets if p.prompt is None]
    if bare:
        desk.remarks.append(reasons.BARE)
    if any(pictures.prompt is None for pictures in classes):
        desk.remarks.append(reasons.NO_CLASS)
    gone = [p.folder for p in sets if p.folder and not folders.is_here(p.folder)]
    if gone:
        desk.remarks.append(f"Not on this machine: {', '.join(gone)}.")


def _take_only_repeats(desk: Desk, sets: Sequence[Pictures]) -> None:
    """Repeats of one set change nothing where steps are counted."""
    if len(sets) == 1 and sets[0].repeats > 1:
        reason = "steps are counted, and there is one set of pictures"
        desk.leave("datasets.num_repeats", reason, matters=False)
