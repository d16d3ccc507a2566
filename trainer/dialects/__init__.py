"""The languages of hosted training services, one module each, found by name.

A dialect is the whole of one remote contract: the fields of its requests with their machine
defaults, their places in the configuration, and the shape of its results. What the contracts have
in common stands here.
"""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Protocol, TypeVar, cast

from pydantic import BaseModel, Field

from trainer.config import TrainingConfig
from trainer.contracts import Judged, faults_in
from trainer.errors import InputError, Problem
from trainer.job import Result, ResultFile, Role
from trainer.known_models import known_model, place_of
from trainer.leaves import nearest, shown
from trainer.locations import is_data_uri, shown_location
from trainer.picture_lists import is_picture_list
from trainer.resolve import Layer, resolve

# What `output_name` takes, see there.
_NOT_IN_NAME = re.compile(r"[^A-Za-z0-9._ -]+|^[^A-Za-z0-9]+")
_LONGEST_NAME = 100

# How names of archives end, and how their content begins in base64: zip, gzip, RAR, 7z.
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".rar", ".7z")
_PACKED = ("UEsD", "UEsF", "H4sI", "UmFy", "N3q8")

# What is trained: no default of a service may decide over it in silence.
_KIND = (
    *("model_url", "use_lora", "lora_type", "use_dora", "train_text_encoder"),
    *("train_text_encoder_ti", "concepts"),
)
# Where pictures are is said in each service's own way; a name of files trains nothing.
_SAID_OTHERWISE = ("images_data_url", "output_name")

# The type of a field that every answer has beside the service's own.
IGNORED = Annotated[
    dict[str, str] | None,
    Field(description="Options without an effect, with the reason; this project's own."),
]
Answer = TypeVar("Answer", bound=BaseModel)


class Dialect(Protocol):
    """What a dialect's module offers.

    Args:
        NAMES: each name it answers to, with the fields of a request that the name itself says.
        SERVICE: what messages call the service.
        RENAMED: field to leaf, where their names differ; one in a group as `group.field`.
        FIELDS: leaf to the field that errors and answers name in its place, see `named`.
        NOT_USED: field to the reason why it is not taken.
    """

    NAMES: Mapping[str, Mapping[str, Any]]
    SERVICE: str
    RENAMED: Mapping[str, str]
    FIELDS: Mapping[str, str]
    NOT_USED: Mapping[str, str]
    Input: type[BaseModel]
    Output: type[BaseModel]

    def to_layers(self, payload: Mapping[str, Any]) -> list[Layer]:
        """The service's defaults and the request's own fields, as layers for `resolve`."""

    def to_output(self, result: Result, url_for: Callable[[ResultFile], str]) -> BaseModel:
        """The service's answer for a finished run, see `described`."""

    def to_request(self, config: TrainingConfig) -> dict[str, Any]:
        """The request that asks the service for this configuration.

        Raises:
            InputError: a value that the service has no way to say.
        """


class File(BaseModel):
    """A file of a result, as fal describes it."""

    url: str
    content_type: str | None = None
    file_name: str | None = None
    file_size: int | None = None


class LoraFiles(BaseModel):
    """The files of a LoRA: where a service keeps its own, the names are this project's."""

    diffusers_lora_file: File | None = Field(None, description="The LoRA for diffusers.")
    kohya_lora_file: File | None = Field(None, description="The LoRA for kohya-style programs.")
    config_file: File = Field(description="The training configuration.")


# Field of an answer to the role of its file.
LORA_ROLES: Mapping[str, Role] = {
    "diffusers_lora_file": "diffusers_lora",
    "kohya_lora_file": "kohya_lora",
    "config_file": "config",
}


def dialect_names() -> dict[str, str]:
    """Every name a dialect answers to, with its module's name."""
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: module for module in modules for name in _import(module).NAMES}


def load_dialect(name: str) -> Dialect:
    """The dialect with this name.

    Raises:
        InputError: there is none.
    """
    known = dialect_names()
    if name not in known:
        message = f"got `{name}`; allowed: one of {', '.join(known)}"
        raise InputError.of("dialect", message, nearest(name, known))
    return _import(known[name])


def layers_of(name: str, payload: Mapping[str, Any]) -> list[Layer]:
    """A request to a service as layers for `resolve`, its base model by the owner's lists.

    Args:
        name: of the dialect.

    Raises:
        InputError: there is no such dialect, or a list of base models cannot be used.
    """
    dialect = load_dialect(name)
    defaults, request = dialect.to_layers({**payload, **dialect.NAMES[name]})
    request = replace(
        request,
        problems=[*_contradictions(name, dialect, payload), *request.problems],
        fields={**dialect.FIELDS, **request.fields},
    )
    return [with_known_model(layer, field_of(name, "model_url")) for layer in (defaults, request)]


