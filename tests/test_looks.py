"""What is looked at between steps: it shows what is learnt, and changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from snapshots import composition, stopped_after
from tiny import TWO_LAYERS, configuration, digests, losses, never, train

from trainer import engine, sampling
from trainer.config import TrainingConfig
from trainer.data.holding import held_out
from trainer.errors import InputError, Interrupted, NonFiniteError
from trainer.estimate import estimate
from trainer.events import Event, MeasuresEvent, NoteEvent, SampleEvent, StepEvent
from trainer.inspection import inspect_pictures
from trainer.job import RunFolder
from trainer.listeners import EventLog
from trainer.looking import looks_of
from trainer.looks import NEVER, Moments
from trainer.validation import Measured, history_of, over_fitting

LOOKED: dict[str, Any] = {
    **TWO_LAYERS,
    "validation_prompts": ("a TOK, at home",),
    "sample_steps": 2,
    "sample_inference_steps": 2,
}
HELD_OUT: dict[str, Any] = {**TWO_LAYERS, "validation_images": 1, "validation_steps": 1}


def pixels(folder: Path) -> dict[str, bytes]:
    """Pixels of the pictures made on the way, by their places."""
    root = RunFolder(folder).samples
    paths = sorted(root.rglob("*.png"))
    return {p.relative_to(root).as_posix(): np.asarray(Image.open(p)).tobytes() for p in paths}


def held_out_losses(events: list[Event]) -> dict[int, float]:
    """The loss of held-out pictures by step."""
    told = [event for event in events if isinstance(event, MeasuresEvent)]
    return {e.step: e.values["validation/loss"] for e in told if "validation/loss" in e.values}


def logged(config: Any, folder: Path, *, stopped: int | None = None) -> list[Event]:
    """A training whose events are logged, perhaps stopped after a step."""
    events = train(config, folder) if stopped is None else stopped_after(stopped, config, folder)
    RunFolder(folder).create()
    with EventLog(RunFolder(folder)) as log:
        for event in events:
            log.hear(event)
    return events


# Moments


def test_a_look_is_taken_every_so_many_steps_and_after_the_last() -> None:
    moments = Moments(every=3, total_steps=7, from_base=True)
    assert [step for step in range(9) if moments.include(step)] == [0, 3, 6, 7]
    assert not any(NEVER.include(step) for step in range(9))
    assert [moments.after(step) for step in range(8)] == [3, 3, 3, 2, 2, 2, 1, 0]


# Pictures on the way


def test_pictures_on_the_way_change_no_byte_of_the_result(
    sdxl_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    train(configuration(sdxl_folder, photo_folder, **TWO_LAYERS), tmp_path / "without")
    events = train(configuration(sdxl_folder, photo_folder, **LOOKED), tmp_path / "with")

    weights = "pytorch_lora_weights.safetensors"
    plain, looked_at = (tmp_path / run / "outputs" / weights for run in ("without", "with"))
    assert plain.read_bytes() == looked_at.read_bytes()
    told = [event for event in events if isinstance(event, SampleEvent)]
    assert [(event.step, event.number) for event in told] == [(0, 0), (2, 0), (4, 0)]
    assert all((tmp_path / "with" / event.path).exists() for event in told)
    assert [event.left for event in told] == [2, 1, 0]
    assert all(event.seconds > 0 for event in told)


def test_the_first_picture_is_what_the_base_model_makes(
    sdxl_folder: Path, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made once more by diffusers' own pipeline, from the words and the same noise."""
    keys: list[int] = []
    made = sampling.drawn

    def listen(*given: Any, **named: Any) -> Any:
        keys.append(named["key"])
        return made(*given, **named)

    monkeypatch.setattr(sampling, "drawn", listen)
    config = configuration(sdxl_folder, photo_folder, **LOOKED, sample_guidance_scale=3.0)
    composed, _ = composition(config, tmp_path)
    looks = looks_of(composed.config, composed.training, (), RunFolder(tmp_path))
    next(composed.training.steps(RunFolder(tmp_path), never, looks))

    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_folder)
    pipeline.set_progress_bar_config(disable=True)
    side = composed.config.data.resolution_width
    assert side is not None
    expected = pipeline(
        "a TOK, at home",
        width=side,
        height=side,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(keys[0]),
        output_type="np",
    ).images[0]
    (picture,) = pixels(tmp_path).values()
    ours = np.frombuffer(picture, np.uint8).reshape(side, side, 3)
    assert np.abs(ours / 255 - expected).max() < 1.5 / 255


