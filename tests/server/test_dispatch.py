"""The dispatcher: starts, adopts, settles and puts back; what ended is judged in a fixed order."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import InputError
from trainer.job import Result
from trainer.server import dispatch, slots
from trainer.server.backends import BackendError, Handover, Standing
from trainer.server.backends.local import LocalBackend
from trainer.server.database import Database
from trainer.server.dispatch import Dispatcher, Lane, Limits
from trainer.server.files import SCHEMA as FILES
from trainer.server.files import FileStore
from trainer.server.generators import Generators
from trainer.server.job_folders import JobFolders
from trainer.server.queue import SCHEMA, Job, Kind, NewJob, Queue
from trainer.server.slots import Slot

FAKE = Path(__file__).parent / "fake_job.py"
TRAIN = (sys.executable, str(FAKE), "{config}", "{output}")
GENERATE = (sys.executable, str(FAKE), "--stdin")
USUAL = Limits()


class World:
    """A queue with a dispatcher that can be lost and made anew, as after a crash of the server."""

    def __init__(self, root: Path, *, slots: int = 1, limits: Limits = USUAL) -> None:
        self.root = root
        self.limits = limits
        self.database = Database(root / "db", SCHEMA + FILES)
        self.queue = Queue(self.database)
        self.files = FileStore(self.database, root / "files")
        self.folders = JobFolders(root / "jobs")
        self.places = [Slot(str(number), root / "slots") for number in range(slots)]
        # To be changed before a restart.
        self.command: tuple[str, ...] = TRAIN
        self.generate: tuple[str, ...] = GENERATE
        self.idle_seconds = 0.3
        self.engine: FarEngine | None = None
        # Of earlier servers too: their processes are this program's children all the same.
        self.backends: list[LocalBackend] = []
        self.all_generators: list[Generators] = []
        self.restart()

    def restart(self) -> None:
        generators = Generators(self.places, self.root, self.generate, self.idle_seconds)
        self.all_generators.append(generators)
        self.backends.append(LocalBackend(self.places, self.root / "jobs"))
        self.dispatcher = Dispatcher(
            self.queue,
            self.files,
            self.folders,
            trainings=Lane(self.engine or self.backends[-1], self.command),
            generators=generators,
            limits=self.limits,
        )

    def end(self) -> None:
        """Ends every process that was started."""
        locks = [slot.lock for slot in self.places]
        locks += [self.root / "jobs" / job.id / "lock" for job in self.queue.running()]
        deadline = time.monotonic() + 10
        while any(slots.is_held(lock) for lock in locks):
            assert time.monotonic() < deadline
            for lock in locks:
                slots.end(lock, at_once=True)
            time.sleep(0.02)
        for backend in self.backends:
            for child in backend._children.values():
                child.wait(10)
        for generators in self.all_generators:
            for worker in generators._workers.values():
                worker.process.wait(10)
                if worker.process.stdin is not None:
                    worker.process.stdin.close()

    def submit(self, kind: Kind = "training", **more: object) -> Job:
        work = (
            "rank: 4\n"
            if kind == "training"
            else json.dumps({"output_format": "png", "num_images": 2})
        )
        return self.queue.submit(NewJob("fal", "x", kind, {}, work, **more))

    def state(self, job: Job) -> str:
        return self.now(job).state

    def now(self, job: Job) -> Job:
        found = self.queue.find(job.id)
        assert found is not None
        return found

    def until(self, true: Callable[[], bool], seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline
            self.dispatcher.tick()
            time.sleep(0.02)

    def until_over(self, *jobs: Job) -> None:
        self.until(lambda: all(self.now(job).is_over for job in jobs))

    def starts(self) -> list[str]:
        log = Path(os.environ["FAKE_LOG"])
        return log.read_text().split() if log.exists() else []


MakeWorld = Callable[..., World]


@pytest.fixture
def make_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeWorld]:
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "starts"))
    worlds: list[World] = []

    def make(**given: Any) -> World:
        worlds.append(World(tmp_path, **given))
        return worlds[-1]

    yield make
    for world in worlds:
        world.end()


@pytest.fixture
def world(make_world: MakeWorld) -> World:
    return make_world()


def test_a_job_runs_and_its_results_can_be_fetched(world: World) -> None:
    job = world.submit()

    world.until_over(job)

    assert world.state(job) == "done"
    files = {file.role: file for file in world.files.of_job(job.id)}
    assert files["kohya_lora"].path.read_bytes() == b"kohya"
    assert files["kohya_lora"].address.startswith(f"/files/{files['kohya_lora'].id}/")


def test_one_slot_runs_one_job_at_a_time_in_order(world: World) -> None:
    jobs = [world.submit() for _ in range(3)]

    world.until_over(*jobs)

    assert world.starts() == [job.id for job in jobs]


def test_two_slots_run_two_jobs_each_on_its_own_gpu(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SECONDS", "20")
    world = make_world(slots=2)
    for _ in range(3):
        world.submit()

    world.dispatcher.tick()

    assert world.queue.counts() == {"running": 2, "queued": 1}
    assert sorted(slot.environment()["CUDA_VISIBLE_DEVICES"] for slot in world.places) == ["0", "1"]


def test_a_failed_job_keeps_the_reason_that_it_gave(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAIL", "memory")
    job = world.submit()

    world.until_over(job)

    result = world.folders.of(job.id).result()
    assert world.state(job) == "failed"
    assert result is not None
    assert result.error_kind == "memory"


def test_a_job_that_leaves_no_result_is_tried_three_times(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_EXIT", "9")
    job = world.submit()

    world.until_over(job)

    result = world.folders.of(job.id).result()
    assert world.starts() == [job.id] * 3
    assert world.state(job) == "failed"
    assert result is not None
    assert result.error_kind == "lost"


def test_an_interrupted_job_goes_on_however_often(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_EXIT", "75")
    job = world.submit()
    world.until(lambda: len(world.starts()) >= 5)
    monkeypatch.delenv("FAKE_EXIT")

    world.until_over(job)

    assert world.state(job) == "done"
    assert world.now(job).starts == 1


def test_an_interrupted_job_goes_on_where_its_launcher_makes_another_exit_code_of_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAIL", "interrupted")
    said = {"status": "interrupted", "exit_code": 75}
    monkeypatch.setenv("FAKE_RESULT", json.dumps(said))
    job = world.submit()
    world.until(lambda: len(world.starts()) >= 5)
    monkeypatch.delenv("FAKE_FAIL")
    monkeypatch.delenv("FAKE_RESULT")

    world.until_over(job)

    assert world.state(job) == "done"
    assert world.now(job).starts == 1


def test_a_running_job_is_cancelled_within_seconds(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SECONDS", "20")
    job = world.submit()
    world.until(lambda: world.starts() != [])

    world.queue.request_cancel(job.id)
    world.until_over(job)

    assert world.state(job) == "cancelled"
    assert world.starts() == [job.id]


@pytest.mark.parametrize("exit_code", ["0", "1", "75"])
def test_a_wish_to_cancel_outranks_every_exit_code(
    world: World, monkeypatch: pytest.MonkeyPatch, exit_code: str
) -> None:
    monkeypatch.setenv("FAKE_EXIT", exit_code)
    monkeypatch.setenv("FAKE_SECONDS", "0.2")
    job = world.submit()
    world.dispatcher.tick()

    world.queue.request_cancel(job.id)
    world.until_over(job)

    assert world.state(job) == "cancelled"


def test_a_job_that_does_not_listen_is_ended_when_its_grace_is_over(
    make_world: MakeWorld,
) -> None:
    world = make_world(limits=Limits(grace=0.3))
    deaf = "trap '' TERM; echo x >>$FAKE_LOG; while true; do sleep 0.1; done"
    world.command = ("/bin/sh", "-c", deaf)
    world.restart()
    job = world.submit()
    world.until(lambda: world.starts() != [])

    world.queue.request_cancel(job.id)
    world.until_over(job)

    assert world.state(job) == "cancelled"


# Notes each SIGTERM, for half a second after the first, and ends.
COUNTING = """
import os, signal, time
def note(*_):
    with open(os.environ["FAKE_LOG"], "a") as log:
        log.write("TERM ")
    heard.append(time.monotonic())
