"""Times of flow matching as other programs draw them, beside those of the imported configuration.

The others' numbers: the draws and weights of diffusers' `training_utils`, which sd-scripts has,
too; its scheduler's table of noise levels and its shift of them; and where a program has a formula
of its own, that formula.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from reading import import_file, loaded

from trainer.config import LossConfig
from trainer.importers import Imported, imported
from trainer.importers.documents import read_document
from trainer.objectives import RectifiedFlow

DRAWS = 2000
# Two samples of this size of one distribution are so far apart once in a thousand
# (Kolmogorov-Smirnov); a sign that is turned is ten times as far.
NEAR = 1.95 * (2 / DRAWS) ** 0.5
# FLUX.1 [dev]'s scheduler, and its latents of 1024 x 1024 pixels.
DYNAMIC = {
    **{"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15},
    **{"base_image_seq_len": 256, "max_image_seq_len": 4096},
}
LATENTS, TOKENS = (128, 128), 4096

Draw = Callable[[torch.Generator], torch.Tensor]


def ours(loss: LossConfig) -> torch.Tensor:
    objective = RectifiedFlow.from_config(DYNAMIC, loss)
    timesteps = objective.sample_timesteps(
        1, range(DRAWS), minimum=0, maximum=1000, latent_size=LATENTS
    )
    return timesteps / 1000


def from_table(scheme: str, *, shift: float, **options: float) -> Draw:
    """Shares of noise as the scripts take them from a scheduler's table, by a drawn place."""

    def draw(generator: torch.Generator) -> torch.Tensor:
        places = compute_density_for_timestep_sampling(
            scheme, DRAWS, generator=generator, **options
        )
        table = FlowMatchEulerDiscreteScheduler(shift=shift).sigmas
        return table[(places * 1000).long()].double()

    return draw


def of_normals(scale: float, shift: Callable[[torch.Tensor], torch.Tensor]) -> Draw:
    def draw(generator: torch.Generator) -> torch.Tensor:
        normals = torch.randn(DRAWS, generator=generator, dtype=torch.float64)
        return shift((normals * scale).sigmoid())

    return draw


def uniform(generator: torch.Generator) -> torch.Tensor:
    return torch.rand(DRAWS, generator=generator, dtype=torch.float64)


def by_tokens(times: torch.Tensor) -> torch.Tensor:
    """Moved by the number of tokens, as FLUX.1's pipeline moves them."""
    scheduler = FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    moved: torch.Tensor = scheduler.time_shift(calculate_shift(TOKENS), 1.0, times)
    return moved


def distance(first: torch.Tensor, second: torch.Tensor, weights: torch.Tensor) -> float:
    """The largest difference of two distributions; the second's draws have weights."""
    second, order = second.sort()
    places = torch.cat([first, second])
    below_first = torch.searchsorted(first.sort().values, places, right=True) / len(first)
    heaped = torch.cat([torch.zeros(1), (weights[order] / weights.sum()).cumsum(0)])
    below_second = heaped[torch.searchsorted(second, places, right=True)]
    return float((below_first - below_second).abs().max())


def apart(found: Imported, draw: Draw, weights: str = "none") -> float:
    theirs = draw(torch.Generator().manual_seed(2))
    weight = compute_loss_weighting_for_sd3(weights, theirs)
    return distance(ours(loaded(found).loss), theirs, weight)


MEAN = {"logit_mean": 0.7, "logit_std": 0.6}


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("none", {}),
        ("logit_normal", {"logit_mean": 0.0, "logit_std": 1.0}),
        ("logit_normal", MEAN),
        ("mode", {"mode_scale": 1.29}),
        ("mode", {"mode_scale": -0.8}),
    ],
)
def test_schemes_draw_the_same_times(
    scheme: str, options: dict[str, float], tmp_path: Path
) -> None:
    flags = " ".join(f"--{name}={value}" for name, value in options.items())
    line = f"python {{}} --instance_data_dir p --weighting_scheme={scheme} {flags}"
    for script in ("train_dreambooth_lora_flux.py", "train_dreambooth_flux.py"):
        found = imported([read_document(line.format(script))])
        assert apart(found, from_table(scheme, shift=1.0, **options)) < NEAR

    given = "".join(f"{name} = {value}\n" for name, value in options.items())
    text = f'network_module = "networks.lora_flux"\nweighting_scheme = "{scheme}"\n{given}'
    found = import_file(tmp_path, "a.toml", f'train_data_dir = "p"\n{text}')
    assert apart(found, from_table(scheme, shift=3.0, **options)) < NEAR


def test_a_turned_mean_would_be_far() -> None:
    line = "python train_dreambooth_lora_flux.py --instance_data_dir p --logit_mean=-0.7"
    found = imported([read_document(f"{line} --weighting_scheme=logit_normal --logit_std=0.6")])

    assert apart(found, from_table("logit_normal", shift=1.0, **MEAN)) > 10 * NEAR


def test_a_weight_by_noise_level_is_a_density_on_average() -> None:
    """Times are drawn by cosmap here, and weighed by it there: what a level counts is the same."""
    line = "python train_dreambooth_lora_flux.py --instance_data_dir p --weighting_scheme=cosmap"
    draw = from_table("cosmap", shift=1.0)

    assert apart(imported([read_document(line)]), draw, "cosmap") < NEAR
    assert apart(imported([read_document(line)]), draw) > NEAR


def shifted_by_two(times: torch.Tensor) -> torch.Tensor:
    return 2 * times / (1 + times)


@pytest.mark.parametrize(
    ("text", "draw"),
    [
        ('timestep_sampling = "uniform"', uniform),
        ('timestep_sampling = "sigmoid"\nsigmoid_scale = 0.5', of_normals(0.5, lambda t: t)),
        (
            'timestep_sampling = "shift"\ndiscrete_flow_shift = 2\nsigmoid_scale = 1.4',
            of_normals(1.4, shifted_by_two),
        ),
        ('timestep_sampling = "flux_shift"', of_normals(1.0, by_tokens)),
    ],
)
def test_ways_of_kohya_draw_the_same_times(text: str, draw: Draw, tmp_path: Path) -> None:
    network = 'network_module = "networks.lora_flux"\ntrain_data_dir = "p"\n'
    found = import_file(tmp_path, "a.toml", f"{network}{text}\n")

    assert apart(found, draw) < NEAR


@pytest.mark.parametrize(
    ("way", "draw"),
    [
        ("sigmoid", of_normals(1.0, lambda times: times)),
        ("linear", uniform),
        ("shift", lambda generator: by_tokens(uniform(generator))),
    ],
)
def test_ways_of_ai_toolkit_draw_the_same_times(way: str, draw: Draw, tmp_path: Path) -> None:
    text = (
        "config: {process: [{type: sd_trainer, network: {linear: 4}, datasets: [{folder_path: p}], "
        f"train: {{timestep_type: {way}}}, model: {{name_or_path: x, is_flux: true}}}}]}}"
    )
    found = import_file(tmp_path, "job.yaml", text)

    assert apart(found, draw) < NEAR
