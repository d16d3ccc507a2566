"""Several processes that train together: one cause, one writer, nothing done twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rank_jobs import AFTERWARDS, Job, Zygote
from tiny import TWO_LAYERS, digests

from trainer.job import RunFolder

# Longer than any step and than another process's start on a busy machine.
TIMEOUT = 15


@pytest.fixture
def arguments(sd15_folder: Path, photo_folder: Path) -> list[str]:
    """A training that is over long after its fault."""
    values = f"train --model-url {sd15_folder} --images-data-url {photo_folder} --rank 4"
    fixed = f"--tensorboard false --max-train-steps 400 --rank-timeout {TIMEOUT}"
    few = ["--target-unet-modules", ",".join(TWO_LAYERS["target_unet_modules"])]
    return [*values.split(), *fixed.split(), *few]


def starting(zygote: Zygote, arguments: list[str], folder: Path, **more: Any) -> Job:
    """A training of these arguments into this folder."""
    return zygote.start([*arguments, "--output", str(folder)], folder, **more)


def test_a_process_that_raises_ends_all_with_its_cause(
    zygote: Zygote, arguments: list[str], tmp_path: Path, figure: Callable[[str], None]
) -> None:
    job = starting(zygote, arguments, tmp_path / "run", TRAINER_FAULT="rankfail@3")
    assert job.ended() == [1, 1]
    result = job.result()
    assert (result["error_kind"], result["exit_code"], result["step"]) == ("internal", 1, 2)
    assert "process 1 on" in result["error"]
    assert "this process fails, as TRAINER_FAULT asks for" in result["error"]
    assert job.said(0).count("error[") == 1
    figure("its message and exit code in result.json")


def test_a_killed_process_ends_all_and_the_same_command_goes_on_to_equal_bytes(
    zygote: Zygote, arguments: list[str], tmp_path: Path, figure: Callable[[str], None]
) -> None:
    short = [word if word != "400" else "8" for word in arguments]
    arguments = [*short, "--checkpointing-steps", "2"]
    job = starting(zygote, arguments, tmp_path / "run")
    job.at_step(3)
    os.kill(job.pids[1], signal.SIGKILL)
    job.stop_by_launcher(0)
    assert job.ended(AFTERWARDS) == [7, -signal.SIGKILL]
    result = job.result()
    assert (result["error_kind"], result["exit_code"]) == ("process", 7)
    assert "process 1 on" in result["error"]
    assert "died or was killed" in result["error"]

    for name in ("run", "whole"):
        done = starting(zygote, arguments, tmp_path / name)
        assert done.ended() == [0, 0], done.said()
    assert digests(tmp_path / "run/outputs") == digests(tmp_path / "whole/outputs")
    figure("the cause told, then equal bytes")


# Without an agent, the processes' store stands still with the main process.
@pytest.mark.thorough
@pytest.mark.parametrize(("rank", "agent"), [(1, False), (0, True), (0, False)])
def test_a_process_that_stands_still_ends_all_within_rank_timeout(
    rank: int,
    agent: bool,
    zygote: Zygote,
    arguments: list[str],
    tmp_path: Path,
    figure: Callable[[str], None],
) -> None:
    job = starting(zygote, arguments, tmp_path / "run", agent=agent)
    job.at_step(2)
    os.kill(job.pids[rank], signal.SIGSTOP)
    took = job.until((tmp_path / "run/result.json").exists, TIMEOUT + AFTERWARDS)
    assert job.ended(AFTERWARDS) == [7, 7]
    assert job.result()["error_kind"] == "process"
    assert f"process {rank} o" in job.result()["error"]
    figure(f"{took:.0f} s at rank_timeout {TIMEOUT} s")


def test_the_death_of_the_main_process_is_told_by_another(
    zygote: Zygote, arguments: list[str], tmp_path: Path, figure: Callable[[str], None]
) -> None:
    job = starting(zygote, arguments, tmp_path / "run")
    job.at_step(2)
    os.kill(job.pids[0], signal.SIGKILL)
    assert job.ended(AFTERWARDS) == [-signal.SIGKILL, 7]
    assert job.result()["error_kind"] == "process"
    assert "process 0" in job.result()["error"]
    assert "error[process]" in job.said(1)
    figure("result.json by process 1")


# The main thread sleeps once pictures were opened often, in its steps; the watch goes on.
HANGING = """
import sys, time
seen = []
def hook(event, arguments):
    if event == "open" and "prepared" in str(arguments[0]) and str(arguments[0]).endswith(".png"):
        seen.append(1)
        if len(seen) > 20:
            time.sleep(1000)
