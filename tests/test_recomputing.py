"""Recomputed activations: what is chosen where nobody chose, and how much memory that saves."""

from __future__ import annotations

from collections.abc import Callable
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
from trainer.config import TrainingConfig
from trainer.errors import InputError
from trainer.events import RunEvent
from trainer.foreseen import Foreseen
from trainer.job import RunFolder
from trainer.live_bytes import LiveBytes
from trainer.machine import completed, precision_of
from trainer.memory import STEPS, Footprint, Forecast
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
    decided = within(config_of(), footprint, capacity=29 * GIB, parts=1, num_processes=1)
    notes = {n.field: n.message for n in decided.resolved.notes if n.kind == "yielded"}
    assert "would take 32.0 GiB" in notes["gradient_checkpointing"]
    roomy = within(config_of(), footprint, capacity=80 * GIB, parts=1, num_processes=1)
    assert roomy.run.gradient_checkpointing is False
    assert not [n for n in roomy.resolved.notes if n.field == "gradient_checkpointing"]


def test_weights_in_parts_leave_more_room() -> None:
    def words(parts: int, **leaves: Any) -> str:
        config = config_of(**leaves)
        return recomputing.words(
            within(config, footprint, capacity=29 * GIB, parts=parts, num_processes=parts)
        )

    assert words(1) != "kept"
    # An adapter and its state are whole everywhere: 22 GiB and half of 10; a spare one.
    assert words(2) == "kept"
    assert words(2, use_lora=False) == "kept"


@pytest.mark.parametrize("sizes", [{"enable_bucket": True}, {"priority": "quality"}])
def test_steps_of_several_sizes_are_recorded_where_their_activations_fit_twice(
    sizes: dict[str, Any],
) -> None:
    def records(gib: int, **leaves: Any) -> bool | None:
        config = config_of(gradient_checkpointing=False, **leaves)
        decided = within(config, footprint, capacity=gib * GIB, parts=1, num_processes=1)
        return decided.run.cuda_graph

    # 32 GiB, 20 of activations once more, and a spare one.
    assert (records(53, **sizes), records(52, **sizes)) == (None, False)
    assert records(52, **sizes, cuda_graph=True) is True
    assert records(33, resolution_width=512, resolution_height=512) is None


def spread_on(kind: str) -> Any:
    accelerator = SimpleNamespace(device=torch.device(kind), num_processes=1)
    return SimpleNamespace(accelerator=accelerator, processes=ALONE, sharding=None)


def decided_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    forecast: Callable[..., Footprint],
    began_with: dict[str, Any] | None = None,
) -> TrainingConfig:
    monkeypatch.setattr(affordable, "device_memory", lambda _: 29 * GIB)
    monkeypatch.setattr(Foreseen, "footprint", lambda _, config, precision: forecast(config))
    base: Any = None
    return affordable.affordable(config_of(), base, spread_on("cuda"), began_with or {})


def test_a_processor_keeps_all_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    assert recomputing.words(decided_on_a_gpu(monkeypatch, footprint)).startswith("recomputed in")
    base: Any = None
    there = affordable.affordable(config_of(), base, spread_on("cpu"), {})
    assert there.run.gradient_checkpointing is False


def test_a_training_that_goes_on_recomputes_as_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    began_with = {"gradient_checkpointing": True, "checkpointing_share": 0.75}
    config = decided_on_a_gpu(monkeypatch, footprint, began_with)
    assert (config.run.gradient_checkpointing, config.run.checkpointing_share) == (True, 0.75)


def test_a_training_that_cannot_be_foreseen_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(config: TrainingConfig) -> Footprint:
        raise InputError.of("model_url", "is odd", "give another")

    config = decided_on_a_gpu(monkeypatch, unknown)
    assert config.run.gradient_checkpointing is False
    (warning,) = [note for note in config.resolved.notes if note.kind == "warning"]
    assert "cannot be foreseen" in warning.message
    assert "is odd" in warning.message


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


@pytest.mark.parametrize("family", ["sdxl", "flux"])
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
