"""Recomputed activations: what is chosen where nobody chose, and how much memory that saves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from snapshots import gradient
from tiny import compose, configuration, never, steps

from trainer import affordable, engine, foreseen, recomputing
from trainer.affordable import within
from trainer.base_model import BaseModel, locate
from trainer.capacity import Room
from trainer.config import TrainingConfig
from trainer.config_files import read_config_file
from trainer.errors import InputError
from trainer.events import CheckpointEvent, RunEvent
from trainer.foreseen import Foreseen
from trainer.job import RunFolder
from trainer.live_bytes import LiveBytes
from trainer.machine import completed, precision_of
from trainer.memory import CLASS_PICTURES, STEPS, Footprint, Forecast
from trainer.processes import ALONE
from trainer.resolve import Layer, resolve

GIB = 2**30


def config_of(**leaves: Any) -> TrainingConfig:
    given = {"model_url": "m", "images_data_url": "p", "mixed_precision": "bf16", **leaves}
    return resolve([Layer("test", given, explicit=True)])


def footprint(config: TrainingConfig) -> Footprint:
    """Of 10 GiB of weights and 2 of the optimizer's, beside up to 20 GiB of activations."""
    share = config.run.checkpointing_share if config.run.gradient_checkpointing else 0.0
    return Footprint({STEPS: round((32 - 16 * share) * GIB)}, 10 * GIB, 2 * GIB, 1)


def peak(config: TrainingConfig) -> int:
    return footprint(config).peak_bytes


@pytest.mark.parametrize(
    ("gib", "words"),
    [
        (33, "kept"),
        # 28 GiB with a quarter, and a spare one.
        (32.9, "recomputed in 25% of the blocks"),
        (29, "recomputed in 25% of the blocks"),
        (28.9, "recomputed in 50% of the blocks"),
        (17, "recomputed"),
        # Nothing fits: what takes least may still do.
        (8, "recomputed"),
    ],
)
def test_as_few_blocks_recompute_as_memory_asks_for(gib: float, words: str) -> None:
    chosen = recomputing.chosen(config_of(), round(gib * GIB), peak)
    assert recomputing.words(chosen) == words


def test_what_somebody_chose_stays() -> None:
    for chosen in (True, False):
        config = config_of(gradient_checkpointing=chosen)
        assert recomputing.chosen(config, 8 * GIB, peak) == config
    share = recomputing.chosen(config_of(checkpointing_share=0.3), 8 * GIB, peak)
    assert (share.run.gradient_checkpointing, share.run.checkpointing_share) == (True, 0.3)


def test_a_training_says_why_it_recomputes() -> None:
    decided, _ = within(config_of(), footprint, capacity=29 * GIB)
    notes = {n.field: n.message for n in decided.resolved.notes if n.kind == "yielded"}
    assert "would take 32.0 GiB" in notes["gradient_checkpointing"]
    roomy, room = within(config_of(), footprint, capacity=80 * GIB)
    assert roomy.run.gradient_checkpointing is False
    assert not [n for n in roomy.resolved.notes if n.field == "gradient_checkpointing"]
    assert room == Room(80 * GIB, 32 * GIB, 20 * GIB)


def test_what_comes_before_the_steps_is_no_reason_to_recompute() -> None:
    def with_class_pictures(config: TrainingConfig) -> Footprint:
        found = footprint(config)
        return replace(found, stages={**found.stages, CLASS_PICTURES: 60 * GIB})

    decided, _ = within(config_of(), with_class_pictures, capacity=40 * GIB)
    assert recomputing.words(decided) == "kept"


def test_weights_in_parts_leave_more_room() -> None:
    def taken(parts: int, **leaves: Any) -> float:
        config = config_of(gradient_checkpointing=False, **leaves)
        return within(config, footprint, capacity=80 * GIB, parts=parts)[1].steps / GIB

    # Half of 10 GiB of weights, less the adapter's one number; and of all weights' state.
    assert taken(1) == 32
    assert taken(2) == pytest.approx(27)
    assert taken(2, use_lora=False) == 26
    # Of text encoders that learn, and a VAE that encodes in steps, each device has all.
    assert taken(2, train_text_encoder=True) == taken(2, cache_latents=False) == 32


def spread_on(kind: str) -> Any:
    accelerator = SimpleNamespace(device=torch.device(kind), num_processes=1)
    return SimpleNamespace(accelerator=accelerator, processes=ALONE, sharding=None)


def decided_on(
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    forecast: Callable[..., Footprint] = footprint,
    began_with: dict[str, Any] | None = None,
    **leaves: Any,
) -> TrainingConfig:
    """What is decided on a processor, or on a GPU of 29 GiB."""
    monkeypatch.setattr(affordable, "device_memory", lambda _: 29 * GIB)
    monkeypatch.setattr(Foreseen, "footprint", lambda _, config, precision: forecast(config))
    base: Any = None
    spread = spread_on(kind)
    return affordable.affordable(config_of(**leaves), base, spread, began_with or {})[0]


def test_a_processor_keeps_all_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    assert recomputing.words(decided_on("cuda", monkeypatch)).startswith("recomputed in")
    there = decided_on("cpu", monkeypatch, checkpointing_share=0.5)
    assert there.run.gradient_checkpointing is False
    assert "are kept" in there.resolved.ignored_options["checkpointing_share"]


