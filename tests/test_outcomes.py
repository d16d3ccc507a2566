"""Outcomes of operations on tensors without data: made again as torch made them the first time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from trainer.outcomes import Outcomes, without_data

ATEN: Any = torch.ops.aten
CPU = torch.device("cpu")
MODE = FakeTensorMode()


def like(tensor: torch.Tensor) -> tuple[Any, ...]:
    assert isinstance(tensor, FakeTensor)
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.fake_device


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> FakeTensor:
    return without_data(torch.empty(shape, dtype=dtype, device="meta"), MODE, CPU)


@pytest.mark.parametrize(
    ("func", "given"),
    [
        (ATEN.mm.default, [(4, 6), (6, 8)]),
        (ATEN.native_layer_norm.default, [(4, 6), [6], (6,), (6,), 1e-5]),
        (ATEN.sum.dim_IntList, [(4, 6), [1], True]),
    ],
    ids=str,
)
def test_an_outcome_is_like_the_first_and_torch_is_asked_once(
    func: Any, given: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = Outcomes()
    args = [empty(*each) if isinstance(each, tuple) else each for each in given]
    with MODE:
        first = outcomes.of(func, args, {})
        monkeypatch.delattr(FakeTensorMode, "dispatch")
        second = outcomes.of(func, args, {})
    pairs = zip(first, second, strict=True) if isinstance(first, tuple) else [(first, second)]
    for one, other in pairs:
        assert like(one) == like(other)
        assert one.untyped_storage() != other.untyped_storage()


def test_a_view_shares_the_storage_of_what_it_is_of() -> None:
    outcomes = Outcomes()
    with MODE:
        for _ in range(3):
            whole = empty(4, 6)
            view = outcomes.of(ATEN.transpose.int, (whole, 0, 1), {})
            assert like(view) == like(whole.t())
            assert view.untyped_storage() == whole.untyped_storage()
            parts = outcomes.of(ATEN.split.Tensor, (whole, 2), {})
            assert [part.untyped_storage() == whole.untyped_storage() for part in parts] == [
                True
            ] * 2


def test_what_is_changed_in_place_is_the_same_tensor() -> None:
    outcomes = Outcomes()
    with MODE:
        for _ in range(3):
            one = empty(4, 6)
            assert outcomes.of(ATEN.add_.Tensor, (one, empty(4, 6)), {}) is one
            assert outcomes.of(ATEN.mul.out, (empty(4, 6), empty(4, 6)), {"out": one}) is one


def test_what_is_changed_in_form_is_changed_each_time() -> None:
    outcomes = Outcomes()
    with MODE:
        for _ in range(3):
            one = empty(4, 6)
            assert outcomes.of(ATEN.t_.default, (one,), {}).shape == (6, 4)


def test_numbers_of_several_types_are_not_the_same() -> None:
    outcomes = Outcomes()
    whole = empty(2, dtype=torch.int64)
    with MODE:
        outcomes.of(ATEN.mul.Tensor, (whole, 1), {})
        assert outcomes.of(ATEN.mul.Tensor, (whole, 1.0), {}).dtype == torch.float32
        assert outcomes.of(ATEN.mul.Tensor, (whole, True), {}).dtype == torch.int64


def test_operations_on_numbers_that_are_known_are_left_to_torch() -> None:
    outcomes = Outcomes()
    with MODE:
        for number in (2.0, 3.0):
            known = torch.tensor(number)
            assert outcomes.of(ATEN._local_scalar_dense.default, (known,), {}) == number


def test_operations_on_data_are_left_to_torch() -> None:
    outcomes = Outcomes()
    for number in (2.0, 3.0):
        assert outcomes.of(ATEN.mul.Tensor, (torch.tensor(number), 2), {}) == 2 * number
