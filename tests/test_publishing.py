"""A result goes to the hub where that is asked for, and nothing else does; a stand-in plays it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from stand_in_hub import READS_ONLY, TOKEN, Hub, Repository, stand_in_hub
from tiny import TWO_LAYERS, never

from trainer import publishing
from trainer.cli import run
from trainer.config import TrainingConfig
from trainer.errors import InputError
from trainer.events import Event, FileEvent, NoteEvent, PublishedEvent, StageEvent
from trainer.job import RunFolder
from trainer.publishing import published
from trainer.resolve import Layer, resolve
from trainer.runner import Stop, supervise

FILES = {
    "README.md": b"---\nlibrary_name: diffusers\n---\n# anna\n",
    "unet/diffusion_pytorch_model.safetensors": b"weights" * 1000,
    "lora.safetensors": b"adapter" * 1000,
}
PHOTOGRAPHS = {"debug_dataset.zip": "debug_dataset", "debug_masks.zip": "debug_masks"}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with stand_in_hub(tmp_path / "hub") as hub:
        yield hub


def wanting(**leaves: Any) -> TrainingConfig:
    """A configuration that asks for the hub."""
    leaves = {"images_data_url": "photos", "push_to_hub": True, "output_name": "me"} | leaves
    return resolve([Layer("test", leaves, explicit=True)])


def finished(_: TrainingConfig, folder: RunFolder, __: Stop) -> Iterator[Event]:
    """An engine that is done at once, with these files."""
    for name, content in FILES.items():
        path = folder.outputs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        role = "model_card" if name == "README.md" else "diffusers_lora"
        yield FileEvent(role, f"outputs/{name}")
    for name, role in PHOTOGRAPHS.items():
        (folder.outputs / name).write_bytes(b"faces")
        yield FileEvent(role, f"outputs/{name}")


def events_of(config: TrainingConfig, root: Path, stop: Stop = never) -> list[Event]:
    return list(published(finished, config, stop)(config, RunFolder(root), stop))


def remarks(events: list[Event]) -> list[NoteEvent]:
    return [event for event in events if isinstance(event, NoteEvent)]


def test_all_result_files_but_photographs_are_one_commit_to_a_private_repository(
    hub: Hub, tmp_path: Path
) -> None:
    events = events_of(wanting(), tmp_path / "run")

    (repository,) = hub.repositories.values()
    assert list(hub.repositories) == ["anna/me"]
    assert repository.private
    assert repository.files == FILES
    assert len(repository.commits) == 1
    assert repository.commits[0].startswith("me, trained with tok-trainer ")
    assert events[-3:] == [
        StageEvent("upload", 0, 3),
        StageEvent("upload", 3, 3),
        PublishedEvent("anna/me", f"{hub.address}/anna/me/commit/{'1':0>40}", private=True),
    ]


def test_nothing_is_asked_of_the_hub_where_nobody_wants_it(hub: Hub, tmp_path: Path) -> None:
    events = events_of(wanting(push_to_hub=False), tmp_path)

    assert hub.requests == []
    assert all(isinstance(event, FileEvent) for event in events)


def test_only_the_first_of_several_processes_speaks_to_the_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")

    events_of(wanting(), tmp_path)

    assert hub.requests == []


def test_a_repository_may_be_of_another_owner_and_public(hub: Hub, tmp_path: Path) -> None:
    events_of(wanting(hub_model_id="a.studio/Anna-1", hub_private=False), tmp_path)

    assert {name: one.private for name, one in hub.repositories.items()} == {
        "a.studio/Anna-1": False
    }


def test_a_later_run_adds_a_commit_to_the_same_repository(hub: Hub, tmp_path: Path) -> None:
    for number in range(2):
        events_of(wanting(), tmp_path / str(number))

    assert len(hub.repositories["anna/me"].commits) == 2


def refusal(config: TrainingConfig) -> str:
    """What is said before a training begins."""

    def never_run(*_: Any) -> Iterator[Event]:
        raise AssertionError

    with pytest.raises(InputError) as error:
        published(never_run, config, never)
    return str(error.value)


def test_without_a_token_it_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with stand_in_hub(tmp_path, token=None) as hub:
        said = refusal(wanting())

    assert said == (
        "error[input]: `push_to_hub`: there is no token of the Hugging Face hub here\n"
        "  hint: run `hf auth login`, or set HF_TOKEN; or leave --push-to-hub out"
    )
    assert hub.requests == []


def test_a_token_that_the_hub_does_not_know_is_refused_and_not_told(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_somebodyElses")

    said = refusal(wanting())

    assert f"{hub.address} does not know this token" in said
    assert "somebodyElses" not in said


def test_a_token_that_may_only_read_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", READS_ONLY)

    assert "`push_to_hub`: the token may only read" in refusal(wanting())
    assert hub.repositories == {}


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_it_is_refused_by_name(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv(variable, "1")

    assert "nothing can be sent: HF_HUB_OFFLINE is set" in refusal(wanting())
    assert hub.requests == []


def test_nothing_private_goes_to_a_repository_that_others_see(hub: Hub) -> None:
    hub.repositories["anna/me"] = Repository(private=False)

    said = refusal(wanting())

    assert "`hub_private`: `anna/me` is there already, and everybody can see it" in said


def test_a_repository_that_was_made_public_during_the_training_gets_nothing(
    hub: Hub, tmp_path: Path
) -> None:
    config = wanting()
    engine = published(finished, config, never)
    hub.repositories["anna/me"] = Repository(private=False)

    events = list(engine(config, RunFolder(tmp_path), never))

    assert hub.repositories["anna/me"].files == {}
    (note,) = remarks(events)
    assert note.field == "hub_private"
    assert "its result is not on the hub: `anna/me` is there already" in note.message


NAMES = ["a--b", "a..b", "-a", "a.", "a/b/c", "a b", "", "ä", "a" * 97, "a/", "/a"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_the_hub_does_not_allow_is_refused_with_the_configuration(name: str) -> None:
    with pytest.raises(HFValidationError):
        validate_repo_id(name)

    with pytest.raises(InputError, match="`hub_model_id`: got"):
        wanting(hub_model_id=name, push_to_hub=False)


@pytest.mark.parametrize("name", ["me", "anna/me", "a.b/c_d-e", "0", "_a", "a" * 96])
def test_a_name_that_the_hub_allows_is_taken(name: str) -> None:
    validate_repo_id(name)

    assert wanting(hub_model_id=name).output.hub_model_id == name


@pytest.mark.parametrize("name", ["My result", "me.git", "me."])
def test_an_output_name_that_is_no_name_on_the_hub_needs_another(name: str) -> None:
    with pytest.raises(InputError, match=f"`hub_model_id`: got `{name}`, which the hub does not"):
        wanting(output_name=name)

    assert wanting(output_name=name, hub_model_id="me").output.output_name == name


def test_a_hub_out_of_reach_is_told_before_and_after_the_training_and_loses_nothing(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nobody listens at port 1.
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")

    events = events_of(wanting(), tmp_path / "run")

    before, after = remarks(events)
    assert events[0] == before
    assert before.message.startswith("the hub could not be asked before the training: ")
    assert "its result is not on the hub" in after.message
    line = (
        f"hf repos create me --private && hf upload me {tmp_path}/run/outputs . --private --exclude"
    )
    assert line in after.message
    assert (tmp_path / "run/outputs/lora.safetensors").read_bytes() == FILES["lora.safetensors"]


def test_a_hub_that_says_nothing_is_not_waited_for(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "CHECK_SECONDS", 0.0)
    monkeypatch.setattr(publishing, "_POLL_SECONDS", 0.01)

    note = remarks(events_of(wanting(), tmp_path))[0]

    assert "it was stopped, or took too long" in note.message


def test_a_failed_upload_leaves_the_run_done_and_says_what_to_do(hub: Hub, tmp_path: Path) -> None:
    config, folder = wanting(), RunFolder(tmp_path / "run")
    hub.refusing = 507
    heard: list[Event] = []

    class Ear:
        def hear(self, event: Event) -> None:
            heard.append(event)

        def __enter__(self) -> Ear:
            return self

        def __exit__(self, *_: object) -> None:
            return None

    result = supervise(
        config, folder, [Ear()], engine=published(finished, config, never), stop=never
    )

    assert (result.status, result.exit_code, result.published) == ("done", 0, None)
    assert len(result.files) == len(FILES) + len(PHOTOGRAPHS)
    (note,) = remarks(heard)
    assert (note.note, note.field) == ("warning", "push_to_hub")
    assert "507" in note.message
    assert "to send it later: hf upload anna/me " in note.message
    assert hub.repositories["anna/me"].files == {}


def send_later(events: list[Event]) -> subprocess.CompletedProcess[str]:
    """Does what the warning at the end of a run says, in a shell."""
    line = re.split(r"to send it later(?: \(.*\))?: ", remarks(events)[-1].message)[-1]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["/bin/sh", "-c", line],
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("is_made", [True, False], ids=["is there", "is not there"])
def test_the_line_that_sends_later_makes_the_repository_that_was_asked_for(
    private: bool, is_made: bool, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As an organisation has it whose new repositories are of the other kind.
    hub.private = not private
    with monkeypatch.context() as patch:
        if is_made:
            hub.refusing = 507
        else:
            # Nobody listens at port 1.
            patch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
        events = events_of(wanting(hub_private=private), tmp_path / "run")
        hub.refusing = 0
    assert ("anna/me" in hub.repositories) == is_made

    done = send_later(events)

    assert done.returncode == 0, done.stderr
    assert {name: one.private for name, one in hub.repositories.items()} == {"anna/me": private}
    assert hub.repositories["anna/me"].files == FILES


def test_the_line_that_sends_later_sends_nothing_private_to_what_everybody_sees(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["anna/me"] = Repository(private=False)
    with monkeypatch.context() as patch:
        patch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
        events = events_of(wanting(), tmp_path / "run")

    done = send_later(events)

    assert done.returncode != 0
    assert hub.repositories["anna/me"] == Repository(private=False)


def test_a_wish_to_stop_ends_an_upload_of_which_nothing_is_seen(hub: Hub, tmp_path: Path) -> None:
    hub.slow = 30.0
    began = time.monotonic()

    events = events_of(wanting(), tmp_path, lambda: any("PUT" in r for r in hub.requests))

    assert time.monotonic() - began < 20
    assert "it was stopped" in remarks(events)[0].message
    assert hub.repositories["anna/me"].commits == []


def test_no_token_is_told_whatever_a_library_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "of an unusual form")
    text = f"Illegal header value b'Bearer eyJhbGciOi' for {TOKEN}, of an unusual form"

    said = publishing._without_token(text)

    assert said == "Illegal header value b'Bearer …' for hf_…, …"


def program(path: Path, does: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something else in place of the program that asks the hub."""
    path.write_text(does)
    monkeypatch.setattr(publishing, "_PROGRAM", path)


