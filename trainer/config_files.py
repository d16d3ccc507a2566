"""Configuration files: YAML 1.2 and JSON in, the resolved configuration out.

Knows the shape of files, not what options mean. Values are passed on as they stand; whether
they are right is decided in `trainer.resolve`.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Hashable, Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from trainer.config import LEAVES, SECTIONS, Note, Resolution, TrainingConfig
from trainer.errors import InputError, Problem
from trainer.leaves import CONTENTS, FILE_KEYS, PLACES, shown
from trainer.locations import is_web_address
from trainer.network import without_keys
from trainer.resolve import Layer

_REASONS = TypeAdapter(dict[str, str])
_FIX_SYNTAX = "correct the file, then run the same command again"

# What is longer than any path is a content.
_LONGEST_PATH = 4096
_DIGEST = re.compile(r"data:sha256,[0-9a-f]{64}")

# Stands for a text, see `_new_mark`.
_MARK = re.compile(r"content-[0-9a-f]{32}")
# What may begin a line of YAML that gives one name its value, and values that need no quotes.
_NAME = re.compile(r"[ \t-]*[A-Za-z_]+: +")
_PLAIN = re.compile(r"(?:data:[A-Za-z0-9+./;=-]*,)?[A-Za-z0-9+/]+={0,2}")

# The core schema of YAML 1.2.2, section 10.3.2. PyYAML speaks YAML 1.1, where 1e-4 is text,
# no is false and 1:30 is ninety.
_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_BOOLEAN = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INTEGER = re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_SCALARS = (
    ("tag:yaml.org,2002:null", _NULL, ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", _BOOLEAN, list("tTfF")),
    ("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789")),
    ("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789")),
)


def _new_mark() -> str:
    """A word that nobody can have written anywhere."""
    return f"content-{secrets.token_hex(16)}"


class _LongTexts:
    """Texts that are taken out of YAML: PyYAML reads only a few megabytes in a second.

    Marks stand in their place. Where a mark is not a value by itself, what looked like a name with
    its value was a line of another text: there the line is put back as it was.
    """

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._raw: dict[str, str] = {}

    def taken_out_of(self, text: str) -> str:
        """YAML with marks in the place of its long texts."""
        if len(text) <= _LONGEST_PATH:
            return text
        return "\n".join(map(self._shortened, text.split("\n")))

    def _shortened(self, line: str) -> str:
        name = _NAME.match(line) if len(line) > _LONGEST_PATH else None
        if name is None:
            return line
        raw = line[name.end() :].rstrip()
        value = _value_of(raw) if len(raw) > _LONGEST_PATH else None
        if value is None:
            return line
        mark = _new_mark()
        self._values[mark], self._raw[mark] = value, raw
        return name[0] + mark

    def put_back(self, scalar: str) -> str:
        """The text that stood where this scalar of the shortened YAML stands."""
        if scalar in self._values:
            return self._values[scalar]
        return _MARK.sub(lambda mark: self._raw.get(mark[0], mark[0]), scalar)


def _value_of(raw: str) -> str | None:
    """The text that a YAML scalar on one line is; nothing where that takes more to tell."""
    quote = raw[:1]
    if quote not in ("'", '"'):
        is_text = _PLAIN.fullmatch(raw) and not any(p.match(raw) for _, p, _ in _SCALARS)
        return raw if is_text else None
    if not raw.isascii() or raw[-1] != quote or quote in raw[1:-1]:
        return None
    if quote == "'":
        return raw[1:-1]
    # YAML knows more escapes than JSON, and takes each half of a surrogate pair by itself.
    if "\\u" in raw:
        return None
    try:
        text: str = json.loads(raw)
    except ValueError:
        return None
    return text


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """YAML 1.2 core schema; a key that occurs twice is an error."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def __init__(self, text: str) -> None:
        self._long_texts = _LongTexts()
        super().__init__(self._long_texts.taken_out_of(text))

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        """The text of a scalar."""
        return self._long_texts.put_back(str(super().construct_scalar(node)))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """The mapping of a node, whose keys must differ."""
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                message = "a name cannot be a list or a mapping"
                raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
            if key.value in seen:
                message = f"`{key.value}` stands there twice"
                raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
            seen.add(key.value)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep=deep)
        return mapping

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """A whole number: decimal, even with leading zeros, 0o17 or 0x1f."""
        text = str(self.construct_scalar(node))
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text, base)


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # PyYAML has no types
    """Quotes every text that YAML 1.1 or 1.2 would read as something else."""


