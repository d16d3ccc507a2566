"""Which example is trained when: counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from grid import plan_of

from trainer.data.plan import Plan, Portion, Slot
from trainer.randomness import permutation


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


def numbers_of(plan: Plan, steps: int) -> list[list[list[int]]]:
    return [[[slot.number for slot in batch] for batch in plan.at(step)] for step in range(steps)]


def test_one_portion_has_the_order_that_its_pictures_alone_had() -> None:
    # What the plan drew before there were portions: the permutation of the pictures' places.
    orders = [permutation(7, "order", epoch, 5) for epoch in range(3)]

    plan = plan_of(Portion((10, 11, 12, 13, 14)), batch_size=5)

    assert numbers_of(plan, 3) == [[[10 + place for place in order]] for order in orders]


def test_portions_share_one_order_in_which_each_picture_comes_as_often_as_it_is_repeated() -> None:
    plan = plan_of(Portion((0, 1), repeats=3), Portion((2, 3, 4)), batch_size=2)

    epochs = [
        [number for batches in numbers_of(plan, 5) for batch in batches for number in batch],
        [s.number for step in range(5, 10) for batch in plan.at(step) for s in batch],
    ]

    assert plan.num_examples == 9
    assert plan.steps_per_epoch == 5
    assert plan.total_steps(1000, 2) == 10
    assert [sorted(epoch) for epoch in epochs] == [[0, 0, 0, 1, 1, 1, 2, 3, 4]] * 2
    assert epochs[0] != epochs[1]


def test_class_slots_follow_the_instance_slots_of_their_batch_in_the_same_order() -> None:
    plan = plan_of(
        Portion((0, 1, 2, 3), class_images=(4, 5, 6), prior_loss_weight=0.5),
        batch_size=3,
        gradient_accumulation_steps=2,
    )

    first, second = plan.at(0)

    assert [slot.position for slot in first] == [0, 1, 2, ~0, ~1, ~2]
    assert [slot.position for slot in second] == [3, ~3]
    assert [slot.is_class for slot in first] == [False] * 3 + [True] * 3
    # A quarter each, and half of it for the class.
    assert [slot.weight for slot in first] == [0.25] * 3 + [0.125] * 3
    assert [slot.weight for slot in second] == [0.25, 0.125]
    assert all(slot.number in (4, 5, 6) for slot in first[3:])


def test_only_subjects_with_class_pictures_get_class_slots() -> None:
    plan = plan_of(Portion((0, 1), class_images=(4,)), Portion((2, 3)), batch_size=4)

    (batch,) = plan.at(0)

    instances, classes = batch[:4], batch[4:]
    with_class = [slot for slot in instances if slot.number < 2]
    assert [slot.position for slot in classes] == [~slot.position for slot in with_class]
    assert [slot.number for slot in classes] == [4, 4]


def test_the_class_cursor_goes_on_over_epochs_and_uses_every_picture_equally_often() -> None:
    plan = plan_of(Portion((0, 1), class_images=(2, 3, 4)), batch_size=1)

    used = [plan.at(step)[0][1].number for step in range(12)]

    # Use c is place c % 3 of the cursor's turn c // 3; its two pictures an epoch do not matter.
    expected = [2 + permutation(7, "class order 0", c // 3, 3)[c % 3] for c in range(12)]
    assert used == expected
    assert [sorted(used[start : start + 3]) for start in (0, 3, 6, 9)] == [[2, 3, 4]] * 4


def test_every_subject_has_a_class_cursor_of_its_own() -> None:
    plan = plan_of(
        Portion((0,), repeats=2, class_images=(10, 11, 12)),
        Portion((1, 2, 3), class_images=(20, 21)),
        batch_size=2,
    )

    pairs = [
        (instance.number, partner.number)
        for step in range(3 * plan.steps_per_epoch)
        for batch in plan.at(step)
        for instance, partner in zip(
            batch[: len(batch) // 2], batch[len(batch) // 2 :], strict=True
        )
    ]

    first = [partner for number, partner in pairs if number == 0]
    second = [partner for number, partner in pairs if number > 0]
    assert first == [10 + permutation(7, "class order 0", c // 3, 3)[c % 3] for c in range(6)]
    assert second == [20 + permutation(7, "class order 1", c // 2, 2)[c % 2] for c in range(9)]


def test_pairs_change_from_epoch_to_epoch() -> None:
    plan = plan_of(Portion((0, 1, 2), class_images=(3, 4, 5)), batch_size=3)

    epochs = {tuple(slot.number for slot in plan.at(step)[0]) for step in range(8)}
    pairs = {(epoch[place], epoch[place + 3]) for epoch in epochs for place in range(3)}

    assert len(pairs) > 3


@pytest.mark.parametrize("count", [1, 2, 5, 7])
@pytest.mark.parametrize("class_count", [1, 3, 20])
def test_two_processes_pair_the_same_pictures_as_one(count: int, class_count: int) -> None:
    portion = Portion(
        tuple(range(count)),
        class_images=tuple(range(count, count + class_count)),
        prior_loss_weight=2.0,
    )
    alone = plan_of(portion, batch_size=4)
    layouts = [
        plan_of(portion, batch_size=1, gradient_accumulation_steps=2, num_processes=2)
        for _ in range(2)
    ]
    ranks = [replace(plan, process_index=rank) for rank, plan in enumerate(layouts)]
    for step in range(3 * alone.steps_per_epoch):
        one = {slot.position: slot.number for batch in alone.at(step) for slot in batch}
        both = [slot for plan in ranks for batch in plan.at(step) for slot in batch]

        assert {s.position: s.number for s in both if s.weight > 0} == one
        # Over two processes the instance slots weigh 1 and the class slots twice that.
        assert sum(s.weight for s in both if not s.is_class) / 2 == pytest.approx(1)
        assert sum(s.weight for s in both if s.is_class) / 2 == pytest.approx(2)


def test_an_idle_slot_has_no_class_picture_beside_it() -> None:
    plan = plan_of(Portion((0,), class_images=(1,)), num_processes=2, process_index=1)

    assert plan.at(0) == [[Slot(0, 0, 0.0)]]
