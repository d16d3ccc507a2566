"""What the handlers of all protocols work with: settings, queue, files, and how jobs are made."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from starlette.requests import Request

from trainer.config import TrainingConfig
from trainer.config_files import parse_yaml, read_config_file, write_config
from trainer.dialects import field_of, layers_of
from trainer.errors import InputError, Problem, TrainerError
from trainer.job import Result, ResultFile
from trainer.known_models import known_models, own_files
from trainer.resolve import Layer, resolve
from trainer.server.files import FileStore, StoredFile
from trainer.server.inputs import Inputs
from trainer.server.job_folders import JobFolders
from trainer.server.parts import Parts
from trainer.server.progress import Progress, ProgressReader
from trainer.server.queue import Job, KeyReused, NewJob, Queue, QueueFull
from trainer.server.refusals import Refusal
from trainer.server.room import Room
from trainer.server.settings import ServerSettings
from trainer.server.tickets import Tickets

log = logging.getLogger("trainer.server")

IDEMPOTENCY_KEY = "idempotency-key"
# Longer texts of a request, such as an archive in base64, are not kept with the job.
_LONGEST_TEXT = 2000
_HASHED_AT_ONCE = 2**20
# Absolute paths: in backticks whatever is in them, elsewhere those of two parts at least. What
# follows a colon or a slash belongs to a web address.
_QUOTED_PATH = re.compile(r"`(?:file://)?~?/[^`]*?([^`/]*)/?`")
_PATH = re.compile(r"(?<![\w:/.~`-])(?:file://)?~?/(?:[^\s/`'\"<>|:;,]+/)+([^\s/`'\"<>|:;,]*)")


@dataclass(frozen=True)
class Workshop:
    """One server from inside.

    Args:
        settings: of the server.
        queue: of jobs.
        files: uploads and results.
        folders: of jobs.
        inputs: judges what requests name.
        progress: follows event logs.
        room: how much the data folder may grow.
        overrides: the owner's options over every request.
        parts: of files that come in parts.
        tickets: for what browsers fetch without a key.
    """

    settings: ServerSettings
    queue: Queue
    files: FileStore
    folders: JobFolders
    inputs: Inputs
    progress: ProgressReader
    room: Room
    overrides: Sequence[Layer] = ()
    parts: Parts = field(default_factory=Parts)
    tickets: Tickets = field(default_factory=Tickets)

    def training(
        self, dialect: str, payload: Mapping[str, Any], over: Mapping[str, Any] | None = None
    ) -> str:
        """The configuration that a service's request means here, as YAML.

        Args:
            over: options in the place of the request's.

        Raises:
            Refusal: with every field at fault, in the request's own names.
        """
        return self.configuration(
            lambda: [*layers_of(dialect, payload), Layer("server", over or {}, explicit=True)],
            partial(field_of, dialect),
        )

    def configuration(
        self, layers: Callable[[], Sequence[Layer]], field_of: Callable[[str], str]
    ) -> str:
        """`resolved` as YAML."""
        return write_config(self.resolved(layers, field_of))

    def resolved(
        self, layers: Callable[[], Sequence[Layer]], field_of: Callable[[str], str]
    ) -> TrainingConfig:
        """The configuration that layers of a request mean here.

        Args:
            layers: makes them.
            field_of: gives the request's name of an option.

        Raises:
            Refusal: with every field at fault, in the request's own names.
        """
        self._check_lists()
        try:
            return resolve([*self.inputs.admitted(layers()), *self.overrides])
        except InputError as error:
            named = [told_to_strangers(p, field_of(p.field)) for p in error.problems]
            # What the dialect says of a field goes before what follows from it.
            problems = list({p.field: p for p in reversed(named)}.values())[::-1]
            message = "\n".join(map(str, problems))
            raise Refusal("invalid", message, problems=problems) from error

    def _check_lists(self) -> None:
        """Looks whether the owner's lists of base models can be used, which may change any time.

        Raises:
            Refusal: they cannot; strangers are not told more.
        """
        try:
            known_models()
        except InputError as error:
            log.error("%s", error)
            message = "this server's list of base models cannot be used; its log tells why"
            raise Refusal("internal", message) from error

    def submit(
        self, new: NewJob, work: Callable[[], str], *, start_within: float | None = None
    ) -> Job:
        """Puts a job into the queue.

        What is there already is answered before anything is asked of it, and contents of the
        request are kept only once there is room, and only where it is taken.

        Args:
            new: without its work.
            work: judges the request and makes its work.
            start_within: seconds after which the job is not begun any more.

        Raises:
            Refusal: there is no room, or the idempotency key belongs to another request; and what
                `work` raises.
            DiskError: it cannot be written.
        """
        try:
            key = new.idempotency_key
            if key is not None:
                new = replace(new, fingerprint=_fingerprint(new, start_within))
                earlier = self.queue.find_repeated(key, new.fingerprint)
                if earlier is not None:
                    return earlier
            self.room.require()
            self.queue.require_room()
            start_by = None if start_within is None else time.time() + start_within
            with self.files.for_one_request():
                new = replace(new, work=work(), request=shortened(new.request), start_by=start_by)
                return self.queue.submit(new)
        except KeyReused:
            message = "this Idempotency-Key came with another request before"
            problem = Problem(IDEMPOTENCY_KEY, message, "use a new one for each request")
            raise Refusal("invalid", message, problems=[problem]) from None
        except QueueFull:
            message = f"{self.settings.max_queued} jobs wait already, as many as may"
            raise Refusal("queue_full", message) from None

    def job(self, id: str, protocol: str) -> Job:
        """A protocol's job.

        Raises:
            Refusal: there is none.
        """
        job = self.queue.find(id)
        if job is None or job.protocol != protocol:
            raise Refusal("not_found", f"there is no request `{id[:64]}`")
        return job

    def result(self, job: Job) -> Result | None:
        """How a job ended, as strangers are told; nothing for one that is not, or was cancelled."""
        result = self.folders.of(job.id).result() if job.is_over else None
        if result is None or result.status == "done":
            return result
        told = {
            "error": result.error and self.without_paths(result.error),
            "hint": result.hint and self.without_paths(result.hint),
            "problems": tuple(
                p.model_copy(
                    update={
                        "message": self.without_paths(p.message),
                        "hint": self.without_paths(p.hint),
                    }
                )
                for p in result.problems
            ),
        }
        return result.model_copy(update=told)

    def without_paths(self, text: str) -> str:
        """A text as strangers may read it: of each path of this machine, only the last part."""
        unquoted = _QUOTED_PATH.sub(r"`\1`", text)
        return _PATH.sub(r"\1", unquoted.replace(f"{self.settings.data.resolve()}/", ""))

    def progress_of(self, job: Job) -> Progress:
        """What a job has said."""
        events = self.folders.of(job.id).run.events
        return self.progress.read(events, lambda: _chosen_in(job))

    def file_of(self, job: Job, result: ResultFile) -> StoredFile:
        """The fetchable file of a result."""
        path = self.folders.of(job.id).run.root / result.path
        return next(file for file in self.files.of_job(job.id) if file.path == path)

    def base_url(self, request: Request) -> str:
        """The address under which this client reaches the server: no slash at its end."""
        if self.settings.public_url is not None:
            return self.settings.public_url
        scheme = request.url.scheme
        forwarded = request.headers.get("x-forwarded-proto")
        # Only a proxy on this machine is believed.
        if forwarded in ("http", "https") and request.client and request.client.host in _OWN:
            scheme = forwarded
        return f"{scheme}://{request.headers['host']}"


_OWN = ("127.0.0.1", "::1")


def read_overrides(file: Path | None) -> list[Layer]:
    """The owner's options over every request.

    Raises:
        InputError: an option is wrong.
    """
    if file is None:
        return []
    layers = read_config_file(file)
    try:
        resolve([Layer("trial", {"images_data_url": "https://photos.example"}, True), *layers])
    except InputError as error:
        # Options may depend on others, which requests bring; wrong values do not.
        own = [problem for problem in error.problems if "(in " in problem.message]
        if own:
            raise InputError(own) from error
    return layers


def _chosen_in(job: Job) -> Collection[str] | None:
    """The options that somebody set on purpose; of pictures that are made all that is told."""
    if job.kind == "generation":
        return None
    resolved = parse_yaml(job.work, "work").get("resolved", {})
    return frozenset(resolved.get("explicit", ()))


def told_to_strangers(problem: Problem, field: str) -> Problem:
    """A problem of a request, under the request's name of the field and without our paths."""
    message, hint = problem.message, problem.hint
    for path in own_files():
        message = message.replace(str(path), path.name)
        hint = hint.replace(str(path), path.name)
    return replace(problem, field=field, message=message, hint=hint)