heard = []
signal.signal(signal.SIGTERM, note)
with open(os.environ["FAKE_LOG"], "a") as log:
    log.write("begun ")
while not heard or time.monotonic() < heard[0] + 0.5:
    time.sleep(0.02)
"""


@pytest.mark.parametrize("closes", [False, True], ids=["cancelled", "cancelled and closed"])
def test_a_job_is_asked_once_to_end(world: World, closes: bool) -> None:
    world.command = (sys.executable, "-c", COUNTING)
    world.restart()
    job = world.submit()
    world.until(lambda: world.starts() != [])

    world.queue.request_cancel(job.id)
    if closes:
        world.dispatcher.tick()
        world.dispatcher.close()
    else:
        world.until_over(job)

    assert world.state(job) == "cancelled"
    assert world.starts() == ["begun", "TERM"]


def test_a_job_that_begins_again_is_asked_again_to_end(world: World) -> None:
    world.command = (sys.executable, "-c", COUNTING + "raise SystemExit(75)")
    world.restart()
    job = world.submit()
    for starts in (1, 2):
        world.until(lambda starts=starts: world.starts().count("begun") == starts)  # type: ignore[misc]
        world.dispatcher.close()
        assert world.state(job) == "queued"
        world.restart()

    assert world.starts() == ["begun", "TERM"] * 2


def test_a_job_that_takes_too_long_fails(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SECONDS", "20")
    world = make_world(limits=Limits(wall=0.2))
    job = world.submit()

    world.until_over(job)

    result = world.folders.of(job.id).result()
    assert result is not None
    assert result.error_kind == "wall_time"


def test_a_job_that_began_too_late_fails_without_a_start(world: World) -> None:
    job = world.submit(start_by=time.time() - 1)

    world.until_over(job)

    result = world.folders.of(job.id).result()
    assert result is not None
    assert (world.state(job), result.error_kind) == ("failed", "request_timeout")
    assert world.starts() == []


def test_after_a_crash_a_living_job_is_adopted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SECONDS", "1")
    job = world.submit()
    world.until(lambda: world.starts() != [])

    world.restart()
    world.until_over(job)

    assert world.state(job) == "done"
    assert world.starts() == [job.id]


def test_after_a_crash_a_finished_job_is_settled(world: World) -> None:
    job = world.submit()
    world.dispatcher.tick()
    result = world.folders.of(job.id).run.result
    lock = world.root / "jobs" / job.id / "lock"
    deadline = time.monotonic() + 10
    while not result.exists() or slots.is_held(lock):
        assert time.monotonic() < deadline
        time.sleep(0.02)

    world.restart()
    world.until_over(job)

    assert world.state(job) == "done"
    assert world.starts() == [job.id]


def test_after_a_crash_a_job_that_died_runs_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SECONDS", "20")
    job = world.submit()
    world.until(lambda: world.starts() != [])
    monkeypatch.setenv("FAKE_SECONDS", "0")
    world.restart()
    process = slots.process_of(world.root / "jobs" / job.id / "lock")
    assert process is not None
    os.killpg(process, signal.SIGKILL)

    world.until_over(job)

    assert world.state(job) == "done"
    assert world.starts() == [job.id] * 2
    assert world.now(job).starts == 2


def test_a_start_that_never_came_about_does_not_count(world: World) -> None:
    job = world.submit()
    world.queue.start(job)

    world.restart()
    world.until_over(job)

    assert (world.state(job), world.now(job).starts) == ("done", 1)


def test_an_adopted_job_can_be_cancelled(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SECONDS", "20")
    job = world.submit()
    world.until(lambda: world.starts() != [])
    world.restart()

    world.queue.request_cancel(job.id)
    world.until_over(job)

    assert world.state(job) == "cancelled"


def test_closing_interrupts_what_runs_and_puts_it_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SECONDS", "20")
    job = world.submit()
    world.until(lambda: world.starts() != [])

    world.dispatcher.close()

    assert (world.state(job), world.now(job).starts) == ("queued", 0)


def test_pictures_are_made_by_one_process_that_stays(world: World) -> None:
    first, second = world.submit("generation"), world.submit("generation")

    world.until_over(first, second)

    assert [world.state(job) for job in (first, second)] == ["done", "done"]
    assert len(world.files.of_job(first.id)) == 2
    assert world.places[0].is_held()


def test_inference_leaves_when_it_is_idle(world: World) -> None:
    job = world.submit("generation")
    world.until_over(job)

    world.until(lambda: not world.places[0].is_held())


def test_inference_makes_room_for_a_training(world: World) -> None:
    world.idle_seconds = 1000
    world.restart()
    pictures = world.submit("generation")
    world.until_over(pictures)
    assert world.places[0].is_held()
    training = world.submit()

    world.until_over(training)

    assert world.state(training) == "done"


def test_a_training_and_inference_never_share_a_slot(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SECONDS", "0.5")
    training, pictures = world.submit(), world.submit("generation")
    world.until(lambda: world.state(training) == "running")

    for _ in range(5):
        world.dispatcher.tick()

    assert world.state(pictures) == "queued"
    world.until_over(training, pictures)
    assert world.state(pictures) == "done"


def test_pictures_whose_process_died_are_made_by_another(world: World) -> None:
    once = 'test -e died && exec "$@"; touch died; read folder; exit 9'
    world.generate = ("/bin/sh", "-c", once, "-", *GENERATE)
    world.restart()
    job = world.submit("generation")

    world.until_over(job)

    assert world.state(job) == "done"
    assert world.now(job).starts == 2


def test_a_result_from_an_interrupted_start_is_not_taken_for_the_end(world: World) -> None:
    job = world.submit()
    run = world.folders.of(job.id).run
    run.create()
    run.write_result(Result(status="interrupted", exit_code=75))

    world.until_over(job)

    assert world.state(job) == "done"
    assert world.starts() == [job.id]


def test_a_program_that_is_not_there_fails_the_job_with_a_reason(world: World) -> None:
    world.command = ("/nowhere/program",)
    world.restart()
    job = world.submit()

    world.until_over(job)

    assert world.state(job) == "failed"


def test_the_command_has_its_places_filled_in(world: World, tmp_path: Path) -> None:
    world.command = (
        "/bin/sh",
        "-c",
        f"echo {{id}} {{config}} >{shlex.quote(str(tmp_path / 'said'))}",
    )
    world.restart()
    job = world.submit()

    world.until_over(job)

    folder = tmp_path / "jobs" / job.id
    assert (tmp_path / "said").read_text().split() == [job.id, str(folder / "config.yaml")]
    assert (folder / "config.yaml").read_text() == "rank: 4\n"


def test_a_second_holder_of_a_lock_is_refused(tmp_path: Path) -> None:
    lock = tmp_path / "slot.lock"
    child = slots.spawn(
        ["/bin/sh", "-c", "read x"],
        locks=[lock],
        log=tmp_path / "log",
        environment=dict(os.environ),
        pipe=True,
    )

    with pytest.raises(slots.Busy):
        slots.spawn(["true"], locks=[lock], log=tmp_path / "log", environment=dict(os.environ))

    assert child.stdin is not None
    child.stdin.close()
    child.wait(10)
    assert not slots.is_held(lock)


def test_inputs_that_the_job_refuses_are_told_by_field(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAIL", "input")
    job = world.submit()

    world.until_over(job)

    result = world.folders.of(job.id).result()
    assert result is not None
    assert [problem.field for problem in result.problems] == ["rank"]
    assert Result.of_error(InputError.of("rank", "x")).problems[0].field == "rank"


def test_a_damaged_result_stops_neither_the_job_nor_any_other(world: World) -> None:
    damaged, other = world.submit(), world.submit()
    run = world.folders.of(damaged.id).run
    run.create()
    run.result.write_text('{"status": "finished"}')

    world.until_over(damaged, other)

    assert [world.state(job) for job in (damaged, other)] == ["done", "done"]


class FarEngine:
    """An engine elsewhere that takes jobs, or has trouble with what is asked of it."""

    runs_here = False

    def __init__(self) -> None:
        self.taken: list[str] = []
        self.stopped: list[str] = []
        # Whether each was to be stopped at once.
        self.ways: list[bool] = []
        self.hears = True
        self.trouble = ""

    def has_room(self) -> bool:
        return True

    def start(self, job: Handover) -> bool:
        self._ask("start")
        self.taken.append(job.id)
        return True

    def standing(self, id: str) -> Standing:
        self._ask("standing")
        return Standing("running" if id in self.taken else "unknown")

    def stop(self, id: str, *, at_once: bool) -> bool:
        self._ask("stop")
        self.stopped.append(id)
        self.ways.append(at_once)
        return self.hears

    def _ask(self, what: str) -> None:
        if self.trouble == what:
            raise BackendError("the controller at 10.1.2.3 does not answer")


@pytest.fixture
def engine(world: World) -> FarEngine:
    """An engine that this world's trainings are handed over to."""
    world.engine = FarEngine()
    world.restart()
    return world.engine