def test_a_run_that_goes_on_has_the_pictures_of_one_that_was_never_stopped(
    sdxl_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    config = configuration(
        sdxl_folder, photo_folder, **LOOKED, train_text_encoder_ti=True, checkpointing_steps=1
    )
    train(config, tmp_path / "whole")
    stopped_after(3, config, tmp_path / "stopped")
    again = train(config, tmp_path / "stopped")

    assert pixels(tmp_path / "stopped") == pixels(tmp_path / "whole")
    assert [e.step for e in again if isinstance(e, SampleEvent)] == [4]


THREE = {**LOOKED, "validation_prompts": ("a TOK, at home", "a dog", "a cat")}
ALL_TOLD = [(step, number) for step in (0, 2, 4) for number in range(3)]


def until_told(
    place: tuple[int, int] | None, config: TrainingConfig, folder: Path
) -> tuple[list[tuple[int, int]], Interrupted | None]:
    """Trains with a log of its events, and is stopped once this picture is told of.

    Returns:
        The pictures that were told of, step and number, and what it ended in.
    """
    told: list[tuple[int, int]] = []
    RunFolder(folder).create()
    try:
        with EventLog(RunFolder(folder)) as log:
            for event in engine.run(config, RunFolder(folder), lambda: place in told):
                log.hear(event)
                if isinstance(event, SampleEvent):
                    told.append((event.step, event.number))
    except Interrupted as ended:
        return told, ended
    return told, None


def logged_pictures(folder: Path) -> list[tuple[int, int]]:
    """Step and number of the pictures that a run's log tells of."""
    told = [event for event in RunFolder(folder).read_events() if event["event"] == "sample"]
    assert [event["left"] for event in told] == list(range(len(ALL_TOLD)))[::-1]
    return [(event["step"], event["number"]) for event in told]


def results(folder: Path) -> dict[str, str]:
    """What a training made, without what tells of time and place."""
    return {n: d for n, d in digests(folder / "outputs").items() if n.endswith(".safetensors")}


@pytest.mark.parametrize(
    "text",
    [{}, {"train_text_encoder_ti": True}, {"train_text_encoder_ti_frac": 0.25}],
    ids=["frozen text", "text that learnt until the look", "text that learnt until before it"],
)
def test_a_wish_to_stop_is_heard_between_two_pictures_and_the_look_is_finished_afterwards(
    text: dict[str, Any], sdxl_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    given = {**THREE, **({"train_text_encoder_ti": True, **text} if text else {})}
    config = configuration(sdxl_folder, photo_folder, **given)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert until_told(None, config, whole) == (ALL_TOLD, None)

    told, ended = until_told((2, 1), config, cut)

    assert told == ALL_TOLD[:5]
    assert [path.name for path in RunFolder(cut).checkpoints.iterdir()] == ["step-2"]
    assert ended is not None
    assert ended.message == "stopped after step 2 of 4; its checkpoint is kept"

    assert until_told(None, config, cut) == (ALL_TOLD[5:], None)
    assert logged_pictures(cut) == ALL_TOLD
    assert pixels(cut) == pixels(whole)
    assert results(cut) == results(whole) != {}


def test_a_wish_to_stop_while_the_base_model_is_looked_at_begins_anew(
    sdxl_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    config = configuration(sdxl_folder, photo_folder, **THREE)

    told, ended = until_told((0, 0), config, tmp_path)

    assert told == ALL_TOLD[:1]
    assert ended is not None
    assert ended.message == "stopped before the first step"
    assert not RunFolder(tmp_path).checkpoints.exists()
    assert until_told(None, config, tmp_path) == (ALL_TOLD, None)
    assert logged_pictures(tmp_path) == ALL_TOLD


def test_a_wish_to_stop_during_the_last_look_leaves_files_to_be_made(
    sdxl_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    config = configuration(sdxl_folder, photo_folder, **THREE)

    told, ended = until_told((4, 0), config, tmp_path)

    assert told == ALL_TOLD[:7]
    assert ended is not None
    assert ended.message == "stopped after step 4 of 4; its checkpoint is kept"
    assert until_told(None, config, tmp_path) == (ALL_TOLD[7:], None)
    assert results(tmp_path)


def test_a_look_that_is_cut_short_again_or_killed_has_each_picture_once(
    sdxl_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    config = configuration(sdxl_folder, photo_folder, **THREE)
    until_told((2, 0), config, tmp_path)

    told, ended = until_told((2, 1), config, tmp_path)

    assert told == [(2, 1)]
    assert ended is not None
    assert ended.message == "stopped after step 2 of 4; its checkpoint is kept"
    with EventLog(RunFolder(tmp_path)) as log:
        for event in engine.run(config, RunFolder(tmp_path), never):
            log.hear(event)
            if isinstance(event, StepEvent):
                # Here it is killed: its step and all before it have no newer checkpoint.
                break
    assert until_told(None, config, tmp_path) == (ALL_TOLD[6:], None)
    assert logged_pictures(tmp_path) == ALL_TOLD


def test_prompts_that_changed_meanwhile_have_their_pictures_too(
    sdxl_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    until_told((2, 1), configuration(sdxl_folder, photo_folder, **THREE), tmp_path)
    same, *others = THREE["validation_prompts"]
    prompts = [same, *(f"{other}, at night" for other in others)]

    changed = configuration(sdxl_folder, photo_folder, **{**THREE, "validation_prompts": prompts})
    told, _ = until_told(None, changed, tmp_path)

    assert told[:2] == [(2, 1), (2, 2)]


def test_a_wish_to_stop_that_came_with_a_step_begins_no_picture(
    sdxl_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    config = configuration(sdxl_folder, photo_folder, **LOOKED)

    events = stopped_after(2, config, tmp_path)

    assert [event.step for event in events if isinstance(event, SampleEvent)] == [0]
    again = train(config, tmp_path)
    assert [event.step for event in again if isinstance(event, SampleEvent)] == [2, 4]


def test_a_new_training_in_the_folder_leaves_no_picture_of_an_earlier_one(
    sdxl_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    old = RunFolder(tmp_path).samples / "000777" / "0.png"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"")

    train(configuration(sdxl_folder, photo_folder, **LOOKED), tmp_path)

    assert not old.exists()


def out_of_memory(*_: Any, **__: Any) -> Any:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")


def overflows(*_: Any, **__: Any) -> Any:
    raise NonFiniteError("the VAE gives no finite picture", "set upscale_vae_32bit: true")


@pytest.mark.parametrize(
    ("place", "failure", "words"),
    [
        ("trainer.previews.sample_encoded", out_of_memory, "too little memory"),
        ("trainer.previews._on", out_of_memory, "too little memory"),
        ("trainer.previews.sample_encoded", overflows, "upscale_vae_32bit"),
    ],
    ids=["picture", "VAE", "overflow"],
)
def test_a_picture_that_cannot_be_made_ends_the_pictures_and_not_the_training(
    place: str,
    failure: Any,
    words: str,
    sdxl_folder: Path,
    photo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(place, failure)
    events = train(configuration(sdxl_folder, photo_folder, **LOOKED), tmp_path)

    notes = [e for e in events if isinstance(e, NoteEvent) and e.field == "validation_prompts"]
    assert [note.note for note in notes] == ["warning"]
    assert words in notes[0].message
    assert len(losses(events)) == 4


def test_too_little_memory_for_held_out_pictures_ends_the_looks_and_not_the_training(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.validation.HeldOut._loss", out_of_memory)
    events = train(configuration(sd15_folder, photo_folder, **HELD_OUT), tmp_path)

    notes = [e for e in events if isinstance(e, NoteEvent) and e.field == "validation_images"]
    assert len(notes) == 1
    assert held_out_losses(events) == {}
    assert len(losses(events)) == 4


# Numbers of what learns


def test_prodigys_estimate_and_norms_of_new_tokens_are_told(
    sdxl_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    leaves = {"optimizer": "prodigy", "train_text_encoder_ti": True, **TWO_LAYERS}
    events = train(configuration(sdxl_folder, photo_folder, **leaves), tmp_path)

    told = [event for event in events if isinstance(event, MeasuresEvent)]
    assert [event.step for event in told] == [1, 2, 3, 4]
    encoders = ("text_encoder", "text_encoder_2")
    norms = {f"tokens/{encoder}/<s{n}>" for encoder in encoders for n in (0, 1)}
    assert set(told[0].values) == {"train/prodigy_d", *norms}
    assert all(event.values["train/prodigy_d"] > 0 for event in told)


def test_a_training_without_such_numbers_tells_none(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    events = train(configuration(sd15_folder, photo_folder, **TWO_LAYERS), tmp_path)
    assert not [event for event in events if isinstance(event, MeasuresEvent)]


# Held-out pictures


@pytest.mark.parametrize("cached", [True, False])
def test_the_same_weights_have_the_same_held_out_loss(
    cached: bool, sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    config = configuration(sd15_folder, photo_folder, **HELD_OUT, cache_latents=cached)
    composed, _ = composition(config, tmp_path)
    training = composed.training
    (look,) = looks_of(composed.config, training, composed.held_out, RunFolder(tmp_path))
    global_state = torch.get_rng_state()

    values = {held_out_losses(list(look.at(0, never)))[0] for _ in range(3)}

    assert len(values) == 1
    assert torch.equal(torch.get_rng_state(), global_state)
    assert all(parameter.grad is None for parameter in training.parameters)


def test_another_learning_rate_leaves_the_first_held_out_loss_and_changes_the_later_ones(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    runs = [
        held_out_losses(
            train(
                configuration(sd15_folder, photo_folder, **HELD_OUT, learning_rate=rate),
                tmp_path / str(rate),
            )
        )
        for rate in (1e-3, 1e-2)
    ]
    assert runs[0].keys() == runs[1].keys() == {0, 1, 2, 3, 4}
    assert runs[0][0] == runs[1][0]
    assert runs[0][4] != runs[1][4]


def test_held_out_pictures_are_no_part_of_the_training_nor_of_its_card(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    composed, _ = composition(
        configuration(sd15_folder, photo_folder, **HELD_OUT), tmp_path / "held out"
    )
    training = composed.training
    shown = {n for step in range(8) for batch in training.dataset[step] for n in batch.numbers}

    assert len(composed.held_out) == 1
    assert not shown & set(composed.held_out)
    assert {example.number for example in training.dataset.trained} == shown


def test_so_many_held_out_pictures_that_none_is_left_are_refused_before_a_model_is_read(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    config = configuration(sd15_folder, photo_folder, **{**HELD_OUT, "validation_images": 99})
    with pytest.raises(InputError, match="validation_images.*99"):
        composition(config, tmp_path)


def test_validate_refuses_too_many_and_an_estimate_counts_steps_without_them(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    wanted = configuration(sd15_folder, photo_folder, **HELD_OUT, num_train_epochs=3)
    composed, _ = composition(wanted, tmp_path)
    plain = configuration(sd15_folder, photo_folder, **TWO_LAYERS, num_train_epochs=3)

    assert estimate(wanted).steps == composed.training.total_steps
    assert estimate(wanted).steps < estimate(plain).steps
    with pytest.raises(InputError, match="validation_images"):
        inspect_pictures(configuration(sd15_folder, photo_folder, validation_images=99))


def test_of_each_concept_a_picture_is_left() -> None:
    pictures = [(1, "a"), (1, "b"), (1, "c"), (2, "a"), (2, "b")]
    held = held_out(pictures, count=3, seed=0)
    assert len(set(held)) == 3
    assert {concept for concept, _ in set(pictures) - set(held)} == {1, 2}
    assert held_out(pictures, count=3, seed=0) == held
    assert {held_out(pictures, count=1, seed=seed) for seed in range(20)} > {held[:1]}
    with pytest.raises(InputError, match="of 5 pictures 3 can be kept out"):
        held_out(pictures, count=4, seed=0)


def test_a_held_out_loss_that_is_not_finite_is_no_part_of_the_history() -> None:
    events = [{"event": "step", "step": n, "smoothed_loss": 0.5} for n in (1, 2)] + [
        {"event": "measures", "step": 1, "values": {"validation/loss": None}},
        {"event": "measures", "step": 2, "values": {"validation/loss": 0.25}},
    ]
    assert history_of(events, step=9) == [Measured(2, 0.25, 0.5)]


def test_turned_pictures_are_held_out_in_the_middle_of_their_range(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    turned = {"random_rotation_start": -20, "random_rotation_end": 10, "cache_latents": False}
    composed, _ = composition(
        configuration(sd15_folder, photo_folder, **{**HELD_OUT, **turned}), tmp_path
    )
    (number,) = composed.held_out
    assert composed.training.dataset.still(number, [7]).angles == (-5.0,)


def test_a_run_that_goes_on_remembers_its_held_out_losses(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    config = configuration(sd15_folder, photo_folder, **HELD_OUT, checkpointing_steps=1)
    events = logged(config, tmp_path, stopped=3)

    history = history_of(RunFolder(tmp_path).read_events(), step=2)

    assert [measured.step for measured in history] == [1, 2]
    assert [one.held_out for one in history] == [held_out_losses(events)[n] for n in (1, 2)]
    assert json.loads(RunFolder(tmp_path).events.read_text().splitlines()[-1])


# Over-fitting


def course(held_out: list[float], trained: list[float]) -> list[Measured]:
    """Looks every 100 steps."""
    pairs = zip(held_out, trained, strict=True)
    return [Measured(100 * n, *pair) for n, pair in enumerate(pairs, start=1)]


def test_over_fitting_is_told_where_held_out_pictures_rise_while_trained_ones_fall() -> None:
    """By hand: means of three are 0.43, …, 0.49; of trained ones 0.40 and 0.20."""
    held_out = [0.47, 0.40, 0.42, 0.46, 0.49, 0.52]
    words = over_fitting(course(held_out, [0.5, 0.4, 0.3, 0.25, 0.2, 0.15]))
    assert "lowest around step 200 (0.4300) and is 14% higher now" in words
    assert "fell from 0.4000 to 0.2000" in words


FALLING = [0.5, 0.4, 0.3, 0.25, 0.2, 0.15]


@pytest.mark.parametrize(
    ("held_out", "trained"),
    [
        ([0.6, 0.5, 0.4, 0.3, 0.2, 0.1], FALLING),
        ([0.5, 0.4, 0.45, 0.5, 0.4, 0.45], FALLING),
        ([0.42, 0.40, 0.41, 0.44, 0.43, 0.45], FALLING),
        ([0.5, 0.4, 0.45, 0.5, 0.55, 0.6], [0.5, 0.4, 0.45, 0.5, 0.55, 0.6]),
        ([0.40, 0.42, 0.45, 0.47, 0.50], FALLING[:-1]),
    ],
    ids=["learning", "up and down", "hardly higher", "both rise", "too early"],
)
def test_nothing_is_told_where_it_does_not_show(
    held_out: list[float], trained: list[float]
) -> None:
    assert over_fitting(course(held_out, trained)) == ""