def shortened(value: Any) -> Any:
    """A request without the long texts in it, as it is kept with its job."""
    if isinstance(value, str) and len(value) > _LONGEST_TEXT:
        return f"{value[:40]}… ({len(value)} characters)"
    if isinstance(value, Mapping):
        return {key: shortened(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shortened(item) for item in value]
    return value


def failure(result: Result | None) -> TrainerError | None:
    """What a failed job ended in; nothing for one that did not fail."""
    if result is None or result.status == "done":
        return None
    return TrainerError(result.error or "the job failed", result.hint or "")


def _fingerprint(new: NewJob, start_within: float | None) -> str:
    """Equal for requests that ask for the same, under whatever name of this server."""
    webhook = {**(new.webhook or {}), "base_url": None}
    asked = [new.protocol, new.app, new.kind, new.name, new.priority, start_within, webhook]
    text = json.dumps([*asked, _with_digests(new.request)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _with_digests(value: Any) -> Any:
    """A request with digests in the place of long texts: no second copy of an archive is made."""
    if isinstance(value, str) and len(value) > _LONGEST_TEXT:
        digest = hashlib.sha256()
        for start in range(0, len(value), _HASHED_AT_ONCE):
            digest.update(value[start : start + _HASHED_AT_ONCE].encode())
        return [len(value), digest.hexdigest()]
    if isinstance(value, Mapping):
        return {key: _with_digests(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_digests(item) for item in value]
    return value
