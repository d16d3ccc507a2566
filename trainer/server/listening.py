"""The server at its sockets: plain http, https and the proxy for unmodified clients, and the end.

Hypercorn lets go of clients that do not get on. Told to end, the server asks trainings for their
checkpoints first, and lets clients go meanwhile.
"""

from __future__ import annotations

import asyncio
import asyncio.constants
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast
from urllib.parse import urlsplit

import click
from hypercorn.asyncio import serve as serve_app
from hypercorn.config import Config
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool

from trainer.errors import InputError, TrainerError
from trainer.server import tls
from trainer.server.app import create_app, only_server
from trainer.server.connect import serve_connect
from trainer.server.hosts import SERVICE_HOSTS
from trainer.server.settings import ServerSettings

_LONGEST_HEADERS = 32 * 2**10
_BACKLOG = 512
# Half a minute otherwise, for every https client that has nothing to say any more.
_GOODBYE_SECONDS = 1.0


def run(settings: ServerSettings) -> None:
    """Serves until it is told to end.

    Raises:
        InputError: an address is taken, another server uses the data folder, or a file of the
            owner's cannot be used.
        TrainerError: it cannot go on.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("httpx", "httpcore", "hypercorn.error"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("asyncio").addFilter(_is_no_goodbye)
    with _for_the_owner_alone(), only_server(settings.data):
        app = create_app(settings)
        config = _config(settings)
        if settings.tls:
            _encrypt(settings, config)
        asyncio.run(_serve(app, config, settings))


@contextmanager
def _for_the_owner_alone() -> Iterator[None]:
    """What the server and its jobs write meanwhile is for its owner's eyes alone."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


async def _serve(app: Starlette, config: Config, settings: ServerSettings) -> None:
    stop: asyncio.Event = asyncio.Event()
    _listen_to_signals(app, stop)
    # There is no other way to say this to Hypercorn's sockets.
    asyncio.constants.SSL_SHUTDOWN_TIMEOUT = _GOODBYE_SECONDS
    work = [asyncio.create_task(_end_of_work(app, stop, settings))]
    if settings.tls:
        proxy = (settings.host, settings.proxy_port)
        target = (settings.host, settings.tls_port)
        work.append(asyncio.create_task(serve_connect(proxy, target, SERVICE_HOSTS, stop)))
    click.echo(f"Serving at http://{settings.host}:{settings.port}", err=True)
    try:
        await serve_app(cast(Any, app), config, shutdown_trigger=stop.wait)
    finally:
        stop.set()
        await asyncio.gather(*work)
    if app.state.fault.is_set():
        raise TrainerError("the server cannot go on; the log above tells why", "start it again")


def _is_no_goodbye(record: logging.LogRecord) -> bool:
    """Whether a record is of anything but an https client that did not say goodbye."""
    error = record.exc_info[1] if record.exc_info else None
    return not (isinstance(error, TimeoutError) and "SSL shutdown" in str(error))


def _listen_to_signals(app: Starlette, stop: asyncio.Event) -> None:
    """The first signal ends the server, a second one its wait for trainings."""
    hurry: threading.Event = app.state.hurry

    def end() -> None:
        if stop.is_set():
            hurry.set()
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)


async def _end_of_work(app: Starlette, stop: asyncio.Event, settings: ServerSettings) -> None:
    """Once the server is to end, begins nothing any more, and asks trainings to leave."""
    told = [asyncio.create_task(event.wait()) for event in (stop, app.state.fault)]
    await asyncio.wait(told, return_when=asyncio.FIRST_COMPLETED)
    for task in told:
        task.cancel()
    stop.set()
    running = await run_in_threadpool(app.state.server.dispatcher.wind_down)
    if running:
        click.echo(
            f"Waiting up to {settings.grace_seconds:g} s for {running} to leave a checkpoint; "
            "Ctrl-C again ends the wait, and the next server goes on with what runs",
            err=True,
        )


def _encrypt(settings: ServerSettings, config: Config) -> None:
    """Serves https beside http, and tells what clients must know for it."""
    public = urlsplit(settings.public_url or "").hostname
    names = [name for name in (settings.host, public, *settings.allowed_hosts) if name]
    certificates = tls.certificates(settings.data / "tls", names)
    config.certfile = config.keyfile = str(certificates.server)
    config.insecure_bind = config.bind
    config.bind = [_bound(settings.host, settings.tls_port, "--tls-port")]
    # The proxy listens for itself; here only whether it can.
    _socket(settings.host, settings.proxy_port, "--proxy-port").close()
    lines = tls.environment_lines(
        certificates,
        f"{settings.host}:{settings.tls_port}",
        f"{settings.host}:{settings.proxy_port}",
    )
    for purpose, commands in lines.items():
        click.echo("\n".join([f"# {purpose}", *commands]))


def _config(settings: ServerSettings) -> Config:
    config = Config()
    config.bind = [_bound(settings.host, settings.port, "--port")]
    # Of a new connection, and between two requests on one. Bodies are watched by the `Guard`: a
    # limit on silence would cut off whoever waits for a stream or a result.
    config.keep_alive_timeout = settings.client_seconds
    config.h11_max_incomplete_size = _LONGEST_HEADERS
    config.graceful_timeout = 3
    config.shutdown_timeout = settings.grace_seconds + 10
    config.startup_timeout = 60
    config.errorlog = logging.getLogger("hypercorn.error")
    config.accesslog = None
    config.include_server_header = False
    return config


def _bound(host: str, port: int, flag: str) -> str:
    """A socket that listens, as Hypercorn takes one over."""
    return f"fd://{_socket(host, port, flag).detach()}"


def _socket(host: str, port: int, flag: str) -> socket.socket:
    """A socket that listens.

    Raises:
        InputError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        message = f"cannot listen at `{host}:{port}`: {error.strerror}"
        raise InputError.of(flag, message, f"give another {flag}") from error
