"""The server put together: routes of all protocols around one queue, and what goes on beside them.

Blocking work is done in threads; the event loop only moves bytes.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import shlex
import sqlite3
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from trainer.durable import disk_errors
from trainer.errors import DiskError, InputError, TrainerError
from trainer.known_models import known_models
from trainer.server import database as databases
from trainer.server import downloads, files, queue, upkeep
from trainer.server.backends import Backend
from trainer.server.backends.command import CommandBackend, Templates
from trainer.server.backends.local import LocalBackend
from trainer.server.backends.slurm import SlurmBackend
from trainer.server.dispatch import Dispatcher, Lane, Limits
from trainer.server.generators import Generators
from trainer.server.hosts import own_hosts
from trainer.server.inputs import Inputs
from trainer.server.job_folders import JobFolders
from trainer.server.operations import Operation, Told, openapi, routes
from trainer.server.progress import ProgressReader
from trainer.server.protocols import protocol_of, protocols
from trainer.server.refusals import Reason, Refusal
from trainer.server.room import Room
from trainer.server.security import Guard
from trainer.server.settings import (
    GENERATION_COMMAND,
    GIBIBYTE,
    JOB_COMMAND,
    PREPARATION_COMMAND,
    ServerSettings,
)
from trainer.server.slots import PROCESSOR, Slot, gpus_of_this_machine
from trainer.server.tidying import TidyPaths
from trainer.server.webhooks import Outbox
from trainer.server.workshop import Workshop, read_overrides

# -P: what lies in the folder where a job works is no module.
_TRAINER = (sys.executable, "-P", "-m", "trainer")
_TRAIN = (*_TRAINER, "train", "{config}", "--output", "{output}", "--seal-network")
_GENERATE = (*_TRAINER, "generate", "--stdin")
_PREPARE = (*_TRAINER, "prepare", "{config}", "--output", "{output}", "--with-result")

_TICK_SECONDS = 0.1
_REMOTE_POLL_SECONDS = 5.0
_UPKEEP_SECONDS = 60.0

log = logging.getLogger("trainer.server")


@dataclass(frozen=True)
class Server:
    """All parts of a server.

    Args:
        workshop: what handlers work with.
        dispatcher: starts and settles jobs.
        outbox: tells of their ends.
        database: of all of them.
    """

    workshop: Workshop
    dispatcher: Dispatcher
    outbox: Outbox
    database: databases.Database


def create_app(settings: ServerSettings) -> Starlette:
    """The server as an ASGI application.

    Raises:
        InputError: a file of the owner's cannot be used.
        DiskError: the data folder cannot be made.
    """
    known_models()
    server = _server(settings)
    operations = (
        *_own_operations(server),
        *downloads.OPERATIONS,
        *(operation for protocol in protocols() for operation in protocol.OPERATIONS),
    )
    description = openapi(operations)
    app = Starlette(
        routes=routes(operations, server.workshop),
        exception_handlers={
            Refusal: _refused,
            DiskError: _refused_by_disk,
            HTTPException: _refused_by_routing,
        },
        lifespan=_lifespan(server),
    )
    app.router.redirect_slashes = False
    app.state.workshop = server.workshop
    app.state.server = server
    app.state.openapi = description
    # Set when the server cannot go on, and when it is to end without waiting.
    app.state.fault = asyncio.Event()
    app.state.hurry = threading.Event()
    app.add_middleware(cast(Any, TidyPaths))
    app.add_middleware(cast(Any, Guard), settings=settings)
    return app


def _server(settings: ServerSettings) -> Server:
    data = settings.data.resolve()
    upkeep.private_folder(data)
    schema = queue.SCHEMA + files.SCHEMA
    database = databases.Database(data / upkeep.DATABASE, schema)
    room = Room(settings.max_data_gib and settings.max_data_gib * GIBIBYTE)
    store = files.FileStore(database, data / "files", room)
    folders = JobFolders(data / "jobs")
    jobs = queue.Queue(database, max_queued=settings.max_queued)
    roots = (*settings.allowed_roots, data / "files")
    workshop = Workshop(
        settings=settings,
        queue=jobs,
        files=store,
        folders=folders,
        inputs=Inputs(store, roots, own_hosts(settings)),
        progress=ProgressReader(),
        room=room,
        overrides=read_overrides(settings.overrides),
    )
    places = _places(settings, data)
    dispatcher = Dispatcher(
        jobs,
        store,
        folders,
        trainings=Lane(
            BACKENDS[settings.backend](settings, places, data / "jobs"),
            _command(JOB_COMMAND, _TRAIN),
        ),
        preparations=Lane(
            LocalBackend([Slot(PROCESSOR, data / "slots" / "preparation")], data / "jobs"),
            _command(PREPARATION_COMMAND, _PREPARE),
        ),
        generators=Generators(
            places,
            data,
            _command(GENERATION_COMMAND, _GENERATE),
            settings.inference_idle_seconds,
        ),
        limits=Limits(
            grace=settings.grace_seconds,
            wall=settings.wall_hours and settings.wall_hours * 3600,
            poll=0.0 if settings.backend == "local" else _REMOTE_POLL_SECONDS,
        ),
    )
    return Server(workshop, dispatcher, Outbox(database, workshop), database)


def _places(settings: ServerSettings, data: Path) -> list[Slot]:
    names = gpus_of_this_machine() if settings.gpus is None else settings.gpus
    return [Slot(name, data / "slots") for name in names]


def _local(settings: ServerSettings, places: Sequence[Slot], jobs: Path) -> Backend:
    return LocalBackend(places, jobs)


def _slurm(settings: ServerSettings, places: Sequence[Slot], jobs: Path) -> Backend:
    script = None if settings.sbatch_script is None else settings.sbatch_script.resolve()
    usual = "--gpus=1" if script is None else ""
    options = usual if settings.sbatch_options is None else settings.sbatch_options
    return SlurmBackend(shlex.split(options), script=script)


def _by_command(settings: ServerSettings, places: Sequence[Slot], jobs: Path) -> Backend:
    return CommandBackend(
        Templates(settings.submit_command, settings.state_command, settings.stop_command)
    )


BACKENDS = {"local": _local, "slurm": _slurm, "command": _by_command}


def _command(variable: str, usual: Sequence[str]) -> list[str]:
    template = os.environ.get(variable)
    return shlex.split(template) if template else list(usual)


def _lifespan(server: Server) -> Callable[[Starlette], Any]:
    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await run_in_threadpool(server.workshop.files.sweep)
        tasks = [
            asyncio.create_task(_repeat(server.dispatcher.tick, _TICK_SECONDS)),
            asyncio.create_task(_repeat(lambda: _upkeep(server), _UPKEEP_SECONDS)),
            asyncio.create_task(server.outbox.run()),
        ]
        app.state.tasks = tasks
        for task in tasks:
            task.add_done_callback(lambda ended: _notice(ended, app.state.fault))
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await run_in_threadpool(server.dispatcher.close, app.state.hurry)

    return lifespan


def _notice(ended: asyncio.Task[None], fault: asyncio.Event) -> None:
    """Tells of work that should go on as long as the server does, and does not."""
    if not ended.cancelled():
        log.critical("the server cannot go on", exc_info=ended.exception())
        fault.set()


@contextmanager
def only_server(data: Path) -> Iterator[None]:
    """Holds the data folder for one server at a time.

    Raises:
        InputError: another one has it.
        DiskError: it cannot be made.
    """
    upkeep.private_folder(data)
    with disk_errors(data, "--data"):
        lock: IO[str] = open(data / "server.lock", "w")  # noqa: SIM115 - held until the block ends
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = f"another server is running in `{data}`"
            raise InputError.of("--data", message, "stop it, or give another folder") from error
        yield


async def _repeat(work: Callable[[], None], seconds: float) -> None:
    """Does something again and again; trouble with the disk passes.

    In a thread of its own: requests that wait in all others hold nothing up.
    """
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1) as thread:
        while True:
            try:
                await loop.run_in_executor(thread, work)
            except (TrainerError, OSError, sqlite3.Error) as error:
                log.error("%s", error)
                await asyncio.sleep(1)
            await asyncio.sleep(seconds)


def _upkeep(server: Server) -> None:
    workshop = server.workshop
    upkeep.tidy(
        workshop.queue,
        workshop.files,
        workshop.folders,
        workshop.room,
        data=workshop.settings.data,
        days=workshop.settings.keep_days,
    )


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return protocol_of(request.url.path).refused(error)


async def _refused_by_disk(request: Request, error: Exception) -> Response:
    # Strangers are not told where anything lies.
    log.error("%s", error)
    refusal = Refusal("no_room", "the server cannot write to its disk; its log tells more")
    return protocol_of(request.url.path).refused(refusal)


_REASONS: dict[int, Reason] = {404: "not_found", 405: "wrong_method", 400: "malformed"}


async def _refused_by_routing(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = f"`{request.method} {request.url.path[:200]}` is nothing that this server knows"
    reason = _REASONS.get(error.status_code, "malformed")
    refusal = Refusal(reason, known, headers=error.headers)
    return protocol_of(request.url.path).refused(refusal)


class Health(BaseModel):
    """Whether the server works."""

    status: Literal["ok", "broken"]


def _own_operations(server: Server) -> tuple[Operation, ...]:
    """What belongs to no service."""

    async def healthz(request: Request, _: Workshop) -> Response:
        tasks = getattr(request.app.state, "tasks", [])
        alive = bool(tasks) and not any(task.done() for task in tasks)
        return JSONResponse({"status": "ok" if alive else "broken"}, 200 if alive else 500)

    async def measured(request: Request, workshop: Workshop) -> Response:
        text = await run_in_threadpool(
            upkeep.metrics, workshop.queue, server.database, workshop.room
        )
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def described(request: Request, _: Workshop) -> Response:
        return JSONResponse(request.app.state.openapi)

    return (
        Operation(
            "GET",
            "/healthz",
            healthz,
            "Tell whether the server works",
            "server",
            answer=Health,
            other_statuses=(500,),
        ),
        Operation(
            "GET",
            "/metrics",
            measured,
            "Measurements for Prometheus",
            "server",
            error=Told,
            media="text/plain",
        ),
        Operation("GET", "/openapi.json", described, "This description", "server", is_listed=False),
    )