def test_a_repository_may_be_called_like_a_token(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    events = events_of(wanting(hub_model_id="anna/hf_portrait"), tmp_path)

    assert list(hub.repositories) == ["anna/hf_portrait"]
    (event,) = [event for event in events if isinstance(event, PublishedEvent)]
    assert event.repository == "anna/hf_portrait"
    assert publishing._without_token("no anna/hf_portrait here") == "no anna/hf_portrait here"


def test_a_token_in_an_answer_is_left_out_and_the_answer_still_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = json.dumps({"status": "failed", "message": f'"{TOKEN}"', "hint": f"not {TOKEN}"})
    program(tmp_path / "program.py", f"print({answer!r})", monkeypatch)
    # A token that is part of JSON itself.
    monkeypatch.setenv("HF_TOKEN", '": "')

    events = events_of(wanting(), tmp_path / "run")

    assert '"hf_…"' in remarks(events)[0].message
    assert "not hf_…" in remarks(events)[1].message


@pytest.mark.parametrize(
    "does",
    [
        "",
        "print('no JSON')",
        "print('[]')",
        "print('null')",
        "print('{}')",
        """print('{"status": "ok"}')""",
        """print('{"status": "well"}')""",
        """print('{"status": ["ok"]}')""",
        """print('{"status": "refused", "message": "no"}')""",
        "import sys; sys.stdout.buffer.write(bytes([255, 254, 10]))",
        "import sys; sys.stderr.buffer.write(bytes([255, 254, 10])); sys.exit(1)",
        "import os; os.kill(os.getpid(), 9)",
    ],
)
def test_whatever_comes_of_the_upload_the_run_is_done(
    does: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "program.py", does, monkeypatch)

    events = events_of(wanting(), tmp_path / "run")

    before, after = remarks(events)
    assert "the hub could not be asked before the training" in before.message
    assert "the run is done, but its result is not on the hub" in after.message


def test_a_machine_on_which_no_program_can_be_started_any_more_keeps_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing.sys, "executable", str(tmp_path / "gone"))

    events = events_of(wanting(), tmp_path / "run")

    assert "nothing can be started for it" in remarks(events)[1].message


