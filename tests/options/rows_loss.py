"""Rows of the section loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from options.bases import PRIOR
from options.case import Case, near
from options.matrix import Place, acts, refused
from options.sums import loss_is_the_sum, min_snr, ratio_is

Shows = Callable[[Case], None]


def counts(weight: Callable[[float], float]) -> Shows:
    """Asserts the loss with a weight of instance pictures; class pictures have none."""

    def shows(case: Case) -> None:
        assert case.after().seen.is_class.tolist() == [False, False, True, True]
        loss_is_the_sum(case, case.after(), weight)
        assert not math.isclose(case.before().first.loss, case.after().first.loss, rel_tol=0.02)

    return shows


def the_gradient_is_weighted(case: Case) -> None:
    # One timestep for all: the weight is one number. Its place is known from the loss.
    seen = case.after().seen
    levels = case.pipeline().pipeline.scheduler.alphas_cumprod[seen.timesteps[0]]
    weight = min_snr(0.5)(float(levels / (1 - levels)))
    assert weight < 0.5
    ratio_is(case.after().first.gradients, case.before().first.gradients, weight)


def velocity_is_weighted(case: Case) -> None:
    seen = case.after().seen
    levels = case.pipeline().pipeline.scheduler.alphas_cumprod[seen.timesteps[0]]
    snr = float(levels / (1 - levels))
    ratio_is(
        case.after().first.gradients,
        case.before().first.gradients,
        min(snr, 0.5) / (snr + 1),
    )


def whole_channels_are_shifted(case: Case) -> None:
    plain, shifted = case.before().seen, case.after().seen
    for ours, theirs in (
        (plain.noisy_latents, shifted.noisy_latents),
        (plain.target, shifted.target),
    ):
        shift = theirs - ours
        means = shift.mean((2, 3), keepdim=True)
        near(shift, means.expand_as(shift), rtol=1e-3, atol=1e-5)
        assert bool((means.abs() > 1e-4).all())
    many = torch.cat([(shift_of(case, step)) for step in range(len(case.after(6).steps))])
    assert 0.3 < float(many.std()) / 0.5 < 1.7
    loss_is_the_sum(case, case.after(), min_snr(5.0))


def shift_of(case: Case, step: int) -> torch.Tensor:
    """How far each example's channels of the target lie from those without an offset."""
    pair = case.before(6).steps[step].passes[0], case.after(6).steps[step].passes[0]
    return (pair[1].target - pair[0].target).mean((2, 3)).flatten()


def timesteps_are(allowed: set[int]) -> Shows:
    def shows(case: Case) -> None:
        seen = {int(t) for one in case.after(6).passes for t in one.timesteps}
        assert seen <= allowed
        assert not {int(t) for one in case.before(6).passes for t in one.timesteps} <= allowed
        objective = case.pipeline().objective_class.from_scheduler(
            case.pipeline().pipeline.scheduler
        )
        loss = case.after().config.loss
        drawn = objective.sample_timesteps(
            42,
            range(-1000, 1000),
            minimum=loss.min_timestep_trained,
            maximum=loss.max_timestep_trained,
        )
        assert set(drawn.tolist()) == allowed
        first = case.after().batch.positions
        assert drawn[[p + 1000 for p in first]].tolist() == case.after().seen.timesteps.tolist()

    return shows


ONE_TIMESTEP: dict[str, Any] = {"min_timestep_trained": 400, "max_timestep_trained": 401}
LOSS = [
    acts(
        "snr_gamma",
        "gradient",
        "instance pictures weigh min(1, gamma / SNR), class pictures 1",
        counts(min_snr(0.5)),
        base={**PRIOR, "snr_gamma": None},
        flipped={"snr_gamma": 0.5},
    ),
    acts(
        "snr_gamma",
        "gradient",
        "0 is none: every picture weighs 1",
        counts(lambda snr: 1.0),
        base={**PRIOR, "snr_gamma": 0.5},
        flipped={"snr_gamma": 0.0},
    ),
    acts(
        "snr_gamma",
        "gradient",
        "the gradient is gamma / SNR of what it was",
        the_gradient_is_weighted,
        base={"snr_gamma": None, "min_timestep_trained": 200, "max_timestep_trained": 201},
        flipped={"snr_gamma": 0.5},
    ),
    acts(
        "snr_gamma",
        "gradient",
        "velocity prediction: the weight is min(SNR, gamma) / (SNR + 1)",
        velocity_is_weighted,
        base={"snr_gamma": None, "model_url": Place("velocity model"), **ONE_TIMESTEP},
        flipped={"snr_gamma": 0.5},
    ),
    acts(
        "noise_offset",
        "batch",
        "noise and target are shifted by whole channels",
        whole_channels_are_shifted,
        flipped={"noise_offset": 0.5},
    ),
    acts(
        "min_timestep_trained",
        "batch",
        "no timestep is smaller, and it occurs itself",
        timesteps_are({996, 997, 998, 999}),
        flipped={"min_timestep_trained": 996},
    ),
    acts(
        "max_timestep_trained",
        "batch",
        "every timestep is smaller, and the next smaller one occurs",
        timesteps_are({0, 1, 2, 3}),
        flipped={"max_timestep_trained": 4},
    ),
    refused(
        "min_timestep_trained",
        {"min_timestep_trained": 500, "max_timestep_trained": 500},
        "the smallest timestep is below",
    ),
]
