"""All rows of the matrix, in the order of the sections."""

from __future__ import annotations

from collections.abc import Mapping

from options.matrix import Observable, Row
from options.rows_adapter import ADAPTER
from options.rows_captions import CAPTION
from options.rows_data import DATA
from options.rows_faces import FACE
from options.rows_loss import LOSS
from options.rows_masks import MASK
from options.rows_model import MODEL
from options.rows_optim import OPTIM
from options.rows_output import OUTPUT
from options.rows_refusals import NOT_TAKEN
from options.rows_running import RUN
from options.rows_tokens import PRIORS, TOKEN
from options.rows_windows import WINDOWS

ROWS: tuple[Row, ...] = (
    *MODEL,
    *DATA,
    *WINDOWS,
    *MASK,
    *FACE,
    *CAPTION,
    *TOKEN,
    *ADAPTER,
    *PRIORS,
    *LOSS,
    *OPTIM,
    *RUN,
    *OUTPUT,
    *NOT_TAKEN,
)


def observables() -> Mapping[str, tuple[Observable, ...]]:
    """For every leaf with a row, where its effect is seen, each place once."""
    found: dict[str, dict[Observable, None]] = {}
    for row in ROWS:
        found.setdefault(row.leaf, {}).update(dict.fromkeys(row.acts_on))
    return {leaf: tuple(places) for leaf, places in found.items()}