def test_an_upload_may_take_as_long_as_its_size_asks_for_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "program.py", "import time; time.sleep(60)", monkeypatch)
    monkeypatch.setattr(publishing, "CHECK_SECONDS", 0.0)
    monkeypatch.setattr(publishing, "UPLOAD_SECONDS", 0.0)
    size = sum(map(len, FILES.values()))
    monkeypatch.setattr(publishing, "UPLOAD_BYTES_PER_SECOND", float(size))
    began = time.monotonic()

    events = events_of(wanting(), tmp_path / "run")

    assert 1 <= time.monotonic() - began < 20
    assert "took too long" in remarks(events)[1].message


def test_a_wish_to_stop_ends_the_question_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "program.py", "import time; time.sleep(60)", monkeypatch)
    began = time.monotonic()

    published(finished, wanting(), lambda: True)

    assert time.monotonic() - began < 10


def test_a_token_in_a_configuration_is_refused_and_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"images_data_url: photos\nhub_token: {TOKEN}\n")

    assert run(["validate", str(file)]) == 2
    assert run(["validate", "--images-data-url", "photos", "--hub-token", TOKEN]) == 2

    said = "".join(capsys.readouterr())
    assert said.count("run `hf auth login`, or set HF_TOKEN") == 2
    assert TOKEN not in said


