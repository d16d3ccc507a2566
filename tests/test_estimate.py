"""Estimates: steps by the plan's formula, memory by counting, time by measurement alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import copies
import pytest
import torch

from trainer import base_model, measurements, remedies
from trainer.adapted.layers import Copies
from trainer.base_model import Precision
from trainer.config import ModelConfig, OptimConfig, TrainingConfig
from trainer.errors import InputError
from trainer.estimate import Estimate, device_name, estimate
from trainer.frozen import freeze
from trainer.live_bytes import LiveBytes
from trainer.machine import completed, mixed_precision_of, precision_of
from trainer.measurements import measured_seconds_per_step, measurement_key, record_measurement
from trainer.memory import STEPS, Footprint, Forecast, training_footprint
from trainer.resolve import Layer, resolve
from trainer.tokens import TokenNames
from trainer.trainables import build
from trainer.update_memory import UpdateMemory
from trainer.updates import Updates

MEBI = 2**20


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keeps measurements of the tests away from the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def configuration(model: Path | str, photos: Path, **leaves: Any) -> TrainingConfig:
    given = {"model_url": str(model), "images_data_url": str(photos), "rank": 4, **leaves}
    return resolve([Layer("test", given, explicit=True)])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # AdamW: two moments in 32 bits. 8-bit: one byte each, and two 32-bit maxima per 256.
        ("adamw", 8.0),
        ("adamw8bit", 2 + 2 * 4 / 256),
        # Prodigy: two moments, s and the first weights.
        ("prodigy", 16.0),
    ],
)
def test_the_state_of_an_optimizer_is_counted(name: str, expected: float) -> None:
    update = UpdateMemory.measured(
        OptimConfig(optimizer=name), torch.float32, torch.device("cpu"), one_by_one=False
    )
    assert update.meanwhile == 0
    assert update.state == pytest.approx(expected, rel=0.01)


def test_a_weight_of_16_bits_is_updated_in_copies_of_32() -> None:
    # SGD with momentum's state aside: the copy, its gradient, random bits, the value cut toward
    # zero, two choices between them, all of 4 bytes, and truth values and the result beside them.
    update = UpdateMemory.measured(
        OptimConfig(optimizer="adafactor"), torch.bfloat16, torch.device("cpu"), one_by_one=True
    )
    assert 6 * 4 <= update.meanwhile <= 6 * 4 + 4
    # A row and a column of 512 for each 512 of them.
    assert update.state == pytest.approx(2 * 4 / 512, rel=0.01)


def test_a_gradient_is_given_up_before_the_next_is_there() -> None:
    layers = torch.nn.Sequential(*[torch.nn.Linear(512, 512, bias=False) for _ in range(3)])
    hooks = UpdateMemory(state=0, meanwhile=8).in_backward(list(layers.parameters()))
    with LiveBytes() as counter:
        counter.hold(layers)
        layers(torch.ones(1, 512)).sum().backward()
    # Three weights of 1 MiB; one gradient, and twice as much again while it is used.
    assert counter.now == 3 * MEBI
    assert 6 * MEBI < counter.peak < 6.1 * MEBI
    assert len(hooks) == 3


def real_peak(config: TrainingConfig) -> tuple[int, int]:
    """Peak bytes of real steps with real tensors, and the trained parameters."""
    base = base_model.locate(config.model)
    config = config.with_leaf("mixed_precision", mixed_precision_of(config.run))
    # What stands in copies at odd places takes some bytes more.
    family = copies.LOAD(base, precision_of(config))
    names = None
    if config.token.train_text_encoder_ti:
        token = config.token
        names = TokenNames(token.token_abstraction, token.num_new_tokens_per_abstraction)
    freeze(
        family.denoiser,
        quantization=config.model.quantization,
        offload_blocks=config.run.offload_blocks,
        device=torch.device("cpu"),
    )
    trainables = build(config, family, names)
    trained = trainables.of(trainables.parameters)
    fused = config.optim.fused_backward
    updates = Updates(trainables.groups(config.optim), config.optim, seed=0, in_backward=fused)
    batch_size = config.run.batch_size
    has_prior = config.prior.with_prior_preservation
    captions = [str(number) for number in range(batch_size)] + ["a man"] * has_prior
    rows = [*range(batch_size), *[batch_size] * (batch_size if has_prior else 0)]
    encoders = [family.pipeline.components[name] for name in family.text_encoder_names]
    live = bool(trainables.of(("text_encoders", "tokens")))
    geometry = dict.fromkeys(
        ("original_size", "crop_top_left", "target_size"),
        torch.zeros(len(rows), 2, dtype=torch.int64),
    )
    pixels = torch.zeros(1, 3, base.native_size, base.native_size)
    with torch.no_grad():
        kept = family.encode_text(captions)
        shape = family.encode_image(pixels).mean.shape[1:]
    narrow = family.denoiser.dtype
    allowed = torch.ones((), dtype=torch.bool)
    with LiveBytes() as counter:
        for module in (family.denoiser, *(encoders if live else ())):
            counter.hold(module)
        copies_of_learning = Copies(trainables.modules.values(), precision_of(config).frozen)
        for step in range(2):
            updates.begin(step, allowed)
            text = family.encode_text(captions) if live else kept
            text = {name: states[rows] for name, states in text.items()}
            latents = torch.zeros(len(rows), *shape)
            with copies_of_learning.of_this_step():
                with torch.autocast("cpu", narrow, enabled=narrow != torch.float32):
                    prediction = family.predict(
                        latents,
                        torch.zeros(len(rows), dtype=torch.int64),
                        text,
                        {**geometry, "guidance": torch.ones(len(rows))},
                    )
                (prediction.float() - latents).square().mean().backward()
            del text, prediction
            updates.apply(allowed)
            updates.optimizer.zero_grad(set_to_none=True)
    return counter.peak, sum(p.numel() for p in trained)


def footprint_of(config: TrainingConfig) -> Footprint:
    """As on a machine with a GPU, where it is left to offloading what it does."""
    base = base_model.locate(config.model)
    config = config.with_leaf("mixed_precision", mixed_precision_of(config.run))
    for field in ("resolution_width", "resolution_height"):
        config = config.with_leaf(field, config.leaf(field) or base.native_size)
    return training_footprint(base, precision_of(config), torch.device("cpu"), config)


PRIOR = {"with_prior_preservation": True, "photo_class": "man"}
TEXT_ENCODERS = {"train_text_encoder": True, "text_encoder_rank": 2}
TOKENS = {"train_text_encoder_ti": True}
WHOLE = {"use_lora": False, "max_grad_norm": 0.0}


@pytest.mark.parametrize(
    "leaves",
    [{**TOKENS, **PRIOR}, pytest.param(TEXT_ENCODERS, marks=pytest.mark.thorough)],
)
def test_the_estimated_peak_is_that_of_a_real_training(
    sd15_folder: Path, photo_folder: Path, leaves: dict[str, Any]
) -> None:
    # A batch so large that the steps, not the encoding of pictures, are the peak.
    config = configuration(sd15_folder, photo_folder, batch_size=8, **leaves)
    footprint = footprint_of(config)
    peak, trained = real_peak(config)
    assert footprint.trained_parameters == trained
    # AdamW's counter beside each tensor shows in models as small as these.
    assert footprint.peak_bytes == pytest.approx(peak, rel=0.04)


# What learns is copied into 16 bits, and so large that the copies show.
NARROW = {"rank": 64, "mixed_precision": "bf16", "batch_size": 4}
FUSED = {"optimizer": "adafactor", "fused_backward": True, **WHOLE}
FUSED |= {"weights_dtype": "bf16", "mixed_precision": "bf16"}


@pytest.mark.parametrize(
    "leaves",
    [
        {},
        {**NARROW, "use_dora": True},
        pytest.param(NARROW, marks=pytest.mark.thorough),
        pytest.param({**NARROW, "lora_type": "lokr"}, marks=pytest.mark.thorough),
        pytest.param({**NARROW, "lora_type": "loha"}, marks=pytest.mark.thorough),
        pytest.param(
            {**NARROW, "use_dora": True, "quantization": "fp8"}, marks=pytest.mark.thorough
        ),
        {**WHOLE, "rank": 16},
        {**FUSED, "rank": 16},
        pytest.param({"quantization": "nf4"}, marks=pytest.mark.thorough),
        {"quantization": "fp8"},
        pytest.param({"quantization": "int8"}, marks=pytest.mark.thorough),
        {"quantization": "int8", "offload_blocks": 3},
        pytest.param({"offload_blocks": 2}, marks=pytest.mark.thorough),
    ],
)
def test_the_estimated_peak_is_that_of_a_real_training_of_a_transformer(
    flux_folder: Path,
    photo_folder: Path,
    leaves: dict[str, Any],
) -> None:
    # Weights, not activations, are most of it; encoding a picture would take more.
    config = configuration(flux_folder, photo_folder, **leaves)
    footprint = footprint_of(config)
    peak, trained = real_peak(config)
    assert footprint.trained_parameters == trained
    # Of the state of many small weights, each takes 512 bytes at least.
    rel = 0.005 if config.adapter.use_lora else 0.04
    assert footprint.stages[STEPS] == pytest.approx(peak, rel=rel)


def test_new_tokens_are_counted_in_every_text_encoder(
    sdxl_folder: Path, photo_folder: Path
) -> None:
    # Three vectors of two identifiers, in encoders of width 32 and 48; one layer of the denoiser.
    leaves = {"token_abstraction": "TOK,DOG", "num_new_tokens_per_abstraction": 3, **TOKENS}
    config = configuration(sdxl_folder, photo_folder, **leaves, target_unet_modules="conv_in")
    # Rank 4: from 4 channels in windows of 3 x 3, to 16 channels.
    adapter = 4 * (4 * 3 * 3 + 16)
    assert footprint_of(config).trained_parameters == adapter + 2 * 3 * (32 + 48)


def test_making_class_pictures_may_be_the_peak(flux_folder: Path, photo_folder: Path) -> None:
    size = {"resolution_width": 256, "resolution_height": 256}

    def peak(**leaves: Any) -> int:
        given = {"gradient_checkpointing": True, **PRIOR, **size, **leaves}
        return footprint_of(configuration(flux_folder, photo_folder, **given)).peak_bytes

    # A decoder of pictures works beside the denoiser then; an encoder never does.
    given = peak(class_images_url=str(photo_folder))
    assert peak() > 1.05 * given
    # Each in its turn, it takes less than a step.
    assert peak(offload_models=True) == given


def test_shorter_captions_take_less_whatever_was_foreseen_before(
    flux_folder: Path, photo_folder: Path
) -> None:
    base = base_model.locate(ModelConfig(model_url=str(flux_folder)))
    forecast = Forecast(base, torch.device("cpu"))
    sides = {"resolution_width": 64, "resolution_height": 64}
    config = completed(configuration(flux_folder, photo_folder, **sides), base)

    def steps(length: int | None) -> int:
        other = config.with_leaf("max_sequence_length", length)
        return forecast.footprint(other, precision_of(other)).stages[STEPS]

    usual, short, usual_again = (steps(length) for length in (None, 64, 512))
    assert short < usual == usual_again


def test_tokens_that_learn_before_the_denoiser_take_less_than_both_at_once(
    sd15_folder: Path, photo_folder: Path
) -> None:
    def peak(**leaves: Any) -> int:
        leaves = {"batch_size": 8, "rank": 64, **TOKENS, **leaves}
        return footprint_of(configuration(sd15_folder, photo_folder, **leaves)).peak_bytes

    assert peak(disable_unet_during_ti_training=True) < peak()


def test_text_encoders_that_learn_are_recomputed_too(sd15_folder: Path, photo_folder: Path) -> None:
    config = configuration(sd15_folder, photo_folder, batch_size=8, **TEXT_ENCODERS)
    saving = config.with_leaf("gradient_checkpointing", True)
    assert footprint_of(saving).peak_bytes < 0.8 * footprint_of(config).peak_bytes


def test_settings_that_save_memory_lower_the_estimate(
    flux_folder: Path, photo_folder: Path
) -> None:
    def peak(**leaves: Any) -> int:
        config = configuration(flux_folder, photo_folder, **{"batch_size": 8, **leaves})
        return footprint_of(config).peak_bytes

    plain = peak()
    assert peak(gradient_checkpointing=True) < 0.8 * plain
    assert peak(mixed_precision="bf16") < 0.8 * plain


def test_full_training_holds_weights_gradients_and_moments_in_32_bits(
    flux_folder: Path, photo_folder: Path
) -> None:
    config = configuration(flux_folder, photo_folder, use_lora=False, mixed_precision="bf16")
    footprint = footprint_of(config)
    # Weight, gradient and AdamW's two moments: four numbers of 4 bytes each.
    assert footprint.peak_bytes > 16 * footprint.trained_parameters


def test_steps_follow_the_pictures_where_epochs_are_given(
    sd15_folder: Path, photo_folder: Path
) -> None:
    # Five pictures, two a step: three steps an epoch.
    config = configuration("nowhere/at-all", photo_folder, batch_size=2, num_train_epochs=4)
    answer = estimate(config)
    assert (answer.num_examples, answer.steps, answer.epochs) == (5, 12, 4.0)


def test_an_epoch_shows_every_concept_as_often_as_it_is_repeated(photo_folder: Path) -> None:
    concepts = [
        {"images_data_url": str(photo_folder), "token": "TOK", "repeats": 3},
        {"images_data_url": str(photo_folder), "token": "DOG"},
    ]
    given = {"model_url": "nowhere/at-all", "concepts": concepts, "token_abstraction": "TOK,DOG"}
    given |= {"batch_size": 4, "num_train_epochs": 2}
    answer = estimate(resolve([Layer("test", given, explicit=True)]))
    # Five pictures three times and five once are 20: five steps an epoch.
    assert (answer.num_examples, answer.steps) == (20, 10)


def test_class_pictures_change_nothing_of_the_steps_and_are_left_out_of_the_time(
    photo_folder: Path,
) -> None:
    leaves = {"num_train_epochs": 1, "num_class_images": 7, **PRIOR}
    made = estimate(configuration("nowhere/at-all", photo_folder, **leaves))
    assert (made.num_examples, made.steps) == (5, 5)
    assert "7 class pictures are made first" in made.notes[0]
    given = {**leaves, "class_images_url": str(photo_folder)}
    del given["num_class_images"]
    answer = estimate(configuration("nowhere/at-all", photo_folder, **given))
    assert not [note for note in answer.notes if "class pictures" in note]


def test_pictures_on_the_way_are_counted_and_left_out_of_the_time(photo_folder: Path) -> None:
    prompts = {"validation_prompts": ("a TOK", "a dog"), "max_train_steps": 100}
    # Two by the base model, two after the last step, and two every 30.
    for every, count in ((None, 4), (30, 10), (100, 4)):
        config = configuration("nowhere", photo_folder, **prompts, sample_steps=every)
        words = f"{count} pictures on the way: their time is left out"
        assert words in estimate(config).notes


def test_class_pictures_that_concepts_share_are_counted_once(photo_folder: Path) -> None:
    concept = {"images_data_url": str(photo_folder), "with_prior_preservation": True}
    concepts = [
        {**concept, "photo_class": "Man", "num_class_images": 7},
        {**concept, "photo_class": "Man", "num_class_images": 3},
        {**concept, "photo_class": "Baby", "num_class_images": 2},
    ]
    given = {"model_url": "nowhere/at-all", "concepts": concepts}
    answer = estimate(resolve([Layer("test", given, explicit=True)]))
    assert "9 class pictures are made first" in answer.notes[0]


def test_an_estimate_names_the_concept_whose_pictures_are_missing(photo_folder: Path) -> None:
    concepts = [{"images_data_url": str(photo_folder)}, {"images_data_url": "nowhere"}]
    given = {"model_url": "nowhere/at-all", "concepts": concepts}
    with pytest.raises(InputError, match=r"`concepts\[1\]\.images_data_url`"):
        estimate(resolve([Layer("test", given, explicit=True)]))


def test_epochs_follow_the_steps_otherwise(photo_folder: Path) -> None:
    config = configuration("nowhere/at-all", photo_folder, max_train_steps=8)
    answer = estimate(config)
    assert (answer.steps, answer.epochs) == (8, 1.6)


def test_what_cannot_be_known_is_unknown_and_says_why(photo_folder: Path) -> None:
    answer = estimate(configuration("nowhere/at-all", photo_folder), hourly=2.0).as_dict()
    unknown = ["trained_parameters", "peak_memory_gib", "seconds", "cost"]
    assert [answer[name] for name in unknown] == [None] * 4
    assert "nowhere/at-all" in answer["notes"][0]
    assert json.loads(json.dumps(answer)) == answer


def test_pictures_that_are_missing_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        estimate(configuration("nowhere/at-all", tmp_path / "missing"))


def test_what_settings_take_is_foreseen_once_for_estimate_and_advice(
    flux_folder: Path, photo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreseen: list[TrainingConfig] = []
    plain = Forecast._footprint

    def watched(forecast: Forecast, config: TrainingConfig, precision: Precision) -> Footprint:
        foreseen.append(config)
        return plain(forecast, config, precision)

    monkeypatch.setattr(Forecast, "_footprint", watched)
    monkeypatch.setattr(remedies, "CANDIDATES", ())
    monkeypatch.setattr("trainer.estimate.device_memory", lambda _: 2**30)
    answer = estimate(configuration(flux_folder, photo_folder))
    assert answer.advice is not None
    assert len(foreseen) == 1


def test_time_comes_from_a_measurement_and_cost_from_time(
    flux_folder: Path, photo_folder: Path
) -> None:
    config = configuration(flux_folder, photo_folder, max_train_steps=100)
    before = estimate(config, hourly=3.6)
    assert (before.seconds, before.cost) == (None, None)
    assert "no such training was measured" in before.notes[0]
    known = completed(config, base_model.locate(config.model))
    key = measurement_key(known, family="flux", device=device_name(), num_processes=1)
    record_measurement(key, 0.25)
    after = estimate(config, hourly=3.6)
    # 100 steps of 0.25 s; 25 s at 3.6 an hour are 0.025.
    assert after.seconds == 25.0
    assert after.cost == pytest.approx(0.025)
    assert after.notes == ()


def test_without_a_price_there_is_no_cost() -> None:
    answer = Estimate(
        num_examples=1,
        steps=1,
        epochs=1.0,
        device="",
        footprint=None,
        advice=None,
        seconds=3600.0,
        hourly=None,
        notes=(),
    )
    assert "cost" not in answer.as_dict()
    assert replace(answer, hourly=2.5).as_dict()["cost"] == 2.5


def some_key(**leaves: Any) -> measurements.MeasurementKey:
    config = resolve([Layer("test", {"images_data_url": "photos", **leaves}, explicit=True)])
    return measurement_key(config, family="sdxl", device="some device", num_processes=1)


@pytest.mark.parametrize(
    "leaves",
    [
        {"rank": 8},
        {"use_dora": True},
        {"lora_type": "loha"},
        {"use_lora": False},
        {"resolution_width": 512, "resolution_height": 512},
        {"batch_size": 2},
        {"gradient_accumulation_steps": 2},
        {"mixed_precision": "bf16"},
        {"gradient_checkpointing": True},
        {"adapter_layers": "peft"},
        {"deterministic": True},
        {"cuda_graph": False},
        {"compile_blocks": True},
        {"channels_last": True},
        {"tf32": False},
        {"attention": "math"},
        {"cache_latents": False},
        {"optimizer": "adamw8bit"},
        {"quantization": "int8"},
        {"max_sequence_length": 64},
        {"offload_blocks": 1},
        {"target_unet_modules": "to_q"},
        {"model_url": "other/model"},
        {"with_prior_preservation": True, "photo_class": "man"},
        {"train_text_encoder_ti": True},
        {"train_text_encoder": True},
    ],
)
def test_a_measurement_holds_for_the_same_training_alone(leaves: dict[str, Any]) -> None:
    record_measurement(some_key(), 2.0)
    assert measured_seconds_per_step(some_key()) == 2.0
    assert measured_seconds_per_step(some_key(**leaves)) is None


@pytest.mark.parametrize(
    ("common", "leaves"),
    [
        (WHOLE, {"weights_dtype": "bf16"}),
        (WHOLE, {"fused_backward": True}),
        (TOKENS, {"num_new_tokens_per_abstraction": 3}),
        (TOKENS, {"train_text_encoder_ti_frac": 0.25}),
        (TOKENS, {"disable_unet_during_ti_training": True}),
        (TEXT_ENCODERS, {"train_text_encoder_frac": 0.5}),
        (TEXT_ENCODERS, {"text_encoder_rank": 4}),
        (TEXT_ENCODERS, {"target_text_encoder_modules": "q_proj"}),
    ],
)
def test_a_measurement_holds_for_the_same_way_of_learning_alone(
    common: dict[str, Any], leaves: dict[str, Any]
) -> None:
    assert some_key(**common) == some_key(**common)
    assert some_key(**common) != some_key(**{**common, **leaves})


def test_class_pictures_count_in_the_key_whichever_concept_has_them() -> None:
    concepts = [{"images_data_url": "a", "token": "TOK"}, {"images_data_url": "b", "token": "DOG"}]
    given: dict[str, Any] = {"token_abstraction": "TOK,DOG", "batch_size": 2}

    def key() -> measurements.MeasurementKey:
        config = resolve([Layer("test", {"concepts": concepts, **given}, explicit=True)])
        return measurement_key(config, family="sdxl", device="some device", num_processes=1)

    assert key().forward_examples == 2
    concepts[1] |= {"with_prior_preservation": True, "photo_class": "man"}  # type: ignore[dict-item]
    assert key().forward_examples == 4


def test_a_measurement_holds_for_its_device_alone() -> None:
    record_measurement(some_key(), 2.0)
    assert measured_seconds_per_step(replace(some_key(), device="another")) is None
    assert measured_seconds_per_step(replace(some_key(), num_processes=2)) is None


def test_the_newest_measurement_counts(own_cache: Path) -> None:
    for seconds in (2.0, 3.0):
        record_measurement(some_key(), seconds)
    with open(own_cache / "tok-trainer" / "measurements.jsonl", "a") as file:
        file.write('{"key": {"fam')
    assert measured_seconds_per_step(some_key()) == 3.0


def test_a_machine_without_a_place_for_measurements_forgets_them(own_cache: Path) -> None:
    own_cache.write_text("a file where the folder should be")
    record_measurement(some_key(), 2.0)
    assert measured_seconds_per_step(some_key()) is None


def test_measurements_lie_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    expected = Path("/home/somebody/.cache/tok-trainer/measurements.jsonl")
    assert measurements.measurements_file() == expected