RECOMPUTED = {"gradient_checkpointing": True, "checkpointing_share": 0.75}
KEPT = {"gradient_checkpointing": False}


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_training_that_goes_on_does_as_it_did(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def share(began_with: dict[str, Any], **leaves: Any) -> float | None:
        run = decided_on(kind, monkeypatch, footprint, began_with, **leaves).run
        return run.checkpointing_share if run.gradient_checkpointing else None

    assert share(RECOMPUTED) == 0.75
    assert share(KEPT) is None
    # What is asked for now is not overruled; that it is another training is told elsewhere.
    assert share(RECOMPUTED, checkpointing_share=1.0) == 1
    assert share(RECOMPUTED, gradient_checkpointing=False) is None


@pytest.mark.parametrize(
    "error", [InputError.of("model_url", "is odd", "see"), RuntimeError("is odd")]
)
def test_a_training_that_cannot_be_foreseen_is_tried(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(config: TrainingConfig) -> Footprint:
        raise error

    config = decided_on("cuda", monkeypatch, unknown)
    assert config.run.gradient_checkpointing is False
    (warning,) = [note for note in config.resolved.notes if note.kind == "warning"]
    assert "cannot be foreseen" in warning.message
    assert "is odd" in warning.message


def test_a_run_goes_on_from_the_configuration_that_it_wrote(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    for folder, leaves in ((tmp_path / "kept", {}), (tmp_path / "recomputed", RECOMPUTED)):
        config = configuration(
            sd15_folder, photo_folder, max_train_steps=2, checkpointing_steps=1, **leaves
        )
        events = engine.run(config, RunFolder(folder), never)
        assert any(isinstance(event, CheckpointEvent) for event in events)
        written = resolve(read_config_file(folder / "config.yaml"))
        training, _ = compose(written, folder)
        assert not list(training.resume(RunFolder(folder)))
        assert training.step == 1


def test_a_run_that_was_begun_with_recomputation_goes_on_without_being_told_again(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    leaves = {"max_train_steps": 2, "checkpointing_steps": 1}
    told = {"gradient_checkpointing": True, "checkpointing_share": 0.5}
    steps(configuration(sd15_folder, photo_folder, **leaves, **told), tmp_path)
    config = configuration(sd15_folder, photo_folder, **leaves)
    training, _ = compose(config, tmp_path)
    assert training.config.run.checkpointing_share == 0.5
    events = engine.run(config, RunFolder(tmp_path), never)
    run = next(event for event in events if isinstance(event, RunEvent))
    assert run.start_step == 2
    assert run.details["activations"] == "recomputed in 50% of the blocks"


@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux"])
def test_a_forecast_is_no_less_than_what_recomputing_in_some_blocks_takes(
    family: str,
    photo_folder: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    folder = request.getfixturevalue(f"{family}_folder")
    size = {"resolution_width": 256, "resolution_height": 256, "batch_size": 2}

    def config(share: float) -> TrainingConfig:
        leaves = {"gradient_checkpointing": share > 0, "checkpointing_share": share or 1.0}
        return configuration(folder, photo_folder, **size, **leaves)

    def taken(share: float) -> int:
        """By a forward and a backward pass, beside what was there before."""
        training, _ = compose(config(share), tmp_path / str(share))
        with LiveBytes() as counter:
            gradient(training, training.dataset[0][0])
        return counter.peak

    base = locate(config(1).model)
    forecast = Forecast(base, torch.device("cpu"))

    def foretold(share: float) -> int:
        settings = completed(config(share), base)
        return forecast.footprint(settings, precision_of(settings)).stages[STEPS]

    none, half, all_ = taken(0), taken(0.5), taken(1)
    assert all_ < half <= (none + all_) / 2
    # Which is what is foretold.
    assert foretold(0.5) == pytest.approx((foretold(0) + foretold(1)) / 2, abs=1)
    assert foretold(1) < foretold(0)


@pytest.fixture
def sd15(sd15_folder: Path, photo_folder: Path) -> tuple[BaseModel, TrainingConfig]:
    config = configuration(sd15_folder, photo_folder)
    base = locate(config.model)
    return base, recomputing.kept(completed(config, base))


def test_a_training_is_foreseen_once_on_a_machine(
    sd15: tuple[BaseModel, TrainingConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreseen, "cache_folder", lambda: tmp_path)
    base, config = sd15
    made: list[TrainingConfig] = []
    plain = Forecast.footprint

    def watched(forecast: Forecast, config: TrainingConfig, precision: Any) -> Footprint:
        made.append(config)
        return plain(forecast, config, precision)

    monkeypatch.setattr(Forecast, "footprint", watched)

    def tell(config: TrainingConfig) -> Footprint:
        return Foreseen(base, torch.device("cpu")).footprint(config, precision_of(config))

    first = tell(config)
    assert first == tell(config) == tell(config.with_leaf("images_data_url", "elsewhere"))
    assert len(made) == 1
    assert tell(config.with_leaf("batch_size", 2)) != first
    assert len(made) == 2
    with_class = config.with_leaf("with_prior_preservation", True).with_leaf("photo_class", "man")
    assert CLASS_PICTURES in tell(with_class).stages
    given = with_class.with_leaf("class_images_url", "elsewhere")
    assert CLASS_PICTURES not in tell(given).stages
