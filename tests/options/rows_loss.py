"""Rows of the section loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from options.bases import PRIOR
from options.case import Case, near, same
from options.matrix import DDPM, FLOW, Leaves, Place, Row, acts, idle, meaningless, refused
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
    loss_is_the_sum(case, case.after())


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


def whoever_samples_never_sees_it(case: Case) -> None:
    whole_channels_are_shifted(case)
    (warning,) = (n for n in case.after().config.resolved.notes if n.field == "noise_offset")
    assert warning.kind == "warning"
    assert case.before().config.leaf("noise_offset") == 0


def no_weight_is_no_weight(case: Case) -> None:
    ours, theirs = case.before().first, case.after().first
    same(ours.gradients, theirs.gradients)
    assert case.after().config.loss.snr_gamma is None


# How much of a picture is noise, of numbers that are drawn evenly.
Times = Callable[[torch.Tensor], torch.Tensor]
EVEN: Leaves = {"timestep_density": "uniform", "timestep_shift": 1.0}


def logit_normal(mean: float = 0.0, std: float = 1.0) -> Times:
    """Esser et al. 2024, equation 19."""
    return lambda even: (mean + std * torch.special.ndtri(even)).sigmoid()


def mode(scale: float) -> Times:
    """Esser et al. 2024, equation 20, where a larger number is less noise."""

    def times(even: torch.Tensor) -> torch.Tensor:
        u = 1 - even
        return 1 - u - scale * ((math.pi / 2 * u).cos().square() - 1 + u)

    return times


def cosmap(even: torch.Tensor) -> torch.Tensor:
    """Esser et al. 2024, equation 21."""
    return 1 - 1 / ((math.pi / 2 * even).tan() + 1)


def moved(odds: float, before: Times = lambda even: even) -> Times:
    """Esser et al. 2024, equation 23."""
    return lambda even: odds * before(even) / (1 + (odds - 1) * before(even))


def by_pixels(even: torch.Tensor) -> torch.Tensor:
    """As diffusers' FLUX pipelines move the noise levels of 64 x 64 pixels, 16 tokens."""
    exponent = calculate_shift(16, 256, 4096, 0.5, 1.15)
    return moved(math.exp(exponent), logit_normal())(even)


def cut_off(low: float, high: float, odds: float) -> Times:
    """Even times between two bounds that hold after the move, which keeps their order."""

    def times(even: torch.Tensor) -> torch.Tensor:
        first, last = (bound / (odds - (odds - 1) * bound) for bound in (low, high))
        return moved(odds)(first + even * (last - first))

    return times


def times_of(case: Case, more: Leaves) -> torch.Tensor:
    """The share of noise in each example of six steps."""
    return torch.cat([one.timesteps for one in case.probe(more, 6).passes]) / 1000


def times_are(after: Times, before: Times) -> Shows:
    """Asserts by how much noise the same draws go with after the flip and before."""

    def shows(case: Case) -> None:
        whole = {"min_timestep_trained": 0, "max_timestep_trained": 1000}
        even = times_of(case, {**EVEN, **whole})
        assert even.dtype == torch.float64
        near(times_of(case, {}), before(even), rtol=1e-6, atol=1e-9)
        near(times_of(case, case.row.flipped), after(even), rtol=1e-6, atol=1e-9)
        assert not torch.allclose(before(even), after(even), atol=1e-4)

    return shows


def is_told_the_guidance(case: Case) -> None:
    for probe, scale in ((case.before(), 1.0), (case.after(), 2.5)):
        assert {tuple(one.told["guidance"].tolist()) for one in probe.passes} == {(scale, scale)}
    assert not torch.allclose(case.before().seen.prediction, case.after().seen.prediction)


def flow_row(
    leaf: str, says: str, after: Times, before: Times, *, base: Leaves, flipped: Leaves
) -> Row:
    return acts(
        leaf, "batch", says, times_are(after, before), base=base, flipped=flipped, families=FLOW
    )


