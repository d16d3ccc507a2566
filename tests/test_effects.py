"""Each hyperparameter's effect, observed where it acts in a real training on a tiny model.

The observables are what the denoiser is given, the losses, and the trained tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import make_tiny_models
import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file
from tiny import configuration, losses, steps, train

from trainer import adapters, base_model
from trainer.base_model import Precision
from trainer.config import ModelConfig
from trainer.errors import InputError
from trainer.events import NoteEvent, StepEvent
from trainer.families.base import Family
from trainer.families.sd15 import StableDiffusion15
from trainer.families.sdxl import StableDiffusionXL

FULL = Precision(torch.float32, torch.float32, torch.float32)


@dataclass
class Spy:
    """What the denoiser was given, one entry per forward pass."""

    latents: list[torch.Tensor] = field(default_factory=list)
    timesteps: list[int] = field(default_factory=list)
    text: list[torch.Tensor] = field(default_factory=list)
    geometry: list[dict[str, torch.Tensor]] = field(default_factory=list)
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
        seen.timesteps += timesteps.tolist()
        seen.text += list(text["hidden_states"].clone())
        seen.geometry.append(dict(geometry))
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
        return family.encode_text([caption])["hidden_states"][0]


def first_update(spy: Spy) -> dict[str, torch.Tensor]:
    """How far each trained tensor moved in the first step."""
    before, after = spy.parameters[0], spy.parameters[1]
    return {name: after[name] - before[name] for name in before}


def test_batch_size_is_the_number_of_latents_in_a_forward_pass(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path, spy: Spy
) -> None:
    steps(configuration(sd15_folder, photo_folder, batch_size=3, max_train_steps=2), tmp_path)
    assert [len(latents) for latents in spy.latents] == [3, 2]


def test_resolution_is_the_size_of_the_latents_and_height_comes_first_in_the_time_ids(
    sdxl_folder: Path, photo_folder: Path, tmp_path: Path, spy: Spy
) -> None:
    size = {"resolution_width": 128, "resolution_height": 64}
    steps(configuration(sdxl_folder, photo_folder, max_train_steps=1, **size), tmp_path)
    assert spy.latents[0].shape[-2:] == (8, 16)
    assert spy.geometry[0]["target_size"].tolist() == [[64, 128]]


def test_timesteps_stay_inside_their_bounds(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path, spy: Spy
) -> None:
    bounds = {"min_timestep_trained": 300, "max_timestep_trained": 304}
    steps(
        configuration(sd15_folder, photo_folder, batch_size=5, max_train_steps=6, **bounds),
        tmp_path,
    )
    assert set(spy.timesteps) == {300, 301, 302, 303}


def test_each_picture_goes_with_its_own_caption_and_the_prompt_with_the_others(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path, spy: Spy
) -> None:
    leaves = {"instance_prompt": "TOK standing somewhere", "max_train_steps": 5}
    steps(configuration(sd15_folder, photo_folder, **leaves), tmp_path)
    own = encoded(sd15_folder, "a portrait of TOK in a space suit")
    prompt = encoded(sd15_folder, "TOK standing somewhere")
    assert sum(torch.equal(text, own) for text in spy.text) == 1
    assert sum(torch.equal(text, prompt) for text in spy.text) == 4


def test_a_dropped_caption_is_the_encoded_empty_one(
    sdxl_folder: Path, photo_folder: Path, tmp_path: Path, spy: Spy
) -> None:
    steps(configuration(sdxl_folder, photo_folder, caption_dropout=1.0), tmp_path)
    empty = encoded(sdxl_folder, "")
    assert all(torch.equal(text, empty) for text in spy.text)


@pytest.mark.parametrize("learning_rate", [1e-3, 2e-4])
def test_the_first_adamw_step_moves_b_by_the_learning_rate(
    learning_rate: float, sd15_folder: Path, photo_folder: Path, tmp_path: Path, spy: Spy
) -> None:
    # Adam's first step is lr * g / (|g| + eps): its largest element is lr where |g| >> eps.
    leaves = {"learning_rate": learning_rate, "adam_epsilon": 1e-12, "max_train_steps": 2}
    steps(configuration(sd15_folder, photo_folder, **leaves), tmp_path)
    moved = [change.abs().max() for n, change in first_update(spy).items() if "lora_B" in n]
    assert float(max(moved)) == pytest.approx(learning_rate, rel=1e-3)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_weight_decay_shrinks_a_which_has_no_gradient_at_first(
    decay: float, sd15_folder: Path, photo_folder: Path, tmp_path: Path, spy: Spy
) -> None:
    steps(
        configuration(sd15_folder, photo_folder, adam_weight_decay=decay, max_train_steps=2),
        tmp_path,
    )
    name = next(name for name in spy.parameters[0] if "lora_A" in name)
    ratio = spy.parameters[1][name] / spy.parameters[0][name]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1 - 1e-3 * decay))


def test_snr_gamma_weights_the_loss_by_gamma_over_snr(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path, spy: Spy
) -> None:
    bounds = {"min_timestep_trained": 50, "max_timestep_trained": 51, "max_train_steps": 1}
    runs = {}
    for gamma in (None, 0.5):
        config = configuration(sd15_folder, photo_folder, snr_gamma=gamma, **bounds)
        runs[gamma] = losses(steps(config, tmp_path / str(gamma)))[0]
    scheduler = DDPMScheduler(**_noise_table(sd15_folder))
    share = scheduler.alphas_cumprod[50]
    assert runs[0.5] / runs[None] == pytest.approx(float(0.5 * (1 - share) / share), rel=1e-5)


def _noise_table(folder: Path) -> dict[str, Any]:
    config = DDPMScheduler.load_config(folder / "scheduler")
    return {name: config[name] for name in ("beta_start", "beta_end", "beta_schedule")}


def test_noise_offset_shifts_whole_channels_of_the_noisy_latents(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path, spy: Spy
) -> None:
    for offset in (0.0, 0.5):
        config = configuration(sd15_folder, photo_folder, noise_offset=offset, max_train_steps=1)
        steps(config, tmp_path / str(offset))
    shift = spy.latents[1] - spy.latents[0]
    torch.testing.assert_close(
        shift, shift.mean((2, 3), keepdim=True).expand_as(shift), atol=1e-5, rtol=1e-4
    )
    assert bool((shift.mean((2, 3)).abs() > 1e-3).all())


def test_accumulated_small_batches_train_like_one_large_batch(
    sdxl_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    together = {"batch_size": 2, "gradient_accumulation_steps": 1}
    apart = {"batch_size": 1, "gradient_accumulation_steps": 2}
    one = steps(configuration(sdxl_folder, photo_folder, **together), tmp_path / "one")
    two = steps(configuration(sdxl_folder, photo_folder, **apart), tmp_path / "two")
    assert losses(two) == pytest.approx(losses(one), rel=2e-6)


@pytest.mark.parametrize(
    "leaves",
    [
        {"cache_latents": False},
        {"cache_latents": False, "num_workers": 2},
        {"gradient_checkpointing": True},
    ],
)
def test_conveniences_do_not_change_the_losses(
    leaves: dict[str, Any], sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    common = {"random_flip": True, "batch_size": 2}
    plain = steps(configuration(sd15_folder, photo_folder, **common), tmp_path / "plain")
    other = steps(configuration(sd15_folder, photo_folder, **common, **leaves), tmp_path / "other")
    assert losses(other) == pytest.approx(losses(plain), rel=1e-5)


def test_a_flipped_picture_reaches_the_denoiser_both_ways_also_from_the_cache(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path, spy: Spy
) -> None:
    # At timestep 0 hardly any noise is on the latents: the two views of one picture stand apart.
    leaves = {"max_timestep_trained": 1, "max_train_steps": 20, "checkpointing_steps": 50}
    single = tmp_path / "photos"
    single.mkdir()
    (single / "a.jpg").write_bytes((photo_folder / "photo_1.jpg").read_bytes())
    for flip in (False, True):
        config = configuration(sd15_folder, single, random_flip=flip, **leaves)
        steps(config, tmp_path / str(flip))
    plain, flipped = torch.cat(spy.latents[:20]), torch.cat(spy.latents[20:])
    same = [bool(torch.equal(a, b)) for a, b in zip(plain, flipped, strict=True)]
    assert 4 <= sum(same) <= 16


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


def test_upscale_vae_32bit_decides_the_precision_of_the_latents(
    sdxl_folder: Path, photo_folder: Path, tmp_path: Path, spy: Spy
) -> None:
    for full in (True, False):
        leaves = {"mixed_precision": "bf16", "upscale_vae_32bit": full, "max_train_steps": 1}
        steps(configuration(sdxl_folder, photo_folder, **leaves), tmp_path / str(full))
    steps(configuration(sdxl_folder, photo_folder, max_train_steps=1), tmp_path / "fp32")
    with_32, with_16, reference = spy.latents
    assert torch.equal(with_32, reference)
    assert not torch.allclose(with_16, reference, atol=1e-4)


def test_fp16_on_a_processor_is_refused(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="needs a GPU"):
        steps(configuration(sd15_folder, photo_folder, mixed_precision="fp16"), tmp_path)


def test_the_learning_rate_follows_its_schedule_step_by_step(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    leaves = {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 4, "max_train_steps": 6}
    events = steps(configuration(sd15_folder, photo_folder, **leaves), tmp_path)
    rates = [event.learning_rate for event in events if isinstance(event, StepEvent)]
    assert rates == pytest.approx([0, 0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3])


def test_epochs_decide_the_number_of_steps(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path, spy: Spy
) -> None:
    leaves = {"num_train_epochs": 3, "batch_size": 2, "max_train_steps": 1000}
    events = steps(configuration(sd15_folder, photo_folder, **leaves), tmp_path)
    assert len(losses(events)) == 9
    assert sum(len(latents) for latents in spy.latents) == 15


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


def test_alpha_scales_what_the_adapter_adds(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    # The scale multiplies B's gradient too, which Adam undoes: only the product's scale is left.
    deltas = []
    for alpha in (4.0, 8.0):
        leaves = {"alpha": alpha, "max_train_steps": 1, "adam_epsilon": 1e-12, "max_grad_norm": 0.0}
        train(configuration(sd15_folder, photo_folder, **leaves), tmp_path / str(alpha))
        tensors = load_file(tmp_path / str(alpha) / "outputs" / "pytorch_lora_weights.safetensors")
        name = next(name for name in tensors if name.endswith("to_q.lora_B.weight"))
        deltas.append(tensors[name] @ tensors[name.replace("lora_B", "lora_A")])
    torch.testing.assert_close(deltas[1], 2 * deltas[0], rtol=1e-3, atol=1e-7)


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


def test_another_base_model_gives_another_adapter(
    sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    other = make_tiny_models.make_sd15(tmp_path / "other", seed=1)
    one = losses(steps(configuration(sd15_folder, photo_folder), tmp_path / "one"))
    two = losses(steps(configuration(other, photo_folder), tmp_path / "two"))
    assert one != two


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
