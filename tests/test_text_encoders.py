"""Text encoders that learn: by an adapter of their own strength and length, or wholly."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import snapshots
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from snapshots import changed, encoded, fresh, stopped_after, watched
from tiny import TWO_LAYERS, compose, configuration, losses, never, train
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from trainer.adapted.layers import AdaptedLayer
from trainer.adapters import EffectiveWeights
from trainer.events import FileEvent, NoteEvent, PhaseEvent, StepEvent, VerifyEvent
from trainer.job import RunFolder
from trainer.training import Training

CAPTION = "A photograph of a TOK"
TEXT: dict[str, Any] = {"train_text_encoder": True, "max_train_steps": 3, "learning_rate": 2e-3}
OWN = {
    "rank": 4,
    "alpha": 2.0,
    "text_encoder_rank": 2,
    "text_encoder_alpha": 6.0,
    "target_unet_modules": ["to_k"],
    "target_text_encoder_modules": ["q_proj", "fc1"],
}
PREFIXES = {"sd15": {"text_encoder": "lora_te"}, "sdxl": {"text_encoder": "lora_te1"}}
PREFIXES["sdxl"]["text_encoder_2"] = "lora_te2"

# SDXL takes the states before its first encoder's last layer, which therefore never learns.
IDLE = ("text_encoder", "layers.2.")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return snapshots.write_pictures(tmp_path_factory.mktemp("text") / "pictures", 3)


@dataclass(frozen=True)
class Trained:
    """A training whose files are written."""

    family: str
    form: str
    base: Path
    training: Training
    outputs: Path


@pytest.fixture(scope="module", params=["sd15 lora", "sd15 dora", "sdxl lora", "sdxl dora"])
def trained(
    request: pytest.FixtureRequest, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    family, form = request.param.split()
    base: Path = request.getfixturevalue(f"{family}_folder")
    folder = tmp_path_factory.mktemp("trained")
    config = configuration(base, pictures, **TEXT, **OWN, use_dora=form == "dora")
    with pytest.MonkeyPatch.context() as patch:
        snapshots.skip_reading_back(patch)
        composed, _ = snapshots.composition(config, folder)
        watched(composed.training, folder)
        snapshots.deliver(composed, folder)
    return Trained(family, form, base, composed.training, folder / "outputs")


def test_an_adapter_on_text_encoders_has_its_own_rank_strength_and_layers_in_every_file(
    trained: Trained,
) -> None:
    family, form = trained.family, trained.form
    diffusers_file = load_file(trained.outputs / "pytorch_lora_weights.safetensors")
    kohya_file = load_file(trained.outputs / "lora.safetensors")
    base = fresh(trained.base)
    for name, prefix in PREFIXES[family].items():
        encoder = trained.training.trainables.text_encoders[name]
        # Three layers have a query and a first linear layer each.
        effective = EffectiveWeights(encoder)
        assert {path.rsplit(".")[-1] for path in effective} == {"q_proj", "fc1"}
        assert len(effective) == 6
        own = [key for key in diffusers_file if key.startswith(f"{name}.")]
        assert all(key.startswith(f"{name}.text_model.") for key in own)
        ranks = {diffusers_file[key].shape[0] for key in own if "lora_A" in key}
        assert ranks == {2}
        short = {key for key in kohya_file if key.startswith(f"{prefix}_")}
        assert all(key.startswith(f"{prefix}_text_model_encoder_layers_") for key in short)
        assert sum(key.endswith("lora_down.weight") for key in short) == 6
        assert {kohya_file[k].shape[0] for k in short if k.endswith("lora_down.weight")} == {2}
        # Below the adapters lies the base model, to the bit.
        expected = base.pipeline.components[name].state_dict()
        got = snapshots.base_tensors(encoder)
        assert got.keys() == expected.keys()
        assert not changed(expected, got, "")
        for path in effective:
            is_used = name != IDLE[0] or family != "sdxl" or IDLE[1] not in path
            assert torch.equal(effective[path], effective.base(path)) == (not is_used)
            if form == "lora":
                stem = f"{prefix}_text_model_{path.replace('.', '_')}".replace(
                    "text_model_text_model", "text_model"
                )
                torch.testing.assert_close(
                    effective[path] - effective.base(path),
                    change_of(kohya_file, stem),
                    rtol=1e-3,
                    atol=1e-6,
                )
    denoiser = [key for key in diffusers_file if key.startswith("unet.") and "lora_A" in key]
    assert {diffusers_file[key].shape[0] for key in denoiser} == {4}


def change_of(tensors: dict[str, torch.Tensor], stem: str) -> torch.Tensor:
    """What a kohya LoRA adds to a linear layer: alpha / rank * up @ down."""
    down, up = tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"]
    return float(tensors[f"{stem}.alpha"]) / len(down) * (up @ down)


def test_a_fresh_pipeline_with_the_file_encodes_prompts_as_the_trained_encoders_do(
    trained: Trained,
) -> None:
    reader = fresh(trained.base)
    before = encoded(reader, CAPTION)
    name = "pytorch_lora_weights.safetensors"
    reader.pipeline.load_lora_weights(trained.outputs, weight_name=name)
    after = encoded(reader, CAPTION)
    with torch.no_grad():
        expected = trained.training.text.of([CAPTION])
    for name, states in expected.items():
        torch.testing.assert_close(after[name], states, rtol=0, atol=1e-5)
        assert float((before[name] - states).abs().max()) > 1e-3


@pytest.mark.parametrize(("family", "form"), [("sdxl", "lokr"), ("sd15", "loha")])
def test_other_forms_on_text_encoders_are_given_back_by_their_files(
    family: str, form: str, pictures: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(f"{family}_folder")
    leaves = {"lora_type": form, "target_unet_modules": ["to_k"]}
    events = train(configuration(folder, pictures, **TEXT, **leaves), tmp_path)

    checks = [event for event in events if isinstance(event, VerifyEvent)]
    passed = {check.path for check in checks if check.status == "passed"}
    written = {e.path for e in events if isinstance(e, FileEvent) and ".safetensors" in e.path}
    assert passed == written
    assert not [check for check in checks if check.status == "failed"]
    kohya = load_file(tmp_path / "outputs" / "lora.safetensors")
    for prefix in PREFIXES[family].values():
        assert any(key.startswith(f"{prefix}_text_model_encoder_layers_0_") for key in kohya)


@pytest.mark.parametrize("decay", [0.5, 0.0])
def test_text_encoders_have_their_own_rate_and_decay(
    decay: float, sdxl_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    # Adam's first step moves B by lr where |g| >> eps; A has no gradient yet, and only decays.
    rates = {"learning_rate": 2e-4, "text_encoder_lr": 3e-3, "adam_epsilon": 1e-14}
    decays = {"adam_weight_decay": 0.25, "adam_weight_decay_text_encoder": decay}
    leaves = TEXT | {"max_train_steps": 1} | rates | decays | TWO_LAYERS
    training, _ = compose(configuration(sdxl_folder, pictures, **leaves), tmp_path)
    (before, after), _ = watched(training, tmp_path)

    for component, rate, own in (
        ("unet", 2e-4, 0.25),
        ("text_encoder", 3e-3, decay),
        ("text_encoder_2", 3e-3, decay),
    ):
        names = [name for name in before if name.startswith(f"{component}.")]
        moved = [(after[n] - before[n]).abs().max() for n in names if n.endswith("lora_B.weight")]
        assert float(max(moved)) == pytest.approx(rate, rel=1e-3)
        for name in (name for name in names if name.endswith("lora_A.weight")):
            is_used = not (component == IDLE[0] and IDLE[1] in name)
            if own and is_used:
                torch.testing.assert_close(after[name], before[name] * (1 - rate * own))
            else:
                assert torch.equal(after[name], before[name])


def test_text_encoders_stay_to_the_bit_after_their_share_of_the_steps_also_when_resumed(
    sdxl_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    shares = {"train_text_encoder_frac": 0.5, "max_train_steps": 6, "checkpointing_steps": 100}
    config = configuration(
        sdxl_folder,
        pictures,
        **(TEXT | shares | TWO_LAYERS),
        optimizer="prodigy",
        checkpoints_total_limit=9,
    )
    training, _ = compose(config, tmp_path / "whole")
    states, events = watched(training, tmp_path / "whole")

    for step in range(6):
        for encoder in ("text_encoder.", "text_encoder_2."):
            assert bool(changed(states[step], states[step + 1], encoder)) == (step < 3)
        assert changed(states[step], states[step + 1], "unet.")
    phases = [(e.step, e.learning, e.frozen) for e in events if isinstance(e, PhaseEvent)]
    together = ("denoiser", "text_encoders")
    assert phases == [(0, together, ()), (3, ("denoiser",), ("text_encoders",))]
    folder, told = tmp_path / "parts", []
    for step in (2, 3, 4):
        told += stopped_after(step, config, folder)
    again, _ = compose(config, folder)
    list(again.resume(RunFolder(folder)))
    told += again.steps(RunFolder(folder), never)
    assert losses(told) == losses(events)
    last = load_file(folder / "checkpoints" / "step-6" / "weights.safetensors")
    assert last.keys() == states[-1].keys()
    assert not changed(states[-1], last, "")


def test_wholly_trained_text_encoders_load_from_their_folders_and_encode_as_trained(
    sdxl_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    # Rates far too hot for a real model, so that the change of a tiny one is to be seen.
    leaves = TEXT | {"use_lora": False, "learning_rate": 5e-4, "extract_rank": 4}
    composed, _ = snapshots.composition(configuration(sdxl_folder, pictures, **leaves), tmp_path)
    watched(composed.training, tmp_path)
    events = snapshots.deliver(composed, tmp_path)

    outputs = tmp_path / "outputs"
    roles = {event.role for event in events if isinstance(event, FileEvent)}
    assert {"denoiser_weights", "text_encoder_weights", "text_encoder_2_weights"} <= roles
    reader = fresh(sdxl_folder)
    before = encoded(reader, CAPTION)
    reader.pipeline.register_modules(
        unet=UNet2DConditionModel.from_pretrained(outputs / "unet"),
        text_encoder=CLIPTextModel.from_pretrained(outputs / "text_encoder"),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(outputs / "text_encoder_2"),
    )
    after = encoded(reader, CAPTION)
    with torch.no_grad():
        trained = composed.training.text.of([CAPTION])
    for name, states in trained.items():
        torch.testing.assert_close(after[name], states, rtol=0, atol=1e-6)
        assert float((before[name] - states).abs().max()) > 1e-3
    # The LoRA taken from the change holds its best four directions, and says what it lacks.
    report = json.loads((outputs / "extraction.json").read_text())
    notes = [e for e in events if isinstance(e, NoteEvent) and e.field == "extract_rank"]
    assert 0 < report["residual"] < 1
    assert f"{report['residual']:.1%}" in notes[0].message
    assert any(layer.startswith("text_encoder_2.") for layer in report["layers"])
    checks = {event.path: event.status for event in events if isinstance(event, VerifyEvent)}
    assert checks["outputs/pytorch_lora_weights.safetensors"] == "passed"
    assert checks["outputs/lora.safetensors"] == "passed"
    assert "failed" not in {e.status for e in events if isinstance(e, VerifyEvent)}


def test_an_extracted_lora_on_text_encoders_gives_the_nearest_weights_of_its_rank(
    sd15_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots.skip_reading_back(monkeypatch)
    leaves = TEXT | {"use_lora": False, "learning_rate": 5e-4, "extract_rank": 3}
    composed, _ = snapshots.composition(configuration(sd15_folder, pictures, **leaves), tmp_path)
    watched(composed.training, tmp_path)
    snapshots.deliver(composed, tmp_path)

    tensors = load_file(tmp_path / "outputs" / "lora.safetensors")
    trained = composed.training.trainables.text_encoders["text_encoder"].state_dict()
    base = fresh(sd15_folder).pipeline.text_encoder.state_dict()
    path = next(name for name in base if name.endswith("layers.1.self_attn.q_proj.weight"))
    change = (trained[path] - base[path]).double()
    # Eckart and Young: the three largest singular values, by numpy's decomposition.
    left, values, right = torch.linalg.svd(change)
    nearest = left[:, :3] @ values[:3].diag() @ right[:3]
    found = change_of(tensors, "lora_te_text_model_encoder_layers_1_self_attn_q_proj")
    torch.testing.assert_close(found.double(), nearest, rtol=1e-3, atol=1e-6)


FORMS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "loha": {"lora_type": "loha", "rank": 64},
    "thin loha": {"lora_type": "loha", "rank": 2},
}


@pytest.mark.parametrize("form", FORMS)
def test_nothing_of_a_text_encoder_stays_behind_when_it_has_learnt_and_leaves_the_device(
    form: str,
    sd15_folder: Path,
    photo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leaves = {"max_train_steps": 4, "train_text_encoder": True, "train_text_encoder_frac": 0.5}
    config = configuration(
        sd15_folder, photo_folder, mixed_precision="bf16", **leaves, **FORMS[form]
    )
    training, _ = compose(config, tmp_path)
    modules = training.family.pipeline.text_encoder.modules()
    layers = [layer for layer in modules if isinstance(layer, AdaptedLayer)]
    assert all(layer.copied for layer in layers)
    plain = torch.nn.Module.to

    def to(module: torch.nn.Module, *where: Any, **named: Any) -> torch.nn.Module:
        # A device that nothing can be computed on together with another.
        return plain(module, *(("meta",) if where == ("cpu",) else where), **named)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    taken = (e for e in training.steps(RunFolder(tmp_path), never) if isinstance(e, StepEvent))
    # The third is the first without them.
    assert [next(taken).step for _ in range(3)] == [1, 2, 3]
    assert layers
    assert all(layer.copies is None and not layer.copied for layer in layers)
