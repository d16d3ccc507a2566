"""Memory between steps on a processor: kept for the next one, and given back at the end."""

from __future__ import annotations

import resource
from pathlib import Path
from unittest.mock import Mock, call

import pytest
import torch

from trainer import heap

PIECE, PIECES = 8 * 2**20, 16
PAGES = PIECE * PIECES // resource.getpagesize()

ONLY_OF_GLIBC = pytest.mark.skipif(heap._library() is None, reason="another C library")


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in heap._GIVEN:
        monkeypatch.delenv(name, raising=False)


def take_a_step() -> int:
    """How many pages the system handed out for it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.zeros(PIECE // 4) for _ in range(PIECES)]
    del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@ONLY_OF_GLIBC
def test_a_later_step_takes_what_earlier_ones_gave_back() -> None:
    with heap.kept(True):
        # Where its pieces lie is settled by the first ones.
        for _ in range(3):
            take_a_step()
        assert take_a_step() < PAGES / 20


@ONLY_OF_GLIBC
def test_at_the_end_what_is_kept_is_given_back() -> None:
    with heap.kept(True):
        take_a_step()
        inside = resident_bytes()
    assert resident_bytes() < inside - PIECE * PIECES / 2


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Mock:
    asked = Mock()
    monkeypatch.setattr("ctypes.CDLL", lambda _: asked)
    return asked


def test_the_c_library_is_asked_where_a_processor_computes(library: Mock) -> None:
    with heap.kept(False):
        assert not library.mock_calls
    with heap.kept(True):
        # As malloc.h has them: no free end of the heap is too large.
        assert call(-1, -1) in library.mallopt.mock_calls
        assert not library.malloc_trim.called
    assert library.malloc_trim.called


@pytest.mark.parametrize("name", heap._GIVEN)
def test_what_the_user_set_stays(name: str, library: Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    with heap.kept(True):
        pass
    assert not library.mock_calls


def test_another_c_library_is_left_alone(library: Mock) -> None:
    del library.gnu_get_libc_version
    with heap.kept(True):
        pass
    assert not library.mock_calls
