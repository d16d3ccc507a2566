"""DoRA's row norms |W + s B A| without ever making W + s B A.

|W + s B A|² = |W|² + 2 s ⟨W Aᵀ, B⟩ + s² ⟨B (A Aᵀ), B⟩, row by row: |W|² does not change, and all
else is of the adapter's size. Several layers of one shape are computed together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def squared_rows(weight: torch.Tensor) -> torch.Tensor:
    """|W|² of each row (out,) in 32 bits, of a weight (out, in, …)."""
    rows = weight.flatten(1)
    norms: torch.Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
    return norms.square()


def row_norms(
    squares: torch.Tensor,
    products: torch.Tensor,
    downs: Sequence[torch.Tensor],
    ups: Sequence[torch.Tensor],
    scale: float,
) -> torch.Tensor:
    """|W + s B A| (n, out) of n layers of one shape, in 32 bits also where autocast asks for less.

    Args:
        squares: |W|² (n, out).
        products: W Aᵀ (n, out, r) in any number format.
        downs: A (r, in, …) of each.
        ups: B (out, r, …) of each.
        scale: s.
    """
    down = torch.stack([each.flatten(1) for each in downs])
    up = torch.stack([each.flatten(1) for each in ups])
    with torch.autocast(squares.device.type, enabled=False):
        gram = torch.bmm(down, down.transpose(1, 2))
        # ⟨2 W Aᵀ + s B (A Aᵀ), B⟩
        mixed = torch.baddbmm(products.float(), up, gram, beta=2, alpha=scale)
    summed = torch.addcmul(squares, (mixed * up).sum(-1), squares.new_full((), scale))
    # Rounding may leave less than nothing of a row that the adapter cancels.
    return summed.clamp_(min=torch.finfo(torch.float32).tiny).sqrt_()
