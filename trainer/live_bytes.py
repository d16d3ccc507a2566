"""Memory by counting: every storage from its making to its end, repeated blocks once for all.

Works on tensors with and without data. Knows no family and no configuration.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

from trainer.frozen import frozen_layers
from trainer.outcomes import Outcomes

# PyTorch's CUDA allocator hands out multiples of this many bytes.
ALLOCATION_UNIT = 512

# What autograd and autocast ask tensors without data for more often than for anything else.
_DEVICE_OF = torch.ops.prim.device.default

# Blocks left of a row of equal ones: the first and the last have other neighbours than those
# between them, of which one is left.
_LEFT = 3


@dataclass(frozen=True)
class StandIn:
    """A block that is left in a model for several equal ones.

    Args:
        block: with an equal one before it.
        successor: the equal block after it.
        others: how many it stands for beside itself.
    """

    block: torch.nn.Module
    successor: torch.nn.Module
    others: int


def shorten(
    model: torch.nn.Module,
    blocks: Iterable[torch.nn.Module],
    adapted: Collection[torch.nn.Module] = (),
) -> tuple[StandIn, ...]:
    """Takes out of each row of equal blocks all but three.

    Equal are neighbours whose tensors have the same names, shapes, number formats and places, and
    learn or do not: each makes the same storages as the other, and leaves the same behind.

    Args:
        model: changed in place.
        blocks: those of its modules that may be taken out.
        adapted: layers that are to be changed, in equal blocks in the same places.
    """
    candidates = set(blocks)
    stand_ins: list[StandIn] = []
    for row in [each for each in model.modules() if isinstance(each, torch.nn.ModuleList)]:
        start = 0
        while start < len(row):
            kind, end = _kind(row[start], adapted), start + 1
            while end < len(row) and row[end] in candidates and _kind(row[end], adapted) == kind:
                end += 1
            if row[start] in candidates and end - start > _LEFT:
                others = end - start - _LEFT
                stand_ins.append(StandIn(row[start + 1], row[end - 1], others))
                del row[start + 2 : end - 1]
                end -= others
            start = end
    return tuple(stand_ins)


def _kind(block: torch.nn.Module, adapted: Collection[torch.nn.Module]) -> object:
    """What decides which storages a block makes."""
    named = (*block.named_parameters(), *block.named_buffers())
    tensors = [(name, t.shape, t.dtype, t.requires_grad) for name, t in named]
    kept = [
        (layer.offloaded, [(p.shape, p.dtype) for p in layer.parts])
        for layer in frozen_layers(block)
    ]
    return tensors, kept, [(type(module), module in adapted) for module in block.modules()]


def _tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Parameters, buffers, and what is kept of frozen weights on the device."""
    yield from module.parameters()
    yield from module.buffers()
    for layer in frozen_layers(module):
        yield from layer.parts_on_device


@dataclass
class _Storage:
    """The size of a storage, and of those like it that further blocks made and keep."""

    size: int
    others_size: int = 0


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that live at one time: those held, and those made inside.

    Args:
        stand_ins: blocks of what is counted, whose every pass counts as many times over as the
            blocks they stand for: their weights, and what forward and backward leave behind.
        outcomes: what is known of operations on tensors without data.
    """

    def __init__(self, stand_ins: Iterable[StandIn] = (), outcomes: Outcomes | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch gives it no types
        self.now = 0
        self.peak = 0
        self.maker: int = 0
        self._sizes = WeakIdKeyDictionary()
        self._caches_end = False
        self._outcomes = outcomes or Outcomes()
        self._repetitions = [_Repetition(self, each) for each in stand_ins]

    def hold(self, module: torch.nn.Module) -> None:
        """Counts the parameters and buffers of a module, and what it keeps of frozen weights."""
        for repetition in self._repetitions:
            self.add(repetition.weights_of(module))
        for tensor in _tensors(module):
            self._count(tensor)

    def add(self, size: int) -> None:
        """Counts bytes that stay."""
        self.now += size
        self.peak = max(self.peak, self.now)

    @contextmanager
    def ending_caches(self, context: AbstractContextManager[Any]) -> Iterator[None]:
        """Inside of a context that caches what blocks make, and lets go of it at its end."""
        with context:
            yield
            self._caches_end = True
        self._caches_end = False

    def __exit__(self, *reason: Any) -> None:
        """Counts no longer."""
        super().__exit__(*reason)  # type: ignore[no-untyped-call] # torch gives it no types
        for repetition in self._repetitions:
            repetition.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operation and counts the storages it makes."""
        if func is _DEVICE_OF:
            return args[0].fake_device
        outcome = self._outcomes.of(func, args, kwargs or {})
        for tensor in tree_iter(outcome):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return outcome

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._sizes:
            return
        size = allocated(storage.nbytes())
        record = _Storage(size, self.maker * size)
        self._sizes[storage] = size
        self.add(size)
        weakref.finalize(storage, self._release, record)

    def _release(self, record: _Storage) -> None:
        self.now -= record.size
        if self._caches_end:
            self.now -= record.others_size


