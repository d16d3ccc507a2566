"""Draws are pure functions of (seed, purpose, position)."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys

import pytest

from trainer import randomness

KNOWN_KEYS = [8191287690251064523, 2645398831481083900]
KNOWN_ORDER = [5, 2, 3, 4, 1, 0, 7, 6]

DRAW = """
from trainer import randomness
print(randomness.key(42, "noise", 7), randomness.permutation(42, "order", 0, 10),
      randomness.source(42, "crop", 3).random())
"""


def draw_in_a_process(hash_seed: str) -> str:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run(
        [sys.executable, "-c", DRAW], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_a_key_is_blake2b_of_seed_purpose_and_position() -> None:
    # Second implementation: the digest's hexadecimal text, without its lowest bit.
    text = hashlib.blake2b(b"42/noise/7", digest_size=8).hexdigest()
    assert randomness.key(42, "noise", 7) == int(text, 16) // 2


def test_known_keys_never_change() -> None:
    # Pinned: a change here changes every run with the same seed.
    assert [randomness.key(42, "noise", position) for position in (0, 1)] == KNOWN_KEYS
    assert randomness.permutation(42, "order", 0, 8) == KNOWN_ORDER


def test_keys_fit_a_torch_generator() -> None:
    keys = [randomness.key(seed, "noise", 0) for seed in range(1000)]
    assert all(0 <= key < 2**63 for key in keys)


@pytest.mark.parametrize("hash_seed", ["1", "4242"])
def test_draws_do_not_depend_on_pythons_hash_seed(hash_seed: str) -> None:
    assert draw_in_a_process(hash_seed) == draw_in_a_process("0")


def test_seeds_purposes_and_positions_draw_independently() -> None:
    keys = {
        randomness.key(seed, purpose, position)
        for seed in range(10)
        for purpose in ("noise", "timestep", "crop")
        for position in range(100)
    }
    assert len(keys) == 10 * 3 * 100


def test_digits_cannot_wander_between_the_parts_of_a_key() -> None:
    assert randomness.key(1, "a", 11) != randomness.key(11, "a", 1)
    assert randomness.key(1, "a1", 1) != randomness.key(1, "a", 11)


def test_neighbouring_positions_share_half_of_their_bits() -> None:
    # Independent 63-bit numbers differ in 31.5 bits on average; the mean of 500 pairs has a
    # standard deviation of sqrt(63) / 2 / sqrt(500) = 0.18.
    keys = [randomness.key(0, "noise", position) for position in range(501)]
    pairs = zip(keys, keys[1:], strict=False)
    differing = [(a ^ b).bit_count() for a, b in pairs]
    assert abs(sum(differing) / len(differing) - 31.5) < 5 * 0.18


def test_a_permutation_holds_every_number_once_and_differs_between_epochs() -> None:
    first, second = (randomness.permutation(3, "order", epoch, 50) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second


def test_drawing_leaves_the_global_generator_alone() -> None:
    random.seed(5)
    expected = random.random()
    random.seed(5)
    randomness.permutation(1, "order", 0, 100)
    assert random.random() == expected
