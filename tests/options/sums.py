"""Second computations of what a step does, from what was recorded of it: loss, latents, updates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from options.case import Case, near
from options.matrix import DDPM, FLOW
from options.probe import Pass, Probe, Tensors
from options.world import SHAPES, SIDE, grid
from torch.nn.functional import avg_pool2d

Mask = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def shares_of_signal(case: Case, seen: Pass) -> torch.Tensor:
    """alphas_cumprod at the timesteps of a pass, by the checkpoint's own scheduler (B,)."""
    levels: torch.Tensor = case.pipeline().pipeline.scheduler.alphas_cumprod
    return levels[seen.timesteps]


def clean_latents(case: Case, seen: Pass) -> torch.Tensor:
    """The latents under the noise.

    For epsilon prediction the target is the noise; for rectified flow it is the way from the
    latents to the noise, of which a thousandth is gone in each timestep.
    """
    if case.family in FLOW:
        gone = (seen.timesteps / 1000).view(-1, 1, 1, 1)
        return seen.noisy_latents - (gone * seen.target).float()
    share = shares_of_signal(case, seen).view(-1, 1, 1, 1)
    return (seen.noisy_latents - (1 - share).sqrt() * seen.target) / share.sqrt()


def example_losses(seen: Pass) -> torch.Tensor:
    """Mean squared error (B,), weighted by masks that have mean 1 in each example."""
    errors = (seen.prediction - seen.target).square()
    if seen.mask is not None:
        means = avg_pool2d(seen.mask, 8)
        errors = errors * means / means.mean((1, 2, 3), keepdim=True)
    return errors.mean((1, 2, 3))


def min_snr(gamma: float) -> Callable[[float], float]:
    """min(1, gamma / SNR): Hang et al. 2023 for epsilon prediction."""
    return lambda snr: min(1.0, gamma / snr)


USUAL = min_snr(5.0)


def loss_is_the_sum(case: Case, probe: Probe, weight: Callable[[float], float] = USUAL) -> None:
    """Asserts that a step's loss is the sum of share, weight and error of its examples.

    Args:
        weight: of an instance picture's loss, from its signal-to-noise ratio, in DDPM; in
            rectified flow there is none.
    """
    for step in probe.steps:
        total = 0.0
        for seen in step.passes:
            for row, error in enumerate(example_losses(seen)):
                factor = 1.0
                if case.family in DDPM and not bool(seen.is_class[row]):
                    level = float(shares_of_signal(case, seen)[row])
                    factor = weight(level / (1 - level))
                total += float(seen.shares[row]) * factor * float(error)
        assert math.isclose(step.loss, total, rel_tol=2e-4), (step.loss, total)


def brightness(picture: Any) -> Mask:
    """The luminance (H, W) of a picture's bytes (H, W, 3)."""
    light: Mask = np.asarray(picture, np.float64) / 255 @ np.array([0.299, 0.587, 0.114])
    return light.clip(1e-7, 1 - 1e-7)


def mask_of_brightness(
    picture: Any, temperature: float = 1.0, bias: float = 0.001, *, inverted: bool = False
) -> torch.Tensor:
    """What a segmenter whose answer is the brightness makes of a picture (H, W)."""
    light = brightness(picture)
    chance = 1 / (1 + ((1 - light) / light) ** (1 / temperature))
    weights = np.clip((1 - chance if inverted else chance) + bias, 0, 1)
    return torch.tensor(weights / weights.max(), dtype=torch.float32)


def middle(whole: Any) -> Any:
    """The middle window of the trained size."""
    top, left = ((side - SIDE) // 2 for side in whole.shape[:2])
    return whole[top : top + SIDE, left : left + SIDE]


def grid_masks(names: list[str], temperature: float = 1.0, bias: float = 0.001) -> torch.Tensor:
    """The masks (B, 1, H, W) of grid pictures in their middle windows."""
    assert set(names) <= set(SHAPES)
    whole = [mask_of_brightness(grid(name), temperature, bias) for name in names]
    return torch.stack([middle(mask) for mask in whole])[:, None]


def replayed(
    probe: Probe, build: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
) -> Tensors:
    """Where another optimizer takes the first parameters with the recorded gradients.

    Args:
        build: makes it from groups of parameters without settings, the denoiser's first.
    """
    copies = {n: torch.nn.Parameter(t.clone()) for n, t in probe.first.before.items()}
    groups: dict[str, list[torch.nn.Parameter]] = {}
    for name, copy in copies.items():
        groups.setdefault(name.split(".")[0], []).append(copy)
    optimizer = build([{"params": group} for group in groups.values()])
    for step in probe.steps:
        for name, copy in copies.items():
            copy.grad = step.clipped[name].clone() if name in step.clipped else None
        optimizer.step()
    return {name: copy.detach() for name, copy in copies.items()}


def distance(ours: Tensors, theirs: Tensors) -> float:
    """The largest difference of two sets of tensors."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def changed(ours: Tensors, theirs: Tensors) -> set[str]:
    """The names whose tensors differ."""
    return {name for name in ours if not torch.equal(ours[name], theirs[name])}


def ratio_is(ours: Tensors, theirs: Tensors, factor: float) -> None:
    """Asserts that the first tensors are so many times the second, and not all zero."""
    assert ours
    assert ours.keys() == theirs.keys()
    assert any(float(tensor.abs().max()) > 0 for tensor in theirs.values())
    near(ours, {n: factor * t for n, t in theirs.items()}, rtol=2e-3, atol=1e-7)
