"""What every model family must do, checked on a tiny model of each: a new family's entry test."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

from trainer import adapters, base_model
from trainer.base_model import Precision
from trainer.config import AdapterConfig, ModelConfig
from trainer.families import family_names, load_family
from trainer.families.base import Family

FULL = Precision(*[torch.float32] * 4)


@pytest.fixture(params=family_names())
def family_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(family_name: str, request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(f"{family_name}_folder")
    return path


@pytest.fixture
def family(folder: Path) -> Family:
    located = base_model.locate(ModelConfig(model_url=str(folder)))
    return base_model.load(located, FULL)


def geometry_of(size: int) -> dict[str, torch.Tensor]:
    square = torch.tensor([[size, size]])
    return {
        "original_size": square,
        "crop_top_left": torch.zeros_like(square),
        "target_size": square,
    }


def predict(family: Family, latents: torch.Tensor, caption: str) -> torch.Tensor:
    text = family.encode_text([caption])
    timesteps = torch.full((len(latents),), 500)
    return family.predict(latents, timesteps, text, geometry_of(64))


def latents_for(family: Family) -> torch.Tensor:
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        return family.encode_image(pixels).mean


def test_a_family_says_at_most_ten_things(family_name: str) -> None:
    family = load_family(family_name)
    said = {name for name in vars(Family) | vars(family) if not name.startswith("_")}
    assert 5 <= len(said) <= 10


def test_a_family_is_recognised_by_its_checkpoint(family_name: str, folder: Path) -> None:
    located = base_model.locate(ModelConfig(model_url=str(folder)))
    assert (located.family_name, located.native_size) == (family_name, 64)


def test_everything_of_the_base_model_is_frozen_after_loading(family: Family) -> None:
    modules = [c for c in family.pipeline.components.values() if isinstance(c, torch.nn.Module)]
    assert len(modules) >= 3
    assert not any(p.requires_grad for module in modules for p in module.parameters())


def test_text_is_encoded_as_the_pipeline_does_it_for_inference(family: Family) -> None:
    caption = "a photograph of a TOK"
    expected = family.pipeline.encode_prompt(
        caption, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    ours = family.encode_text([caption])
    assert torch.equal(ours["hidden_states"], expected[0])


def test_an_empty_caption_is_encoded_and_not_zeroed(family: Family) -> None:
    assert family.encode_text([""])["hidden_states"].abs().sum() > 0


def test_a_caption_is_encoded_alike_alone_and_in_a_batch(family: Family) -> None:
    both = family.encode_text(["a TOK", "another, much longer caption"])
    alone = family.encode_text(["a TOK"])
    for name, states in alone.items():
        torch.testing.assert_close(both[name][:1], states)


def test_latents_are_those_the_pipeline_decodes(family: Family) -> None:
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    vae = family.pipeline.vae
    with torch.no_grad():
        ours = family.encode_image(pixels)
        expected = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
    torch.testing.assert_close(ours.mean, expected)
    assert bool((ours.std > 0).all())


def test_the_prediction_has_the_shape_of_the_latents(family: Family) -> None:
    latents = latents_for(family)
    assert predict(family, latents, "a TOK").shape == latents.shape


def test_the_prediction_depends_on_the_caption(family: Family) -> None:
    latents = latents_for(family)
    one, other = predict(family, latents, "a TOK"), predict(family, latents, "a green field")
    assert not torch.allclose(one, other)


def test_default_targets_find_attention_and_convolution_layers(family: Family) -> None:
    layers, notes = adapters.target_layers(
        family.denoiser, AdapterConfig().target_unet_modules, field="t", must_match=True
    )
    assert notes == []
    assert any(layer.endswith("attn1.to_out.0") for layer in layers)
    assert any(layer.endswith("conv2") for layer in layers)


@pytest.mark.parametrize(
    "form", [{}, {"use_dora": True}, {"lora_type": "lokr"}, {"lora_type": "loha"}]
)
def test_an_adapter_starts_without_effect_and_learns_in_every_layer(
    family: Family, form: dict[str, object]
) -> None:
    latents = latents_for(family)
    before = predict(family, latents, "a TOK")
    adapter = AdapterConfig.model_validate({"rank": 4, **form})
    layers, _ = adapters.target_layers(
        family.denoiser, adapter.target_unet_modules, field="t", must_match=True
    )
    adapters.add_adapter(family.denoiser, adapter, layers, component="unet", seed=0)
    after = predict(family, latents, "a TOK")
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)
    after.square().mean().backward()
    learning = {
        n for n, p in family.denoiser.named_parameters() if p.grad is not None and p.grad.any()
    }
    assert all(any(name.startswith(f"{layer}.") for name in learning) for layer in layers)


def test_kohya_names_are_distinct_and_lead_back_to_their_layers(family: Family) -> None:
    names = {}
    components = {
        family.denoiser_name: family.denoiser,
        **{name: family.pipeline.components[name] for name in family.text_encoder_names},
    }
    for component, module in components.items():
        for path, layer in module.named_modules():
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                names[family.kohya.of_layer(component, path)] = (component, path)
    assert len(names) > 100
    for name, layer in names.items():
        assert family.kohya.layer_of(name, family.denoiser_name) == layer


def test_a_family_imports_neither_adapters_nor_loss_nor_data_nor_export(family_name: str) -> None:
    source = inspect.getsource(inspect.getmodule(load_family(family_name)))
    for room in ("adapters", "loss", "data", "export", "engine"):
        assert f"trainer.{room}" not in source
