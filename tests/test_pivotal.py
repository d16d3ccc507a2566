"""Pivotal tuning: new tokens learn up to the pivot, beside tables that are never touched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import snapshots
import torch
from safetensors.torch import load_file
from snapshots import changed, encoded, fresh, norm_of, stopped_after, watched
from tiny import TWO_LAYERS, compose, configuration, digests, losses, steps, train
from torch.utils._python_dispatch import TorchDispatchMode

from trainer import base_model, tokens
from trainer.errors import InputError
from trainer.events import Event, NoteEvent, PhaseEvent, StepEvent
from trainer.job import RunFolder

PIVOT = 3
TOKENS: dict[str, Any] = {
    "train_text_encoder_ti": True,
    "max_train_steps": 6,
    "text_encoder_lr": 1e-3,
    "checkpointing_steps": 100,
    **TWO_LAYERS,
}
EVERY_LAYER = {"target_unet_modules": ["to_k", "to_q", "to_v", "to_out.0", "conv1", "conv2"]}
PRODIGY = {"optimizer": "prodigy", "learning_rate": 1.0, "text_encoder_lr": 1.0}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return snapshots.write_pictures(tmp_path_factory.mktemp("pivotal") / "pictures", 5)


@pytest.fixture(params=["sd15", "sdxl"])
def model(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(f"{request.param}_folder")
    return folder


# The pivot


@pytest.mark.parametrize(
    ("family", "optimizer"), [("sd15", PRODIGY), ("sdxl", {})], ids=["sd15", "sdxl"]
)
def test_new_rows_learn_in_every_step_before_the_pivot_and_stay_to_the_bit_from_it_on(
    family: str,
    optimizer: dict[str, Any],
    pictures: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    model: Path = request.getfixturevalue(f"{family}_folder")
    training, _ = compose(configuration(model, pictures, **(TOKENS | optimizer)), tmp_path)
    states, events = watched(training, tmp_path)

    encoders = {f"new_tokens.{name}" for name in training.family.text_encoder_names}
    for step in range(6):
        moved = changed(states[step], states[step + 1], "new_tokens.")
        assert moved == (encoders if step < PIVOT else set())
        # The denoiser learns on both sides.
        assert changed(states[step], states[step + 1], "unet.")
    assert phases(events) == {(0, ("denoiser", "tokens"), ()), (3, ("denoiser",), ("tokens",))}


@pytest.mark.parametrize(("share", "pivot"), [(0.5, 2), (1.0, 5), (0.01, 1)])
def test_the_pivot_is_a_share_of_the_steps_also_in_a_run_of_one_epoch(
    share: float, pivot: int, sd15_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    # An implementation that counts epochs has its pivot in epoch int(0.5 * 1) = 0: nothing learns.
    leaves = TOKENS | {"num_train_epochs": 1, "train_text_encoder_ti_frac": share}
    training, _ = compose(configuration(sd15_folder, pictures, **leaves), tmp_path)
    states, _ = watched(training, tmp_path)

    moved = [bool(changed(a, b, "new_tokens.")) for a, b in zip(states, states[1:], strict=False)]
    assert moved == [step < pivot for step in range(5)]


@pytest.mark.parametrize("optimizer", [{}, PRODIGY], ids=["adamw", "prodigy"])
def test_the_denoiser_waits_for_the_pivot_where_it_is_told_to(
    optimizer: dict[str, Any], sdxl_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    leaves = TOKENS | optimizer | {"disable_unet_during_ti_training": True, "use_dora": True}
    training, _ = compose(configuration(sdxl_folder, pictures, **leaves), tmp_path)
    states, events = watched(training, tmp_path)

    for step in range(6):
        assert bool(changed(states[step], states[step + 1], "unet.")) == (step >= PIVOT)
        assert bool(changed(states[step], states[step + 1], "new_tokens.")) == (step < PIVOT)
    assert phases(events) == {(0, ("tokens",), ()), (3, ("denoiser",), ("tokens",))}


@pytest.mark.parametrize(
    ("family", "optimizer"), [("sd15", PRODIGY), ("sdxl", {})], ids=["sd15", "sdxl"]
)
def test_a_run_stopped_around_the_pivot_goes_on_to_the_same_bytes(
    family: str,
    optimizer: dict[str, Any],
    pictures: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    snapshots.skip_reading_back(monkeypatch)
    folder = request.getfixturevalue(f"{family}_folder")
    config = configuration(folder, pictures, **(TOKENS | optimizer), checkpoints_total_limit=9)
    whole = train(config, tmp_path / "whole")
    expected = digests(tmp_path / "whole" / "outputs")
    weights = tensors_of(tmp_path / "whole", 6)

    run, told = tmp_path / "parts", []
    for step in (PIVOT - 1, PIVOT, PIVOT + 1):
        told += stopped_after(step, config, run)
    told += train(config, run)

    assert losses(told) == losses(whole)
    assert phases(told) >= phases(whole)
    assert digests(run / "outputs") == expected
    saved = {step: tensors_of(run, step) for step in (PIVOT - 1, PIVOT, PIVOT + 1, 6)}
    assert saved[6].keys() == weights.keys()
    assert not changed(weights, saved[6], "")
    assert changed(saved[PIVOT - 1], saved[PIVOT], "new_tokens.")
    assert not changed(saved[PIVOT], saved[PIVOT + 1], "new_tokens.")
    assert not changed(saved[PIVOT], saved[6], "new_tokens.")
    assert len(expected) >= 6


def tensors_of(run: Path, step: int) -> snapshots.Learnt:
    """What a checkpoint has kept."""
    return load_file(run / "checkpoints" / f"step-{step}" / "weights.safetensors")


def phases(events: list[Event]) -> set[tuple[int, tuple[str, ...], tuple[str, ...]]]:
    """Step, learning and frozen parts of each phase."""
    return {(e.step, e.learning, e.frozen) for e in events if isinstance(e, PhaseEvent)}


# What must not change


def test_every_frozen_tensor_is_to_the_bit_that_of_the_base_model_afterwards(
    model: Path, pictures: Path, tmp_path: Path
) -> None:
    leaves = TOKENS | EVERY_LAYER | {"cache_latents": False, "use_dora": True, "max_train_steps": 4}
    training, _ = compose(configuration(model, pictures, **leaves), tmp_path)
    family = training.family
    names = [family.denoiser_name, "vae", *family.text_encoder_names]
    parts = {name: family.pipeline.components[name] for name in names}
    watched(training, tmp_path)

    base = fresh(model)
    for name, module in parts.items():
        expected, got = base.pipeline.components[name].state_dict(), snapshots.base_tensors(module)
        assert got.keys() == expected.keys()
        assert not changed(expected, got, "")


class _Shapes(TorchDispatchMode):
    """The shapes of everything that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.seen.add(tuple(made.shape))
        return made