def request_of(name: str, config: TrainingConfig) -> dict[str, Any]:
    """The request that asks a service for this training.

    What was set on purpose and changes the training must come back from the request, and so must
    base model and method, whoever set them. Other options that the service lacks stay out.

    Args:
        name: of the dialect.

    Raises:
        InputError: there is no such dialect, or it has no way to say a value.
    """
    dialect = load_dialect(name)
    request, said = dialect.to_request(config), dialect.NAMES[name]
    others = [field for field, value in said.items() if request[field] != value]
    if others:
        message = f"got {shown(request[others[0]])}; allowed for `{name}`: {said[others[0]]}"
        raise InputError.of(others[0], message, "choose another name of the dialect")
    request = {field: value for field, value in request.items() if field not in said}
    problems = [*_lost(config, resolve(layers_of(name, request)), dialect.SERVICE)]
    if problems:
        raise InputError(problems)
    return request


def field_of(name: str, leaf: str) -> str:
    """What a service calls an option, or a part of one; its own name where it has no other."""
    return _in_fields(load_dialect(name).FIELDS, leaf)


def named(renamed: Mapping[str, str], others: Mapping[str, str]) -> dict[str, str]:
    """Leaf to the field that errors and answers name in its place.

    Args:
        renamed: field to leaf; the first of several fields names the leaf.
        others: leaf to the field that decides over it, too.
    """
    first = {leaf: field for field, leaf in reversed([*renamed.items()])}
    return {**first, **others}


def two_layers(
    service: str,
    defaults: Mapping[str, Any],
    request: Layer,
    judgement: Judged,
    renamed: Mapping[str, str],
) -> list[Layer]:
    """The layers of a service's defaults and of a request to it.

    Args:
        request: with its values, and with notes and problems beyond those of the judgement.
        renamed: field to leaf.
    """
    return [
        Layer(f"{service} defaults", defaults, explicit=False),
        replace(
            request,
            notes=[*judgement.notes, *request.notes],
            problems=[*judgement.problems, *request.problems],
            # So that nothing else is said of them.
            wrong={renamed.get(field, field) for field in judgement.refused} | {*request.wrong},
        ),
    ]


def is_base(model_url: str, name: str) -> bool:
    """Whether this is the base model of that name, or where the owner's lists have it."""
    return model_url in (name, place_of(name))


def sayable(
    request: dict[str, Any],
    model: type[BaseModel],
    service: str,
    *,
    words: Mapping[str, str],
    leaf_of: Callable[[str], str],
    problems: Sequence[Problem] = (),
) -> dict[str, Any]:
    """A request as it is, if the service takes it.

    Args:
        request: as it would be sent.
        model: the service's request.
        words: field to what it may hold, where the schema does not say it well.
        leaf_of: gives the option that a field comes from.
        problems: found before.

    Raises:
        InputError: with these problems, and with every value that the service does not take.
    """
    told = {problem.field for problem in problems}
    unsaid = [
        Problem(
            leaf_of(fault.field),
            f"got {shown(fault.value)}, which {service} does not take; allowed: {fault.allowed}",
        )
        for fault in faults_in(request, model, words)
    ]
    found = [*problems, *(problem for problem in unsaid if problem.field not in told)]
    if found:
        raise InputError(found)
    return request


def only_one_subject(config: TrainingConfig, service: str) -> list[Problem]:
    """Problems of a configuration that teaches several things to a service that teaches one."""
    unknown = {
        "concepts": config.values()["concepts"],
        "token_abstraction": config.token.token_abstraction[1:],
    }
    return [
        Problem(leaf, f"got {shown(config.leaf(leaf))}, which {service} does not take", "train one")
        for leaf, value in unknown.items()
        if value
    ]


def only_listed(config: TrainingConfig, service: str) -> list[Problem]:
    """The problem of a folder or archive for a service that takes pictures one by one."""
    images = config.data.images_data_url
    if images is None or is_picture_list(images):
        return []
    if not _is_folder(images) and not is_archive(images):
        return []
    message = f"got `{shown_location(images)}`, which {service} does not take; allowed: pictures "
    return [Problem("images_data_url", message + "one by one, as its requests list them")]


def archives_among(locations: Sequence[str], field: str) -> Iterator[Problem]:
    """Problems of archives in a list of pictures.

    Args:
        field: with `{}` for the place in the list.
    """
    for place, location in enumerate(locations):
        if is_archive(location):
            message = f"got the archive `{shown_location(location)}`; allowed: one picture"
            yield Problem(field.format(place), message, "unpack it and list its pictures")


def is_archive(location: str) -> bool:
    """Whether a location says of itself that it is an archive, by its name or first bytes."""
    header, _, content = location[:_LONGEST_NAME].partition(",")
    if is_data_uri(location):
        return "zip" in header or "tar" in header or content.startswith(_PACKED)
    if location.startswith(_PACKED):
        return True
    path = re.split(r"[?#]", location, maxsplit=1)[0] if "://" in location[:10] else location
    return PurePosixPath(path[-_LONGEST_NAME:]).suffix.lower() in _ARCHIVES


