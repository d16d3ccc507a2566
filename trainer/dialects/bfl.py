"""BFL's finetuning, POST /v1/finetune: its request, its defaults, and its answer.

From the FLUX Finetuning Beta Guide. Where the page is silent (number formats, optimizer, batch
size) stands what this program needs for the same on one GPU.
"""

from __future__ import annotations

import base64
import binascii
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer.config import Note, TrainingConfig
from trainer.dialects import left_aside
from trainer.errors import InputError, Problem
from trainer.job import Result, ResultFile, Role
from trainer.leaves import in_words, shown
from trainer.resolve import Layer

NAMES = ("bfl", "black-forest-labs")
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
NOT_USED: Mapping[str, str] = {}
_EXTRACTED = {"lora_rank": "extract_rank"}

# The page recommends for `lora` values ten times those for `full`.
FULL_RATE, LORA_RATE = 1e-5, 1e-4
# The trigger is a word of the captions, not a new token.
_ALWAYS: Mapping[str, Any] = {
    "model_url": "black-forest-labs/FLUX.1-dev",
    "train_text_encoder_ti": False,
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
# What `output_name` takes, see there.
_NOT_IN_NAME = re.compile(r"[^A-Za-z0-9._ -]+|^[^A-Za-z0-9]+")
_LONGEST_NAME = 100


class Input(BaseModel):
    """A finetuning request."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    file_data: str = Field(min_length=1, description="Zip archive of the pictures, in base64.")
    finetune_comment: str = Field(description="What the finetune is called in lists.")
    trigger_word: str = Field(
        "TOK", min_length=1, description="Word or phrase for the concept in the captions."
    )
    mode: Literal["character", "product", "style", "general"] = Field(
        description="What captions tell, by the concept."
    )
    iterations: int = Field(300, ge=100, description="Training steps.")
    learning_rate: float | None = Field(
        None, gt=0, description="Learning rate. None: 1e-5 for full, 1e-4 for lora."
    )
    captioning: bool = Field(True, description="Write captions for pictures without one.")
    priority: Literal["speed", "quality", "high_res_only"] = Field(
        "quality", description="Speed of a step against its resolution."
    )
    lora_rank: Literal[16, 32] = Field(32, description="Rank of the LoRA.")
    finetune_type: Literal["full", "lora"] = Field(
        "full", description="All weights with a LoRA taken from their change, or a LoRA."
    )


class File(BaseModel):
    """A file of the result."""

    url: str
    content_type: str
    file_name: str
    file_size: int


class Finetune(BaseModel):
    """The files of a finetune: the service keeps its own, and the names are this project's."""

    diffusers_lora_file: File | None = Field(None, description="The LoRA for diffusers.")
    kohya_lora_file: File | None = Field(None, description="The LoRA for kohya-style programs.")
    config_file: File = Field(description="The training configuration.")


class Output(BaseModel):
    """What /v1/get_result answers for a finetune that is done."""

    id: str | None = Field(None, description="Of the finetune, where a server gives it one.")
    status: Literal["Ready"] = "Ready"
    result: Finetune
    progress: float | None = None


OUTPUT_ROLES: Mapping[str, Role] = {
    "diffusers_lora_file": "diffusers_lora",
    "kohya_lora_file": "kohya_lora",
    "config_file": "config",
}


def to_layers(payload: Mapping[str, Any]) -> list[Layer]:
    """The service's defaults for this kind of finetune, then the request's own fields.

    What the service would refuse becomes a problem of the request: a missing field, a value
    outside of its range, too many pictures or none.
    """
    fields = Input.model_fields
    missing = [
        Problem(name, f"is missing, and {SERVICE} requires it; allowed: {_allowed(name)}")
        for name, info in fields.items()
        if info.is_required() and payload.get(name) is None
    ]
    given = {n: value for n, value in payload.items() if n in fields and value is not None}
    problems = {
        name: Problem(name, f"got {shown(given[name])} (in request); allowed: {_allowed(name)}")
        for name in _refused(given)
        if name in given
    }
    archive = given.get("file_data")
    names = _names_in(archive) if isinstance(archive, str) else None
    if names is not None and (problem := _problem_of_archive(names)):
        problems["file_data"] = problem
    given = {name: value for name, value in given.items() if name not in problems}
    if "file_data" not in given:
        # So that nothing else is said of pictures that are refused already.
        given["file_data"] = SERVICE
    filled = {name: info.default for name, info in fields.items() if not info.is_required()} | given
    kind = filled["finetune_type"]
    defaults = {n: v for n, v in filled.items() if n not in given and v is not None}
    notes = [*left_aside(payload, Input, NOT_USED, SERVICE), *_unexpected(names or ())]
    if kind == "lora" and given.get("learning_rate") == FULL_RATE:
        message = f"{shown(FULL_RATE)} is the rate for `full`; ten times as much is recommended "
        message += f"for `lora`, {shown(LORA_RATE)}"
        notes.append(Note(kind="warning", field="request.learning_rate", message=message))
    own = {**_ALWAYS, **_BY_TYPE[kind], "instance_prompt": filled["trigger_word"]}
    return [
        Layer(f"{SERVICE} defaults", {**own, **_placed(defaults, kind)}, explicit=False),
        Layer(
            "request",
            _placed(given, kind),
            explicit=True,
            notes=notes,
            problems=[*missing, *problems.values()],
        ),
    ]


def to_output(result: Result, url_for: Callable[[ResultFile], str]) -> Output:
    """The service's answer for a finished run.

    Args:
        url_for: the address under which a result file can be fetched.

    Raises:
        ValueError: the run delivered no configuration, so it did not finish.
    """
    files = {field: result.file(role) for field, role in OUTPUT_ROLES.items()}
    if files["config_file"] is None:
        raise ValueError(f"a run that ended as {result.status} has no answer")
    described = {
        field: File(
            url=url_for(file),
            content_type=file.content_type,
            file_name=file.path.rsplit("/", maxsplit=1)[-1],
            file_size=file.size,
        )
        for field, file in files.items()
        if file is not None
    }
    return Output(result=Finetune.model_validate(described))


def to_request(config: TrainingConfig) -> dict[str, Any]:
    """The request for the same training; options of ours that the service lacks stay out.

    Raises:
        InputError: a value that the service has no way to say.
    """
    values = config.values()
    trigger, *more = config.token.token_abstraction
    unsayable = {"concepts": values["concepts"], "token_abstraction": more}
    problems = [
        Problem(leaf, f"got {shown(values[leaf])}, which {SERVICE} does not take", "train one")
        for leaf, value in unsayable.items()
        if value
    ]
    kind = "lora" if config.adapter.use_lora else "full"
    request = {
        "file_data": values["images_data_url"],
        "finetune_comment": values["output_name"],
        "trigger_word": trigger,
        # Both tell all that is seen.
        "mode": "general" if values["caption_mode"] == "plain" else values["caption_mode"],
        "iterations": values["max_train_steps"],
        "learning_rate": values["learning_rate"],
        "captioning": not values["skip_caption_generation"],
        "priority": values["priority"],
        "lora_rank": values[_leaf("lora_rank", kind)],
        "finetune_type": kind,
    }
    message = f"got {{}}, which {SERVICE} does not take; allowed: {{}}"
    problems += [
        Problem(_leaf(name, kind), message.format(shown(request[name]), _allowed(name)))
        for name in _refused(request)
    ]
    if problems:
        raise InputError(problems)
    return request


def _leaf(name: str, kind: str) -> str:
    """The leaf of a field in a finetune of this kind."""
    leaves = {**RENAMED, **(_EXTRACTED if kind == "full" else {})}
    return leaves.get(name, name)


def _placed(fields: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return {
        _leaf(name, kind): _READ_AS[name](value) if name in _READ_AS else value
        for name, value in fields.items()
        if name not in NOT_USED and (name != "finetune_comment" or _name_of(value))
    }


def _name_of(comment: str) -> str:
    """A comment as the name of files; empty where no letter of it can be in one."""
    return _NOT_IN_NAME.sub("-", comment).strip("-. ")[:_LONGEST_NAME]


# What a field's value is in its leaf, where that differs.
_READ_AS: Mapping[str, Callable[[Any], Any]] = {
    "finetune_comment": _name_of,
    # A phrase may hold a comma, which parts names in a text.
    "trigger_word": lambda word: [word],
    "captioning": lambda wanted: not wanted,
    "finetune_type": lambda kind: kind == "lora",
}


def _allowed(name: str) -> str:
    """What a field may hold, in words."""
    if name == "file_data":
        return _ARCHIVE
    return in_words(Input.model_json_schema()["properties"][name]).removesuffix(", or null")


def _refused(request: Mapping[str, Any]) -> list[str]:
    """The fields of a request that the service does not take as they are, each once."""
    try:
        Input.model_validate(request)
    except ValidationError as error:
        return list(dict.fromkeys(str(detail["loc"][0]) for detail in error.errors()))
    return []


def _problem_of_archive(names: Sequence[str]) -> Problem | None:
    """What the service would refuse of the files in an archive."""
    pictures, others = _with_suffix(names, _PICTURES), _with_suffix(names, _OTHER_PICTURES)
    message = "the archive holds {}; allowed: " + _ARCHIVE
    if others:
        return Problem("file_data", message.format(f"`{others[0]}`"), "convert or remove it")
    if _FEWEST_PICTURES <= len(pictures) <= _MOST_PICTURES:
        return None
    return Problem("file_data", message.format(f"{len(pictures)} pictures"), "pack it anew")


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
        with zipfile.ZipFile(BytesIO(content)) as archive:
            names = archive.namelist()
    except (binascii.Error, zipfile.BadZipFile):
        return None
    return [name for name in names if not name.endswith("/") and not _is_of_system(name)]


def _is_of_system(name: str) -> bool:
    parts = PurePosixPath(name).parts
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return hidden or parts[-1].lower() in _SYSTEM_FILES