def test_an_engine_that_does_not_answer_ends_no_job_and_stops_no_other(
    world: World, engine: FarEngine
) -> None:
    training, pictures = world.submit(), world.submit("generation")
    world.dispatcher.tick()
    engine.trouble = "standing"

    world.until_over(pictures)

    assert (world.state(training), world.state(pictures)) == ("running", "done")


def test_an_engine_that_takes_nothing_is_asked_again_and_strangers_are_not_told_why(
    world: World, engine: FarEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "HANDOVER_SECONDS", 0.01)
    engine.trouble = "start"
    refused = world.submit()
    world.until_over(refused)
    result = world.folders.of(refused.id).result()
    assert result is not None
    assert (result.error_kind, "10.1.2.3" in str(result.error)) == ("backend", False)

    later = world.submit()
    world.dispatcher.tick()
    engine.trouble = ""
    world.until(lambda: engine.taken != [])

    assert engine.taken == [later.id]
    assert world.now(later).starts == 1


def test_a_job_elsewhere_is_asked_until_it_hears_and_after_its_grace_ended_until_it_hears(
    world: World, engine: FarEngine
) -> None:
    job = world.submit()
    world.dispatcher.tick()
    world.queue.request_cancel(job.id)
    ways = []
    for grace in (USUAL.grace, 0):
        world.dispatcher._limits = Limits(grace=grace)
        for engine.hears in (False, True, True):
            world.dispatcher.tick()
            ways.append(engine.ways.copy())
            engine.ways.clear()

    assert ways == [[False], [False], [], [True], [True], []]


