"""What is measured of a training beside the loss of each step."""

from __future__ import annotations

import pytest

from trainer.measures import Smoothed


def test_a_smoothed_loss_begins_at_the_first_and_leans_to_the_last() -> None:
    """By hand: (0.98 * 1 + 3) / (0.98 + 1)."""
    smoothed = Smoothed()

    assert smoothed.add(1.0) == pytest.approx(1.0)
    assert smoothed.add(3.0) == pytest.approx((0.98 * 1 + 3) / 1.98)


def test_a_smoothed_loss_goes_on_where_it_stood() -> None:
    values = [0.5, 0.25, 1.0, 0.125]
    whole, resumed = Smoothed(values), Smoothed(values[:2])
    for value in values[2:]:
        resumed.add(value)

    assert resumed.add(0.75) == whole.add(0.75)
