"""The services' ways of asking over HTTP, one module each, found by name.

A protocol is the routes of a service and the shapes of its answers; what a request means for a
training is in its dialect.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any, Protocol, cast

from starlette.responses import Response

from trainer.server.operations import Operation
from trainer.server.queue import Job
from trainer.server.refusals import Refusal
from trainer.server.workshop import Workshop


class WireProtocol(Protocol):
    """What a protocol's module offers.

    `NAME` is what its jobs are filed under. `PREFIXES` are the beginnings of paths that are its
    own; the one with an empty prefix has all others.
    """

    NAME: str
    PREFIXES: tuple[str, ...]
    OPERATIONS: Sequence[Operation]

    def refused(self, refusal: Refusal) -> Response:
        """The service's answer to a refusal."""

    def announced(self, job: Job, workshop: Workshop) -> Mapping[str, Any]:
        """What a webhook is told of a job that is over."""

    def signed(self, job: Job, body: bytes, workshop: Workshop) -> Mapping[str, str]:
        """The headers by which a webhook knows that it is told by this server."""


@cache
def protocols() -> tuple[WireProtocol, ...]:
    """All protocols, by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return tuple(cast(WireProtocol, import_module(f"{__name__}.{name}")) for name in names)


def protocol_named(name: str) -> WireProtocol:
    """The protocol that files jobs under this name."""
    return next(protocol for protocol in protocols() if name == protocol.NAME)


def protocol_of(path: str) -> WireProtocol:
    """The protocol that a path belongs to, by the longest beginning that fits."""
    fitting = [(len(p), protocol) for protocol in protocols() for p in _fitting(protocol, path)]
    return max(fitting, key=lambda pair: pair[0])[1]


def _fitting(protocol: WireProtocol, path: str) -> list[str]:
    return [prefix for prefix in protocol.PREFIXES if path.startswith(prefix)]
