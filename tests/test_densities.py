"""Densities of the times of rectified flow: diffusers' sampling, the paper's, their bounds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from scipy import integrate, stats

from trainer.config import LossConfig
from trainer.densities import DENSITIES, Density, shifted

# Name and options of what is drawn from.
KINDS: dict[str, dict[str, Any]] = {
    "logit_normal": {},
    "logit_normal to noise": {"logit_mean": 1.5, "logit_std": 0.4},
    "logit_normal wide": {"logit_mean": -0.5, "logit_std": 3.0},
    "uniform": {},
    "mode": {},
    "mode of the ends": {"mode_scale": -1.0},
    "mode at its strongest": {"mode_scale": 1.75},
    "cosmap": {},
}
EXTREMES: tuple[dict[str, Any], ...] = (
    {"timestep_density": "logit_normal", "logit_std": 1e-3},
    {"timestep_density": "logit_normal", "logit_std": 1e3},
    {"timestep_density": "logit_normal", "logit_mean": 30.0},
    {"timestep_density": "logit_normal", "logit_mean": -30.0, "logit_std": 0.5},
    {"timestep_density": "mode", "mode_scale": -1.0},
    {"timestep_density": "mode", "mode_scale": 1.75},
    {"timestep_density": "cosmap"},
)
UNIFORM = np.linspace(0, 1, 2001)[:-1]


@pytest.fixture(params=KINDS)
def loss(request: pytest.FixtureRequest) -> LossConfig:
    kind = request.param.split()[0]
    return LossConfig(timestep_density=kind, **KINDS[request.param])


def density_of(loss: LossConfig) -> Density:
    return DENSITIES[loss.timestep_density](loss)


def published(loss: LossConfig, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Times as diffusers' scripts draw them; cosmap, which weighs there, by the paper's formula."""
    generator = torch.Generator().manual_seed(7)
    if loss.timestep_density == "cosmap":
        even = torch.rand(count, generator=generator, dtype=torch.float64)
        # Esser et al. 2024, section 3.1: t = f(u) = 1 - 1 / (tan(pi u / 2) + 1).
        return (1 - 1 / ((math.pi / 2 * even).tan() + 1)).numpy()
    times = compute_density_for_timestep_sampling(
        weighting_scheme=loss.timestep_density,
        batch_size=count,
        logit_mean=loss.logit_mean,
        logit_std=loss.logit_std,
        mode_scale=loss.mode_scale,
        generator=generator,
    )
    return times.double().numpy()


def test_share_and_quantile_undo_each_other(loss: LossConfig) -> None:
    density = density_of(loss)
    shares = np.linspace(0, 1, 101)
    times = [density.quantile(share) for share in shares]
    assert [density.share(time) for time in times] == pytest.approx(shares, abs=1e-7)
    assert times == sorted(times)
    assert (times[0], times[-1]) == (0.0, pytest.approx(1.0, abs=1e-15))


def test_times_are_distributed_as_diffusers_draws_them(loss: LossConfig) -> None:
    density = density_of(loss)
    ours = [density.drawn(uniform, 0.0, 1.0) for uniform in UNIFORM + 0.5 / len(UNIFORM)]
    # Even quantiles are nearer to their density than any draw: 20000 draws decide at 1 percent.
    gap = stats.ks_2samp(ours, published(loss, 20_000)).statistic
    assert gap < 1.63 / math.sqrt(20_000) + 1 / len(UNIFORM)


def test_diffusers_mode_is_ours_from_the_other_end_of_the_same_number() -> None:
    even = torch.rand(50, generator=torch.Generator().manual_seed(7))
    theirs = published(LossConfig(timestep_density="mode", mode_scale=0.8), 50)
    density = density_of(LossConfig(timestep_density="mode", mode_scale=0.8))
    ours = [density.quantile(1 - uniform) for uniform in even.tolist()]
    assert ours == pytest.approx(theirs, abs=1e-6)


def test_cosmap_has_the_papers_density() -> None:
    # Esser et al. 2024, section 3.1: 2 / (pi - 2 pi t + 2 pi t^2).
    density = density_of(LossConfig(timestep_density="cosmap"))
    for time in (0.0, 0.1, 0.5, 0.77, 1.0):
        expected, _ = integrate.quad(
            lambda t: 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2), 0, time
        )
        assert density.share(time) == pytest.approx(expected, abs=1e-12)


def test_within_bounds_the_density_is_the_whole_one_without_its_ends(loss: LossConfig) -> None:
    low, high = 0.3, 0.65
    density = density_of(loss)
    ours = np.array([density.drawn(u, low, high) for u in UNIFORM + 0.5 / len(UNIFORM)])
    drawn = published(loss, 100_000)
    kept = drawn[(drawn >= low) & (drawn <= high)]
    assert len(kept) > 300
    assert stats.ks_2samp(ours, kept).statistic < 1.63 / math.sqrt(len(kept)) + 1 / len(UNIFORM)
    # A density that was squeezed into the bounds would pass none of these.
    squeezed = low + (high - low) * drawn
    if loss.timestep_density == "logit_normal":
        assert stats.ks_2samp(ours, squeezed).pvalue < 1e-6


def test_bounds_are_reached_and_never_passed(loss: LossConfig) -> None:
    density = density_of(loss)
    for low, high in ((0.0, 1.0), (0.2, 0.7), (0.999, 1.0), (0.0, 0.001), (0.5, 0.501)):
        assert density.drawn(0.0, low, high) == pytest.approx(low, abs=1e-9)
        # A logit-normal density vanishes at 1: no number of 64 bits leads there.
        if high < 1:
            assert density.drawn(1 - 2**-53, low, high) == pytest.approx(high, abs=1e-9)
        times = [density.drawn(uniform, low, high) for uniform in UNIFORM[::10]]
        assert low <= min(times) <= max(times) <= high
        assert times == sorted(times)


@pytest.mark.parametrize("options", EXTREMES, ids=str)
def test_extreme_densities_stay_finite_and_within_their_bounds(options: dict[str, Any]) -> None:
    density = density_of(LossConfig(**options))
    for low, high in ((0.0, 1.0), (0.0, 1e-3), (0.999, 1.0), (0.5, 0.501), (0.1, 0.4)):
        for uniform in (0.0, 2**-53, 0.3, 0.5, 0.999, 1 - 2**-53):
            assert low <= density.drawn(uniform, low, high) <= high


@pytest.mark.parametrize(("low", "high", "expected"), [(0.1, 0.4, 0.4), (0.6, 0.9, 0.6)])
def test_bounds_far_out_in_a_tail_leave_the_end_that_is_nearest_to_the_middle(
    low: float, high: float, expected: float
) -> None:
    # Beyond 400 deviations from 0.5: of a share of 64 bits nothing is left in between.
    density = density_of(LossConfig(logit_std=1e-3))
    assert [density.drawn(uniform, low, high) for uniform in (0.0, 0.5, 0.9)] == [expected] * 3


@pytest.mark.parametrize("odds", [0.2, 1 / 3, 1.0, 3.0, 5.0])
def test_a_shift_multiplies_the_odds_of_noise(odds: float) -> None:
    for time in (0.0, 0.001, 0.3, 0.999):
        moved = shifted(time, odds)
        assert moved / (1 - moved) == pytest.approx(odds * time / (1 - time))
        assert shifted(moved, 1 / odds) == pytest.approx(time)
    # Not by rounding either: a time beyond 1 has no odds.
    assert shifted(1.0, odds) == 1.0
    assert all(shifted(1 - 2**-53 * n, odds) <= 1.0 for n in range(100))