def test_a_job_that_waits_elsewhere_is_cancelled_at_once(
    world: World, engine: FarEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "standing", lambda id: Standing("waiting"))
    job = world.submit()
    world.dispatcher.tick()
    world.queue.request_cancel(job.id)

    world.dispatcher.tick()

    assert engine.ways == [True]


def test_a_job_that_took_too_long_while_the_server_ends_goes_on_with_the_next(
    world: World,
) -> None:
    world.command = (sys.executable, "-c", COUNTING + "raise SystemExit(75)")
    world.restart()
    job = world.submit()
    world.until(lambda: world.starts() != [])
    world.dispatcher._limits = Limits(wall=0)

    world.dispatcher.close()

    assert (world.state(job), world.starts()) == ("queued", ["begun", "TERM"])


def test_a_job_that_does_not_hear_the_servers_end_is_told_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.command = (sys.executable, "-c", COUNTING + "raise SystemExit(75)")
    world.restart()
    job = world.submit()
    world.until(lambda: world.starts() != [])
    backend = world.dispatcher._lanes["training"].backend
    stop, asked = backend.stop, []

    def deaf_at_first(id: str, *, at_once: bool) -> bool:
        asked.append(id)
        return len(asked) > 1 and stop(id, at_once=at_once)

    monkeypatch.setattr(backend, "stop", deaf_at_first)

    world.dispatcher.close()

    assert (world.state(job), world.starts(), len(asked)) == ("queued", ["begun", "TERM"], 2)