for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def parse_yaml(text: str, name: str) -> dict[str, Any]:
    """The mapping in a YAML text.

    Args:
        name: the file's name, for messages.

    Raises:
        InputError: not YAML, or not a mapping of names to values.
    """
    try:
        content = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        reason = error.problem or "not YAML"
        raise InputError.of(name, f"line {line}: {reason}", _FIX_SYNTAX) from error
    except yaml.YAMLError as error:
        raise InputError.of(name, f"not YAML: {error}", _FIX_SYNTAX) from error
    except (RecursionError, ValueError) as error:
        raise InputError.of(name, "a value in it cannot be read", _FIX_SYNTAX) from error
    return _as_mapping({} if content is None else content, name)


def parse_json(text: str, name: str) -> dict[str, Any]:
    """The mapping in a JSON text; arguments and errors as for `parse_yaml`."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [key for key, _ in pairs]
        twice = sorted({key for key in names if names.count(key) > 1})
        if twice:
            raise InputError.of(name, f"`{twice[0]}` stands there twice", _FIX_SYNTAX)
        return dict(pairs)

    try:
        content = json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        message = f"line {error.lineno}: {error.msg}"
        raise InputError.of(name, message, _FIX_SYNTAX) from error
    except (RecursionError, ValueError) as error:
        raise InputError.of(name, "a value in it cannot be read", _FIX_SYNTAX) from error
    return _as_mapping(content, name)


_PARSERS = {".yaml": parse_yaml, ".yml": parse_yaml, ".json": parse_json}


def read_mapping(path: Path) -> dict[str, Any]:
    """The content of a YAML or JSON file as it stands, such as a request to a service.

    Raises:
        InputError: no such file, of another kind, or unreadable.
    """
    parse = _PARSERS.get(path.suffix.lower())
    if parse is None:
        endings = ", ".join(_PARSERS)
        raise InputError.of(
            str(path), f"is no configuration file; allowed: {endings}", "rename or convert it"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError.of(str(path), "is not UTF-8 text", "save it as UTF-8") from error
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
        raise InputError.of(str(path), reason, "check the path") from error
    return parse(text, str(path))


def read_config_file(path: Path) -> list[Layer]:
    """The layers of a configuration file: one, or two for a written resolved configuration.

    Raises:
        InputError: the file cannot be read, or options stand where they do not belong.
    """
    return as_layers(read_mapping(path), path.name)


def as_layers(content: Mapping[str, Any], name: str) -> list[Layer]:
    """The layers of a configuration file's content; arguments and errors as for `parse_yaml`."""
    values, problems = _flatten({k: v for k, v in content.items() if k not in FILE_KEYS})
    if "resolved" not in content:
        return [Layer(name, values, explicit=True, problems=problems)]
    try:
        resolved, ignored = _history(content)
    except ValidationError:
        hint = "take `resolved` and `ignored_options` out"
        problems.append(Problem("resolved", f"is not as it was written (in {name})", hint))
        resolved, ignored = Resolution(), []
    chosen = {key: value for key, value in values.items() if key in resolved.explicit}
    others = {key: value for key, value in values.items() if key not in resolved.explicit}
    notes = (*resolved.notes, *ignored)
    return [
        Layer(name, others, explicit=False, notes=notes, problems=problems, is_written=True),
        Layer(name, chosen, explicit=True, is_written=True),
    ]


def write_config(config: TrainingConfig, *, with_contents: bool = True) -> str:
    """The configuration as YAML: every option in its section, and how it came about.

    Equal configurations give equal text. Reading it gives the configuration back.

    Args:
        config: resolved.
        with_contents: keep what stands in the configuration itself, such as an archive in base64;
            without it, its digest stands in its place, and the user's photographs stay with them;
            of a path only its last part is left, and of an address nothing that may be a key.
    """
    content = config.model_dump(mode="json")
    if not with_contents:
        content = without_contents(content)
    resolved = content.pop("resolved")
    resolved["notes"] = [note for note in resolved["notes"] if note["kind"] != "ignored"]
    ignored = config.resolved.ignored_options
    contents: dict[str, str] = {}
    content = _with_marks(content, contents)
    text = dump_yaml({**content, "ignored_options": ignored, "resolved": resolved})
    for mark, long_text in contents.items():
        text = text.replace(mark, json.dumps(long_text), 1)
    return text