sys.addaudithook(hook)
"""


@pytest.mark.thorough
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_hangs_ends_all_and_is_named_with_what_it_was_at(
    rank: int,
    zygote: Zygote,
    arguments: list[str],
    tmp_path: Path,
    figure: Callable[[str], None],
) -> None:
    live = ["--cache-latents", "false"]
    job = starting(zygote, [*arguments, *live], tmp_path / "run", hooks={rank: HANGING})
    took = job.until((tmp_path / "run/result.json").exists, 60 + TIMEOUT + AFTERWARDS)
    job.ended(AFTERWARDS)
    result = job.result()
    assert (result["error_kind"], result["exit_code"]) == ("process", 7)
    assert f"process {rank} on" in result["error"]
    assert "did not come to step" in result["error"]
    figure(f"{took:.0f} s with start-up, rank_timeout {TIMEOUT} s")


# Every path that is opened for writing, renamed or removed, and what encodes.
WATCHED = """
import atexit, os, sys
from trainer import encoding
os.environ["XDG_CACHE_HOME"] = EMPTY
out = os.open(PATH, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
def note(*words):
    os.write(out, (" ".join(map(str, words)) + "\\n").encode())
def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            note("write", arguments[0])
    elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
        note("write", arguments[0])
sys.addaudithook(hook)
from trainer.families import sd15
def counted(name):
    inner = getattr(sd15.FAMILY, name)
    def outer(self, *given):
        note(name)
        return inner(self, *given)
    setattr(sd15.FAMILY, name, outer)
counted("encode_text"); counted("encode_image")
"""


def test_one_process_writes_and_each_encodes_its_share(
    zygote: Zygote, arguments: list[str], tmp_path: Path, figure: Callable[[str], None]
) -> None:
    short = [word if word != "400" else "4" for word in arguments]
    watched = WATCHED.replace("EMPTY", repr(f"{tmp_path}/cache"))
    hooks = {rank: watched.replace("PATH", repr(f"{tmp_path}/seen.{rank}")) for rank in (0, 1)}
    job = starting(zygote, short, tmp_path / "run", hooks=hooks)
    assert job.ended() == [0, 0], job.said()
    lines = [Path(f"{tmp_path}/seen.{rank}").read_text().splitlines() for rank in (0, 1)]
    places = (str(tmp_path / "run") + "/", "cache")
    written = [
        [line for line in of_one if line.startswith("write") and any(p in line for p in places)]
        for of_one in lines
    ]
    assert len(written[0]) > 10
    assert written[1] == []
    shares = [[of_one.count(name) for of_one in lines] for name in ("encode_text", "encode_image")]
    assert all(abs(first - second) <= 1 for first, second in shares), shares
    assert all(sum(share) > 0 for share in shares)
    figure(f"encoded {shares[0]} captions, {shares[1]} pictures")


def pictures_told(folder: Path) -> list[tuple[int, int]]:
    """Step and number of the pictures on the way, as a run's log tells of them."""
    told = [event for event in RunFolder(folder).read_events() if event["event"] == "sample"]
    return [(event["step"], event["number"]) for event in told]


def test_processes_share_the_pictures_on_the_way(
    zygote: Zygote, arguments: list[str], tmp_path: Path, figure: Callable[[str], None]
) -> None:
    short = [word if word != "400" else "2" for word in arguments]
    prompts = ["--validation-prompts", json.dumps(["a TOK", "a dog", "a cat"])]
    looked = [*short, *prompts, "--sample-inference-steps", "2", "--validation-images", "1"]
    counting = [
        f"""
from trainer import previews
made = previews.sample_encoded
def counted(*given, **named):
    with open({str(tmp_path / f"made.{rank}")!r}, "a") as file:
        file.write(named["told"] + "\\n")
    return made(*given, **named)
previews.sample_encoded = counted
"""
        for rank in (0, 1)
    ]
    job = starting(zygote, looked, tmp_path / "run", hooks=dict(enumerate(counting)))
    assert job.ended() == [0, 0], job.said()
    made = [(tmp_path / f"made.{rank}").read_text().splitlines() for rank in (0, 1)]
    assert made == [["a TOK", "a cat"] * 2, ["a dog"] * 2]
    samples = RunFolder(tmp_path / "run").samples
    pictures = {path.relative_to(samples).as_posix() for path in samples.rglob("*.png")}
    assert pictures == {f"{step}/{n}.png" for step in ("000000", "000002") for n in range(3)}
    assert pictures_told(tmp_path / "run") == [(step, n) for step in (0, 2) for n in range(3)]
    figure(f"pictures {len(made[0])} and {len(made[1])}")


@pytest.mark.parametrize("who", ["the other", pytest.param("both", marks=pytest.mark.thorough)])
def test_a_wish_to_stop_of_any_process_leaves_a_checkpoint(
    who: str,
    zygote: Zygote,
    arguments: list[str],
    tmp_path: Path,
    figure: Callable[[str], None],
) -> None:
    job = starting(zygote, arguments, tmp_path / "run")
    job.at_step(2)
    for pid in job.pids if who == "both" else job.pids[1:]:
        os.kill(pid, signal.SIGTERM)
    assert job.ended(AFTERWARDS) == [75, 75]
    result = job.result()
    assert (result["status"], result["exit_code"]) == ("interrupted", 75)
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == [f"step-{result['step']}"]
    figure("exit 75, checkpoint of the last step")


# Is asked to stop while it makes its first picture after step 2: before it, two of the base model.
ASKED = """
import os, signal
from trainer import previews
made, calls = previews.sample_encoded, []
def asked(*given, **named):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return made(*given, **named)
previews.sample_encoded = asked
"""


@pytest.mark.slow
def test_a_wish_to_stop_of_one_process_cuts_the_pictures_of_all_short(
    zygote: Zygote, arguments: list[str], tmp_path: Path, figure: Callable[[str], None]
) -> None:
    short = [word if word != "400" else "4" for word in arguments]
    prompts = ["--validation-prompts", json.dumps(["a TOK", "a dog", "a cat", "a cup", "a car"])]
    looked = [*short, *prompts, "--sample-inference-steps", "2", "--sample-steps", "2"]
    job = starting(zygote, looked, tmp_path / "run", hooks={1: ASKED})
    assert job.ended() == [75, 75], job.said()
    assert job.result()["error"] == "stopped after step 2 of 4; its checkpoint is kept"
    places = [(step, number) for step in (0, 2, 4) for number in range(5)]
    assert pictures_told(tmp_path / "run") == places[:7]

    for name in ("run", "whole"):
        done = starting(zygote, looked, tmp_path / name)
        assert done.ended() == [0, 0], done.said()
        assert pictures_told(tmp_path / name) == places
    for folder in ("outputs", "samples"):
        assert digests(tmp_path / "run" / folder) == digests(tmp_path / "whole" / folder) != {}
    figure("2 of 5 pictures, then the others, equal bytes")


# Ends its process when it opens what lies below a folder.
DYING = """
import os, signal, sys
def hook(event, arguments):
    if event == "open" and PLACE in str(arguments[0]):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
"""
WITH_CLASS = ["--with-prior-preservation", "--photo-class", "Man", "--num-class-images", "3"]


@pytest.mark.parametrize(
    ("rank", "place"),
    [
        (0, "/outputs/"),
        *(
            pytest.param(*case, marks=pytest.mark.thorough)
            for case in [
                (0, "/prepared/"),
                (1, "/prepared/"),
                (0, "/class_images/"),
                (1, "/class_images/"),
                (0, "/checkpoints/"),
            ]
        ),
    ],
)
def test_a_process_that_dies_outside_of_steps_ends_all_with_its_cause(
    rank: int,
    place: str,
    zygote: Zygote,
    arguments: list[str],
    tmp_path: Path,
    figure: Callable[[str], None],
) -> None:
    short = [word if word != "400" else "2" for word in arguments]
    of_class = [*WITH_CLASS, "--class-inference-steps", "2"] if "class" in place else []
    hooks = {rank: DYING.replace("PLACE", repr(place))}
    job = starting(zygote, [*short, *of_class], tmp_path / "run", hooks=hooks)
    job.until(lambda: job.pids[rank] in zygote.codes(), 120)
    other = 1 - rank
    job.stop_by_launcher(other)
    codes = job.ended(AFTERWARDS)
    assert (codes[rank], codes[other]) == (-signal.SIGKILL, 7), job.said()
    result = job.result()
    assert (result["error_kind"], result["exit_code"]) == ("process", 7)
    assert f"process {rank} o" in result["error"]
    assert "Traceback" not in job.said()
    figure(result["error"].split("; ")[-1])


# Longer than another process is waited for, and than a blocked main thread after it.
WRITES = 25
WRITING_SLOWLY = f"""
import sys, time
seen = []
def hook(event, arguments):
    if event == "open" and "/checkpoints/.tmp" in str(arguments[0]) and not seen:
        seen.append(1)
        time.sleep({WRITES})
sys.addaudithook(hook)
"""


@pytest.mark.thorough
def test_a_process_that_dies_while_another_writes_a_checkpoint_leaves_it_whole(
    zygote: Zygote, arguments: list[str], tmp_path: Path, figure: Callable[[str], None]
) -> None:
    more = ["--checkpointing-steps", "2", "--rank-timeout", "60"]
    job = starting(zygote, [*arguments, *more], tmp_path / "run", hooks={0: WRITING_SLOWLY})
    job.until(lambda: any((tmp_path / "run").glob("checkpoints/.tmp*")), 120)
    os.kill(job.pids[1], signal.SIGKILL)
    job.stop_by_launcher(0)
    assert job.ended(WRITES + AFTERWARDS) == [7, -signal.SIGKILL], job.said()
    assert "process 1 on" in job.result()["error"]
    assert (tmp_path / "run/checkpoints/step-2/manifest.json").exists()
    assert not any((tmp_path / "run").glob("checkpoints/.tmp*"))
    figure("published, then the cause")


# A process that may write no more than a little to a file, once it opens one in this place.
NO_ROOM = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def hook(event, arguments):
    if event == "open" and PLACE in str(arguments[0]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
sys.addaudithook(hook)
"""


@pytest.mark.thorough
@pytest.mark.parametrize(("place", "steps"), [("/checkpoints/", "2"), ("/events.jsonl", "400")])
def test_a_full_disk_of_the_process_that_writes_ends_all(
    place: str,
    steps: str,
    zygote: Zygote,
    arguments: list[str],
    tmp_path: Path,
    figure: Callable[[str], None],
) -> None:
    given = [word if word != "400" else steps for word in arguments]
    no_room = NO_ROOM.replace("PLACE", repr(place))
    job = starting(zygote, given, tmp_path / "run", hooks={0: no_room})
    assert job.ended() == [5, 5], job.said()
    assert (job.result()["error_kind"], job.result()["exit_code"]) == ("disk", 5)
    assert job.said().count("error[") == 1
    figure("exit 5 of both, told once")


@pytest.mark.thorough
def test_memory_that_runs_out_in_another_process_is_told_with_the_step_to_go_on_from(
    zygote: Zygote, arguments: list[str], tmp_path: Path, figure: Callable[[str], None]
) -> None:
    given = [word if word != "400" else "8" for word in arguments]
    fault = "import os; os.environ['TRAINER_FAULT'] = 'oom@4'"
    checkpoints = ["--checkpointing-steps", "2"]
    job = starting(zygote, [*given, *checkpoints], tmp_path / "run", hooks={1: fault})
    assert job.ended() == [4, 4], job.said()
    assert "of which step 2 is in a checkpoint" in job.result()["error"]
    figure("exit 4 of both, step 2 named")


@pytest.mark.parametrize(
    "wrong",
    ["before they meet", pytest.param("in the main process", marks=pytest.mark.thorough)],
)
def test_what_is_wrong_with_the_input_is_told_once(
    wrong: str,
    zygote: Zygote,
    arguments: list[str],
    tmp_path: Path,
    figure: Callable[[str], None],
) -> None:
    (tmp_path / "empty").mkdir()
    wrongs = {
        "before they meet": ["--rank", "0"],
        "in the main process": ["--images-data-url", str(tmp_path / "empty")],
    }
    job = starting(zygote, [*arguments, *wrongs[wrong]], tmp_path / "run")
    assert job.ended(AFTERWARDS) == [2, 2]
    assert job.said().count("error[input]") == 1, job.said()
    assert not (tmp_path / "run").exists()
    figure("exit 2 of both")


@pytest.mark.thorough
def test_processes_that_are_refused_a_folder_leave_the_training_in_it_alone(
    zygote: Zygote, arguments: list[str], tmp_path: Path, figure: Callable[[str], None]
) -> None:
    first = starting(zygote, arguments, tmp_path / "run")
    first.at_step(2)
    same = [*arguments, "--output", str(first.folder)]
    second = zygote.start(same, tmp_path / "second", agent=True)
    second.until(lambda: second.pids[0] in zygote.codes(), 60)
    os.kill(second.pids[1], signal.SIGTERM)
    assert second.ended(AFTERWARDS) == [2, 75]
    assert second.said().count("error[") == 1, second.said()
    assert not (tmp_path / "run/result.json").exists()
    os.kill(first.pids[0], signal.SIGTERM)
    assert first.ended(AFTERWARDS) == [75, 75]
    figure("one message, no result")


# The VAE overflows on the black picture, and the process that saw it leaves a mark.
OVERFLOWING = """
import torch
from diffusers.models.autoencoders.vae import Encoder
def hook(module, given, output):
    if isinstance(module, Encoder) and float(given[0].max()) < -0.9:
        open(MARK, "w").close()
        return output * float("nan")
torch.nn.modules.module.register_module_forward_hook(hook)
"""


@pytest.mark.parametrize("cached", ["false", pytest.param("true", marks=pytest.mark.thorough)])
def test_what_is_not_finite_in_another_process_is_told_by_its_picture(
    cached: str,
    zygote: Zygote,
    arguments: list[str],
    tmp_path: Path,
    figure: Callable[[str], None],
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    given = Path(arguments[arguments.index("--images-data-url") + 1])
    for number in (0, 2, 3):
        shutil.copy(given / f"photo_{number}.jpg", photos)
    Image.new("RGB", (512, 512)).save(photos / "photo_1.jpg")
    hooks = {r: OVERFLOWING.replace("MARK", repr(f"{tmp_path}/seen.{r}")) for r in (0, 1)}
    own = ["--images-data-url", str(photos), "--cache-latents", cached]
    job = starting(zygote, [*arguments, *own], tmp_path / "run", hooks=hooks)
    assert job.ended() == [3, 3], job.said()
    assert [(tmp_path / f"seen.{rank}").exists() for rank in (0, 1)] == [False, True]
    assert job.result()["error_kind"] == "non-finite"
    assert "photo_1.jpg" in job.result()["error"]
    assert not any(f"photo_{number}" in job.result()["error"] for number in (0, 2, 3))
    assert job.said().count("error[") == 1
    figure("the picture of process 1")