def test_nothing_as_large_as_a_table_is_computed_while_new_tokens_learn(
    model: Path, pictures: Path, tmp_path: Path
) -> None:
    leaves = TOKENS | {"max_train_steps": 2, "train_text_encoder_ti_frac": 1.0}
    training, _ = compose(configuration(model, pictures, **leaves), tmp_path)
    tables = [new.table.weight for new in training.trainables.new_tokens.values()]
    iterator = training.steps(RunFolder(tmp_path), lambda: False)
    with _Shapes() as shapes:
        while not isinstance(next(iterator), StepEvent):
            pass

    # The gradients of the rows are among what was seen, so gradients are seen at all.
    assert all((2, table.shape[1]) in shapes.seen for table in tables)
    assert not [table.shape for table in tables if tuple(table.shape) in shapes.seen]
    assert all(table.grad is None and not table.requires_grad for table in tables)


# Gradients, clipping, decay, retraction


def test_the_gradient_norm_is_that_of_what_learns_and_frozen_tokens_are_not_in_it(
    sdxl_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = snapshots.record_gradients(monkeypatch)
    # Small enough to be reached in each step.
    leaves = TOKENS | EVERY_LAYER | {"max_grad_norm": 1e-4}
    events = steps(configuration(sdxl_folder, pictures, **leaves), tmp_path)

    norms = [event.grad_norm for event in events if isinstance(event, StepEvent)]
    for step, (before, after) in enumerate(zip(seen.before, seen.after, strict=True)):
        rows = before[-2:]
        assert norms[step] == pytest.approx(norm_of(before), rel=1e-5)
        assert norm_of(after) == pytest.approx(1e-4, rel=1e-3)
        if step < PIVOT:
            assert norm_of(rows) > 0
        else:
            assert rows == [None, None]
            assert norm_of(after[:-2]) == pytest.approx(1e-4, rel=1e-3)


def test_rows_are_retracted_once_an_update_and_never_after_the_pivot(
    sdxl_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    retract = tokens.retract

    def listen(new: tokens.NewTokens, exponent: float, allowed: torch.Tensor) -> None:
        before = new.rows.detach().clone()
        retract(new, exponent, allowed)
        calls.append((before, new.rows.detach().clone()))

    monkeypatch.setattr(tokens, "retract", listen)
    leaves = TOKENS | {"gradient_accumulation_steps": 2, "token_retraction": 0.3}
    training, _ = compose(configuration(sdxl_folder, pictures, **leaves), tmp_path)
    states, _ = watched(training, tmp_path)

    assert len(calls) == 2 * PIVOT
    base = fresh(sdxl_folder)
    for number, (before, after) in enumerate(calls):
        name = base.text_encoder_names[number % 2]
        table = base.pipeline.components[name].get_input_embeddings().weight.detach()
        expected = before * (table.std() / before.std()) ** 0.3
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=0)
        assert torch.equal(after, states[number // 2 + 1][f"new_tokens.{name}"])


def test_without_retraction_the_first_step_moves_rows_and_adapter_by_their_own_rates(
    sdxl_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    # Adam's first step is lr * g / (|g| + eps): its largest element is lr where |g| >> eps.
    rates = {"learning_rate": 2e-4, "text_encoder_lr": 5e-3, "adam_epsilon": 1e-14}
    decay = {"adam_weight_decay_text_encoder": 0.0, "token_retraction": 0.0}
    leaves = TOKENS | rates | decay | {"max_train_steps": 1}
    training, _ = compose(configuration(sdxl_folder, pictures, **leaves), tmp_path)
    (before, after), _ = watched(training, tmp_path)

    def largest(start: str, end: str) -> float:
        names = [n for n in before if n.startswith(start) and n.endswith(end)]
        return max(float((after[name] - before[name]).abs().max()) for name in names)

    assert largest("unet.", "lora_B.weight") == pytest.approx(2e-4, rel=1e-3)
    assert largest("new_tokens.", "text_encoder") == pytest.approx(5e-3, rel=1e-3)
    assert largest("new_tokens.", "text_encoder_2") == pytest.approx(5e-3, rel=1e-3)


@pytest.mark.parametrize("decay", [0.5, 0.0])
def test_rows_without_a_gradient_shrink_by_the_text_groups_decay_alone(
    decay: float,
    sdxl_folder: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Dropped captions have no new tokens: one AdamW step is then rows * (1 - lr * decay).
    seen = snapshots.record_gradients(monkeypatch)
    given = {"adam_weight_decay": 0.25, "adam_weight_decay_text_encoder": decay}
    rest = {"caption_dropout": 1.0, "token_retraction": 0.0, "max_train_steps": 1}
    training, _ = compose(configuration(sdxl_folder, pictures, **(TOKENS | given | rest)), tmp_path)
    (before, after), _ = watched(training, tmp_path)

    assert [float(g.abs().max()) for g in seen.before[0][-2:] if g is not None] == [0.0, 0.0]
    for name in ("new_tokens.text_encoder", "new_tokens.text_encoder_2"):
        if decay:
            torch.testing.assert_close(after[name], before[name] * (1 - 1e-3 * decay))
            assert not torch.equal(after[name], before[name])
        else:
            assert torch.equal(after[name], before[name])
    first = next(name for name in before if name.endswith("lora_A.weight"))
    torch.testing.assert_close(after[first], before[first] * (1 - 1e-3 * 0.25))


def test_rows_learn_in_32_bits_beside_encoders_of_16(
    model: Path, pictures: Path, tmp_path: Path
) -> None:
    leaves = TOKENS | {"mixed_precision": "bf16", "token_retraction": 0.0}
    training, _ = compose(configuration(model, pictures, **leaves), tmp_path)
    tables = {new.table.weight.dtype for new in training.trainables.new_tokens.values()}
    states, _ = watched(training, tmp_path)

    assert tables == {torch.bfloat16}
    for step in range(PIVOT):
        moved = changed(states[step], states[step + 1], "new_tokens.")
        assert len(moved) == len(training.family.text_encoder_names)
    rows = [tensor for name, tensor in states[-1].items() if name.startswith("new_tokens.")]
    assert {tensor.dtype for tensor in rows} == {torch.float32}


# Several identifiers


def test_each_identifier_has_rows_and_files_of_its_own_and_learns_from_its_own_captions(
    sdxl_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = snapshots.record_gradients(monkeypatch)
    photos = Path(shutil.copytree(pictures, tmp_path / "photos"))
    for number in range(2, 5):
        (photos / f"{number}.png").unlink()
    (photos / "0.txt").write_text("a TOK in TOKYO")
    (photos / "1.txt").write_text("a TOK1 over there")
    names = {"token_abstraction": "TOK,TOK1", "output_name": "mine", "max_train_steps": 2}
    config = configuration(sdxl_folder, photos, **(TOKENS | names), train_text_encoder_ti_frac=1.0)
    composed, _ = snapshots.composition(config, tmp_path / "run")
    states, _ = watched(composed.training, tmp_path / "run")
    snapshots.skip_reading_back(monkeypatch)
    snapshots.deliver(composed, tmp_path / "run")

    order = [batch.captions[0] for step in range(2) for batch in composed.training.dataset[step]]
    for step, caption in enumerate(order):
        own = slice(2, 4) if "TOK1" in caption else slice(0, 2)
        for rows in seen.before[step][-2:]:
            assert rows is not None
            # Each of the identifier's rows learns, and the other's do not.
            assert bool((rows[own].abs().amax(1) > 0).all())
            assert int((rows.abs().amax(1) > 0).sum()) == 2
    outputs = tmp_path / "run" / "outputs"
    together = load_file(outputs / "mine_emb.safetensors")
    assert {key: tuple(rows.shape) for key, rows in together.items()} == {
        "clip_l": (4, 32),
        "clip_g": (4, 48),
    }
    assert torch.equal(together["clip_l"], states[-1]["new_tokens.text_encoder"])
    assert torch.equal(together["clip_g"], states[-1]["new_tokens.text_encoder_2"])
    for place, identifier in enumerate(("TOK", "TOK1")):
        single = load_file(outputs / f"mine_{identifier}.safetensors")
        for key, rows in single.items():
            assert torch.equal(rows, together[key][2 * place : 2 * place + 2])


@pytest.mark.parametrize("vectors", [1, 3])
def test_the_number_of_vectors_is_the_number_of_rows_and_of_tokens_in_a_caption(
    vectors: int, sd15_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    leaves = TOKENS | {"num_new_tokens_per_abstraction": vectors}
    training, _ = compose(configuration(sd15_folder, pictures, **leaves), tmp_path)

    (rows,) = (new.rows for new in training.trainables.new_tokens.values())
    tokenizer = training.family.pipeline.tokenizer
    written = "".join(f"<s{number}>" for number in range(vectors))
    ids = tokenizer(written, add_special_tokens=False).input_ids
    assert rows.shape == (vectors, 32)
    assert len(ids) == vectors
    plain = fresh(sd15_folder).pipeline.tokenizer
    assert len(tokenizer) == len(plain) + vectors


# Pooling


@pytest.fixture
def old_sdxl(sdxl_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint from before transformers 4.31, whose second encoder says `eos_token_id: 2`."""
    folder = Path(shutil.copytree(sdxl_folder, tmp_path / "old"))
    path = folder / "text_encoder_2" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 2}))
    return folder


def test_ti_pooling_decides_where_an_old_checkpoint_pools(
    old_sdxl: Path, sdxl_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    pooled, states, ignored = {}, {}, {}
    for folder, pooling in ((old_sdxl, "diffusers"), (old_sdxl, "eos"), (sdxl_folder, "eos")):
        config = configuration(folder, pictures, **TOKENS, ti_pooling=pooling)
        run = f"{folder.name} {pooling}"
        training, events = compose(config, tmp_path / run)
        text = training.text.of(["A photograph of a TOK"])
        pooled[run], states[run] = (
            text["pooled_prompt_embeds"].detach(),
            text["prompt_embeds"].detach(),
        )
        notes = [e for e in events if isinstance(e, NoteEvent) and e.field == "ti_pooling"]
        ignored[run] = [note.note for note in notes]

    new = sdxl_folder.name
    assert not torch.allclose(pooled["old diffusers"], pooled["old eos"], atol=1e-3)
    # A checkpoint that says where its texts end pools there anyway, and is told so.
    assert torch.equal(pooled["old eos"], pooled[f"{new} eos"])
    assert all(torch.equal(one, states["old eos"]) for one in states.values())
    assert ignored == {"old diffusers": [], "old eos": [], f"{new} eos": ["ignored"]}


def test_ti_pooling_is_reported_as_ignored_where_nothing_is_pooled(
    sd15_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    config = configuration(sd15_folder, pictures, **TOKENS, ti_pooling="eos")
    composed, events = snapshots.composition(config, tmp_path)

    notes = [e for e in events if isinstance(e, NoteEvent) and e.field == "ti_pooling"]
    assert [note.note for note in notes] == ["ignored"]
    assert "ti_pooling" in composed.config.resolved.ignored_options


# The delivered files


def test_the_files_give_the_trained_prediction_in_a_fresh_pipeline_of_diffusers(
    model: Path, pictures: Path, tmp_path: Path
) -> None:
    attention = {"target_unet_modules": ["to_q", "to_k", "to_v"]}
    config = configuration(model, pictures, **(TOKENS | attention))
    composed, _ = snapshots.composition(config, tmp_path)
    training = composed.training
    watched(training, tmp_path)
    snapshots.deliver(composed, tmp_path)

    pipeline: Any = type(training.family).pipeline_class.from_pretrained(model)
    reader = type(training.family)(pipeline)
    untrained = encoded(reader, "A photograph of a TOK")
    rows = load_file(tmp_path / "outputs" / "lora_emb.safetensors")
    words = ["<s0>", "<s1>"]
    pipeline.load_textual_inversion(
        rows["clip_l"],
        token=words,
        text_encoder=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
    )
    if "clip_g" in rows:
        pipeline.load_textual_inversion(
            rows["clip_g"],
            token=words,
            text_encoder=pipeline.text_encoder_2,
            tokenizer=pipeline.tokenizer_2,
        )
    pipeline.load_lora_weights(tmp_path / "outputs", weight_name="pytorch_lora_weights.safetensors")
    text = encoded(reader, "A photograph of a <s0><s1>")
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    size = torch.tensor([[64, 64]])
    geometry = {
        "original_size": size,
        "crop_top_left": torch.tensor([[0, 0]]),
        "target_size": size,
    }
    timesteps = torch.tensor([500])

    trained = training.text.of(["A photograph of a TOK"])
    with torch.no_grad():
        got = reader.predict(latents, timesteps, text, geometry)
        expected = training.family.predict(latents, timesteps, trained, geometry)
        without = reader.predict(latents, timesteps, untrained, geometry)
    for name, states in trained.items():
        torch.testing.assert_close(text[name], states, rtol=0, atol=1e-5)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    # The caption of another text would not pass.
    assert float((without - expected).abs().max()) > 1e-4


def test_new_tokens_that_no_caption_asks_for_are_refused_before_a_model_is_loaded(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    shutil.copy(photo_folder / "photo_1.jpg", photos)
    leaves = {"train_text_encoder_ti": True, "instance_prompt": "a portrait of a woman"}
    monkeypatch.setattr(base_model, "load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(InputError, match="no caption has `TOK`, so the new tokens would learn"):
        compose(configuration(sd15_folder, photos, **leaves), tmp_path / "run")


def test_a_class_caption_with_an_identifier_deserves_a_warning(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    leaves = {
        "train_text_encoder_ti": True,
        "with_prior_preservation": True,
        "photo_class": "Woman",
        # Its first picture has a caption of its own, which speaks of TOK.
        "class_images_url": str(photo_folder),
    }
    _, events = compose(configuration(sd15_folder, photo_folder, **leaves), tmp_path / "run")
    notes = [event.message for event in events if isinstance(event, NoteEvent)]
    assert "1 class pictures have captions with `TOK`, which then learns the class: " in " ".join(
        notes
    )
