"""The queue: order, idempotency, cancelling, settling; each change is there or it is not."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from trainer.server.database import Database
from trainer.server.queue import SCHEMA, Job, KeyReused, NewJob, Queue, QueueFull


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(tmp_path / "server.sqlite3", SCHEMA)


@pytest.fixture
def queue(database: Database) -> Queue:
    return Queue(database)


def asked(name: str = "a", **more: object) -> NewJob:
    given: dict[str, object] = {"fingerprint": name, "name": name, **more}
    return NewJob("fal", "fal-ai/x", "training", {"rank": 4}, "rank: 4\n", **given)


def names(queue: Queue) -> list[str]:
    """The names of waiting jobs in the order in which they go."""
    found = []
    while job := queue.waiting():
        found.append(job.name)
        queue.start(job)
    return found


def test_jobs_go_in_the_order_in_which_they_came(queue: Queue) -> None:
    for name in "abc":
        queue.submit(asked(name))

    assert names(queue) == ["a", "b", "c"]


def test_a_lower_priority_goes_after_all_others(queue: Queue) -> None:
    queue.submit(asked("low", priority=1))
    queue.submit(asked("normal"))

    assert names(queue) == ["normal", "low"]


def test_a_job_that_goes_back_has_its_old_place(queue: Queue) -> None:
    first = queue.submit(asked("first"))
    queue.start(first)
    queue.submit(asked("second"))

    queue.requeue(first, counts=True)

    assert names(queue) == ["first", "second"]


def test_the_position_counts_those_that_go_before(queue: Queue) -> None:
    low = queue.submit(asked("low", priority=1))
    queue.submit(asked("a"))
    last = queue.submit(asked("b"))

    assert (queue.position(last), queue.position(low)) == (1, 2)


def test_a_job_comes_back_as_it_was_submitted(queue: Queue) -> None:
    submitted = queue.submit(asked(webhook={"url": "https://a.example"}, start_by=5.0))

    found = queue.find(submitted.id)

    assert found is not None
    assert found.number == 1
    assert {**vars(found), "number": 0} == vars(submitted)


def test_the_same_idempotency_key_is_the_same_job(queue: Queue) -> None:
    first = queue.submit(asked(idempotency_key="k"))

    again = queue.submit(asked(idempotency_key="k"))

    assert again.id == first.id
    assert queue.counts() == {"queued": 1}


def test_an_idempotency_key_for_another_request_is_refused(queue: Queue) -> None:
    queue.submit(asked("a", idempotency_key="k"))

    with pytest.raises(KeyReused):
        queue.submit(asked("b", idempotency_key="k"))


def test_no_more_jobs_wait_than_may(tmp_path: Path) -> None:
    queue = Queue(Database(tmp_path / "db", SCHEMA), max_queued=1)
    first = queue.submit(asked())

    with pytest.raises(QueueFull):
        queue.submit(asked())
    queue.start(first)

    queue.submit(asked())


def test_many_threads_submit_without_losing_a_job(queue: Queue) -> None:
    with ThreadPoolExecutor(8) as threads:
        jobs = list(threads.map(lambda number: queue.submit(asked(str(number))), range(40)))

    assert len({job.id for job in jobs}) == 40
    assert queue.counts() == {"queued": 40}


def test_a_job_is_started_once(queue: Queue) -> None:
    job = queue.submit(asked())

    assert [queue.start(job), queue.start(job)] == [True, False]


@pytest.mark.parametrize(("counts", "starts"), [(True, 1), (False, 0)])
def test_an_interrupted_start_does_not_count(queue: Queue, counts: bool, starts: int) -> None:
    job = queue.submit(asked())
    queue.start(job)

    queue.requeue(job, counts=counts)

    found = queue.find(job.id)
    assert found is not None
    assert (found.state, found.starts) == ("queued", starts)


def waiting_webhooks(database: Database) -> int:
    return len(database.rows("SELECT * FROM outbox WHERE state = 'waiting'"))


def test_a_waiting_job_is_cancelled_at_once_and_its_webhook_told(
    queue: Queue, database: Database
) -> None:
    job = queue.submit(asked(webhook={"url": "https://a.example"}))

    before = queue.request_cancel(job.id)

    after = queue.find(job.id)
    assert before is not None
    assert after is not None
    assert (before.state, after.state) == ("queued", "cancelled")
    assert queue.waiting() is None
    assert waiting_webhooks(database) == 1


def test_a_running_job_is_asked_to_end(queue: Queue) -> None:
    job = queue.submit(asked())
    queue.start(job)

    queue.request_cancel(job.id)

    (running,) = queue.running()
    assert running.cancel_requested


def test_cancelling_what_is_over_changes_nothing(queue: Queue) -> None:
    job = queue.submit(asked())
    queue.start(job)
    queue.settle(job, "done")

    before = queue.request_cancel(job.id)

    assert before is not None
    assert before.state == "done"
    assert ended(queue, job) == "done"


def ended(queue: Queue, job: Job) -> str:
    found = queue.find(job.id)
    assert found is not None
    return found.state


def test_a_job_is_settled_once_and_its_webhook_told_once(queue: Queue, database: Database) -> None:
    job = queue.submit(asked(webhook={"url": "https://a.example"}))
    queue.start(job)

    queue.settle(job, "done")
    queue.settle(job, "failed")

    assert ended(queue, job) == "done"
    assert waiting_webhooks(database) == 1


def test_nothing_is_known_of_other_jobs(queue: Queue) -> None:
    assert queue.find("x") is None
    assert queue.request_cancel("x") is None


def test_jobs_are_listed_newest_first_by_pages(queue: Queue) -> None:
    for name in "abc":
        queue.submit(asked(name))

    listed = queue.listed("fal", "training", limit=2, offset=1)

    assert [job.name for job in listed] == ["b", "a"]
    assert queue.listed("bfl", "training") == []


def test_only_ended_jobs_are_forgotten(queue: Queue) -> None:
    over, waits = queue.submit(asked("a")), queue.submit(asked("b"))
    queue.settle(over, "done")

    queue.forget([over.id, waits.id])

    assert queue.find(over.id) is None
    assert queue.find(waits.id) is not None


def test_what_a_job_was_told_is_known_until_it_begins_again_or_is_forgotten(
    queue: Queue, database: Database
) -> None:
    job, other = queue.submit(asked("a")), queue.submit(asked("b"))
    queue.start(job)
    queue.start(other)
    queue.note_told(other, at_once=False)
    queue.note_told(job, at_once=False)
    first = queue.told(job)[False]
    queue.note_told(job, at_once=False)
    queue.note_told(job, at_once=True)
    assert queue.told(job) == {False: first, True: queue.told(job)[True]}

    queue.requeue(job, counts=False)
    queue.start(job)
    assert (queue.told(job), set(queue.told(other))) == ({}, {False})

    queue.forget([other.id])
    assert set(queue.told(other)) == {False}
    queue.settle(other, "cancelled")
    queue.forget([other.id])
    assert database.rows("SELECT * FROM told") == []


def test_a_transaction_that_fails_leaves_nothing(queue: Queue, database: Database) -> None:
    job = queue.submit(asked())

    with pytest.raises(ZeroDivisionError), database.transaction() as connection:
        connection.execute("DELETE FROM jobs")
        _ = 1 / 0

    assert queue.find(job.id) is not None


def test_what_is_written_survives_a_crash_of_the_machine(database: Database) -> None:
    (mode,) = database.row("PRAGMA journal_mode") or ()
    (synchronous,) = database.row("PRAGMA synchronous") or ()

    assert (mode, synchronous) == ("wal", 2), "2 is FULL"
