"""Which pictures are kept out of a training, to be looked at while it learns from the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from trainer import randomness
from trainer.errors import InputError

# A picture by its concept, from 1, and its name there.
Picture = tuple[int, str]


def held_out(pictures: Sequence[Picture], *, count: int, seed: int) -> tuple[Picture, ...]:
    """So many of these pictures, drawn by the seed; of each concept at least one is left.

    Args:
        pictures: every one once, in the order of the concepts.
        count: how many are kept out.
        seed: of the run.

    Raises:
        InputError: there are not so many.
    """
    left = Counter(concept for concept, _ in pictures)
    held: list[Picture] = []
    for place in randomness.permutation(seed, "held out", 0, len(pictures)):
        concept, _ = pictures[place]
        if len(held) < count and left[concept] > 1:
            left[concept] -= 1
            held.append(pictures[place])
    if len(held) < count:
        message = f"is {count}, and of {len(pictures)} pictures {len(held)} can be kept out"
        raise InputError.of("validation_images", message, f"give 0 to {len(held)}")
    return tuple(held)
