"""The commands `trainer serve` and `trainer health`.

The settings of the server come from flags, a file and the environment.
"""

from __future__ import annotations

import http.client
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
from pydantic import SecretStr, ValidationError

from trainer.config_files import read_mapping
from trainer.errors import InputError, Problem, TrainerError
from trainer.leaves import in_words, nearest, shown
from trainer.server.settings import KEYS, ServerSettings

_ANSWER_SECONDS = 5.0


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _is_list(name: str) -> bool:
    return "tuple" in str(ServerSettings.model_fields[name].annotation)


def _options() -> list[click.Option]:
    """A flag for every setting; one that holds several may be repeated."""
    schema = ServerSettings.model_json_schema()["properties"]
    options = []
    for name, info in ServerSettings.model_fields.items():
        if info.json_schema_extra:
            continue
        several = _is_list(name)
        holds = "repeat it for several" if several else in_words(schema[name])
        default = "none" if info.default in (None, ()) else shown(info.default).strip('"')
        help = f"{info.description} [{holds}; default: {default}]"
        is_flag = info.annotation is bool
        names = f"{_flag(name)}/{_flag(f'no_{name}')}" if is_flag else _flag(name)
        options.append(
            click.Option(
                [names],
                help=help,
                is_flag=is_flag,
                multiple=several,
                default=None,
                metavar=None if is_flag else "VALUE",
            )
        )
    return options


class ServeCommand(click.Command):
    """A command that takes every setting of the server as a flag."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params = [*self.params, *_options()]


@click.command(cls=ServeCommand)
@click.option(
    "--settings",
    "file",
    type=click.Path(path_type=Path),
    help="File with settings by name (.yaml or .json); flags win.",
)
def serve(file: Path | None, **flags: Any) -> None:
    """Serve: hosted services' clients train here by changing an address.

    Speaks fal's queue, Novita's and BFL's training, at one port; runs one training at a time on
    each GPU. docs/clients.md tells how to point each client here.
    """
    settings = settings_from(file, flags)
    try:
        from trainer.server import listening
    except ModuleNotFoundError as error:
        message = f"the server needs the package `{error.name}`"
        raise InputError.of("serve", message, "pip install 'tok-trainer[server]'") from error
    listening.run(settings)


@click.command()
@click.option(
    "--url",
    default="http://127.0.0.1:8700",
    show_default=True,
    help="The server's own address; nothing but http is spoken.",
)
@click.option(
    "--optional",
    is_flag=True,
    help="Well, too, where nothing listens, as in a container that trains.",
)
def health(url: str, *, optional: bool) -> None:
    """Tell whether the server on this machine works; ends with 1 if not.

    For what watches over it: a container's health check, a supervisor.
    """
    host, port = _place(url)
    try:
        status = _asked(host, port)
    except ConnectionRefusedError:
        if not optional:
            raise _unwell(url, "nothing listens there", "start it: trainer serve") from None
        click.echo("no server listens")
    except (OSError, http.client.HTTPException) as error:
        raise _unwell(url, str(error) or type(error).__name__) from error
    else:
        if status != http.client.OK:
            raise _unwell(url, f"it answers {status}")
        click.echo("ok")


def _place(url: str) -> tuple[str, int]:
    """Host and port of a server's address.

    Raises:
        InputError: it is none.
    """
    try:
        address = urlsplit(url)
        host, port = address.hostname, address.port
        (host or "").encode("idna")
    except ValueError:
        host, port = None, None
    if not host or address.scheme != "http":
        message = f"got `{url}`, which is no address of a server on this machine"
        raise InputError.of("--url", message, "give one such as http://127.0.0.1:8700")
    return host, port or http.client.HTTP_PORT


def _asked(host: str, port: int) -> int:
    """The status with which a server tells how it is."""
    connection = http.client.HTTPConnection(host, port, timeout=_ANSWER_SECONDS)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status
    finally:
        connection.close()


class UnwellError(TrainerError):
    """A server that is watched over does not work."""

    kind = "unwell"
    exit_code = 1


def _unwell(url: str, reason: str, hint: str = "its log tells more; start it again") -> UnwellError:
    return UnwellError(f"the server at {url} does not work: {reason}", hint)


def settings_from(file: Path | None, flags: Mapping[str, Any]) -> ServerSettings:
    """The settings that a file and flags mean; flags win.

    Raises:
        InputError: with everything that is wrong.
    """
    given = dict(read_mapping(file)) if file is not None else {}
    given |= {name: value for name, value in flags.items() if value not in (None, ())}
    # Keys have a file of their own: settings are shown to people.
    fields = {n: info for n, info in ServerSettings.model_fields.items() if n != "keys"}
    unknown = [name for name in given if name not in fields]
    if unknown:
        raise InputError(
            [Problem(n, "there is no such setting", nearest(n, tuple(fields))) for n in unknown]
        )
    file_of_keys = given.get("key_file")
    if isinstance(file_of_keys, str | Path | None):
        path = Path(file_of_keys) if file_of_keys else None
        given["keys"] = [SecretStr(key) for key in _keys(path)]
    try:
        return ServerSettings.model_validate(given)
    except ValidationError as error:
        raise InputError([_problem(detail, given) for detail in error.errors()]) from error


def _keys(file: Path | None) -> list[str]:
    """The keys of a file and of the environment, each once.

    Raises:
        InputError: the file cannot be read.
    """
    lines: list[str] = []
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            message = f"`{file}` cannot be read"
            raise InputError.of("key_file", message, "give a text file, a key a line") from error
    lines += os.environ.get(KEYS, "").split(",")
    stripped = (line.strip() for line in lines)
    return list(dict.fromkeys(key for key in stripped if key and not key.startswith("#")))


def _problem(detail: Any, given: Mapping[str, Any]) -> Problem:
    name = str(detail["loc"][0]) if detail["loc"] else "host"
    if detail["type"] == "value_error":
        return Problem(name, str(detail["ctx"]["error"]))
    schema = ServerSettings.model_json_schema()["properties"][name]
    return Problem(name, f"got {shown(given.get(name))}; allowed: {in_words(schema)}")