def allocated(size: int) -> int:
    """What a storage of that many bytes takes."""
    return -(-size // ALLOCATION_UNIT) * ALLOCATION_UNIT


class _Repetition:
    """Passes through a stand-in: what each changes in the count, the others change after it.

    A pass through the block lasts until the next begins one: forward from its inputs to its
    successor's, backward from the gradients of its successor's inputs to those of its own. Between
    two equal places of the row lies what one block adds. Forward, a later block has more behind it
    than the block counted; backward it has less, unless gradients take more than activations.
    """

    def __init__(self, counter: LiveBytes, stand_in: StandIn) -> None:
        self._counter, self._stand_in = counter, stand_in
        self._state = "before"
        self._start = self._peak_before = 0
        self._handles = [
            stand_in.block.register_forward_pre_hook(self._enter, with_kwargs=True),
            stand_in.successor.register_forward_pre_hook(self._leave, with_kwargs=True),
        ]

    def weights_of(self, module: torch.nn.Module) -> int:
        """Bytes of the others' weights, if they belong to this module."""
        if not any(part is self._stand_in.block for part in module.modules()):
            return 0
        sizes = {
            t.untyped_storage(): t.untyped_storage().nbytes()
            for t in _tensors(self._stand_in.block)
        }
        return self._stand_in.others * sum(allocated(size) for size in sizes.values())

    def remove(self) -> None:
        """Looks no longer."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, block: torch.nn.Module, args: Any, kwargs: Any) -> None:
        # Where activations are recomputed, the block runs once more while its gradients come.
        if self._state == "before":
            self._begin("forward")
            self._counter.maker = self._stand_in.others
            self._watch((args, kwargs), self._end_backward)

    def _leave(self, block: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if self._state == "forward":
            self._counter.maker = 0
            learns = self._watch((args, kwargs), self._begin_backward)
            self._end("between" if learns else "before")

    def _begin_backward(self, gradient: torch.Tensor) -> None:
        if self._state == "between":
            self._begin("backward")

    def _end_backward(self, gradient: torch.Tensor) -> None:
        if self._state == "backward":
            self._end("before")

    def _watch(self, inputs: Any, then: Callable[[torch.Tensor], None]) -> bool:
        """Acts when the gradient of the first of some inputs is there, if any has one."""
        computed = [
            each
            for each in tree_iter(inputs)
            if isinstance(each, torch.Tensor) and each.grad_fn is not None
        ]
        for tensor in computed:
            tensor.register_hook(then)
        return bool(computed)

    def _begin(self, state: str) -> None:
        counter = self._counter
        self._state, self._start, self._peak_before = state, counter.now, counter.peak
        counter.peak = counter.now

    def _end(self, state: str) -> None:
        counter = self._counter
        change = (counter.now - self._start) * self._stand_in.others
        counter.now += change
        counter.peak = max(self._peak_before, counter.peak + max(0, change), counter.now)
        self._state = state


def repeated(stand_ins: Iterable[StandIn]) -> Mapping[torch.nn.Parameter, int]:
    """How many times over each parameter of a stand-in is there."""
    return {p: 1 + each.others for each in stand_ins for p in each.block.parameters()}
