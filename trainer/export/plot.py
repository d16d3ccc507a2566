"""The loss curve as a picture, the same bytes for the same numbers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.durable import write_bytes

_RAW, _SMOOTH, _INK, _GRID = "#a9c3e6", "#1f4e8c", "#333333", "#e4e4e4"


def write_loss_plot(path: Path, losses: Sequence[tuple[int, float]], title: str) -> None:
    """Draws every step's loss and its running mean as a PNG of 1200 x 675 pixels.

    Args:
        path: the picture.
        losses: step and loss, in order; steps with NaN leave a gap.
        title: what was trained.
    """
    # Needed at the end of a training, whose start it would hold up.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    figure = Figure(figsize=(8, 4.5), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = np.array([step for step, _ in losses], dtype=np.int64)
    values = np.array([loss for _, loss in losses], dtype=np.float64)
    reach = max(1, len(values) // 40)
    marker = "o" if len(values) < 40 else ""
    axes.plot(
        steps, values, color=_RAW, linewidth=1, marker=marker, markersize=3, label="each step"
    )
    smooth = running_mean(values, reach)
    label = f"mean of {2 * reach + 1} steps"
    axes.plot(steps, smooth, color=_SMOOTH, linewidth=2, label=label)
    axes.set_title(title, loc="left", color=_INK, fontsize=12)
    axes.set_xlabel("step", color=_INK)
    axes.set_ylabel("loss", color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=_GRID)
    axes.set_axisbelow(True)
    axes.margins(x=0.02)
    axes.tick_params(colors=_INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    write_bytes(path, picture.getvalue())


def running_mean(values: NDArray[np.float64], reach: int) -> NDArray[np.float64]:
    """The mean of each value and its neighbours on both sides; NaN is left out.

    Args:
        values: (n,).
        reach: neighbours on each side; fewer at the ends.
    """
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    places = np.arange(len(values))
    end = np.minimum(len(values), places + reach + 1)
    start = np.maximum(0, places - reach)
    number = counts[end] - counts[start]
    total = sums[end] - sums[start]
    mean: NDArray[np.float64] = np.where(number > 0, total / np.maximum(number, 1), np.nan)
    return mean
