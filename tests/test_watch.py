"""What a process makes of the signs of the others, and of a store that does not answer."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import DistError, TCPStore

from trainer import stores
from trainer.errors import ProcessError, TrainerError
from trainer.launchers import EXIT_CODE_FILE
from trainer.processes import _is_of_communication, _Progress, _Together
from trainer.signs import Beat
from trainer.stores import LimitedStore
from trainer.watch import Watch


class Shelf:
    """A store in this process, that may cease to answer."""

    def __init__(self, *beats: Beat) -> None:
        self.kept = {f"beat/{rank}": json.dumps(asdict(b)) for rank, b in enumerate(beats)}
        self.answers = True

    def _kept(self) -> dict[str, str]:
        if not self.answers:
            raise DistError("connection reset")
        return self.kept

    def set(self, key: str, value: str) -> None:
        self._kept()[key] = value

    def get(self, key: str) -> bytes:
        return self._kept()[key].encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self._kept() for key in keys)

    def compare_set(self, key: str, _: str, value: str) -> bytes:
        return self._kept().setdefault(key, value).encode()


def watch_of(
    shelf: Any, rank: int, count: int, host: str, said: list[TrainerError], timeout: float = 0.2
) -> Watch:
    """A watch that has looked once."""

    def last_words(error: TrainerError, _: bool) -> None:
        said.append(error)

    watch = Watch(shelf, rank, count, timeout=timeout, stop=lambda: False, last_words=last_words)
    watch._host = host
    watch.look()
    return watch


class Clock:
    """What the watch takes for the time."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time, which stands still but for `sleep` and `run`; the process ends by SystemExit."""
    made = Clock()
    monkeypatch.setattr("trainer.watch.time", made)
    monkeypatch.setattr("trainer.launchers.os._exit", sys.exit)
    return made


def run(watch: Watch, clock: Clock, *seconds: float) -> None:
    """Runs a watch in this thread, with so many seconds before each of its turns."""
    pauses = iter(seconds)

    class Ended(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            pause = next(pauses, None)
            clock.now += pause or 0
            return pause is None

    watch._ended = Ended()
    watch.run()


def test_where_the_first_machine_is_lost_the_lowest_process_of_the_next_one_speaks() -> None:
    beats = [Beat(1, host, 0) for host in ("one", "one", "two", "two")]
    shelf = Shelf(*beats)
    third, fourth = (watch_of(shelf, rank, 4, "two", []) for rank in (2, 3))
    shelf.answers = False
    for watch in (third, fourth):
        watch.look()
        assert watch.cause is not None
        assert watch.cause.lost == (0, 1)
    assert third.cause is not None
    assert [watch.speaks(third.cause) for watch in (third, fourth)] == [True, False]


def test_a_process_that_does_not_come_to_a_step_is_named_though_it_beats() -> None:
    shelf = Shelf(Beat(1, "one", 0), Beat(1, "one", 0, doing="step 4", step=4))
    watch = watch_of(shelf, 0, 2, "one", [])
    watch.begin(5)
    watch._give_up()
    assert watch.cause is None
    time.sleep(0.25)
    shelf.kept["beat/1"] = json.dumps(asdict(Beat(2, "one", 0, doing="step 4", step=4)))
    watch.look()
    watch._give_up()
    assert watch.cause is not None
    assert "process 1 on one did not come to step 5 within" in str(watch.cause.result.error)
    assert "it was at: step 4" in str(watch.cause.result.error)
    assert watch.cause.lost == ()


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed", True),
        ("Error in: gloo/transport/tcp/unbound_buffer.cc: Timed out waiting", True),
        ("cannot read `/data/igloo.png`", False),
        ("no file /data/igloo/1.png", False),
    ],
)
def test_only_gloos_own_messages_mean_that_communication_broke(
    message: str, expected: bool
) -> None:
    assert _is_of_communication(RuntimeError(message)) is expected


def test_a_store_that_does_not_answer_is_given_up_and_used_again_when_it_does() -> None:
    limit = timedelta(seconds=60)
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=limit)
    connection = TCPStore("127.0.0.1", server.port, wait_for_workers=False, timeout=limit)
    store = LimitedStore(connection, 0.2)
    began = time.monotonic()
    # A store answers for a key that is not there when it comes.
    with pytest.raises(DistError, match="no answer within"):
        store.get("later")
    with pytest.raises(DistError, match="still does not answer"):
        store.check("later")
    assert time.monotonic() - began < 10
    server.set("later", "here")
    deadline = time.monotonic() + 10
    while True:
        try:
            found = store.put_first("first", "own")
            break
        except DistError:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert found == b"own"
    assert store.put_first("first", "other") == b"own"


