"""BFL's finetuning, POST /v1/finetune: its request, its defaults, and its answer.

From the FLUX Finetuning Beta Guide. Where the page is silent (number formats, optimizer, batch
size) stands what this program needs for the same on one GPU.
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from trainer import dialects
from trainer.config import Note, TrainingConfig
from trainer.contracts import judged
from trainer.errors import InputError, Problem
from trainer.job import Result, ResultFile
from trainer.leaves import shown
from trainer.locations import content_of, is_data_uri, is_gathered, shown_location
from trainer.resolve import Layer

NAMES: Mapping[str, Mapping[str, Any]] = {"bfl": {}, "black-forest-labs": {}}
SERVICE = "BFL's finetuning"

# Service field to leaf, and service field to the reason why it is not taken. Everything else is
# placed by its name. The rank of a `full` finetune is that of the LoRA taken from it afterwards.
RENAMED: Mapping[str, str] = {
    "file_data": "images_data_url",
    "finetune_comment": "output_name",
    "trigger_word": "token_abstraction",
    "mode": "caption_mode",
    "iterations": "max_train_steps",
    "captioning": "skip_caption_generation",
    "lora_rank": "rank",
    "finetune_type": "use_lora",
}
FIELDS = dialects.named(RENAMED, {"extract_rank": "lora_rank", "instance_prompt": "trigger_word"})
NOT_USED: Mapping[str, str] = {}
_EXTRACTED = {"lora_rank": "extract_rank"}

# The page recommends for `lora` values ten times those for `full`.
FULL_RATE, LORA_RATE = 1e-5, 1e-4
BASE = "black-forest-labs/FLUX.1-dev"
# The trigger is a word of the captions, not a new token.
_ONLY: Mapping[str, Any] = {
    "train_text_encoder_ti": False,
    "train_text_encoder": False,
    "lora_type": "lora",
    "use_dora": False,
}
# Twelve billion weights with their updates on one GPU of 80 GB.
_BY_TYPE: Mapping[str, Mapping[str, Any]] = {
    "lora": {"learning_rate": LORA_RATE},
    "full": {
        "learning_rate": FULL_RATE,
        "optimizer": "adafactor",
        "weights_dtype": "bf16",
        "fused_backward": True,
        "max_grad_norm": 0.0,
        "mixed_precision": "bf16",
        "gradient_checkpointing": True,
    },
}

_PICTURES = (".jpg", ".jpeg", ".png", ".webp")
_OTHER_PICTURES = (
    *(".jpe", ".jfif", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jp2"),
    *(".jxl", ".psd", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw"),
)
# Files that a message names.
_SHOWN = 3
_FEWEST_PICTURES, _MOST_PICTURES = 1, 20
_SYSTEM_FILES = ("thumbs.db", "desktop.ini")
_ARCHIVE = (
    "a zip archive in base64 of 1 to 20 pictures (.jpg, .jpeg, .png, .webp) and .txt captions"
)
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_ZIP = b"PK"
# How an entry of an archive's list begins (APPNOTE 4.3.12), and how many there may be.
_ENTRY = b"PK\x01\x02"
_MOST_FILES = 5000
# What Python's reader raises of damaged lists.
_DAMAGE = (
    *(binascii.Error, zipfile.BadZipFile, struct.error),
    *(NotImplementedError, OSError, ValueError, LookupError, EOFError),
)
_IMAGES = "images_data_url"
_WORDS = {"file_data": _ARCHIVE, "trigger_word": "text, not blank"}
# The date of every file in an archive made here, so that a folder always gives the same one.
_DATE = (1980, 1, 1, 0, 0, 0)


class Input(BaseModel):
    """A finetuning request."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    file_data: str = Field(min_length=1, description="Zip archive of the pictures, in base64.")
    finetune_comment: str = Field(description="What the finetune is called in lists.")
    trigger_word: str = Field(
        "TOK", pattern=r"\S", description="Word or phrase for the concept in the captions."
    )
    mode: Literal["character", "product", "style", "general"] = Field(
        description="What captions tell, by the concept."
    )
    iterations: int = Field(300, ge=100, le=1000, description="Training steps.")
    learning_rate: float | None = Field(
        None, ge=1e-6, le=5e-3, description="Learning rate. None: 1e-5 for full, 1e-4 for lora."
    )
    captioning: bool = Field(True, description="Write captions for pictures without one.")
    priority: Literal["speed", "quality", "high_res_only"] = Field(
        "quality", description="Speed of a step against its resolution."
    )
    lora_rank: Literal[16, 32] = Field(32, description="Rank of the LoRA.")
    finetune_type: Literal["full", "lora"] = Field(
        "full", description="All weights with a LoRA taken from their change, or a LoRA."
    )


