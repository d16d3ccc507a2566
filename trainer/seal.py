"""Shuts the network from inside, once a training has its pictures and its base model.

A training of somebody else's pictures and options has nothing more to ask from outside then. The
interpreter itself refuses connections and look-ups of names, whichever library asks; only this
machine stays within reach. This is a belt and no sandbox: native code that opens a socket without
Python is not held, nor is another program that a library starts.
"""

from __future__ import annotations

import errno
import os
import sys
from functools import cache
from ipaddress import IPv6Address, ip_address
from typing import Any

from trainer.config import TrainingConfig
from trainer.errors import InputError, TrainerError
from trainer.events import RunEvent
from trainer.job import RunFolder
from trainer.runner import Engine, Events, Stop, end_of

FLAG = "--seal-network"

_OFFLINE = "HF_HUB_OFFLINE"
# Where a library keeps what the variable said when it was imported.
_HUB_CONSTANTS = "huggingface_hub.constants"
_TO_ADDRESS = ("socket.connect", "socket.sendto", "socket.sendmsg")
_LOOK_UPS = (
    *("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"),
    "socket.getnameinfo",
)


def sealed(engine: Engine, config: TrainingConfig) -> Engine:
    """An engine that shuts the network in its process when the first step is near.

    Raises:
        InputError: something that is wanted sends from the training.
    """
    if config.run.wandb:
        raise InputError.of(
            FLAG, "shuts out Weights & Biases, which is on", f"leave out --wandb or {FLAG}"
        )
    if config.output.push_to_hub:
        raise InputError.of(
            FLAG,
            "shuts out the hub, where the result is to go: push_to_hub",
            f"leave out --push-to-hub or {FLAG}",
        )

    def run(config: TrainingConfig, folder: RunFolder, stop: Stop) -> Events:
        events = engine(config, folder, stop)
        for event in events:
            if isinstance(event, RunEvent):
                seal()
            try:
                yield event
            except TrainerError as error:
                end_of(error, events)

    return run


def seal() -> None:
    """Refuses every connection from this process to elsewhere, from now until it ends."""
    os.environ[_OFFLINE] = "1"
    if _HUB_CONSTANTS in sys.modules:
        setattr(sys.modules[_HUB_CONSTANTS], _OFFLINE, True)
    _shut()


@cache
def _shut() -> None:
    """Once: what is added cannot be taken away."""
    sys.addaudithook(_refuse_outside)


def _refuse_outside(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _TO_ADDRESS:
        place = arguments[1]
        # A path or a name in the kernel is on this machine; no address, that of the connection.
        if place is None or isinstance(place, str | bytes) or _is_here(place[0]):
            return
        raise _refusal(place[0])
    if event in _LOOK_UPS:
        host = arguments[0][0] if isinstance(arguments[0], tuple) else arguments[0]
        if not _is_here(host):
            raise _refusal(host)


def _is_here(host: Any) -> bool:
    if isinstance(host, bytes):
        host = host.decode("ascii", "replace")
    if host in (None, "localhost"):
        return True
    if not isinstance(host, str):
        return False
    try:
        address = ip_address(host)
    except ValueError:
        return False
    inner = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (inner or address).is_loopback


def _refusal(host: Any) -> OSError:
    return OSError(
        errno.ENETUNREACH,
        f"`{str(host)[:200]}` is not reached: the network is shut since pictures and base model "
        f"are there ({FLAG})",
    )
