"""What a process makes of the signs of the others, and of a store that does not answer."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import DistError, TCPStore

from trainer.errors import TrainerError
from trainer.processes import _is_of_communication
from trainer.stores import LimitedStore
from trainer.watch import Beat, Watch


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


def watch_of(shelf: Any, rank: int, count: int, host: str, said: list[TrainerError]) -> Watch:
    """A watch that has looked once."""

    def last_words(error: TrainerError, _: bool) -> None:
        said.append(error)

    watch = Watch(shelf, rank, count, timeout=0.2, stop=lambda: False, last_words=last_words)
    watch._host = host
    watch.look()
    return watch


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
