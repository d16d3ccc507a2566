"""Which example is trained when: counted by hand."""

from __future__ import annotations

import pytest
from grid import plan_of

from trainer.data.plan import Slot


def slots_of_all_processes(count: int, world: int, step: int, **changes: int) -> list[list[Slot]]:
    plans = [plan_of(count, num_processes=world, process_index=r, **changes) for r in range(world)]
    return [[slot for batch in plan.at(step) for slot in batch] for plan in plans]


def test_three_epochs_over_five_pictures_by_two_are_nine_steps() -> None:
    plan = plan_of(5, batch_size=2)

    assert plan.steps_per_epoch == 3
    assert plan.total_steps(1000, 3) == 9
    assert [plan.epoch_of(step) for step in range(9)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_without_epochs_max_train_steps_is_the_number_of_steps() -> None:
    assert plan_of(5, batch_size=2).total_steps(1000, None) == 1000


def test_each_epoch_shows_every_picture_once_in_an_order_of_its_own() -> None:
    plan = plan_of(5, batch_size=2)

    epochs = [
        [
            slot.number
            for step in range(3 * e, 3 * e + 3)
            for batch in plan.at(step)
            for slot in batch
        ]
        for e in range(3)
    ]

    assert [sorted(epoch) for epoch in epochs] == [[0, 1, 2, 3, 4]] * 3
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_the_last_short_batch_is_kept_and_its_examples_weigh_a_mean() -> None:
    plan = plan_of(5, batch_size=2)

    (last,) = plan.at(2)

    assert [(slot.position, slot.weight) for slot in last] == [(4, 1.0)]


def test_gradient_accumulation_splits_a_step_into_batches() -> None:
    plan = plan_of(12, batch_size=2, gradient_accumulation_steps=3)

    batches = plan.at(1)

    assert [[slot.position for slot in batch] for batch in batches] == [[6, 7], [8, 9], [10, 11]]
    assert plan.steps_per_epoch == 2


def test_batch_size_and_accumulation_cover_the_same_examples() -> None:
    wide = plan_of(7, batch_size=4)
    deep = plan_of(7, batch_size=1, gradient_accumulation_steps=4)
    for step in range(4):
        assert sum(wide.at(step), []) == sum(deep.at(step), [])


def test_more_slots_than_pictures_make_one_step_per_epoch() -> None:
    plan = plan_of(3, batch_size=4, gradient_accumulation_steps=2)

    assert plan.steps_per_epoch == 1
    assert [len(batch) for batch in plan.at(0)] == [3]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 11])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 1), (2, 1), (1, 2), (3, 2)])
def test_two_processes_cover_what_one_would_with_the_same_positions(
    count: int, batch_size: int, accumulation: int
) -> None:
    alone = plan_of(count, batch_size=2 * batch_size, gradient_accumulation_steps=accumulation)
    for step in range(2 * alone.steps_per_epoch):
        one = [(s.number, s.position) for batch in alone.at(step) for s in batch]
        ranks = slots_of_all_processes(
            count, 2, step, batch_size=batch_size, gradient_accumulation_steps=accumulation
        )
        both = [slot for rank in ranks for slot in rank]

        real = sorted((s.position, s.number) for s in both if s.weight > 0)
        assert real == sorted((position, number) for number, position in one)
        # The mean over two processes of the weighted sums is the mean over the real examples.
        assert sum(s.weight for s in both) / 2 == pytest.approx(1)
        assert len({s.weight for s in both if s.weight > 0}) == 1


def test_the_batches_of_one_pass_lie_side_by_side_over_the_processes() -> None:
    def positions(rank: int) -> list[list[int]]:
        plan = plan_of(
            7, batch_size=2, gradient_accumulation_steps=2, num_processes=2, process_index=rank
        )
        return [[slot.position for slot in batch] for batch in plan.at(0)]

    assert positions(0) == [[0, 1], [4, 5]]
    assert positions(1) == [[2, 3], [6]]


def test_a_process_without_examples_repeats_the_last_one_with_weight_zero() -> None:
    _, idle = slots_of_all_processes(1, 2, 0)

    assert [(slot.number, slot.position, slot.weight) for slot in idle] == [(0, 0, 0.0)]


@pytest.mark.parametrize("count", [1, 3, 5, 9, 13])
def test_all_processes_run_equally_many_batches(count: int) -> None:
    plans = [
        plan_of(
            count, num_processes=3, process_index=r, batch_size=2, gradient_accumulation_steps=2
        )
        for r in range(3)
    ]
    for step in range(plans[0].steps_per_epoch):
        assert len({len(plan.at(step)) for plan in plans}) == 1


def test_the_seed_decides_the_order() -> None:
    def order(seed: int) -> list[int]:
        return [plan_of(20, seed=seed).at(step)[0][0].number for step in range(20)]

    assert order(1) == order(1)
    assert order(1) != order(2)
