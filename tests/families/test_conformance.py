"""What every model family must do, checked on a tiny model of each: a new family's entry test."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def geometry_of(height: int, width: int) -> dict[str, torch.Tensor]:
    size = torch.tensor([[height, width]])
    return {
        "original_size": size,
        "crop_top_left": torch.zeros_like(size),
        "target_size": size,
        "guidance": torch.ones(1),
    }


def predict(family: Family, latents: torch.Tensor, caption: str) -> torch.Tensor:
    text = family.encode_text([caption])
    timesteps = torch.full((len(latents),), 500)
    return family.predict(latents, timesteps, text, geometry_of(64, 64))


def pixels_of(height: int, width: int) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def latents_for(family: Family, height: int = 64, width: int = 64) -> torch.Tensor:
    with torch.no_grad():
        return family.encode_image(pixels_of(height, width)).mean


def accepted(function: Callable[..., Any], **given: Any) -> dict[str, Any]:
    """The arguments that a pipeline's method has."""
    return {n: v for n, v in given.items() if n in inspect.signature(function).parameters}


class Asked:
    """What a family's denoiser is asked, and what its pipeline then does without an answer."""

    def __init__(self, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pipeline = family.pipeline
        self.monkeypatch = monkeypatch
        self.calls: list[dict[str, Any]] = []
        names = list(inspect.signature(family.denoiser.forward).parameters)
        # Every denoiser takes the noisy latents first.
        self.first = names[0]

        def listen(_: Any, positional: Any, named: Any) -> None:
            self.calls.append(dict(zip(names, positional, strict=False)) | named)

        family.denoiser.register_forward_pre_hook(listen, with_kwargs=True)

    def latents(self, number: int) -> torch.Tensor:
        """The noisy latents of a call."""
        given: torch.Tensor = self.calls[number][self.first]
        return given

    def decoded(self, caption: str, height: int, width: int, result: torch.Tensor) -> torch.Tensor:
        """What the pipeline gives its VAE where one step of its scheduler led to a result."""
        seen: list[torch.Tensor] = []

        def decode(latents: torch.Tensor, **_: Any) -> Any:
            seen.append(latents)
            return (torch.zeros(1, 3, height, width),)

        self.monkeypatch.setattr(self.pipeline.vae, "decode", decode)
        self.monkeypatch.setattr(self.pipeline.scheduler, "step", lambda *_, **__: (result,))
        self.pipeline(
            prompt=caption,
            height=height,
            width=width,
            num_inference_steps=1,
            guidance_scale=1.0,
            output_type="pt",
        )
        return seen[0]


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
    caption, encode = "a photograph of a TOK", family.pipeline.encode_prompt
    options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    expected = encode(caption, **accepted(encode, device="cpu", **options))
    ours = family.encode_text([caption])
    assert torch.equal(ours["prompt_embeds"], expected[0])
    for states in ours.values():
        assert any(t is not None and torch.equal(t, states) for t in expected)


def test_an_empty_caption_is_encoded_and_not_zeroed(family: Family) -> None:
    assert family.encode_text([""])["prompt_embeds"].abs().sum() > 0


def test_a_caption_is_encoded_alike_alone_and_in_a_batch(family: Family) -> None:
    both = family.encode_text(["a TOK", "another, much longer caption"])
    alone = family.encode_text(["a TOK"])
    for name, states in alone.items():
        torch.testing.assert_close(both[name][:1], states)


def test_latents_are_those_the_pipeline_decodes(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    height, width = 64, 96
    with torch.no_grad():
        ours = family.encode_image(pixels_of(height, width))
        expected = family.pipeline.vae.encode(pixels_of(height, width)).latent_dist
    asked = Asked(family, monkeypatch)
    text = family.encode_text(["a TOK"])

    def decoded(latents: torch.Tensor) -> torch.Tensor:
        # In the form in which the denoiser has them, the pipeline has them too.
        family.predict(latents, torch.tensor([500]), text, geometry_of(height, width))
        return asked.decoded("a TOK", height, width, asked.latents(-1))

    mean = decoded(ours.mean)
    torch.testing.assert_close(mean, expected.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        decoded(ours.mean + ours.std) - mean, expected.std, rtol=1e-4, atol=1e-5
    )
    assert bool((ours.std > 0).all())


def test_the_denoiser_is_asked_as_the_pipeline_asks_it(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    height, width, caption = 64, 96, "a photograph of a TOK"
    asked, latents = Asked(family, monkeypatch), latents_for(family, height, width)
    text = family.encode_text([caption])
    family.predict(latents, torch.tensor([500]), text, geometry_of(height, width))
    asked.decoded(caption, height, width, asked.latents(0))
    (timestep,) = family.pipeline.scheduler.timesteps.tolist()
    family.predict(latents, torch.tensor([timestep]), text, geometry_of(height, width))

    pipelines, ours = (tensors_of(asked.calls[number]) for number in (1, 2))
    assert ours.keys() == pipelines.keys()
    assert asked.latents(1).shape == asked.latents(2).shape
    for name in ours.keys() - {asked.first}:
        torch.testing.assert_close(*aligned(ours[name], pipelines[name]), rtol=1e-5, atol=1e-6)


def tensors_of(call: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors among a denoiser's arguments, those of a nested one by its own names."""
    flat = {name: v for name, v in call.items() if not isinstance(v, dict)}
    for nested in (v for v in call.values() if isinstance(v, dict)):
        flat |= nested
    return {name: v for name, v in flat.items() if isinstance(v, torch.Tensor)}


def aligned(ours: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both with all their dimensions, in one number format: a rank may be left to broadcasting."""
    ours, other = ours.double(), other.double()
    return tuple(torch.broadcast_tensors(ours, other)) if ours.ndim != other.ndim else (ours, other)


def test_the_prediction_has_the_shape_of_the_latents(family: Family) -> None:
    latents = latents_for(family)
    assert predict(family, latents, "a TOK").shape == latents.shape


def test_the_prediction_depends_on_the_caption(family: Family) -> None:
    latents = latents_for(family)
    one, other = predict(family, latents, "a TOK"), predict(family, latents, "a green field")
    assert not torch.allclose(one, other)


def test_a_familys_own_targets_find_layers_each_and_attention_in_every_block(
    family: Family,
) -> None:
    own, field = family.target_modules, "target_unet_modules"
    layers, notes = adapters.target_layers(family.denoiser, own, field=field, must_match=True)
    assert notes == []
    for target in own:
        found = adapters.target_layers(family.denoiser, (target,), field=field, must_match=True)[0]
        assert set(found) <= set(layers)
    modules = dict(family.denoiser.named_modules())
    attention = {path for path, module in modules.items() if "Attention" in type(module).__name__}
    adapted = {path for path in attention if any(layer.startswith(f"{path}.") for layer in layers)}
    innermost = {p for p in attention if not any(q.startswith(f"{p}.") for q in attention)}
    assert innermost
    assert innermost <= adapted


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
        family.denoiser, family.target_modules, field="t", must_match=True
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
    """Every layer alone under its unfused name, and in its place under that of the file."""
    names = family.kohya
    assert names.denoiser == family.denoiser_name
    layers = [
        (component, path)
        for component in (names.denoiser, *names.text_encoder_prefixes)
        for path, layer in family.pipeline.components[component].named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
    ]
    assert len(layers) > 30
    unfused = {names.of_layer(*layer, fused=False): layer for layer in layers}
    assert len(unfused) == len(layers)
    assert {name: tuple(names.layers_of(name)) for name in unfused} == {
        name: (layer,) for name, layer in unfused.items()
    }
    fused = {names.of_layer(*layer) for layer in layers}
    behind = [layer for name in fused for layer in names.layers_of(name)]
    assert sorted(behind) == sorted(layers)


def test_a_family_imports_neither_adapters_nor_loss_nor_data_nor_export(family_name: str) -> None:
    source = inspect.getsource(inspect.getmodule(load_family(family_name)))
    for room in ("adapters", "loss", "data", "export", "engine"):
        assert f"trainer.{room}" not in source
