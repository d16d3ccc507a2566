"""Draws as pure functions of (seed, purpose, position).

Nothing in the project keeps or saves the state of a random generator: whoever needs a random
number asks for the key of its purpose and position, and seeds a generator of its own with it.
Resumed runs, worker processes and other process counts therefore draw the same numbers.
"""

from __future__ import annotations

import hashlib
import random


def key(seed: int, purpose: str, position: int = 0) -> int:
    """A seed in [0, 2**63) for one draw, independent of every other purpose and position.

    Args:
        seed: the run's `seed`.
        purpose: what is drawn, such as `noise` or `crop`.
        position: the global position of the example in the run, over all processes.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def source(seed: int, purpose: str, position: int = 0) -> random.Random:
    """A generator of plain Python numbers for one purpose and position."""
    return random.Random(key(seed, purpose, position))


def permutation(seed: int, purpose: str, position: int, size: int) -> list[int]:
    """The numbers 0 … size - 1 in the order that belongs to one purpose and position."""
    order = list(range(size))
    source(seed, purpose, position).shuffle(order)
    return order