class Output(BaseModel):
    """What /v1/get_result answers for a finetune that is done."""

    id: str | None = Field(None, description="Of the finetune, where a server gives it one.")
    status: Literal["Ready"] = "Ready"
    result: dialects.LoraFiles
    progress: float | None = None
    ignored_options: dialects.IGNORED = None


def to_layers(payload: Mapping[str, Any]) -> list[Layer]:
    """The service's defaults for this kind of finetune, then the request's own fields.

    What the service would refuse becomes a problem of the request: a missing field, a value
    outside of its range, too many pictures or none.
    """
    found = judged(payload, Input, SERVICE, words=_WORDS, not_used=NOT_USED)
    given = dict(found.given)
    names = _names_in(given.get("file_data", ""))
    problems = [*_problems_of_archive(names)]
    if problems:
        del given["file_data"]
    defaults = {n: v for n, v in found.defaults.items() if v is not None}
    filled = {**defaults, **given}
    kind = filled["finetune_type"]
    notes = _unexpected(names or ())
    if kind == "lora" and given.get("learning_rate") == FULL_RATE:
        message = f"{shown(FULL_RATE)} is the rate for `full`; ten times as much is recommended "
        message += f"for `lora`, {shown(LORA_RATE)}"
        notes.append(Note(kind="warning", field="request.learning_rate", message=message))
    own = {"model_url": BASE, **_ONLY, **_BY_TYPE[kind], "instance_prompt": filled["trigger_word"]}
    request = Layer(
        "request",
        _placed(given, kind),
        explicit=True,
        notes=notes,
        problems=problems,
        wrong=["images_data_url"] if problems else [],
    )
    return dialects.two_layers(SERVICE, {**own, **_placed(defaults, kind)}, request, found, RENAMED)


def to_output(result: Result, url_for: Callable[[ResultFile], str]) -> Output:
    """The service's answer for a finished run."""
    answer = dialects.described(result, dialects.LORA_ROLES, url_for, FIELDS)
    ignored = answer.pop("ignored_options")
    files = dialects.LoraFiles.model_validate(answer)
    return Output(result=files, ignored_options=ignored)


def to_request(config: TrainingConfig) -> dict[str, Any]:
    """The request for the same training, see `Dialect`; its pictures are read and packed."""
    values = config.values()
    kind = "lora" if config.adapter.use_lora else "full"
    problems = dialects.only_one_subject(config, SERVICE)
    problems += dialects.only_these(config, _ONLY, SERVICE)
    problems += dialects.only_base(config, BASE, SERVICE)
    request = {
        "file_data": values["images_data_url"],
        "finetune_comment": values["output_name"],
        "trigger_word": config.token.token_abstraction[0],
        # Both tell all that is seen.
        "mode": "general" if values["caption_mode"] == "plain" else values["caption_mode"],
        "iterations": values["max_train_steps"],
        "learning_rate": values["learning_rate"],
        "captioning": not values["skip_caption_generation"],
        "priority": values["priority"],
        "lora_rank": values[_leaf("lora_rank", kind)],
        "finetune_type": kind,
    }
    if isinstance(request["file_data"], str):
        try:
            request["file_data"] = _packed(request["file_data"])
            problems += _problems_of_archive(_names_in(request["file_data"]), "images_data_url")
        except InputError as error:
            problems += error.problems
    return dialects.sayable(
        request,
        Input,
        SERVICE,
        words=_WORDS,
        leaf_of=lambda name: _leaf(name, kind),
        problems=problems,
    )


def _leaf(name: str, kind: str) -> str:
    """The leaf of a field in a finetune of this kind."""
    leaves = {**RENAMED, **(_EXTRACTED if kind == "full" else {})}
    return leaves.get(name, name)