@pytest.mark.parametrize(
    ("first", "second"),
    [("tick", "wind_down"), ("wind_down", "tick")],
    ids=["a tick first", "the end first"],
)
def test_a_job_is_told_once_to_end_by_a_tick_and_the_end_of_the_server_beside_it(
    first: str, second: str, world: World, engine: FarEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "runs_here", True)
    job = world.submit()
    world.dispatcher.tick()
    world.queue.request_cancel(job.id)
    stop, asked = engine.stop, []

    def while_another_thread_is_at_it(id: str, *, at_once: bool) -> bool:
        asked.append(at_once)
        if len(asked) == 1:
            other = threading.Thread(target=getattr(world.dispatcher, second))
            other.start()
            other.join(20)
            assert not other.is_alive()
        return stop(id, at_once=at_once)

    monkeypatch.setattr(engine, "stop", while_another_thread_is_at_it)

    getattr(world.dispatcher, first)()
    world.dispatcher.tick()

    assert asked == [False]


def test_a_job_that_the_engine_did_not_answer_about_is_told_at_the_next_look(
    world: World, engine: FarEngine
) -> None:
    job = world.submit()
    world.dispatcher.tick()
    world.queue.request_cancel(job.id)
    engine.trouble = "stop"
    world.dispatcher.tick()
    engine.trouble = ""

    world.dispatcher.tick()
    world.dispatcher.tick()

    assert engine.ways == [False]