def only_these(config: TrainingConfig, values: Mapping[str, Any], service: str) -> list[Problem]:
    """Problems of options that a service has one value of alone.

    Args:
        values: leaf to that value.
    """
    return [
        _other_value(leaf, config.leaf(leaf), value, service)
        for leaf, value in values.items()
        if config.leaf(leaf) != value
    ]


def only_base(config: TrainingConfig, name: str, service: str) -> list[Problem]:
    """The problem of another base model than the one that a service has."""
    model = config.model.model_url
    return [] if is_base(model, name) else [_other_value("model_url", model, name, service)]


def file_name_of(text: str) -> str:
    """A text as the name of files; empty where no letter of it can be in one."""
    return _NOT_IN_NAME.sub("-", text).strip("-. ")[:_LONGEST_NAME]


def described(
    result: Result,
    roles: Mapping[str, Role],
    url_for: Callable[[ResultFile], str],
    fields: Mapping[str, str],
) -> dict[str, Any]:
    """The fields of an answer that come from a finished run: files by role, ignored options.

    Of these, what the request itself has and what was set on purpose.

    Args:
        roles: field to the role of its file.
        url_for: the address under which a result file can be fetched.
        fields: leaf to what the service calls it.

    Raises:
        ValueError: the run delivered no configuration, so it did not finish.
    """
    if result.file("config") is None:
        raise ValueError(f"a run that ended as {result.status} has no answer")
    files = {field: result.file(role) for field, role in roles.items()}
    answer: dict[str, Any] = {
        field: {
            "url": url_for(file),
            "content_type": file.content_type,
            "file_name": file.path.rsplit("/", maxsplit=1)[-1],
            "file_size": file.size,
        }
        for field, file in files.items()
        if file is not None
    }
    ignored = {
        _in_fields(fields, name): why
        for name, why in result.ignored_options.items()
        if name.startswith("request.") or _head(name) in result.explicit
    }
    return answer | {"ignored_options": ignored or None}


def _contradictions(name: str, dialect: Dialect, payload: Mapping[str, Any]) -> Iterator[Problem]:
    """Problems of fields that the name of the dialect says, and the request says otherwise."""
    for field, value in dialect.NAMES[name].items():
        if payload.get(field) not in (None, value):
            message = f"got {shown(payload[field])} (in request); allowed for `{name}`: {value}"
            others = [n for n, said in dialect.NAMES.items() if said.get(field) == payload[field]]
            # A name of the same kind: with the owner in it, or without.
            others.sort(key=lambda other: ("/" in other) != ("/" in name))
            hint = f"leave it out, or ask `{others[0]}`" if others else "leave it out"
            yield Problem(field, message, hint)


def _lost(config: TrainingConfig, asked: TrainingConfig, service: str) -> Iterator[Problem]:
    """Problems of options that matter and that a request does not say.

    Args:
        asked: the configuration that the request means.
    """
    without_effect: Collection[str] = config.resolved.ignored_options
    for leaf, value in config.result_values().items():
        matters = leaf in _KIND or (config.is_explicit(leaf) and leaf not in without_effect)
        if not matters or leaf in _SAID_OTHERWISE:
            continue
        back = asked.values()[leaf]
        is_same = is_base(back, value) if leaf == "model_url" else back == value
        if not is_same:
            yield _other_value(leaf, value, back, service)


def _other_value(leaf: str, value: Any, allowed: Any, service: str) -> Problem:
    message = f"got {shown(value)}, which {service} does not take; allowed: {shown(allowed)}"
    return Problem(leaf, message)


def with_known_model(layer: Layer, field: str) -> Layer:
    """A layer in which a base model by name is the place that it stands for.

    Args:
        field: what the request calls `model_url`.
    """
    name = layer.values.get("model_url")
    known = known_model(name) if isinstance(name, str) else None
    if known is None:
        return layer
    if "model_url" not in known.options:
        return replace(layer, problems=[*layer.problems, known.problem(field)])
    return replace(layer, values={**layer.values, **known.options})


def _in_fields(fields: Mapping[str, str], leaf: str) -> str:
    return fields.get(_head(leaf), leaf)


def _head(leaf: str) -> str:
    """The leaf of a part of one: `concepts` of `concepts[1].class_prompt`."""
    return re.split(r"[.\[]", leaf, maxsplit=1)[0]


def _is_folder(location: str) -> bool:
    try:
        return Path(location).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):
        # No path at all: base64 is longer than any, and a list has its own signs.
        return False


def _import(module: str) -> Dialect:
    return cast(Dialect, import_module(f"{__name__}.{module}"))
