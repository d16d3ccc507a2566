"""Effects in a training on a tiny model that no single option answers for.

What each option does by itself is shown by its rows in the option-effect matrix, tests/options.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import make_tiny_models
import pytest
import torch
from safetensors.torch import load_file
from tiny import configuration, losses, steps, train

from trainer import adapters, base_model
from trainer.base_model import Precision
from trainer.config import ModelConfig
from trainer.events import NoteEvent, StepEvent
from trainer.families.base import Family
from trainer.families.sd15 import StableDiffusion15
from trainer.families.sdxl import StableDiffusionXL

FULL = Precision(*[torch.float32] * 4)


@dataclass
class Spy:
    """What the denoiser was given, one entry per forward pass."""

    latents: list[torch.Tensor] = field(default_factory=list)
    text: list[torch.Tensor] = field(default_factory=list)
    parameters: list[dict[str, torch.Tensor]] = field(default_factory=list)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spy]:
    """Listens to both families' denoisers."""
    seen = Spy()
    for family in (StableDiffusion15, StableDiffusionXL):
        monkeypatch.setattr(family, "predict", _listening(family.predict, seen))
    yield seen


def _listening(predict: Any, seen: Spy) -> Any:
    def listen(
        self: Family, latents: torch.Tensor, timesteps: torch.Tensor, text: Any, geometry: Any
    ) -> torch.Tensor:
        seen.latents.append(latents.clone())
        seen.text += list(text["prompt_embeds"].clone())
        trained = {
            n: p.detach().clone() for n, p in self.denoiser.named_parameters() if p.requires_grad
        }
        seen.parameters.append(trained)
        prediction: torch.Tensor = predict(self, latents, timesteps, text, geometry)
        return prediction

    return listen


def encoded(folder: Path, caption: str) -> torch.Tensor:
    """A caption's hidden states, by a fresh pipeline."""
    family = base_model.load(base_model.locate(ModelConfig(model_url=str(folder))), FULL)
    with torch.no_grad():
        return family.encode_text([caption])["prompt_embeds"][0]


def test_each_picture_goes_with_its_own_caption_and_the_prompt_with_the_others(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path, spy: Spy
) -> None:
    leaves = {"instance_prompt": "TOK standing somewhere", "max_train_steps": 5}
    steps(configuration(sd15_folder, photo_folder, **leaves), tmp_path)
    own = encoded(sd15_folder, "a portrait of TOK in a space suit")
    prompt = encoded(sd15_folder, "TOK standing somewhere")
    assert sum(torch.equal(text, own) for text in spy.text) == 1
    assert sum(torch.equal(text, prompt) for text in spy.text) == 4


def test_bf16_keeps_trained_weights_in_32_bits_and_moves_magnitudes(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path, spy: Spy
) -> None:
    # A magnitude near 1 in bf16 cannot move by 8e-5 at all: its steps are 4e-3 wide.
    leaves = {"mixed_precision": "bf16", "use_dora": True, "learning_rate": 8e-5}
    steps(configuration(sd15_folder, photo_folder, **leaves), tmp_path)
    first, last = spy.parameters[0], spy.parameters[-1]
    magnitudes = [name for name in first if "magnitude" in name]
    assert {tensor.dtype for tensor in last.values()} == {torch.float32}
    moved = [name for name in magnitudes if not torch.equal(first[name], last[name])]
    assert len(magnitudes) > 50
    # Queries and keys of a random network's cross-attention hardly get a gradient in bf16.
    still = set(magnitudes) - set(moved)
    assert all(".attn" in name for name in still)
    assert len(moved) > 0.8 * len(magnitudes)


def test_rank_alpha_and_targets_shape_the_exported_adapter(
    sdxl_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    leaves = {"rank": 3, "alpha": 1.5, "target_unet_modules": ["to_q", "conv2"]}
    train(configuration(sdxl_folder, photo_folder, **leaves), tmp_path)
    tensors = load_file(tmp_path / "outputs" / "pytorch_lora_weights.safetensors")
    layers = {name.split(".lora_")[0].removeprefix("unet.") for name in tensors}
    family = base_model.load(base_model.locate(ModelConfig(model_url=str(sdxl_folder))), FULL)
    expected, _ = adapters.target_layers(
        family.denoiser, ("to_q", "conv2"), field="t", must_match=True
    )
    assert layers == set(expected)
    assert {t.shape[0] for name, t in tensors.items() if "lora_A" in name} == {3}


def test_v_prediction_checkpoints_are_trained_on_velocity(
    photo_folder: Path, tmp_path: Path, spy: Spy
) -> None:
    runs = {}
    for kind in ("epsilon", "v_prediction"):
        folder = make_tiny_models.make_sd15(tmp_path / kind, prediction_type=kind)
        config = configuration(folder, photo_folder, max_train_steps=1, snr_gamma=None)
        runs[kind] = losses(steps(config, tmp_path / f"run-{kind}"))[0]
    assert torch.equal(spy.latents[0], spy.latents[1])
    assert runs["epsilon"] != pytest.approx(runs["v_prediction"], rel=1e-3)


def test_the_environment_of_a_launcher_does_not_change_the_training(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = steps(configuration(sd15_folder, photo_folder), tmp_path / "plain")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    other = steps(configuration(sd15_folder, photo_folder), tmp_path / "other")
    assert losses(other) == losses(plain)


def test_a_rank_beyond_the_width_of_a_layer_is_noted(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    config = configuration(sd15_folder, photo_folder, rank=20, max_train_steps=1)
    notes = [e for e in steps(config, tmp_path) if isinstance(e, NoteEvent) and e.field == "rank"]
    assert [note.note for note in notes] == ["warning"]
    assert "20 is more than" in notes[0].message


@pytest.mark.parametrize(("warm_up", "warned"), [(3, []), (9, ["lr_warmup_steps"])])
def test_a_warm_up_as_long_as_all_epochs_is_warned_of(
    warm_up: int, warned: list[str], sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    leaves = {"num_train_epochs": 1, "lr_scheduler": "linear", "lr_warmup_steps": warm_up}
    events = steps(configuration(sd15_folder, photo_folder, **leaves), tmp_path)
    warnings = [e.field for e in events if isinstance(e, NoteEvent) and e.note == "warning"]
    assert [field for field in warnings if field == "lr_warmup_steps"] == warned


def test_a_step_is_reported_with_the_norm_before_clipping(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    norms = []
    for largest in (0.0, 1e-6):
        config = configuration(sd15_folder, photo_folder, max_grad_norm=largest, max_train_steps=1)
        events = steps(config, tmp_path / str(largest))
        norms += [event.grad_norm for event in events if isinstance(event, StepEvent)]
    assert norms[1] == pytest.approx(norms[0])
    assert norms[0] > 1e-3
