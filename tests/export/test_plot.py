"""The loss plot: a picture with both curves, the same bytes every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.export.plot import running_mean, write_loss_plot

LOSSES = [(step, 0.1 + 0.05 / step) for step in range(1, 61)]


def test_the_plot_is_a_picture_with_two_curves(tmp_path: Path) -> None:
    write_loss_plot(tmp_path / "loss.png", LOSSES, "astronaut")

    picture = Image.open(tmp_path / "loss.png").convert("RGB")
    colours = {colour for _, colour in picture.getcolors(1 << 24)}
    assert picture.size == (1200, 675)
    assert {(0xA9, 0xC3, 0xE6), (0x1F, 0x4E, 0x8C)} <= colours


def test_the_same_losses_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first.png", "second.png"):
        write_loss_plot(tmp_path / name, LOSSES, "astronaut")

    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()
    assert b"matplotlib" not in (tmp_path / "first.png").read_bytes().lower()


@pytest.mark.parametrize("losses", [[], [(1, 0.5)], [(1, float("nan")), (2, 0.5)]])
def test_runs_of_any_length_are_drawn(losses: list[tuple[int, float]], tmp_path: Path) -> None:
    write_loss_plot(tmp_path / "loss.png", losses, "astronaut")

    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_the_running_mean_takes_neighbours_on_both_sides_and_leaves_out_nan() -> None:
    values = np.array([1.0, 2.0, np.nan, 4.0, 6.0])

    # By hand: (1+2)/2, (1+2)/2, (2+4)/2, (4+6)/2, (4+6)/2.
    assert running_mean(values, 1).tolist() == [1.5, 1.5, 3.0, 5.0, 5.0]
