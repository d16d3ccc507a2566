"""What operations make of tensors without data: seen once, and made again without asking.

Torch works out each outcome anew, which takes ten times as long. Knows tensors alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten


@dataclass(frozen=True)
class _Made:
    """A tensor with a storage of its own."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class _Given:
    """An argument, changed in place: the tensor of this number among the arguments."""

    number: int


# What is made anew of what stays an argument, in the order and form of the outcome.
_Recipe = tuple[Sequence[Any], Any]
# Of an outcome that shares an argument's storage.
_VIEW: _Recipe = ((), None)


class _UnknownError(Exception):
    """More than what tensors are like decides about an outcome."""


def without_data(like: torch.Tensor, mode: FakeTensorMode, device: torch.device) -> FakeTensor:
    """A tensor or parameter of the same shape, strides and number format that has no data.

    Args:
        like: anywhere.
        mode: of all tensors that it meets.
        device: where it seems to be.
    """
    empty = _empty(like.shape, like.stride(), like.dtype, mode)
    is_parameter = isinstance(like, torch.nn.Parameter)
    return FakeTensor(mode, empty, device, requires_grad=like.requires_grad, _is_param=is_parameter)


class Outcomes:
    """Remembers what operations made, by what their arguments are like."""

    def __init__(self) -> None:
        self._known: dict[Hashable, _Recipe | None] = {}

    def of(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """The outcome of an operation."""
        tensors: list[FakeTensor] = []
        try:
            likeness = _told(args, tensors), _told(tuple(kwargs.items()), tensors)
        except _UnknownError:
            return func(*args, **kwargs)
        if not tensors:
            return func(*args, **kwargs)
        key = func, likeness
        if key not in self._known:
            outcome = func(*args, **kwargs)
            self._known[key] = _recipe(func, outcome, tensors)
            return outcome
        recipe, mode = self._known[key], tensors[0].fake_mode
        if recipe is None:
            return func(*args, **kwargs)
        if recipe is _VIEW:
            with in_kernel_invocation_manager(mode):
                views = func(*args, **kwargs)
            device = tensors[0].fake_device
            return tree_map_only(torch.Tensor, lambda view: FakeTensor(mode, view, device), views)
        parts, form = recipe
        made = [_again(part, tensors, mode) for part in parts]
        return made[0] if form.is_leaf() else tree_unflatten(made, form)


def _told(value: Any, tensors: list[FakeTensor]) -> Hashable:
    """What of an argument decides about an outcome; its tensors are added to the list.

    Raises:
        _UnknownError: the data of a tensor may decide.
    """
    if isinstance(value, FakeTensor):
        if value.constant is not None:
            raise _UnknownError
        tensors.append(value)
        return value.shape, value.stride(), value.dtype, value.fake_device
    if isinstance(value, torch.Tensor):
        raise _UnknownError
    if isinstance(value, list | tuple):
        return tuple([_told(each, tensors) for each in value])
    # Equal numbers may be of several types.
    return type(value), value


def _recipe(func: Any, outcome: Any, tensors: Sequence[FakeTensor]) -> _Recipe | None:
    """How to make an outcome again, if that can be said.

    Args:
        func: the operation.
        outcome: of it.
        tensors: among its arguments.
    """
    if torch.Tag.inplace_view in func.tags:
        return None
    leaves, form = tree_flatten(outcome)
    numbers = {id(tensor): number for number, tensor in enumerate(tensors)}
    storages = {tensor.untyped_storage() for tensor in tensors}
    made = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and id(leaf) not in numbers]
    shared = [tensor for tensor in made if tensor.untyped_storage() in storages]
    if shared:
        return _VIEW if len(shared) == len(leaves) else None
    own = {tensor.untyped_storage() for tensor in made}
    if len(own) < len(made) or not all(map(_is_plain, made)):
        return None
    return [_part(leaf, numbers) for leaf in leaves], form


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether shape, strides and format say all of it."""
    if not isinstance(tensor, FakeTensor) or tensor.constant is not None:
        return False
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    numbers = last + 1 if tensor.numel() else 0
    return tensor.untyped_storage().nbytes() == numbers * tensor.itemsize


def _part(leaf: Any, numbers: Mapping[int, int]) -> Any:
    if id(leaf) in numbers:
        return _Given(numbers[id(leaf)])
    if isinstance(leaf, FakeTensor):
        return _Made(leaf.shape, leaf.stride(), leaf.dtype, leaf.fake_device)
    return leaf


def _again(part: Any, tensors: Sequence[FakeTensor], mode: FakeTensorMode) -> Any:
    if isinstance(part, _Made):
        empty = _empty(part.shape, part.stride, part.dtype, mode)
        return FakeTensor(mode, empty, part.device)
    return tensors[part.number] if isinstance(part, _Given) else part


def _empty(
    shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, mode: FakeTensorMode
) -> torch.Tensor:
    with in_kernel_invocation_manager(mode):
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
