"""Which example is trained when: counted by hand."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
from grid import plan_of

from trainer.data.plan import Plan, Portion, Slot
from trainer.images.crop import Size
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


def triples(plan: Plan, step: int) -> list[list[tuple[int, int, float]]]:
    return [[(s.number, s.position, s.weight) for s in batch] for batch in plan.at(step)]


MIXED = (
    Portion((0, 1, 2), repeats=2, class_images=(6, 7), prior_loss_weight=0.5),
    Portion((3, 4, 5)),
)


def test_pictures_of_one_size_have_the_batches_that_there_were_before_sizes() -> None:
    # Taken down before plans knew sizes.
    short = plan_of(5, batch_size=2)
    assert [triples(short, step) for step in range(3)] == [
        [[(4, 0, 0.5), (0, 1, 0.5)]],
        [[(2, 2, 0.5), (1, 3, 0.5)]],
        [[(3, 4, 1.0)]],
    ]
    second = plan_of(*MIXED, batch_size=2, num_processes=2, process_index=1)
    assert [triples(second, step) for step in range(4)] == [
        [[(3, 2, 0.5), (1, 3, 0.5), (7, -4, 0.25)]],
        [[(2, 6, 0.5), (2, 7, 0.5), (7, -7, 0.25), (6, -8, 0.25)]],
        [[(4, 8, 0.0)]],
        [[(1, 14, 0.5), (2, 15, 0.5), (7, -15, 0.25), (6, -16, 0.25)]],
    ]
    deep = plan_of(*MIXED, batch_size=2, gradient_accumulation_steps=2)
    assert triples(deep, 0) == [
        [(0, 0, 0.25), (5, 1, 0.25), (6, -1, 0.125)],
        [(3, 2, 0.25), (1, 3, 0.25), (7, -4, 0.125)],
    ]
    assert triples(deep, 2) == [[(4, 8, 1.0)]]


@pytest.mark.parametrize("sizes", [(), ((64, 96),) * 8])
def test_many_plans_of_one_size_are_what_they_were_before_sizes(
    sizes: tuple[Size, ...],
) -> None:
    digest = hashlib.sha256()
    for portions in ((Portion((0, 1, 2, 3, 4)),), MIXED):
        for batch_size, deep, world in product((1, 2, 3), (1, 2), (1, 2, 3)):
            for rank in range(world):
                plan = plan_of(
                    *portions,
                    batch_size=batch_size,
                    gradient_accumulation_steps=deep,
                    num_processes=world,
                    process_index=rank,
                    sizes=sizes,
                )
                assert plan.filled == 0
                for step in range(3 * plan.steps_per_epoch):
                    digest.update(repr(triples(plan, step)).encode())

    # Taken down before plans knew sizes.
    before = "053b1883f135802ad9e636c8d67e85ef7993e4c14e60f2926da5498e965cd2b2"
    assert digest.hexdigest() == before


WIDE, TALL, SQUARE = (64, 96), (96, 64), (64, 64)
# Seven pictures of three sizes: 3 wide, 3 tall, 1 square.
SIZES = (WIDE, TALL, SQUARE, WIDE, TALL, WIDE, TALL)


def test_each_batch_is_full_and_of_one_size() -> None:
    plan = plan_of(7, batch_size=2, sizes=SIZES)

    for step in range(3 * plan.steps_per_epoch):
        for batch in plan.at(step):
            assert len(batch) == 2
            assert len({SIZES[slot.number] for slot in batch}) == 1


def test_steps_and_fillings_are_counted_by_size() -> None:
    # Batches of 2: 2 wide, 2 tall, 1 square, of which each size has one place to fill.
    plan = plan_of(7, batch_size=2, sizes=SIZES)
    assert (plan.num_examples, plan.filled, plan.steps_per_epoch) == (7, 3, 5)
    # Five batches by two.
    deep = plan_of(7, batch_size=2, gradient_accumulation_steps=2, sizes=SIZES)
    assert (deep.steps_per_epoch, deep.total_steps(1000, 3)) == (3, 9)
    assert [deep.epoch_of(step) for step in (0, 2, 3, 8)] == [0, 0, 1, 2]
    # Batches of one need no filling.
    assert plan_of(7, sizes=SIZES).filled == 0
    # Twice as many uses: 6 wide, 6 tall, 2 square.
    twice = plan_of(Portion(tuple(range(7)), repeats=2), batch_size=4, sizes=SIZES)
    assert (twice.num_examples, twice.filled, twice.steps_per_epoch) == (14, 6, 5)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_every_picture_is_seen_in_each_epoch_and_repeated_only_to_fill(
    batch_size: int, accumulation: int
) -> None:
    plan = plan_of(7, batch_size=batch_size, gradient_accumulation_steps=accumulation, sizes=SIZES)
    per_epoch = plan.steps_per_epoch

    orders = []
    for epoch in range(4):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        order = [slot.number for step in steps for batch in plan.at(step) for slot in batch]
        orders.append(order)
        uses = Counter(order)
        assert set(uses) == set(range(7))
        assert uses.total() == plan.num_examples + plan.filled
        for size in (WIDE, TALL, SQUARE):
            # From the start of its size, one by one: none is repeated twice more than another.
            of_size = [uses[number] for number in range(7) if SIZES[number] == size]
            assert max(of_size) - min(of_size) <= 1
    assert len(set(map(tuple, orders))) == 4


def test_the_batches_of_an_epoch_are_in_an_order_of_their_own() -> None:
    plan = plan_of(7, batch_size=2, sizes=SIZES)

    epochs = [
        [SIZES[plan.at(step)[0][0].number] for step in range(5 * epoch, 5 * epoch + 5)]
        for epoch in range(6)
    ]

    assert all(Counter(epoch) == {WIDE: 2, TALL: 2, SQUARE: 1} for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 2
    other = plan_of(7, batch_size=2, sizes=SIZES, seed=8)
    assert [other.at(step) for step in range(5)] != [plan.at(step) for step in range(5)]


def test_an_epoch_is_its_shuffled_pictures_cut_by_size_and_the_cuts_shuffled() -> None:
    plan = plan_of(7, batch_size=2, sizes=SIZES)

    for epoch in range(3):
        rows = []
        order = permutation(7, "order", epoch, 7)
        for size in dict.fromkeys(SIZES[number] for number in order):
            alike = [number for number in order if SIZES[number] == size]
            # Of three, and of one, the first fills the last place.
            alike.append(alike[0])
            rows += [alike[start : start + 2] for start in range(0, len(alike), 2)]
        expected = [[rows[place]] for place in permutation(7, "batches", epoch, 5)]
        assert numbers_of(plan, 15)[5 * epoch : 5 * epoch + 5] == expected


def test_positions_are_never_used_twice() -> None:
    plan = plan_of(7, batch_size=2, gradient_accumulation_steps=2, sizes=SIZES)

    positions = [
        slot.position
        for step in range(4 * plan.steps_per_epoch)
        for batch in plan.at(step)
        for slot in batch
    ]

    assert len(set(positions)) == len(positions)
    # A step of two batches of two begins at its number times four; the third is half a step.
    assert positions[:14] == [*range(10), *range(12, 16)]


# Beside them five pictures of the class, of two of the sizes.
CLASS_SIZES = (*SIZES, WIDE, TALL, WIDE, TALL, TALL)
WITH_CLASS = Portion(tuple(range(7)), class_images=tuple(range(7, 12)), prior_loss_weight=0.25)


def test_class_pictures_of_other_sizes_follow_in_batches_of_their_own() -> None:
    plan = plan_of(WITH_CLASS, batch_size=3, gradient_accumulation_steps=2, sizes=CLASS_SIZES)
    split = 0

    for step in range(3 * plan.steps_per_epoch):
        batches = plan.at(step)
        for batch in batches:
            assert len({CLASS_SIZES[slot.number] for slot in batch}) == 1
            assert [s.is_class for s in batch] == sorted(s.is_class for s in batch)
        split += sum(batch[0].is_class for batch in batches)
        slots = [slot for batch in batches for slot in batch]
        instances = [slot for slot in slots if not slot.is_class]
        classes = [slot for slot in slots if slot.is_class]
        assert sorted(~slot.position for slot in classes) == sorted(s.position for s in instances)
        # The mean over the step's instances, and a quarter of it for the class.
        assert {slot.weight for slot in instances} == {1 / len(instances)}
        assert {slot.weight for slot in classes} == {0.25 / len(instances)}
    assert split > 0


def test_class_pictures_of_another_size_than_all_instances_leave_those_as_they_are() -> None:
    portion = Portion((0, 1, 2, 3, 4), class_images=(5, 6), prior_loss_weight=0.5)
    sizes = (*[SQUARE] * 5, WIDE, TALL)
    alike = plan_of(portion, batch_size=2)
    differing = plan_of(portion, batch_size=2, sizes=sizes)

    assert differing.steps_per_epoch == alike.steps_per_epoch
    for step in range(6):
        first, *others = differing.at(step)
        (whole,) = alike.at(step)
        assert first == [slot for slot in whole if not slot.is_class]
        assert sorted(map(repr, sum(others, []))) == sorted(
            repr(slot) for slot in whole if slot.is_class
        )


def test_a_place_that_fills_has_the_class_picture_of_the_place_that_it_repeats() -> None:
    plan = plan_of(WITH_CLASS, batch_size=4, sizes=CLASS_SIZES)

    for epoch in range(4):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        slots = [slot for step in steps for batch in plan.at(step) for slot in batch]
        beside = {slot.position: slot.number for slot in slots}
        pairs = {(number, beside[~at]) for at, number in beside.items() if at >= 0}
        # Each picture once with one of the class: 7 pairs, though 12 places are filled up.
        assert len(slots) == 2 * 12
        assert sorted(number for number, _ in pairs) == list(range(7))
        # The cursor moved by 7 an epoch, as without filling.
        used = Counter(partner for _, partner in pairs)
        expected = Counter(
            7 + permutation(7, "class order 0", use // 5, 5)[use % 5]
            for use in range(7 * epoch, 7 * epoch + 7)
        )
        assert used == expected


@pytest.mark.parametrize("portion", [Portion(tuple(range(7))), WITH_CLASS])
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 1), (2, 1), (2, 2), (3, 1)])
def test_processes_share_a_step_of_several_sizes(
    portion: Portion, world: int, batch_size: int, accumulation: int
) -> None:
    alone = plan_of(
        portion,
        batch_size=batch_size,
        gradient_accumulation_steps=world * accumulation,
        sizes=CLASS_SIZES,
    )
    shared = replace(alone, gradient_accumulation_steps=accumulation, num_processes=world)
    ranks = [replace(shared, process_index=rank) for rank in range(world)]
    assert shared.steps_per_epoch == alone.steps_per_epoch

    for step in range(3 * alone.steps_per_epoch):
        of_ranks = [plan.at(step) for plan in ranks]
        # Equally many forward passes, or the processes would wait for each other for ever.
        assert len({len(batches) for batches in of_ranks}) == 1
        slots = [slot for batches in of_ranks for batch in batches for slot in batch]
        real = [slot for slot in slots if slot.weight > 0]
        one = [slot for batch in alone.at(step) for slot in batch]
        # The same pictures at the same places: what is drawn for them is the same too.
        assert {s.position: s.number for s in real} == {s.position: s.number for s in one}
        assert len(real) == len(one)
        # Averaged over the processes each weighs what it weighs alone.
        weights = {slot.position: slot.weight for slot in one}
        assert all(s.weight / world == pytest.approx(weights[s.position]) for s in real)
        assert sum(s.weight for s in one if not s.is_class) == pytest.approx(1)
        for batches in of_ranks:
            for batch in batches:
                assert len({CLASS_SIZES[slot.number] for slot in batch}) == 1


def test_a_process_with_fewer_batches_repeats_the_last_instance_at_the_end() -> None:
    # One square picture with a wide one of the class beside it, and two processes.
    plans = [
        plan_of(
            Portion((0,), class_images=(1,)),
            num_processes=2,
            process_index=rank,
            sizes=(SQUARE, WIDE),
        )
        for rank in range(2)
    ]

    first, second = (triples(plan, 3) for plan in plans)

    # A step is two places, of which there is one.
    assert first == [[(0, 6, 2.0)], [(1, ~6, 2.0)]]
    assert second == [[(0, 6, 0.0)], [(0, 6, 0.0)]]


def test_a_picture_that_stands_twice_in_a_portion_is_shown_twice_an_epoch() -> None:
    plan = plan_of(Portion((0, 0, 1), repeats=2), batch_size=2)

    shown = Counter(s.number for step in range(3) for batch in plan.at(step) for s in batch)

    assert (plan.num_examples, plan.steps_per_epoch) == (6, 3)
    assert shown == {0: 4, 1: 2}
