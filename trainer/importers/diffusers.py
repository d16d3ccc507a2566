"""diffusers' training scripts: their command lines, in shell files or as a text.

Source: the argument parsers in `examples/dreambooth` and `examples/advanced_diffusion_training`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.errors import InputError
from trainer.importers import diffusers_klein as klein
from trainer.importers import folders, reasons
from trainer.importers.adapted import ATTENTION, JOINT
from trainer.importers.command_lines import UNSET
from trainer.importers.desk import Desk, Kind, Table
from trainer.importers.diffusers_table import TABLE, text_learns
from trainer.importers.documents import Document, refuse_several
from trainer.importers.launcher import launcher_of, tell_launcher
from trainer.importers.lengths import Lengths
from trainer.importers.rows import is_true
from trainer.importers.secret_names import is_secret
from trainer.leaves import nearest


@dataclass(frozen=True)
class Script:
    """One of the scripts.

    Args:
        kind: what its base models learn by.
        defaults: of its options, where they are not ours.
        targets: layers that get an adapter; none where all weights are trained.
        one_decay: whether text encoders have the denoiser's weight decay, unless it is said.
        rows: of options that mean something else than in the other scripts.
        is_long: whether an epoch is as long as the class pictures are many.
        remarks: what is to be known of its trainings.
    """

    kind: Kind
    defaults: Mapping[str, Any]
    targets: tuple[str, ...] = ()
    one_decay: bool = False
    rows: Table = field(default_factory=dict)
    is_long: bool = True
    remarks: tuple[str, ...] = ()


_ALL: Mapping[str, Any] = {
    "train_batch_size": 4,
    "num_train_epochs": 1,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 500,
    "snr_gamma": 0,
    "center_crop": False,
    "optimizer": "adamw",
}
_LORA: Mapping[str, Any] = {
    **_ALL,
    "rank": 4,
    "learning_rate": 1e-4,
    "adam_weight_decay": 1e-4,
    "text_encoder_lr": 5e-6,
}
_OLDER: Mapping[str, Any] = {**_ALL, "resolution": 512, "adam_weight_decay": 1e-2}
_FLOW: Mapping[str, Any] = {
    "guidance_scale": 3.5,
    "weighting_scheme": "none",
    "resolution": 512,
}
# Options with several values; the layers are also read from several words.
_LISTS = ("text_encoder_out_layers", "validation_images", "lora_layers")
_OPEN_PRECISION = (
    "Neither the script nor its launcher is given --mixed_precision: there it is what `accelerate "
    "config` wrote on that machine, else no. Give mixed_precision; without it bf16 is taken where "
    "the GPU has it."
)
_ONE_PROCESS = (
    "scale_lr multiplies the rate by the number of processes, too, which the command does not say: "
    "one is assumed. With N of them, multiply learning_rate by N, and start as many here."
)
# Alpha in scripts that have an option for it; the others take the rank.
_ALPHA = 4
SCRIPTS: Mapping[str, Script] = {
    "train_dreambooth.py": Script("table", {**_OLDER, "learning_rate": 5e-6}, one_decay=True),
    "train_dreambooth_lora.py": Script(
        "table", {**_OLDER, "learning_rate": 5e-4, "rank": 4}, ATTENTION, one_decay=True
    ),
    "train_dreambooth_lora_sdxl.py": Script("table", {**_LORA, "resolution": 1024}, ATTENTION),
    "train_dreambooth_flux.py": Script(
        "flow", {**_ALL, **_FLOW, "learning_rate": 1e-4, "adam_weight_decay": 1e-4}
    ),
    "train_dreambooth_lora_flux.py": Script("flow", {**_LORA, **_FLOW}, JOINT),
    "train_dreambooth_lora_sd15_advanced.py": Script(
        "table", {**_LORA, "resolution": 512}, ATTENTION, one_decay=True
    ),
    "train_dreambooth_lora_sdxl_advanced.py": Script(
        "table", {**_LORA, "resolution": 1024}, ATTENTION, one_decay=True
    ),
    "train_dreambooth_lora_flux_advanced.py": Script(
        "flow", {**_LORA, **_FLOW, "enable_t5_ti": False}, JOINT
    ),
    "train_dreambooth_lora_flux2_klein.py": Script(
        "flow",
        {
            **{name: value for name, value in _LORA.items() if name != "text_encoder_lr"},
            **{name: value for name, value in _FLOW.items() if name != "guidance_scale"},
            **{"lora_alpha": _ALPHA, "text_encoder_out_layers": klein.OWN_LAYERS},
        },
        klein.TARGETS,
        rows=klein.ROWS,
        is_long=False,
        remarks=klein.REMARKS,
    ),
}
_GUIDED = f"trains on pairs of pictures: {reasons.GUIDES}"
# Scripts whose names are near, and why they are not read.
OTHERS: Mapping[str, str] = {
    "train_dreambooth_lora_flux2.py": "trains FLUX.2 [dev]: of FLUX.2, [klein] trains here",
    **dict.fromkeys(
        (
            "train_dreambooth_lora_flux2_img2img.py",
            "train_dreambooth_lora_flux2_klein_img2img.py",
            "train_dreambooth_lora_flux2_klein_kv_img2img.py",
            "train_dreambooth_lora_flux_kontext.py",
        ),
        _GUIDED,
    ),
}


def speaks(document: Document) -> bool:
    """Whether a document is the command line of one of these scripts."""
    return document.form == "command" and document.script in SCRIPTS


def read(documents: Sequence[Document]) -> Desk:
    """Makes the desk of an import from one command line.

    Raises:
        InputError: there are several, or it runs another script.
    """
    if len(documents) != 1 or documents[0].form != "command":
        message = "got something else than one command line"
        raise InputError.of("FILE", message, "give a shell file, or the command in quotes")
    document = documents[0]
    script = SCRIPTS.get(document.script)
    if script is None:
        message = f"got `{document.script}`; allowed: {', '.join(SCRIPTS)}"
        raise InputError.of("script", message, nearest(document.script, SCRIPTS))
    given = {n: v for n, v in document.content.items() if v not in ("", [])}
    refuse_several(document, TABLE, _LISTS)
    launcher = launcher_of(document)
    defaults = dict(script.defaults)
    if not launcher.is_precision_open and "mixed_precision" not in launcher.options:
        defaults["mixed_precision"] = "no"
    if script.kind == "flow":
        del defaults["snr_gamma"]
    desk = Desk(given, defaults, script.kind)
    _say_unset(desk)
    desk.lengths = _lengths(desk, script, launcher.processes or 1)
    desk.run({**TABLE, **script.rows})
    desk.remarks += script.remarks
    _take_form(desk, document.script, script)
    if script.one_decay and "adam_weight_decay_text_encoder" not in given and text_learns(desk):
        decay = desk.setting("adam_weight_decay")
        desk.assume("adam_weight_decay", "adam_weight_decay_text_encoder", decay)
    desk.assume("masks", "use_given_masks", False)
    if script.kind == "flow":
        desk.assume("shift of times", "timestep_shift", 1.0)
    _say(desk)
    if launcher.is_precision_open and "mixed_precision" not in given:
        desk.remarks.append(_OPEN_PRECISION)
    if launcher.processes is None and is_true(desk.setting("scale_lr")):
        desk.remarks.append(_ONE_PROCESS)
    tell_launcher(desk, launcher)
    return desk


def _say_unset(desk: Desk) -> None:
    """A remark on variables that the file does not set."""
    given = {n: v for n, v in desk.given.items() if not is_secret(n)}
    unset = [n for n, v in given.items() if isinstance(v, str) and UNSET.match(v)]
    if unset:
        desk.remarks.append(f"Set elsewhere, to be filled in: {', '.join(unset)}.")


def _lengths(desk: Desk, script: Script, processes: int) -> Lengths:
    place = desk.given.get("instance_data_dir") or desk.given.get("dataset_name")
    found = folders.count(str(place)) if place else None
    repeats = desk.whole("repeats") if "repeats" in desk.given else 1
    batch = desk.whole("train_batch_size")
    accumulated = desk.whole("gradient_accumulation_steps") if _accumulates(desk) else 1
    with_class = script.is_long and "with_prior_preservation" in desk.given
    examples = None if found is None else found * max(1, repeats)
    return Lengths(
        examples=_in_epoch(desk, examples) if with_class and examples is not None else examples,
        batch=max(1, batch) * max(1, accumulated),
        repeats=max(1, repeats),
        with_class=with_class,
        processes=processes,
    )


def _accumulates(desk: Desk) -> bool:
    return "gradient_accumulation_steps" in desk.given


def _in_epoch(desk: Desk, examples: int) -> int:
    """An epoch there is as long as the longer of the pictures and the class pictures."""
    classes = desk.whole("num_class_images") if "num_class_images" in desk.given else 100
    return max(examples, classes)


def _take_form(desk: Desk, name: str, script: Script) -> None:
    """Which layers get an adapter, or that all weights are trained."""
    if not script.targets:
        desk.given = {**desk.given, "script": name}
        desk.take("script", "use_lora", False)
    elif "lora_layers" not in desk.given:
        desk.assume("layers", "target_unet_modules", list(script.targets))
    is_open = desk.setting("lora_alpha") is None and desk.values.get("rank") != _ALPHA
    if script.targets and is_open:
        desk.remarks.append(
            "Alpha is the rank; scripts that know --lora_alpha (2025 and later) take "
            f"{_ALPHA} where it is not given: for those add alpha: {_ALPHA}."
        )


def _say(desk: Desk) -> None:
    place = desk.given.get("instance_data_dir")
    if place is not None and folders.has_captions(str(place)):
        desk.remarks.append(
            f"Captions lie in {place}: the script gives every picture --instance_prompt, here they "
            "are read."
        )
