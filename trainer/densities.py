"""How the times of rectified flow are drawn: published densities over (0, 1) by their quantiles.

Numbers only: a time of 0 is the picture, 1 is noise. Knows neither models nor pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist

from trainer.config import LossConfig

# Halvings of [0, 1] after which two numbers of 64 bits are no longer apart.
_HALVINGS = 60

_STANDARD_NORMAL = NormalDist()


@dataclass(frozen=True)
class Density:
    """A density of times, given by its distribution function and the inverse of that.

    Args:
        quantile: share in [0, 1] to the time below which that share lies; rising.
        share: time in [0, 1] to the share below it.
    """

    quantile: Callable[[float], float]
    share: Callable[[float], float]

    def drawn(self, uniform: float, low: float, high: float) -> float:
        """A time in [low, high] by inverse transform: the density cut off outside, not squeezed.

        Args:
            uniform: a number drawn evenly from [0, 1).
            low: the smallest time.
            high: the largest.
        """
        first, last = self.share(low), self.share(high)
        if first == last:
            # A tail too thin for 64 bits: all of it lies at its end towards the middle.
            return high if last < 0.5 else low
        return min(high, max(low, self.quantile(first + uniform * (last - first))))


def _logit_normal(loss: LossConfig) -> Density:
    def quantile(share: float) -> float:
        if share in (0.0, 1.0):
            return share
        return _sigmoid(loss.logit_mean + loss.logit_std * _STANDARD_NORMAL.inv_cdf(share))

    def share(time: float) -> float:
        if time in (0.0, 1.0):
            return time
        logit = math.log(time / (1 - time))
        deviations = (logit - loss.logit_mean) / loss.logit_std
        # By erfc, which keeps its digits in the lower tail; `NormalDist.cdf` does not.
        return 0.5 * math.erfc(-deviations / math.sqrt(2))

    return Density(quantile, share)


def _mode(loss: LossConfig) -> Density:
    # f(u) = 1 - u - s (cos²(πu/2) - 1 + u) falls from 1 to 0; at u = 1 - share it rises.
    def quantile(share: float) -> float:
        return share - loss.mode_scale * (math.sin(math.pi * share / 2) ** 2 - share)

    return Density(quantile, lambda time: _inverse(quantile, time))


def _cosmap(_: LossConfig) -> Density:
    return Density(
        lambda share: 1 - 1 / (math.tan(math.pi * share / 2) + 1),
        lambda time: 2 / math.pi * math.atan2(time, 1 - time),
    )


def _uniform(_: LossConfig) -> Density:
    return Density(lambda share: share, lambda time: time)


# Name to density. Source: Esser et al. 2024, section 3.1: rf/lognorm, rf, rf/mode, rf/cosmap.
DENSITIES: Mapping[str, Callable[[LossConfig], Density]] = {
    "logit_normal": _logit_normal,
    "uniform": _uniform,
    "mode": _mode,
    "cosmap": _cosmap,
}


def shifted(time: float, odds: float) -> float:
    """A time whose odds against the picture are so many times those before; 1 leaves it.

    Source: Esser et al. 2024, section 5.3.2, whose alpha are the odds.
    """
    # Written so that 1 stays 1 and nothing rounds beyond it.
    return odds * time / (1 - time + odds * time)


def _sigmoid(logit: float) -> float:
    """1 / (1 + exp(-logit)), without overflow at either end."""
    return 0.5 * (1 + math.tanh(logit / 2))


def _inverse(rising: Callable[[float], float], wanted: float) -> float:
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < wanted else (low, middle)
    return (low + high) / 2
