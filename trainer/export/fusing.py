"""Adapters of layers that are row blocks of one layer in a file: joined, and split again.

Exact for products whose rows are independent, which LoRA, DoRA and LoHa are: the joined product has
the parts' second factors below one another and their first factors on a diagonal of blocks.
A Kronecker product is not of that kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from trainer.export.state import MAGNITUDE, LayerTensors

# First factor, with the layer's rows, to second factor, with its columns.
_FACTORS = {"lora_B": "lora_A", "hada_w1_a": "hada_w1_b", "hada_w2_a": "hada_w2_b"}
_WITH_ROWS = (*_FACTORS, MAGNITUDE)


def joined(
    parts: Sequence[LayerTensors | None],
    shares: Sequence[int],
    magnitude: Callable[[int], Tensor],
) -> LayerTensors:
    """The adapter of one layer made of several, whose untrained parts are rows of zeros.

    Args:
        parts: folded tensors in the order of rows; None for a layer that was not trained.
        shares: rows of each part as a multiple of the layer's inputs.
        magnitude: the DoRA magnitude of an untrained part, by its number.
    """
    trained = [part for part in parts if part is not None]
    tensors: LayerTensors = {}
    for first, second in _FACTORS.items():
        if first not in trained[0]:
            continue
        tensors[second] = torch.cat([part[second] for part in trained])
        inputs = tensors[second].shape[1]
        rows = [
            share * inputs if part is None else part[first].shape[0]
            for part, share in zip(parts, shares, strict=True)
        ]
        blocks = [None if part is None else part[first] for part in parts]
        tensors[first] = _diagonal(blocks, rows)
    if MAGNITUDE in trained[0]:
        tensors[MAGNITUDE] = torch.cat(
            [
                (magnitude(number) if part is None else part[MAGNITUDE]).flatten()
                for number, part in enumerate(parts)
            ]
        )
    return tensors


def split(tensors: LayerTensors, shares: Sequence[int]) -> list[LayerTensors | None]:
    """The adapters of a joined layer's parts, each of the rank that it needs.

    A part keeps the columns of its rows that are not zero: of a diagonal of blocks its own block,
    of a dense first factor all of them. A part of zeros was not trained, or learnt nothing, unless
    all are or DoRA magnitudes say more.

    Args:
        shares: the parts' rows in proportion, in order.

    Raises:
        ValueError: the rows cannot be divided so.
    """
    firsts = [first for first in _FACTORS if first in tensors]
    ranges = _row_ranges(tensors[firsts[0]].shape[0], shares)
    used = [
        torch.stack([(tensors[first][rows] != 0).any(dim=0) for first in firsts]).any(dim=0)
        for rows in ranges
    ]
    if MAGNITUDE in tensors or not any(columns.any() for columns in used):
        used = [columns if columns.any() else torch.ones_like(columns) for columns in used]
    return [
        _part(tensors, rows, columns) if columns.any() else None
        for rows, columns in zip(ranges, used, strict=True)
    ]


def _part(tensors: LayerTensors, rows: slice, columns: Tensor) -> LayerTensors:
    part: LayerTensors = {}
    for first, second in _FACTORS.items():
        if first in tensors:
            part[first] = tensors[first][rows][:, columns].contiguous()
            part[second] = tensors[second][columns].contiguous()
    if MAGNITUDE in tensors:
        part[MAGNITUDE] = tensors[MAGNITUDE][rows].contiguous()
    return part


def can_split(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the adapter is one whose rows are independent."""
    return any(first in tensors for first in _FACTORS)


def with_swapped_halves(tensors: LayerTensors) -> LayerTensors:
    """The same adapter with the two halves of its layer's rows in each other's place."""
    return {name: halves_swapped(t) if name in _WITH_ROWS else t for name, t in tensors.items()}


def halves_swapped(tensor: Tensor) -> Tensor:
    """A tensor with the two halves of its first axis in each other's place."""
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def _diagonal(blocks: Sequence[Tensor | None], rows: Sequence[int]) -> Tensor:
    """Blocks on a diagonal; None is rows of zeros without a column."""
    present = [block for block in blocks if block is not None]
    result = present[0].new_zeros(sum(rows), sum(block.shape[1] for block in present))
    row = column = 0
    for block, height in zip(blocks, rows, strict=True):
        if block is not None:
            width = block.shape[1]
            result[row : row + height, column : column + width] = block
            column += width
        row += height
    return result


def _row_ranges(rows: int, shares: Sequence[int]) -> list[slice]:
    unit, rest = divmod(rows, sum(shares))
    if rest:
        raise ValueError(f"{rows} rows are not a multiple of {sum(shares)}")
    ends = [unit * sum(shares[: number + 1]) for number in range(len(shares))]
    starts = [0, *ends[:-1]]
    return [slice(start, end) for start, end in zip(starts, ends, strict=True)]