def test_a_restarted_server_does_not_tell_again_a_job_that_was_told_to_end(
    world: World, engine: FarEngine
) -> None:
    job = world.submit()
    world.dispatcher.tick()
    world.queue.request_cancel(job.id)
    world.dispatcher.tick()
    assert engine.ways == [False]

    for _ in range(2):
        world.restart()
        world.dispatcher.tick()
        world.dispatcher.tick()

    assert engine.ways == [False]


def test_a_restarted_server_tells_a_job_that_did_not_hear_the_earlier_one(
    world: World, engine: FarEngine
) -> None:
    job = world.submit()
    world.dispatcher.tick()
    world.queue.request_cancel(job.id)
    engine.hears = False
    world.dispatcher.tick()
    engine.hears = True

    world.restart()
    world.dispatcher.tick()
    world.dispatcher.tick()

    assert engine.ways == [False, False]


def test_the_grace_of_a_job_goes_on_while_the_server_is_restarted(
    world: World, engine: FarEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = world.submit()
    world.dispatcher.tick()
    world.queue.request_cancel(job.id)
    world.dispatcher.tick()
    told_at = world.queue.told(job)[False]
    ways = []
    for later in (USUAL.grace - 5, USUAL.grace + 5, USUAL.grace + 10):
        monkeypatch.setattr(dispatch.time, "time", lambda later=later: told_at + later)
        engine.ways.clear()
        world.restart()
        world.dispatcher.tick()
        ways.append(engine.ways.copy())

    # An end at once loses nothing by being told again, and heals one that came to nothing.
    assert ways == [[], [True], [True]]


def test_a_job_that_an_earlier_server_told_to_end_is_not_told_again_when_this_one_ends(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaf = "trap '' TERM; echo begun >>$FAKE_LOG; until test -e ../end; do sleep 0.05; done"
    world.command = ("/bin/sh", "-c", deaf + "; exit 75")
    world.restart()
    job = world.submit()
    world.until(lambda: world.starts() != [])
    hurry = threading.Event()
    hurry.set()
    world.dispatcher.close(hurry)
    assert set(world.queue.told(job)) == {False}

    world.restart()
    asked: list[bool] = []

    def listen(id: str, *, at_once: bool) -> bool:
        asked.append(at_once)
        return True

    monkeypatch.setattr(world.backends[-1], "stop", listen)
    (world.root / "jobs" / "end").touch()
    world.dispatcher.close()

    assert (world.state(job), asked) == ("queued", [])


def test_what_was_handed_over_goes_on_when_the_server_ends(world: World, engine: FarEngine) -> None:
    job = world.submit()
    world.dispatcher.tick()

    world.dispatcher.close()

    assert (engine.stopped, world.state(job)) == ([], "running")


def test_trainings_elsewhere_do_not_wait_for_pictures_here(world: World, engine: FarEngine) -> None:
    world.places[0].lock.parent.mkdir()
    with open(world.places[0].lock, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        pictures, training = world.submit("generation"), world.submit()
        world.dispatcher.tick()

    assert (world.state(pictures), engine.taken) == ("queued", [training.id])


def test_time_that_a_job_waits_elsewhere_is_not_time_that_it_runs(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(limits=Limits(wall=0.1))
    world.engine = engine = FarEngine()
    world.restart()
    monkeypatch.setattr(engine, "standing", lambda id: Standing("waiting"))
    world.submit()
    world.dispatcher.tick()
    time.sleep(0.2)

    world.dispatcher.tick()

    assert engine.stopped == []


def test_an_interrupted_job_is_not_late_when_it_waits_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_EXIT", "75")
    job = world.submit(start_by=time.time() + 0.5)
    world.until(lambda: len(world.starts()) >= 2 and time.time() > (job.start_by or 0))
    monkeypatch.delenv("FAKE_EXIT")

    world.until_over(job)

    assert world.state(job) == "done"


def test_nothing_begins_once_the_server_is_to_end(world: World) -> None:
    world.dispatcher.wind_down()
    job = world.submit()

    world.dispatcher.tick()

    assert world.state(job) == "queued"


def test_a_wait_for_trainings_can_be_ended_and_the_next_server_goes_on_with_them(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.command = ("/bin/sh", "-c", "trap '' TERM; echo x >>$FAKE_LOG; sleep 1.5")
    world.restart()
    job = world.submit()
    world.until(lambda: world.starts() != [])
    hurry = threading.Event()
    hurry.set()

    began = time.monotonic()
    world.dispatcher.close(hurry)

    assert time.monotonic() - began < 1
    assert world.state(job) == "running"


def test_pictures_that_an_earlier_server_gave_away_can_be_cancelled(world: World) -> None:
    sleeper = slots.spawn(
        ["sleep", "60"],
        locks=[world.places[0].lock],
        log=world.root / "log",
        environment=dict(os.environ),
    )
    job = world.submit("generation")
    world.queue.start(job, world.places[0].name)
    world.queue.request_cancel(job.id)
    world.until(lambda: slots.process_of(world.places[0].lock) is not None)

    world.until_over(job)

    assert world.state(job) == "cancelled"
    assert sleeper.wait(10) == -signal.SIGKILL


def test_inference_that_does_not_leave_is_ended_so_that_a_training_begins(
    make_world: MakeWorld,
) -> None:
    world = make_world(limits=Limits(grace=0.2))
    program = (
        "import pathlib, runpy, time\n"
        f"fake = runpy.run_path({str(FAKE)!r})\n"
        "fake['generate'](pathlib.Path(input()))\n"
        "time.sleep(60)\n"
    )
    world.generate, world.idle_seconds = (sys.executable, "-c", program), 1000
    world.restart()
    pictures, training = world.submit("generation"), world.submit()

    world.until_over(pictures, training)

    assert [world.state(job) for job in (pictures, training)] == ["done", "done"]


def test_the_run_folder_is_there_before_a_training_so_that_a_refusal_stays_in_it(
    tmp_path: Path,
) -> None:
    world = World(tmp_path)
    world.engine = FarEngine()
    world.restart()
    job = world.submit()

    world.dispatcher.tick()

    assert world.folders.of(job.id).run.root.is_dir()