def test_who_came_later_to_a_communication_is_not_named_for_the_one_that_hangs_in_it(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf(*[Beat(0, "one", 0, step=5)] * 4)
    first = watch_of(shelf, 0, 4, "one", [], timeout=60)
    first.begin(5)
    numbers, began = itertools.count(1), clock.now

    def sleep(seconds: float) -> None:
        clock.now += seconds
        for rank in (1, 2, 3):
            beat = Beat(next(numbers), "one", 0, step=5)
            shelf.kept[f"beat/{rank}"] = json.dumps(asdict(beat))
        for rank, later in ((1, 2), (3, 4)):
            if clock.now > began + later:
                shelf.kept[f"late/{rank}"] = ""

    monkeypatch.setattr(clock, "sleep", sleep)
    cause = first.why_broken("gloo/transport/tcp/unbound_buffer.cc: Timed out waiting")
    assert str(cause.result.error).startswith("process 2 on one did not come to step 5 within")


def test_a_blocked_process_is_ended_even_if_its_last_words_fail(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "told"
    told.touch()
    monkeypatch.setenv(EXIT_CODE_FILE, str(told))

    def last_words(*_: Any) -> None:
        raise ValueError("a result of another version")

    watch = watch_of(Shelf(), 0, 1, "one", [])
    watch._last_words = last_words
    cause = watch.announce(ProcessError("lost"))
    with pytest.raises(SystemExit) as ended:
        watch._end(cause)
    assert (ended.value.code, told.read_text()) == (7, "7 0\n")


def test_what_a_watch_does_not_expect_ends_the_training_and_not_the_watch(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(_: str) -> bytes:
        raise RuntimeError("never seen before")

    said: list[TrainerError] = []
    shelf = Shelf(Beat(1, "one", 0), Beat(1, "one", 0))
    watch = watch_of(shelf, 0, 2, "one", said, timeout=60)
    monkeypatch.setattr(shelf, "get", get)
    run(watch, clock, 1)
    assert watch.cause is not None
    assert "never seen before" in str(watch.cause.result.error)
    with pytest.raises(SystemExit) as ended:
        run(watch, clock, *[1] * 12)
    assert ended.value.code == 1
    assert "never seen before" in str(said[0])
    assert "never seen before" in shelf.kept["end"]


def test_a_main_thread_that_writes_files_has_rank_timeout_to_hear_of_a_loss(clock: Clock) -> None:
    watch = watch_of(Shelf(), 0, 1, "one", [], timeout=60)
    with watch.writing():
        watch.announce(ProcessError("lost"))
        run(watch, clock, *[1] * 50)
    run(watch, clock, *[1] * 9)
    with pytest.raises(SystemExit):
        run(watch, clock, 1, 1)


def test_a_main_thread_that_writes_files_without_an_end_is_ended(clock: Clock) -> None:
    watch = watch_of(Shelf(), 0, 1, "one", [], timeout=60)
    with watch.writing(), pytest.raises(SystemExit):
        watch.announce(ProcessError("lost"))
        run(watch, clock, *[1] * 65)


def test_processes_that_were_suspended_together_are_not_taken_for_lost(clock: Clock) -> None:
    shelf = Shelf(Beat(1, "one", 0), Beat(1, "one", 0, step=4))
    watch = watch_of(shelf, 0, 2, "one", [], timeout=60)
    watch.begin(5)
    run(watch, clock, 1, 1, 1000, *[1] * 50)
    assert watch.cause is None
    run(watch, clock, *[1] * 15)
    assert watch.cause is not None
    assert "process 1 on one gave no sign of life for 60 s" in str(watch.cause.result.error)


@pytest.mark.parametrize(
    ("host", "said"), [("one", "died or was killed"), ("two", "gave no sign of life for 60 s")]
)
def test_a_process_is_told_as_dead_only_where_it_can_be_seen_to_have_ended(
    host: str, said: str, clock: Clock
) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    watch = watch_of(Shelf(Beat(1, "one", 0), Beat(1, host, process.pid)), 0, 2, "one", [], 60)
    process.communicate()
    run(watch, clock, *[1] * 65)
    assert watch.cause is not None
    assert f"process 1 on {host} {said}" in str(watch.cause.result.error)


def test_a_process_that_was_never_to_be_seen_is_not_told_as_dead(clock: Clock) -> None:
    hidden = subprocess.Popen([sys.executable, "-c", ""])
    hidden.wait()
    watch = watch_of(Shelf(Beat(1, "one", 0), Beat(1, "one", hidden.pid)), 0, 2, "one", [], 60)
    run(watch, clock, *[1] * 65)
    assert watch.cause is not None
    assert "process 1 on one gave no sign of life for 60 s" in str(watch.cause.result.error)


def test_a_wish_to_stop_of_another_process_is_heard_wherever_this_one_asks() -> None:
    for wishes in (False, True):
        shelf: Any = Shelf(Beat(1, "one", 0), Beat(1, "one", 0, wishes=wishes))
        watch = watch_of(shelf, 0, 2, "one", [])
        both = _Together(
            0, 2, store=shelf, watch=watch, server=shelf, control=None, progress=_Progress()
        )
        assert both.wishing(lambda: False)() is wishes
        assert both.wishing(lambda: True)() is True


def test_a_call_that_was_suspended_with_the_process_still_has_time_for_its_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Suspended(Future[Any]):
        late = True

        def result(self, timeout: float | None = None) -> Any:
            late, self.late = self.late, False
            if late:
                raise TimeoutError
            return super().result(timeout)

    monkeypatch.setattr(stores, "Future", Suspended)
    store: Any = Shelf()
    assert LimitedStore(store, 60).put_first("first", "own") == b"own"


def test_what_a_store_is_not_expected_to_raise_reaches_who_asked_and_ends_no_thread() -> None:
    store: Any = Shelf(Beat(1, "one", 0))
    limited = LimitedStore(store, 5)
    with pytest.raises(KeyError):
        limited.get("beat/1")
    assert limited.check("beat/0")
