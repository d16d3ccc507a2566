"""kohya's sd-scripts: its training options, in TOML files and on command lines.

Source: `library/train_util.py`, `library/flux_train_utils.py` and the scripts' own parsers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import InputError
from trainer.importers import folders, kohya_data, reasons
from trainer.importers.desk import Desk, Kind
from trainer.importers.documents import Document, read_document, refuse_several
from trainer.importers.kohya_table import DATA_FILE, TABLE
from trainer.importers.launcher import launcher_of, tell_launcher
from trainer.importers.lengths import Lengths
from trainer.importers.pictures import Pictures, take_pictures, tell_others

SCRIPTS = (
    *("train_network.py", "sdxl_train_network.py", "flux_train_network.py", "train_db.py"),
    *("fine_tune.py", "sdxl_train.py", "flux_train.py"),
)
# A script whose name is near, and why it is not read.
OTHERS: Mapping[str, str] = {
    "flux_2_train_network.py": "is musubi-tuner's, whose options are not read",
}
# What the scripts assume and this program does not. A seed is drawn there, and is 42 here.
DEFAULTS: Mapping[str, Any] = {
    "network_alpha": 1.0,
    "network_dim": 4,
    "learning_rate": 2e-6,
    "max_train_steps": 1600,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "optimizer_type": "AdamW",
    "train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "min_snr_gamma": 0,
    "mixed_precision": "no",
    "alpha_mask": False,
    "network_train_unet_only": False,
    "timestep_sampling": "sigma",
    "weighting_scheme": "none",
    "sigmoid_scale": 1.0,
    "discrete_flow_shift": 3.0,
    "guidance_scale": 3.5,
    "model_prediction_type": "sigma_scaled",
}
# Options with several values.
_LISTS = frozenset(
    {
        *("network_args", "optimizer_args", "lr_scheduler_args", "text_encoder_lr"),
        *("base_weights", "base_weights_multiplier"),
    }
)
_OWN_PRECISION = "the script's own option alone counts, which is `no` where it is not given"
# Beginnings of scripts and networks for models that do not train here.
_NETWORK = "networks.lora_"
_OTHER_MODELS = frozenset({"sd3", "lumina", "hunyuan", "anima"})
# Side of the pictures of SDXL and FLUX.1.
_NATIVE = 1024
# Options that no other program's JSON has.
_IN_JSON = frozenset({"datasets", "network_module", "pretrained_model_name_or_path"})
# Options that only the graphical interface's JSON has.
_OF_INTERFACE = frozenset({"LoRA_type", "model_list", "max_resolution"})
# Options that only trainings by flow matching have.
_FLOW = frozenset(
    {
        *("clip_l", "t5xxl", "ae", "timestep_sampling", "model_prediction_type"),
        *("discrete_flow_shift", "t5xxl_max_token_length", "apply_t5_attn_mask"),
    }
)


def speaks(document: Document) -> bool:
    """Whether a document is one of these scripts'."""
    if document.form == "command":
        return document.script in SCRIPTS
    names = {*document.content, *kohya_data.flattened(document.content)}
    if document.form == "json":
        return bool(names & (_IN_JSON | _OF_INTERFACE))
    return document.form == "toml" and bool(names & {"datasets", "general", *TABLE})


def read(documents: Sequence[Document]) -> Desk:
    """Makes the desk of an import: training options and data sets together.

    Raises:
        InputError: there are several command lines.
    """
    if sum(document.form == "command" for document in documents) > 1:
        message = "got several command lines; allowed: one, with its files"
        raise InputError.of("FILE", message, reasons.ONE_BY_ONE)
    training, data, script = _gathered(documents)
    has_training = bool(training)
    sets = kohya_data.read(training, data)
    given = {**training, **sets.given}
    desk = Desk(given, DEFAULTS if has_training else {}, _kind(given, script))
    desk.native = _NATIVE if desk.kind == "flow" or script.startswith("sdxl_") else None
    if desk.kind == "flow":
        desk.defaults = {n: v for n, v in desk.defaults.items() if n != "min_snr_gamma"}
    for name, reason, value in sets.left:
        desk.leave(name, reason, value=value)
    desk.remarks += sets.remarks
    if any(pictures.prompt is None for pictures in sets.subjects):
        desk.remarks.append(reasons.BARE)
    subjects = sets.subjects or _in_folders(desk)
    classes = sets.classes or _class_folder(desk)
    launchers = [launcher_of(document) for document in documents]
    processes = max((launcher.processes or 1 for launcher in launchers), default=1)
    desk.lengths = _lengths(desk, subjects, bool(classes), processes)
    if has_training and "network_module" not in given:
        _take_all_weights(desk, script)
    desk.run(TABLE)
    for launcher in launchers:
        tell_launcher(desk, launcher, own_precision=_OWN_PRECISION)
    if not data and DATA_FILE in given:
        desk.leave(DATA_FILE, "there is no such file: give it beside this one")
    for option, label, values in sets.differ:
        tell_others(desk, TABLE, option, label, values)
    name = "image_dir" if sets.subjects else "train_data_dir"
    take_pictures(desk, subjects, classes, name, "is_reg" if sets.classes else "reg_data_dir")
    return desk