def _placed(fields: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return {
        _leaf(name, kind): _READ_AS[name](value) if name in _READ_AS else value
        for name, value in fields.items()
        if name not in NOT_USED and (name != "finetune_comment" or dialects.file_name_of(value))
    }


# What a field's value is in its leaf, where that differs.
_READ_AS: Mapping[str, Callable[[Any], Any]] = {
    "finetune_comment": dialects.file_name_of,
    # A phrase may hold a comma, which parts names in a text.
    "trigger_word": lambda word: [word],
    "captioning": lambda wanted: not wanted,
    "finetune_type": lambda kind: kind == "lora",
}


def _problems_of_archive(names: Sequence[str] | None, field: str = "file_data") -> list[Problem]:
    """What the service would refuse of the files in an archive."""
    if names is None:
        return []
    pictures, others = _with_suffix(names, _PICTURES), _with_suffix(names, _OTHER_PICTURES)
    message = "the archive holds {}; allowed: " + _ARCHIVE
    if others:
        return [Problem(field, message.format(f"`{others[0]}`"), "convert or remove it")]
    if _FEWEST_PICTURES <= len(pictures) <= _MOST_PICTURES:
        return []
    return [Problem(field, message.format(f"{len(pictures)} pictures"), "pack it anew")]


def _unexpected(names: Sequence[str]) -> list[Note]:
    """A note on the files in an archive that are neither pictures nor captions, if there are any.

    The service's page does not say what becomes of them.
    """
    expected = set(_with_suffix(names, (*_PICTURES, *_OTHER_PICTURES, ".txt")))
    others = [name for name in names if name not in expected]
    if not others:
        return []
    more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
    shown_names = ", ".join(f"`{name}`" for name in others[:_SHOWN])
    message = f"{SERVICE} has no use for {shown_names}{more}, neither pictures nor .txt captions"
    return [Note(kind="warning", field="request.file_data", message=message)]


def _with_suffix(names: Sequence[str], suffixes: Sequence[str]) -> list[str]:
    return [name for name in names if PurePosixPath(name).suffix.lower() in suffixes]


def _names_in(file_data: str) -> Sequence[str] | None:
    """The files in a zip archive, without those of operating systems; nothing for anything else.

    That is a place as `images_data_url` has it, and judged where it is read.
    """
    text = file_data.partition(",")[2] if file_data[:5].lower() == "data:" else file_data
    if _BASE64.fullmatch(text) is None:
        return None
    try:
        content = base64.b64decode(text)
        if not content.startswith(_ZIP):
            return None
        # Counted in the bytes: what the archive says of itself may be false, and Python's reader
        # takes seconds for a list of many.
        if content.count(_ENTRY) > _MOST_FILES:
            message = f"the archive holds more than {_MOST_FILES} files; allowed: {_ARCHIVE}"
            raise InputError.of("file_data", message, "pack it anew")
        with zipfile.ZipFile(BytesIO(content)) as archive:
            names = archive.namelist()
    except _DAMAGE:
        return None
    return [name for name in names if not name.endswith("/") and not _is_of_system(name)]


def _packed(location: str) -> str:
    """The pictures at a location as the service takes them: a zip archive in base64.

    Raises:
        InputError: they are elsewhere, are no zip archive and no folder, or cannot be read.
    """
    if is_gathered(location):
        hint = "download them, and give their folder or archive"
        raise _no_archive(location, hint)
    if _names_in(location) is not None and not is_data_uri(location):
        return location
    try:
        content = content_of(location, _IMAGES) if is_data_uri(location) else _read(location)
    except (OSError, RuntimeError, ValueError) as error:
        hint = "give a folder of pictures, or a .zip archive of them"
        raise _no_archive(location, hint) from error
    if not content.startswith(_ZIP):
        raise _no_archive(location, "pack the pictures as .zip")
    return base64.b64encode(content).decode()


def _no_archive(location: str, hint: str) -> InputError:
    message = (
        f"got `{shown_location(location)}`, which {SERVICE} does not take; allowed: {_ARCHIVE}"
    )
    return InputError.of(_IMAGES, message, hint)


def _read(location: str) -> bytes:
    """An archive's bytes, or a folder as an archive: its pictures and captions.

    Raises:
        OSError: there is no such thing.
    """
    path = Path(location).expanduser()
    if not path.is_dir():
        return path.read_bytes()
    inside = sorted(file for file in path.rglob("*") if file.is_file())
    names = [file.relative_to(path).as_posix() for file in inside]
    wanted = _with_suffix(names, (*_PICTURES, *_OTHER_PICTURES, ".txt"))
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name in wanted:
            if not _is_of_system(name):
                archive.writestr(zipfile.ZipInfo(name, _DATE), (path / name).read_bytes())
    return packed.getvalue()


def _is_of_system(name: str) -> bool:
    parts = PurePosixPath(name).parts
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return hidden or not parts or parts[-1].lower() in _SYSTEM_FILES