def test_a_sealed_training_that_is_to_be_published_is_refused_before_it_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--images-data-url", "photos", "--push-to-hub", "--output", str(tmp_path / "run")]

    assert run(["train", *flags, "--seal-network"]) == 2

    assert "`--seal-network`: shuts out the hub" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
def test_a_training_publishes_what_it_verified_and_its_token_stands_nowhere(
    hub: Hub,
    sd15_folder: Path,
    photo_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = {
        "model-url": sd15_folder,
        "images-data-url": photo_folder,
        "rank": 2,
        "max-train-steps": 1,
        "resolution-width": 64,
        "resolution-height": 64,
        "target-unet-modules": ",".join(TWO_LAYERS["target_unet_modules"]),
        "output": tmp_path / "run",
        "output-name": "me",
    }
    flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]

    code = run(["train", *flags, "--push-to-hub", "--debug-dataset", "--json"])

    said = capsys.readouterr()
    assert code == 0, said.err
    result = json.loads(said.out)
    assert result["published"].startswith(f"{hub.address}/anna/me/commit/")
    assert "on the hub, private: " in said.err
    outputs = tmp_path / "run" / "outputs"
    sent = hub.repositories["anna/me"].files
    local = {
        path.relative_to(outputs).as_posix(): path.read_bytes()
        for path in outputs.rglob("*")
        if path.is_file()
    }
    del local["debug_dataset.zip"]
    assert sent == local
    assert {"README.md", "verify.json", "me.safetensors"} <= sent.keys()
    written = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) > 10
    assert not any(TOKEN.encode() in content for content in [*written, said.err.encode()])
