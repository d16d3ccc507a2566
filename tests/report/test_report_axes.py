"""Axes and curves of charts."""

from __future__ import annotations

import math

import pytest

from trainer.report.axes import (
    axis_of,
    even,
    figure_text,
    step_axis,
    thinned,
    tick_label,
    ticks,
)


def test_a_thinned_curve_keeps_its_ends_its_lowest_and_its_highest() -> None:
    points = [(x, math.sin(x / 50)) for x in range(5000)]
    points[1234] = (1234, -7.0)
    points[4321] = (4321, 9.0)

    kept = thinned(points, 600)

    assert len(kept) <= 600
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert {(1234, -7.0), (4321, 9.0)} <= set(kept)
    assert kept == sorted(kept)


def test_a_curve_of_few_points_keeps_them_all() -> None:
    points = [(0, 1.0), (1, None), (2, 3.0)]

    assert thinned(points, 3) == points


def test_a_thinned_curve_keeps_its_gaps() -> None:
    points = [(x, None if 400 <= x < 410 else float(x)) for x in range(1000)]

    kept = thinned(points, 60)

    assert len(kept) <= 60
    assert any(y is None for _, y in kept)
    assert kept[-1] == (999, 999.0)


def test_a_curve_without_values_can_be_thinned() -> None:
    assert all(y is None for _, y in thinned([(x, None) for x in range(1000)], 30))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (0, 37, [0, 10, 20, 30, 40]),
        (0.312, 0.329, [0.31, 0.315, 0.32, 0.325, 0.33]),
        (-2, 6, [-2, 0, 2, 4, 6]),
    ],
)
def test_ticks_are_round_and_reach_around_the_values(
    low: float, high: float, expected: list[float]
) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_an_axis_begins_at_zero_where_that_is_near() -> None:
    assert axis_of([0.4, 1.0]).low == 0
    assert axis_of([0.38, 0.42]).low > 0.3


def test_an_axis_of_values_over_decades_gives_each_decade_the_same_room() -> None:
    axis = axis_of([0.004, 0.03, 2.0])

    assert axis.is_log
    assert axis.share(0.1) - axis.share(0.01) == pytest.approx(axis.share(1) - axis.share(0.1))
    assert (axis.low, axis.high) == pytest.approx((0.002, 2))
    assert set(axis.ticks) == {0.01, 0.1, 1.0}


def test_an_axis_where_steps_count_is_never_one_of_decades() -> None:
    assert not axis_of([1e-6, 1e-3], with_decades=False).is_log


@pytest.mark.parametrize("values", [[0.0], [3.0], [-3.0], [1e-9], [0.0, 0.0]])
def test_an_axis_of_one_value_has_room_for_it(values: list[float]) -> None:
    axis = axis_of(values)

    assert axis.low < axis.high
    assert 0 <= axis.share(values[0]) <= 1


def test_an_axis_over_many_decades_has_few_ticks() -> None:
    axis = axis_of([1e-12, 1e3])

    assert 3 <= len(axis.ticks) <= 8


def test_what_lies_beyond_an_axis_is_at_its_end() -> None:
    axis = step_axis(100)

    assert (axis.share(-5), axis.share(500)) == (0, 1)


def test_steps_are_told_in_whole_numbers() -> None:
    assert step_axis(3).ticks == (0, 1, 2, 3)
    assert step_axis(5000).ticks == (0, 1000, 2000, 3000, 4000, 5000)


@pytest.mark.parametrize(
    ("value", "label"),
    [(0, "0"), (0.25, "0.25"), (2500, "2,500"), (1e-5, "1e-5"), (1e8, "1e8"), (0.001, "0.001")],
)
def test_ticks_have_short_labels(value: float, label: str) -> None:
    assert tick_label(value) == label


@pytest.mark.parametrize(
    ("value", "text"), [(0.083412, "0.0834"), (12345.6, "12,346"), (2e-5, "2e-5"), (0, "0")]
)
def test_figures_have_the_digits_that_count(value: float, text: str) -> None:
    assert figure_text(value) == text


def test_even_choices_have_both_ends_and_no_more_than_asked_for() -> None:
    assert even(list(range(0, 1100, 100)), 8) == [0, 100, 300, 400, 600, 700, 900, 1000]
    assert even([0, 5], 8) == [0, 5]