def _gathered(documents: Sequence[Document]) -> tuple[dict[str, Any], dict[str, Any], str]:
    """The options of the training, those of the data sets, and the script."""
    training: dict[str, Any] = {}
    data: dict[str, Any] = {}
    script = ""
    for document in documents:
        if document.form == "json" and _OF_INTERFACE & document.content.keys():
            message = "is a configuration of kohya_ss' graphical interface, whose names differ"
            raise InputError.of("FILE", message, "import the command or TOML that it makes of it")
        script = document.script or script
        refuse_several(document, TABLE, _LISTS)
        of_data, options = _split(document.content)
        data.update(of_data)
        own = kohya_data.flattened(options)
        if "config_file" in own:
            file = _beside(document, str(own["config_file"]), ".toml")
            training.update(kohya_data.flattened(read_document(str(file)).content))
        training.update(own)
        named = training.get(DATA_FILE)
        if named and not data:
            file = _beside(document, str(named), "")
            if file.is_file():
                data.update(read_document(str(file)).content)
    given = {name: value for name, value in training.items() if value not in (None, "", [])}
    return given, data, script


def _split(content: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """What a file says of data sets, and of the training: one file may have both."""
    if "datasets" not in content:
        return {}, content
    others = {n: v for n, v in content.items() if n not in ("general", "datasets")}
    if not kohya_data.flattened(others).keys() & TABLE.keys():
        return content, {}
    return {n: v for n, v in content.items() if n not in others}, others


def _beside(document: Document, name: str, ending: str) -> Path:
    """A file that a document names: from here, or from its own folder."""
    path = Path(name if name.endswith(ending) else name + ending)
    other = document.folder / path
    return other if not path.is_file() and other.is_file() else path


def _kind(given: Mapping[str, Any], script: str) -> Kind:
    """The kind of base model.

    Raises:
        InputError: the script or the network is for a model that does not train here.
    """
    module = str(given.get("network_module", ""))
    for name, named in (("script", script), ("network_module", module.removeprefix(_NETWORK))):
        if named.partition("_")[0] in _OTHER_MODELS:
            message = f"`{named}` trains a model that is not among the base models here"
            raise InputError.of(name, message, "docs/methods.md names those that are")
    is_flow = (
        bool(_FLOW & given.keys()) or script.startswith("flux_") or module == "networks.lora_flux"
    )
    return "flow" if is_flow else "table"


def _in_folders(desk: Desk) -> list[Pictures]:
    """The pictures of `train_data_dir`, whose folders say repeats and captions by their names."""
    place = desk.given.get("train_data_dir")
    if place is None:
        return []
    odd = folders.misread_folders(str(place))
    if odd:
        named = ", ".join(odd)
        desk.remarks.append(f"No repeats are read here from the names of these folders: {named}.")
    captions = [folder.caption for folder in folders.kohya_folders(str(place))]
    words = [folders.identifier_in(caption) for caption in captions]
    known = sorted({word for word in words if word is not None})
    return [Pictures(str(place), token=known[0] if len(known) == 1 else None)]


def _class_folder(desk: Desk) -> list[Pictures]:
    """The pictures of `reg_data_dir`; the name of its folder is the class."""
    place = desk.given.get("reg_data_dir")
    if place is None:
        return []
    captions = {folder.caption for folder in folders.kohya_folders(str(place))}
    if len(captions) != 1:
        desk.remarks.append(reasons.NO_CLASS)
    return [Pictures(str(place), prompt=captions.pop() if len(captions) == 1 else None)]


def _lengths(desk: Desk, subjects: Sequence[Pictures], has_class: bool, processes: int) -> Lengths:
    """How steps become ours: there, half of the pictures of a training are of the class."""
    found = [pictures.examples for pictures in subjects]
    counted = [n for n in found if n is not None]
    batch = max(1, desk.whole("train_batch_size")) if desk.setting("train_batch_size") else 1
    is_even = has_class and batch % 2 == 0
    has_steps = bool(desk.setting("gradient_accumulation_steps"))
    accumulated = max(1, desk.whole("gradient_accumulation_steps")) if has_steps else 1
    return Lengths(
        examples=sum(counted) if len(counted) == len(found) and found else None,
        batch=(batch // 2 if is_even else batch) * accumulated,
        repeats=subjects[0].repeats if len(subjects) == 1 else 1,
        with_class=has_class,
        processes=processes,
        halved=has_class and not is_even,
    )


def _take_all_weights(desk: Desk, script: str) -> None:
    """Without a network all weights are trained."""
    own = {n: v for n, v in desk.defaults.items() if not n.startswith("network_")}
    desk.defaults = {**own, "network_module": None}
    desk.take("network_module", "use_lora", False)
    if script == "train_db.py":
        desk.defaults = {**desk.defaults, "train_text_encoder": True}
    elif not script:
        desk.remarks.append(
            "No network_module is given: read as a training of all weights of the denoiser. For "
            "train_db.py, which trains the text encoder too, add train_text_encoder: true."
        )
