"""What is measured of a training beside the loss of each step.

Values in, values out; knows nothing of how they are shown.
"""

from __future__ import annotations

from collections.abc import Iterable

# Of the mean that was, in the mean that is: about the last fifty values count.
_DECAY = 0.98


class Smoothed:
    """The exponential mean of values, of which the last counts most.

    Not drawn to zero at the start: divided by the sum of weights, as Adam's moments are (Kingma and
    Ba 2015, section 3).

    Args:
        values: that are in it from the start.
    """

    def __init__(self, values: Iterable[float] = ()) -> None:
        self._sum = self._weights = 0.0
        for value in values:
            self.add(value)

    def add(self, value: float) -> float:
        """The mean with one more value."""
        self._sum = _DECAY * self._sum + (1 - _DECAY) * value
        self._weights = _DECAY * self._weights + (1 - _DECAY)
        return self.value

    @property
    def value(self) -> float:
        """The mean of all that was added."""
        return self._sum / self._weights
