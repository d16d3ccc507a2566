"""Which parts learn at which step; the expected numbers are worked out by hand."""

from __future__ import annotations

import pytest

from trainer.config import AdapterConfig, TokenConfig
from trainer.errors import InputError
from trainer.schedule import Schedule


def tokens(frac: float = 0.5, *, alone: bool = False) -> TokenConfig:
    return TokenConfig(
        train_text_encoder_ti=True,
        train_text_encoder_ti_frac=frac,
        disable_unet_during_ti_training=alone,
    )


def encoders(frac: float = 1.0) -> AdapterConfig:
    return AdapterConfig(train_text_encoder=True, train_text_encoder_frac=frac)


def learning_steps(schedule: Schedule) -> dict[str, list[int]]:
    """Part to the steps in which it learns."""
    steps = range(schedule.total_steps)
    return {
        part: found
        for part in ("denoiser", "text_encoders", "tokens")
        if (found := [step for step in steps if part in schedule.parts_at(step)])
    }


def test_without_tokens_or_text_encoders_only_the_denoiser_learns() -> None:
    schedule = Schedule.of(TokenConfig(), AdapterConfig(), 3)

    assert learning_steps(schedule) == {"denoiser": [0, 1, 2]}
    assert schedule.pivot is None
    assert schedule.text_frozen_from == 0
    assert not schedule.text_learns_at(0)


def test_new_tokens_learn_for_their_share_of_the_steps_and_the_denoiser_in_all() -> None:
    schedule = Schedule.of(tokens(0.5), AdapterConfig(), 6)

    assert learning_steps(schedule) == {"denoiser": [0, 1, 2, 3, 4, 5], "tokens": [0, 1, 2]}
    assert schedule.pivot == 3
    assert [schedule.text_learns_at(step) for step in range(6)] == [True] * 3 + [False] * 3


def test_the_denoiser_can_wait_for_the_pivot() -> None:
    schedule = Schedule.of(tokens(0.5, alone=True), AdapterConfig(), 6)

    assert learning_steps(schedule) == {"denoiser": [3, 4, 5], "tokens": [0, 1, 2]}


def test_the_denoiser_does_not_wait_where_there_are_no_tokens() -> None:
    token = TokenConfig(disable_unet_during_ti_training=True, train_text_encoder_ti_frac=1.0)

    assert learning_steps(Schedule.of(token, AdapterConfig(), 2)) == {"denoiser": [0, 1]}


# fal's defaults; 0.35 of 10 is 3.5, 0.24 of 10 is 2.4; Python rounds 2.5 to 2.
@pytest.mark.parametrize(
    ("frac", "total", "pivot"),
    [(0.5, 1000, 500), (0.35, 10, 4), (0.24, 10, 2), (0.5, 5, 2), (1.0, 7, 7), (0.1, 1000, 100)],
)
def test_the_pivot_is_the_nearest_whole_step(frac: float, total: int, pivot: int) -> None:
    assert Schedule.of(tokens(frac), AdapterConfig(), total).pivot == pivot


@pytest.mark.parametrize(("frac", "total"), [(0.5, 1), (0.001, 10), (1.0, 1)])
def test_tokens_that_shall_learn_learn_in_one_step_at_least(frac: float, total: int) -> None:
    schedule = Schedule.of(tokens(frac), AdapterConfig(), total)

    assert learning_steps(schedule)["tokens"] == [0]


def test_a_share_of_one_never_freezes_the_tokens() -> None:
    schedule = Schedule.of(tokens(1.0), AdapterConfig(), 4)

    assert learning_steps(schedule)["tokens"] == [0, 1, 2, 3]
    assert schedule.text_frozen_from == 4


def test_text_encoders_learn_for_their_share_of_the_steps() -> None:
    schedule = Schedule.of(TokenConfig(), encoders(0.75), 4)

    assert learning_steps(schedule) == {"denoiser": [0, 1, 2, 3], "text_encoders": [0, 1, 2]}
    assert schedule.pivot is None
    assert schedule.text_frozen_from == 3


def test_text_stays_as_it_is_once_the_later_of_both_is_frozen() -> None:
    assert Schedule.of(tokens(0.2), encoders(0.6), 10).text_frozen_from == 6
    assert Schedule.of(tokens(0.6), encoders(0.2), 10).text_frozen_from == 6


# 0.9 of 2 steps is 1.8, which rounds to both of them.
@pytest.mark.parametrize(("frac", "total"), [(1.0, 10), (0.5, 1), (0.9, 2)])
def test_a_denoiser_that_would_never_learn_is_refused(frac: float, total: int) -> None:
    with pytest.raises(InputError, match=f"in all {total} steps") as refusal:
        Schedule.of(tokens(frac, alone=True), AdapterConfig(), total)

    assert refusal.value.problems[0].field == "disable_unet_during_ti_training"
