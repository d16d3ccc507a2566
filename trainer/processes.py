"""The processes of one training, started together by a launcher: what they wait for and share.

Gradients go through torch's default group, whose operations fail after `rank_timeout`. What one
process does alone (pictures, checkpoints, files) may take as long as it takes: the others wait for
it by counting in a store, where they hear of its failure and of signals. One of many processes and
the only one are used alike.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from trainer.errors import Interrupted, ProcessError, TrainerError
from trainer.events import Event, RunEvent, StageEvent, StepEvent
from trainer.job import Result, RunFolder
from trainer.watch import Watch

Item = TypeVar("Item")
Value = TypeVar("Value")

# gloo raises plain RuntimeErrors; its source files stand in their messages.
_GLOO = re.compile(r"\bgloo/(transport|gloo)\b|\bProcessGroupGloo\b|\[.*\bgloo/")
# NCCL ends the process after its timeout: the watch's, which says why, comes before.
_NCCL_LATER = 60.0
_NOT_COME = "look at the messages of those that are missing, and whether machines reach each other"
_SET_BY_LAUNCHERS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LAUNCH = (
    "start them by `torchrun` or `accelerate launch`, which set these variables in each; for one "
    "process, unset RANK and WORLD_SIZE"
)
# Seconds between two looks of a process that waits: the first and the longest.
_SHORTEST, _LONGEST = 0.005, 0.25

# Trainings of this process that were launched together: each has its own names in the store.
_NUMBERS = itertools.count()


class Processes:
    """This process among those of its training.

    Args:
        index: of this process, from 0; the main one is 0.
        count: of all.
    """

    def __init__(self, index: int = 0, count: int = 1) -> None:
        self.index = index
        self.count = count

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.index == 0

    def any(self, flag: bool) -> bool:
        """Whether any process raises the flag; all learn it together."""
        return flag

    def wait(self) -> None:
        """Waits for all processes to come here, however long one takes.

        Raises:
            TrainerError: what ended one of them.
        """

    def wishing(self, stop: Callable[[], bool]) -> Callable[[], bool]:
        """A wish to stop that also comes from the other processes."""
        return stop

    def begin(self, step: int) -> None:
        """Notes that this process begins a step, from 1."""

    def writing(self) -> AbstractContextManager[None]:
        """While this process writes files: where another is lost, it is given `rank_timeout`."""
        return nullcontext()

    def hear(self, event: Event) -> None:
        """Takes an event of this process, to know what it is at.

        Raises:
            TrainerError: what ended another process.
        """

    def shared(
        self, items: Sequence[Item], work: Callable[[Item], Value]
    ) -> Iterator[tuple[Item, Value]]:
        """Does a piece of work for every item, each in one process, and has all results in all.

        Process p of N takes the items p, p + N, p + 2N, …

        Args:
            work: gives values whose tensors are on the processor.
        """
        for item in items:
            yield item, work(item)


# A process without others.
ALONE = Processes()


@dataclass
class _Progress:
    """How far this process is."""

    step: int = 0
    total_steps: int = 0

    def count(self, event: Event) -> None:
        """Takes one event."""
        match event:
            case RunEvent():
                self.step, self.total_steps = event.start_step, event.total_steps
            case StepEvent():
                self.step = event.step
            case _:
                pass


class _Together(Processes):
    """One of several processes.

    Args:
        store: counts who has come.
        watch: over all.
        server: held for the others, who may need the main process's to its end.
        control: a group on the host.
        progress: of this process.
    """

    def __init__(
        self,
        index: int,
        count: int,
        *,
        store: Store,
        watch: Watch,
        server: Store,
        control: Any,
        progress: _Progress,
    ) -> None:
        super().__init__(index, count)
        self._progress = progress
        self._store = store
        self._watch = watch
        self._server = server
        self._control = control
        self._gates = itertools.count()

    def any(self, flag: bool) -> bool:
        raised = torch.tensor(int(flag))
        distributed.all_reduce(raised, distributed.ReduceOp.MAX, self._control)
        return bool(raised)

    def wait(self) -> None:
        gate, pause = f"gate/{next(self._gates)}", _SHORTEST
        self._store.add(gate, 1)
        while self._store.add(gate, 0) < self.count:
            self._raise_cause()
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST)

    def wishing(self, stop: Callable[[], bool]) -> Callable[[], bool]:
        return lambda: stop() or self._watch.wished

    def begin(self, step: int) -> None:
        self._watch.begin(step)

    def writing(self) -> AbstractContextManager[None]:
        return self._watch.writing()

    def hear(self, event: Event) -> None:
        self._progress.count(event)
        if isinstance(event, StageEvent):
            self._watch.doing(f"the stage `{event.stage}`, {event.done} of {event.total}")
        self._raise_cause()

    def shared(
        self, items: Sequence[Item], work: Callable[[Item], Value]
    ) -> Iterator[tuple[Item, Value]]:
        self.wait()
        for start in range(0, len(items), self.count):
            together = items[start : start + self.count]
            own = work(together[self.index]) if self.index < len(together) else None
            # Who has less to do waits here, where nobody is taken for lost.
            self.wait()
            values: list[Any] = [None] * self.count
            distributed.all_gather_object(values, own, self._control)
            yield from zip(together, values, strict=False)

    def _raise_cause(self) -> None:
        if self._watch.cause is not None:
            raise self._watch.cause.error()


class Launched:
    """This process among those that a launcher started with it, while they train.

    An error that leaves the block ends all processes: the others raise it too, and one that came
    of a broken communication gives way to what broke it.

    Args:
        timeout: seconds after which a process that does not answer is given up.
        folder: where the result is written if the main thread or the main process cannot.
        stop: whether this process was asked to stop.

    Raises:
        ProcessError: another process does not come, or is lost.
        Interrupted: asked to stop while the others were waited for.
    """

    def __init__(self, timeout: float, folder: RunFolder, stop: Callable[[], bool]) -> None:
        self._timeout = timeout
        self._folder = folder
        self._stop = stop
        self._watch: Watch | None = None
        self._progress = _Progress()

    def __enter__(self) -> Processes:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
            return ALONE
        try:
            return self._join()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._watch is None:
            return
        try:
            if error is not None:
                self._tell(self._watch, error)
        finally:
            self._watch.leave()
            if error is None and distributed.is_initialized():
                distributed.destroy_process_group()

    def _join(self) -> Processes:
        seconds = timedelta(seconds=self._timeout)
        place = _place()

        def connection() -> Store:
            own = TCPStore(server.host, server.port, wait_for_workers=False, timeout=seconds)
            return PrefixStore(place, own)

        try:
            server, rank, count = next(rendezvous("env://", timeout=seconds))
            of_watch = connection()
        except DistError as error:
            raise ProcessError(
                f"not all processes came to {_told('MASTER_ADDR', 'MASTER_PORT')} within "
                f"{self._timeout:.0f} s: {error}",
                _NOT_COME,
            ) from error
        except ValueError as error:
            raise ProcessError(
                f"the processes cannot meet by {_told(*_SET_BY_LAUNCHERS)}: {error}", _LAUNCH
            ) from error
        self._watch = watch = Watch(
            of_watch,
            rank,
            count,
            timeout=self._timeout,
            stop=self._stop,
            last_words=self._last_words,
        )
        watch.start()
        self._wait_for_all(watch)
        # Accelerate takes a default group that is there.
        on_gpus = torch.cuda.is_available()
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
            store=PrefixStore(place, server),
            rank=rank,
            world_size=count,
            timeout=seconds + timedelta(seconds=_NCCL_LATER if on_gpus else 0),
        )
        control = distributed.new_group(backend="gloo", timeout=seconds)
        return _Together(
            rank,
            count,
            store=connection(),
            watch=watch,
            server=server,
            control=control,
            progress=self._progress,
        )

    def _wait_for_all(self, watch: Watch) -> None:
        deadline = time.monotonic() + self._timeout
        watch.look()
        while not watch.all_there():
            if watch.cause is not None:
                raise watch.cause.error()
            if self._stop():
                raise Interrupted("stopped before the first step", "run the same command to go on")
            if time.monotonic() > deadline:
                missing = ", ".join(map(str, watch.missing()))
                raise ProcessError(
                    f"process {missing} did not come within {self._timeout:.0f} s", _NOT_COME
                )
            time.sleep(_LONGEST)
            watch.look()

    def _tell(self, watch: Watch, error: BaseException) -> None:
        """Tells the other processes what ended this one, or learns what ended them.

        Raises:
            TrainerError: what ended the others.
        """
        if _is_of_communication(error):
            cause = watch.why_broken(str(error))
        elif self._may_be_of_a_loss(error) and (lost := watch.silent()):
            cause = watch.lose(lost)
        else:
            watch.announce(_as_trainer_error(error))
            return
        if watch.speaks(cause) and not watch.is_main:
            self._last_words(cause.error(), watch.holds_folder())
        raise cause.error() from error

    def _may_be_of_a_loss(self, error: BaseException) -> bool:
        """Whether a wish to stop may come of a launcher that lost another process.

        One that never came has told its reason, or tells it.
        """
        watch = self._watch
        known = watch is not None and watch.all_there() and watch.cause is None
        return known and isinstance(error, Interrupted)

    def _last_words(self, error: TrainerError, holds_folder: bool) -> None:
        """Says what ended the training, and writes it down, in the place of the main thread.

        Args:
            holds_folder: whether this training still has the folder's lock; otherwise another may
                have begun in it.
        """
        print(error, file=sys.stderr, flush=True)
        if not self._folder.root.is_dir():
            return
        done = self._progress
        result = Result.of_error(error, step=done.step, total_steps=done.total_steps)
        try:
            if holds_folder:
                self._write(result)
            else:
                with self._folder.lock():
                    self._write(result)
        except (TrainerError, OSError) as refused:
            print(refused, file=sys.stderr, flush=True)

    def _write(self, result: Result) -> None:
        # That of an earlier run is gone as soon as one begins: the main process said how it ended.
        if not self._folder.result.exists():
            self._folder.write_result(result)


def _place() -> str:
    """Where in the store the names of this training are.

    A launcher that starts lost processes again may keep the store, with what the earlier ones said.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return f"attempt {attempt}, training {next(_NUMBERS)}"


def _told(*variables: str) -> str:
    """What these variables of the environment say, in words."""
    return ", ".join(
        f"{name} `{os.environ[name]}`" if name in os.environ else f"{name} (not set)"
        for name in variables
    )


def _is_of_communication(error: BaseException) -> bool:
    """Whether an error says that another process could not be reached."""
    is_gloo = type(error) is RuntimeError and _GLOO.search(str(error)) is not None
    return is_gloo or isinstance(error, DistError)


def _as_trainer_error(error: BaseException) -> TrainerError:
    """What the other processes are told of an error."""
    if isinstance(error, TrainerError):
        return error
    reason = str(error).splitlines()[0] if str(error) else ""
    return TrainerError(f"{type(error).__name__}: {reason}", "its messages are above")
