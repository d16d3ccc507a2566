"""A watch over the processes of one training, so that whatever ends one of them ends all, told.

Each process beats once a second in a store that all can reach, from a thread of its own: a process
that waits in a collective operation is blocked outside Python. What ends the training stands under
one key of the store, and the first one to say it is right.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict

from torch.distributed import DistError
from torch.distributed.distributed_c10d import Store

from trainer.errors import ProcessError, TrainerError
from trainer.job import Result
from trainer.launchers import end_at_once
from trainer.signs import BEGINNING, Beat, Cause
from trainer.stores import LimitedStore

# Seconds between two beats.
_BEAT = 1.0
# A process that does not beat for so many seconds, after communication with it broke or an end was
# asked for, is gone. Shorter than the 30 s that torchrun leaves the others.
_GONE = 5.0
# What a main thread has to hear what ended the training, before its process is ended.
_GRACE = 10.0
_END = "end"

_DIED = "died or was killed"
_HINT = "the messages above may tell why; the same command goes on from the last checkpoint"


class Watch(threading.Thread):
    """Beats for this process, and looks at the beats of the others.

    Args:
        store: a connection of its own.
        rank: of this process.
        count: of all.
        timeout: seconds without a beat after which a process is given up.
        stop: whether this process was asked to stop.
        last_words: says and writes down what ended the training; called where the main thread
            cannot, or where the main process is lost.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        count: int,
        *,
        timeout: float,
        stop: Callable[[], bool],
        last_words: Callable[[TrainerError, bool], None],
    ) -> None:
        super().__init__(name="watch", daemon=True)
        self._store = LimitedStore(store, timeout)
        self._rank = rank
        self._all = range(count)
        self._timeout = timeout
        self._stop = stop
        self._last_words = last_words
        self._host = socket.gethostname()
        # Each has one writer: the number this thread, the others the main thread.
        self._number = 0
        self._doing = BEGINNING
        self._left = False
        self._step, self._step_since = 0, time.monotonic()
        self._beats: dict[int, Beat] = {}
        # Those that could be seen when they began: a container beside this one hides its own.
        self._seen: set[int] = set()
        self._changed: dict[int, float] = {}
        self._cause: Cause | None = None
        self._cause_since = 0.0
        self._grace = _GRACE
        self._judged = self._awake_since = time.monotonic()
        self._ended = threading.Event()
        self._turn = threading.Lock()

    @property
    def cause(self) -> Cause | None:
        """What ends the training, as far as is known."""
        return self._cause

    @property
    def is_main(self) -> bool:
        """Whether this is the watch of the main process."""
        return self._rank == 0

    @property
    def wished(self) -> bool:
        """Whether another process was asked to stop."""
        return any(beat.wishes for beat in self._beats.values())

    def doing(self, what: str) -> None:
        """Notes what the main thread is at."""
        self._doing = what

    def begin(self, step: int) -> None:
        """Notes that the main thread begins a step, from 1."""
        self._step_since = time.monotonic()
        self._doing, self._step = f"step {step}", step

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Notes that the main thread writes files: it hears nothing, and is not blocked."""
        self._grace = max(self._timeout, _GRACE)
        try:
            yield
        finally:
            # What was heard of meanwhile it comes to now.
            self._cause_since, self._grace = time.monotonic(), _GRACE

    def run(self) -> None:
        """Beats and looks until the main thread leaves."""
        while not self._ended.wait(_BEAT):
            try:
                self._judge()
            except BaseException as error:
                # If this thread ended, nobody would end a main thread that is blocked.
                if self._cause is None:
                    traceback.print_exc()
                    self._keep(TrainerError(f"the watch failed: {error!r}", _HINT))
            cause = self._cause
            late = cause is not None and self._seconds_since(self._cause_since) > self._grace
            if cause is not None and late and not self._ended.is_set():
                self._end(cause)

    def _judge(self) -> None:
        self.look()
        now = time.monotonic()
        if now - self._judged > _BEAT + _GONE:
            # Suspended, perhaps with all others: nobody beats then, and the clock goes on.
            self._awake_since = now
        self._judged = now
        if self._cause is None:
            self._give_up()

    def _seconds_since(self, moment: float) -> float:
        """Seconds since then, or since this process was awake."""
        return time.monotonic() - max(moment, self._awake_since)

    def look(self) -> None:
        """One beat of this process, and a look at the others and for a cause."""
        with self._turn:
            try:
                self._look()
            except (DistError, TypeError, ValueError) as error:
                # The first process or its launcher holds the store, and all speak one language.
                self._lose_store(error)

    def _look(self) -> None:
        self._number += 1
        own = Beat(
            self._number,
            self._host,
            os.getpid(),
            doing=self._doing,
            step=self._step,
            wishes=self._stop(),
            left=self._left,
        )
        self._store.set(_beat(self._rank), json.dumps(asdict(own)))
        now = time.monotonic()
        for rank in self._all:
            # Asked for before it is there, a value would be waited for.
            if rank == self._rank or not self._store.check(_beat(rank)):
                continue
            beat = Beat(**json.loads(self._store.get(_beat(rank))))
            is_new = rank not in self._beats
            if is_new or beat.number != self._beats[rank].number:
                self._changed[rank] = now
            self._beats[rank] = beat
            if is_new and self._is_running(rank):
                self._seen.add(rank)
        if self._cause is None and self._store.check(_END):
            self._learn(self._store.get(_END))

    def all_there(self) -> bool:
        """Whether each process has beaten once."""
        return len(self._beats) == len(self._all) - 1

    def missing(self) -> list[int]:
        """The processes that have not come."""
        return [rank for rank in self._all if rank != self._rank and rank not in self._beats]

    def announce(self, error: TrainerError, lost: Collection[int] = ()) -> Cause:
        """Says what ends the training, unless that is said already.

        Returns:
            What was said first.
        """
        cause = Cause(
            rank=self._rank, host=self._host, result=Result.of_error(error), lost=tuple(lost)
        )
        with self._turn:
            if self._cause is None:
                try:
                    said = self._store.put_first(_END, cause.model_dump_json())
                except DistError as broken:
                    self._lose_store(broken)
                else:
                    self._learn(said)
        assert self._cause is not None
        return self._cause

    def why_broken(self, reason: str) -> Cause:
        """What ended a communication: said by another process, or seen by its beats.

        Args:
            reason: what the library says.
        """
        late = "timed out" in reason.lower()
        if late:
            self._mark_late()
        lost = self.silent()
        slow = self._never_late() if late and not lost else []
        if self._cause is not None:
            return self._cause
        if lost:
            return self.lose(lost, "stands still" if late else _DIED)
        if slow:
            return self._lose_late(slow)
        first = reason.splitlines()[0] if reason else "no reason given"
        return self.announce(ProcessError(f"the processes lost touch: {first}", _HINT))

    def silent(self) -> list[int]:
        """Waits for a new beat of each other process, or a cause; those that do not come."""
        self.look()
        since = time.monotonic()
        deadline = since + _GONE
        while True:
            self.look()
            there = {r for r, b in self._beats.items() if b.left or self._changed[r] > since}
            silent = [r for r in self._all if r != self._rank and r not in there]
            if not silent or self._cause is not None or time.monotonic() > deadline:
                return silent
            time.sleep(0.1)

    def leave(self) -> None:
        """The main thread has come to its end: no more watching."""
        self._left = True
        self._ended.set()
        self._say_again()
        self.look()
        # Its store may end with the main process: the others leave first, if they can.
        deadline = time.monotonic() + _GONE
        while self.is_main and time.monotonic() < deadline and not self._alone():
            time.sleep(0.05)
            self.look()

    def _say_again(self) -> None:
        """Says an own cause that could not be said while the store did not answer."""
        cause = self._cause
        if cause is not None and cause.rank == self._rank:
            with self._turn, suppress(DistError):
                self._store.put_first(_END, cause.model_dump_json())

    def _alone(self) -> bool:
        lost = self._cause.lost if self._cause else ()
        return all(beat.left or rank in lost for rank, beat in self._beats.items())

    def speaks(self, cause: Cause) -> bool:
        """Whether this process is the one that tells the user: the lowest that is left."""
        return self._rank == min(set(self._all) - set(cause.lost), default=self._rank)

    def holds_folder(self) -> bool:
        """Whether the main process is still there, though it does nothing: its lock is our own."""
        return self._is_running(0)

    def _is_here(self, rank: int) -> bool:
        beat = self._beats.get(rank)
        return beat is not None and beat.host == self._host

    def _has_ended(self, rank: int) -> bool:
        """Whether a process that was seen on this machine is there no more."""
        return rank in self._seen and not self._is_running(rank)

    def _is_running(self, rank: int) -> bool:
        if not self._is_here(rank):
            return False
        # A process of another user's is not it: numbers are used again.
        with suppress(ProcessLookupError, PermissionError):
            os.kill(self._beats[rank].pid, 0)
            return True
        return False

    def _give_up(self) -> None:
        """Ends the training where a process has stopped to beat."""
        limit = _GRACE if self._stop() else self._timeout
        lost = [
            rank
            for rank, beat in self._beats.items()
            if not beat.left and self._seconds_since(self._changed[rank]) >= limit
        ]
        late = self._behind() if self._seconds_since(self._step_since) >= self._timeout else []
        if lost and all(map(self._has_ended, lost)):
            self.lose(lost)
        elif lost:
            self.lose(lost, f"gave no sign of life for {limit:.0f} s")
        elif late:
            # On a GPU, communication that waits for them would end this process, not them.
            self._lose_late(late)

    def _behind(self) -> list[int]:
        """The processes that have not begun the step that this one is in."""
        beats = self._beats.items()
        return [rank for rank, beat in beats if beat.step < self._step and not beat.left]

    def _lose_late(self, ranks: Sequence[int]) -> Cause:
        where = f"did not come to {self._doing} within {self._timeout:.0f} s"
        return self.lose(ranks, where, lost=())

    def lose(
        self, ranks: Sequence[int], what: str = _DIED, lost: Collection[int] | None = None
    ) -> Cause:
        """Announces the loss of processes.

        Args:
            what: became of them.
            lost: those that can say nothing any more; all of them by default.
        """
        first = self._beats.get(ranks[0], Beat(0, "an unknown machine", 0))
        more = f" (and processes {', '.join(map(str, ranks[1:]))})" if ranks[1:] else ""
        message = f"process {ranks[0]} on {first.host}{more} {what}; it was at: {first.doing}"
        cause = self.announce(ProcessError(message, _HINT), ranks if lost is None else lost)
        self._wake(ranks)
        return cause

    def _wake(self, ranks: Collection[int]) -> None:
        """Lets processes that were stopped go on: they learn the cause and end."""
        for rank in filter(self._is_here, ranks):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(self._beats[rank].pid, signal.SIGCONT)

    def _learn(self, said: bytes) -> None:
        self._cause = Cause.model_validate_json(said)
        self._cause_since = time.monotonic()

    def _lose_store(self, error: Exception) -> None:
        if self._cause is not None:
            return
        text = (str(error).splitlines() or [type(error).__name__])[0]
        message = f"process 0 or its launcher is gone: their store does not answer ({text})"
        lost = self._gone_with_main() if self._rank else ()
        self._keep(ProcessError(message, _HINT), lost)
        self._wake(lost)

    def _keep(self, error: TrainerError, lost: Collection[int] = ()) -> None:
        """Takes a cause that could not be said."""
        result = Result.of_error(error)
        self._cause = Cause(rank=self._rank, host=self._host, result=result, lost=tuple(lost))
        self._cause_since = time.monotonic()

    def _gone_with_main(self) -> tuple[int, ...]:
        """The main process, and those of its machine where that is another than this one."""
        main = self._beats.get(0)
        if main is None or main.host == self._host:
            return (0,)
        return tuple(rank for rank, beat in self._beats.items() if beat.host == main.host)

    def _mark_late(self) -> None:
        with self._turn, suppress(DistError):
            self._store.set(f"late/{self._rank}", "")

    def _never_late(self) -> list[int]:
        """The processes that do not time out soon, as those do that came somewhat later."""
        deadline = time.monotonic() + _GONE
        while True:
            slow = [rank for rank in self._all if rank != self._rank and not self._is_late(rank)]
            if not slow or self._cause is not None or time.monotonic() > deadline:
                return slow
            time.sleep(0.1)

    def _is_late(self, rank: int) -> bool:
        with self._turn, suppress(DistError):
            return self._store.check(f"late/{rank}")
        return False

    def _end(self, cause: Cause) -> None:
        """Ends this process, whose main thread does not hear why: it is blocked outside Python."""
        error = cause.error()
        try:
            self._say_again()
            if self.speaks(cause):
                self._last_words(error, self.is_main or self.holds_folder())
            sys.stderr.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            end_at_once(error.exit_code)


def _beat(rank: int) -> str:
    return f"beat/{rank}"