def without_contents(value: Any, name: str = "") -> Any:
    """Values as others may see them, nested as they are.

    Of a content its digest is left, of a path its last part, and of an address nothing that may be
    a key.

    Args:
        value: of options, by their names.
        name: of the option whose value it is.
    """
    if isinstance(value, dict):
        return {key: without_contents(inner, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_contents(inner, name) for inner in value]
    if name not in PLACES or not isinstance(value, str):
        return value
    is_content = len(value) > _LONGEST_PATH or value[:5].lower() == "data:"
    if name in CONTENTS and is_content and not stands_for_content(value):
        return f"data:sha256,{sha256(value.encode()).hexdigest()}"
    return public_place(value)


def public_place(place: str) -> str:
    """A location as others may see it: an address without keys, the last part of a whole path."""
    if is_web_address(place):
        return without_keys(place)
    return Path(place).name if place.startswith((os.sep, "~")) else place


def stands_for_content(location: str) -> bool:
    """Whether a location is the digest that `write_config` leaves in the place of a content."""
    return _DIGEST.fullmatch(location) is not None


def _with_marks(value: Any, contents: dict[str, str], name: str = "") -> Any:
    """The same nested values with a mark in the place of each long content, see `_LongTexts`.

    Args:
        contents: takes the content of each mark, in the order of the values.
    """
    if isinstance(value, dict):
        return {key: _with_marks(inner, contents, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_marks(inner, contents, name) for inner in value]
    is_long = isinstance(value, str) and name in CONTENTS and len(value) > _LONGEST_PATH
    # JSON's quoted text is YAML's, but for what lies outside of ASCII and for this character.
    if not is_long or not value.isascii() or "\x7f" in value:
        return value
    mark = _new_mark()
    contents[mark] = value
    return mark


def dump_yaml(content: Mapping[str, Any]) -> str:
    """YAML text in the order given."""
    text: str = yaml.dump(
        dict(content), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100
    )
    return text


def _as_mapping(content: object, name: str) -> dict[str, Any]:
    if isinstance(content, dict) and all(isinstance(key, str) for key in content):
        return content
    raise InputError.of(
        name, f"got {shown(content)}; allowed: option names with their values", _FIX_SYNTAX
    )


def _history(content: Mapping[str, Any]) -> tuple[Resolution, list[Note]]:
    """What a written configuration says of how it came about."""
    ignored = _REASONS.validate_python(content.get("ignored_options", {}))
    notes = [Note(kind="ignored", field=key, message=reason) for key, reason in ignored.items()]
    return Resolution.model_validate(content["resolved"]), notes


def _flatten(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Leaves out of their sections, each of which may stand in its own section only."""
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    for section, leaf, value in _places(content):
        home = LEAVES[leaf].section if leaf in LEAVES else section
        if section is not None and home != section:
            message = f"got it in section `{section}`; allowed: in section `{home}`"
            problems.append(Problem(leaf, message, f"move it to `{home}`"))
        if leaf in values:
            message = "is given twice, in its section and outside of it"
            problems.append(Problem(leaf, message, "keep one of the two"))
        values[leaf] = value
    return values, problems + _bad_sections(content)


def _places(content: Mapping[str, Any]) -> Iterable[tuple[str | None, str, Any]]:
    for key, value in content.items():
        if key not in SECTIONS:
            yield None, key, value
        elif isinstance(value, dict):
            for leaf, inner in value.items():
                yield key, str(leaf), inner


def _bad_sections(content: Mapping[str, Any]) -> list[Problem]:
    return [
        Problem(key, f"got {shown(value)}; allowed: the options of this section")
        for key, value in content.items()
        if key in SECTIONS and value is not None and not isinstance(value, dict)
    ]
