"""What clients are told of a running job: lines that are only ever added, share and time left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.server.progress import ProgressReader

RUN = {
    "event": "run",
    "start_step": 0,
    "total_steps": 1000,
    "steps_per_epoch": 10,
    "num_examples": 20,
    "num_pictures": 10,
    "time": 0,
}


def step(number: int, seconds: float = 2.0) -> dict[str, Any]:
    return {"event": "step", "step": number, "loss": 0.5, "seconds": seconds, "time": 60}


@pytest.fixture
def events(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def say(events: Path, *said: dict[str, Any]) -> None:
    with open(events, "a") as file:
        file.writelines(json.dumps(event) + "\n" for event in said)


def messages(reader: ProgressReader, events: Path) -> list[str]:
    return [line.message for line in reader.read(events).lines]


def test_before_a_job_says_anything_there_are_no_lines(events: Path) -> None:
    progress = ProgressReader().read(events)

    assert (progress.lines, progress.share, progress.seconds_left) == ([], 0.0, None)


def test_a_thousand_steps_are_about_a_hundred_lines(events: Path) -> None:
    say(events, RUN, *(step(number) for number in range(1, 1001)))

    said = messages(ProgressReader(), events)

    assert said[0] == "Training 1000 steps on 10 pictures"
    assert len(said) == 1 + 1 + 100, "the beginning, step 1, and every tenth step"
    assert said[-1] == "step 1000 of 1000, loss 0.5000"


def test_lines_are_only_added_as_the_log_grows(events: Path) -> None:
    reader = ProgressReader()
    say(events, RUN, step(1))
    before = messages(reader, events)

    say(events, *(step(number) for number in range(2, 30)))

    assert messages(reader, events)[: len(before)] == before
    assert messages(reader, events) == messages(ProgressReader(), events)


def test_a_line_that_is_half_written_waits(events: Path) -> None:
    reader = ProgressReader()
    say(events, RUN)
    whole = json.dumps(step(1)) + "\n"
    with open(events, "a") as file:
        file.write(whole[:20])
    assert len(messages(reader, events)) == 1

    with open(events, "a") as file:
        file.write(whole[20:])

    assert len(messages(reader, events)) == 2


def test_a_run_that_takes_back_steps_is_read_anew(events: Path) -> None:
    reader = ProgressReader()
    say(events, RUN, *(step(number) for number in range(1, 41)))
    assert reader.read(events).step == 40
    events.write_text("")
    say(events, {**RUN, "start_step": 20})

    progress = reader.read(events)

    assert progress.step == 20
    assert progress.lines[0].message.endswith("going on from step 20")


def test_share_and_time_left_follow_the_steps(events: Path) -> None:
    say(events, RUN, step(250, seconds=2.0))

    progress = ProgressReader().read(events)

    assert progress.share == 0.25
    assert progress.seconds_left == 1500.0, "750 steps of 2 s"


def test_the_time_left_counts_the_pictures_that_are_still_to_be_made(events: Path) -> None:
    reader = ProgressReader()
    sample = {"event": "sample", "step": 0, "number": 0, "prompt": "a cup", "path": "p", "time": 0}
    say(events, RUN, {**sample, "seconds": 4.0, "left": 5}, step(250, seconds=2.0))
    assert reader.read(events).seconds_left == 1520.0, "750 steps of 2 s, 5 pictures of 4 s"

    note = {"note": "warning", "field": "validation_prompts", "message": "no memory", "time": 0}
    say(events, {"event": "note", **note})

    assert reader.read(events).seconds_left == 1500.0


def test_a_log_that_does_not_tell_how_long_pictures_take_has_steps_alone(events: Path) -> None:
    sample = {"event": "sample", "step": 0, "number": 0, "prompt": "a cup", "path": "p", "time": 0}
    say(events, RUN, sample, step(250, seconds=2.0))

    assert ProgressReader().read(events).seconds_left == 1500.0


def test_lines_have_their_time_in_utc_and_warnings_their_level(events: Path) -> None:
    note = {"event": "note", "note": "warning", "field": "rank", "message": "is large", "time": 60}
    say(events, note)

    (line,) = ProgressReader().read(events).lines

    assert line.time == "1970-01-01T00:01:00+00:00"
    assert (line.level, line.message) == ("WARN", "warning: rank is large")


def test_a_stage_is_told_when_it_begins_and_ends(events: Path) -> None:
    stage = {"event": "stage", "stage": "prepare", "total": 3, "time": 0}
    say(events, *({**stage, "done": done} for done in (0, 1, 2, 3)))

    assert messages(ProgressReader(), events) == ["prepare: 0 of 3", "prepare: 3 of 3"]


def test_an_event_of_a_kind_that_nobody_knows_is_no_line(events: Path) -> None:
    say(events, {"event": "new kind", "time": 0})

    assert messages(ProgressReader(), events) == []


def test_a_log_that_is_written_anew_is_read_anew_also_where_it_is_longer(events: Path) -> None:
    reader = ProgressReader()
    say(events, RUN, step(1))
    assert reader.read(events).step == 1
    other = events.with_name("other")
    say(other, {**RUN, "start_step": 500}, *(step(number) for number in range(501, 700)))
    other.replace(events)

    assert reader.read(events).step == 699
    assert messages(reader, events)[0].endswith("going on from step 500")


def test_a_line_that_a_loss_of_power_spoilt_is_passed_over(events: Path) -> None:
    say(events, RUN)
    with open(events, "ab") as file:
        file.write(b"\0\0\0\n")
    say(events, step(1000))

    assert len(messages(ProgressReader(), events)) == 2


def test_of_options_that_nobody_set_it_is_not_told_that_they_have_no_effect(events: Path) -> None:
    note = {"event": "note", "note": "ignored", "message": "has no effect", "time": 0}
    fields = ("rank", "lokr_factor", "request.foo")
    say(events, *({**note, "field": field} for field in fields))

    def told(reader: ProgressReader, chosen: set[str] | None) -> list[str]:
        lines = reader.read(events, lambda: chosen).lines
        return [line.message.split()[1] for line in lines]

    assert told(ProgressReader(), {"rank"}) == ["rank", "request.foo"]
    assert told(ProgressReader(), None) == list(fields)
