"""What learns in a training, by part: its groups, its freezing, its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from snapshots import fresh, gradient
from tiny import compose, configuration

from trainer import trainables
from trainer.families.base import Family
from trainer.tokens import token_names
from trainer.trainables import Trainables

MODES: dict[str, dict[str, Any]] = {
    "adapter": {},
    "tokens": {"train_text_encoder_ti": True},
    "text encoders": {"train_text_encoder": True},
    "all weights": {"use_lora": False, "learning_rate": 1e-5, "train_text_encoder": True},
}


def built(mode: str, folder: Path, **leaves: Any) -> tuple[Trainables, Family]:
    config = configuration(folder, folder, **(MODES[mode] | leaves))
    family = fresh(folder)
    return trainables.build(config, family, token_names(config.token)), family


@pytest.mark.parametrize("mode", MODES)
def test_each_part_learns_alone_and_everything_else_is_frozen(mode: str, sdxl_folder: Path) -> None:
    made, family = built(mode, sdxl_folder)
    modules = [m for m in family.pipeline.components.values() if isinstance(m, torch.nn.Module)]
    for part, components in made.parameters.items():
        made.learn({part})
        learning = {id(p) for module in modules for p in module.parameters() if p.requires_grad}
        assert learning == {id(p) for group in components.values() for p in group}
    made.learn(made.parameters)
    assert all(parameter.requires_grad for parameter in made.of(made.parameters))


@pytest.mark.parametrize(
    ("mode", "groups"),
    [
        ("adapter", ["denoiser unet"]),
        ("tokens", ["denoiser unet", "tokens text_encoder", "tokens text_encoder_2"]),
        (
            "text encoders",
            ["denoiser unet", "text_encoders text_encoder", "text_encoders text_encoder_2"],
        ),
    ],
)
def test_the_optimizer_has_a_group_for_the_denoiser_and_for_each_text_encoder(
    mode: str, groups: list[str], sdxl_folder: Path
) -> None:
    rates = {"learning_rate": 2e-4, "adam_weight_decay": 0.25}
    text = {"text_encoder_lr": 5e-5, "adam_weight_decay_text_encoder": 0.0}
    leaves = rates | (text if mode != "adapter" else {})
    config = configuration(sdxl_folder, sdxl_folder, **(MODES[mode] | leaves))
    made, _ = built(mode, sdxl_folder, **leaves)
    found = made.groups(config.optim)
    assert [group.name for group in found] == groups
    assert (found[0].learning_rate, found[0].weight_decay) == (2e-4, 0.25)
    # An explicit zero is a zero: the reference scripts take the other group's decay for it.
    assert {(g.learning_rate, g.weight_decay) for g in found[1:]} <= {(5e-5, 0.0)}
    listed = [parameter for group in found for parameter in group.parameters]
    assert [id(p) for p in listed] == [id(p) for p in made.of(made.parameters)]


@pytest.mark.parametrize("mode", MODES)
def test_what_a_checkpoint_keeps_is_put_back_to_the_bit(mode: str, sd15_folder: Path) -> None:
    made, _ = built(mode, sd15_folder)
    other, _ = built(mode, sd15_folder, seed=7)
    with torch.no_grad():
        for number, parameter in enumerate(made.of(made.parameters), start=1):
            parameter.add_(1e-3 * number)
    kept = {
        component: {name: tensor.clone() for name, tensor in tensors.items()}
        for component, tensors in made.tensors().items()
    }
    other.load(kept)
    for component, tensors in other.tensors().items():
        assert tensors.keys() == kept[component].keys()
        assert all(torch.equal(tensors[name], kept[component][name]) for name in tensors)
    for one, two in zip(made.of(made.parameters), other.of(other.parameters), strict=True):
        assert torch.equal(one, two)


def test_first_weights_depend_on_the_seed_and_on_the_component(sdxl_folder: Path) -> None:
    one, _ = built("tokens", sdxl_folder)
    same, _ = built("tokens", sdxl_folder)
    other, _ = built("tokens", sdxl_folder, seed=7)
    rows = [new.rows.detach() for new in one.new_tokens.values()]
    again = [new.rows.detach() for new in same.new_tokens.values()]
    others = [new.rows.detach() for new in other.new_tokens.values()]
    assert all(torch.equal(a, b) for a, b in zip(rows, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(rows, others, strict=True))
    # The two encoders have different widths; what both have are other numbers.
    assert not torch.allclose(rows[0] / rows[0].std(), rows[1][:, :32] / rows[1].std(), atol=0.1)


def test_what_learns_is_in_32_bits_whatever_the_base_model_is_in(sdxl_folder: Path) -> None:
    config = configuration(sdxl_folder, sdxl_folder, train_text_encoder=True, use_dora=True)
    family = fresh(sdxl_folder)
    for module in family.pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.to(torch.bfloat16)
    made = trainables.build(config, family, None)
    assert {parameter.dtype for parameter in made.of(made.parameters)} == {torch.float32}
    assert family.pipeline.text_encoder.dtype == torch.bfloat16


@pytest.mark.parametrize("mode", ["tokens", "text encoders"])
def test_recomputed_activations_give_the_same_gradients(
    mode: str, sd15_folder: Path, photo_folder: Path, tmp_path: Path
) -> None:
    gradients = []
    for recompute in (False, True):
        leaves = MODES[mode] | {"gradient_checkpointing": recompute}
        config = configuration(sd15_folder, photo_folder, **leaves)
        training, _ = compose(config, tmp_path / str(recompute))
        gradients.append(gradient(training, training.dataset[0][0]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-9)
    assert float(gradients[0].norm()) > 0