ONE_TIMESTEP: dict[str, Any] = {"min_timestep_trained": 400, "max_timestep_trained": 401}
# Values of options that mean nothing without a density of times.
OF_FLOW: Leaves = {
    "timestep_density": "uniform",
    "logit_mean": 0.5,
    "logit_std": 2.0,
    "mode_scale": 0.5,
    "timestep_shift": 3.0,
}
UNMOVED: Leaves = {"timestep_shift": 1.0}
TIMES = [
    flow_row(
        "timestep_density",
        "uniform: times are even; otherwise their logits are normal",
        lambda even: even,
        logit_normal(),
        base=UNMOVED,
        flipped={"timestep_density": "uniform"},
    ),
    flow_row(
        "timestep_density",
        "mode: times are those of Esser's mode sampling",
        mode(1.29),
        logit_normal(),
        base=UNMOVED,
        flipped={"timestep_density": "mode"},
    ),
    flow_row(
        "timestep_density",
        "cosmap: times are those of Esser's CosMap",
        cosmap,
        logit_normal(),
        base=UNMOVED,
        flipped={"timestep_density": "cosmap"},
    ),
    refused("timestep_density", {"timestep_density": "normal"}, "logit_normal, uniform, mode"),
    flow_row(
        "logit_mean",
        "the logits of times have this mean",
        logit_normal(0.5),
        logit_normal(),
        base=UNMOVED,
        flipped={"logit_mean": 0.5},
    ),
    flow_row(
        "logit_std",
        "the logits of times have this deviation",
        logit_normal(0.0, 2.0),
        logit_normal(),
        base=UNMOVED,
        flipped={"logit_std": 2.0},
    ),
    refused("logit_std", {"logit_std": 0.0}, "above 0"),
    flow_row(
        "mode_scale",
        "the middle is favoured so much",
        mode(-0.5),
        mode(1.29),
        base={**UNMOVED, "timestep_density": "mode"},
        flipped={"mode_scale": -0.5},
    ),
    refused("mode_scale", {"mode_scale": 2.0}, "at most 1.75"),
    flow_row(
        "timestep_shift",
        "the odds of noise are so many times larger; otherwise as diffusers moves them",
        moved(3.0, logit_normal()),
        by_pixels,
        base={},
        flipped={"timestep_shift": 3.0},
    ),
    refused("timestep_shift", {"timestep_shift": 0.0}, "above 0"),
    flow_row(
        "min_timestep_trained",
        "no time is smaller after its move, and the density is cut off there",
        cut_off(0.75, 1.0, 3.0),
        moved(3.0),
        base={**EVEN, "timestep_shift": 3.0},
        flipped={"min_timestep_trained": 750},
    ),
    flow_row(
        "max_timestep_trained",
        "no time is larger after its move, and the density is cut off there",
        cut_off(0.0, 0.25, 3.0),
        moved(3.0),
        base={**EVEN, "timestep_shift": 3.0},
        flipped={"max_timestep_trained": 250},
    ),
    *idle(
        "timestep_density is not logit_normal",
        base={"timestep_density": "uniform"},
        families=FLOW,
        logit_mean=0.5,
        logit_std=2.0,
    ),
    *idle("timestep_density is not mode", families=FLOW, mode_scale=0.5),
    *[
        row
        for family in DDPM
        for leaf, value in OF_FLOW.items()
        for row in meaningless(
            leaf, value, f"a `{family}` learns from a table of noise levels", families=(family,)
        )
    ],
    *[
        row
        for family in FLOW
        for row in meaningless(
            "snr_gamma", 1.0, f"a `{family}` learns by flow matching", families=(family,)
        )
    ],
    acts(
        "guidance_scale",
        ("batch", "gradient"),
        "the denoiser is told this guidance, otherwise 1",
        is_told_the_guidance,
        flipped={"guidance_scale": 2.5},
        families=("flux",),
    ),
    *meaningless(
        "guidance_scale",
        2.5,
        "this denoiser is not told any guidance",
        families=("sd15", "sdxl", "flux2"),
    ),
    refused("guidance_scale", {"guidance_scale": -1.0}, "at least 0"),
]
LOSS = [
    *TIMES,
    Row(
        "snr_gamma",
        "0 is no weight, as there is none here",
        no_weight_is_no_weight,
        flipped={"snr_gamma": 0.0},
        families=FLOW,
    ),
    acts(
        "noise_offset",
        "batch",
        "noise and target are shifted by whole channels, and that is warned of",
        whoever_samples_never_sees_it,
        flipped={"noise_offset": 0.5},
        families=FLOW,
    ),
    acts(
        "snr_gamma",
        "gradient",
        "instance pictures weigh min(1, gamma / SNR), class pictures 1",
        counts(min_snr(0.5)),
        base={**PRIOR, "snr_gamma": None},
        flipped={"snr_gamma": 0.5},
        families=DDPM,
    ),
    acts(
        "snr_gamma",
        "gradient",
        "0 is none: every picture weighs 1",
        counts(lambda snr: 1.0),
        base={**PRIOR, "snr_gamma": 0.5},
        flipped={"snr_gamma": 0.0},
        families=DDPM,
    ),
    acts(
        "snr_gamma",
        "gradient",
        "the gradient is gamma / SNR of what it was",
        the_gradient_is_weighted,
        base={"snr_gamma": None, "min_timestep_trained": 200, "max_timestep_trained": 201},
        flipped={"snr_gamma": 0.5},
        families=DDPM,
    ),
    acts(
        "snr_gamma",
        "gradient",
        "velocity prediction: the weight is min(SNR, gamma) / (SNR + 1)",
        velocity_is_weighted,
        base={"snr_gamma": None, "model_url": Place("velocity model"), **ONE_TIMESTEP},
        flipped={"snr_gamma": 0.5},
        families=DDPM,
    ),
    acts(
        "noise_offset",
        "batch",
        "noise and target are shifted by whole channels",
        whole_channels_are_shifted,
        flipped={"noise_offset": 0.5},
        families=DDPM,
    ),
    acts(
        "min_timestep_trained",
        "batch",
        "no timestep is smaller, and it occurs itself",
        timesteps_are({996, 997, 998, 999}),
        flipped={"min_timestep_trained": 996},
        families=DDPM,
    ),
    acts(
        "max_timestep_trained",
        "batch",
        "every timestep is smaller, and the next smaller one occurs",
        timesteps_are({0, 1, 2, 3}),
        flipped={"max_timestep_trained": 4},
        families=DDPM,
    ),
    refused(
        "min_timestep_trained",
        {"min_timestep_trained": 500, "max_timestep_trained": 500},
        "the smallest timestep is below",
    ),
]
