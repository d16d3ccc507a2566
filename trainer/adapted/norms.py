"""DoRA's row norms |W + s B A| without ever making W + s B A.

|W + s B A|² = |W|² + 2 s ⟨W Aᵀ, B⟩ + s² ⟨B (A Aᵀ), B⟩, row by row: |W|² does not change, and all
else is of the adapter's size. Several layers of one shape are computed together.
"""

from __future__ import annotations

import torch


def squared_rows(weight: torch.Tensor) -> torch.Tensor:
    """|W|² of each row (out,) in 32 bits, of a weight (out, in, …)."""
    rows = weight.flatten(1)
    norms: torch.Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
    return norms.square()


def row_norms(
    squares: torch.Tensor,
    products: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """|W + s B A| (n, out) of n layers of one shape, in 32 bits.

    Args:
        squares: |W|² (n, out), in 32 bits.
        products: W Aᵀ (n, out, r), in the number format of the factors.
        down: A (n, r, in and window), in the number format in which layers multiply by it; what
            rounding changes of |W|² is as much less than it as the adapter is less than W.
        up: B (n, out, r), likewise.
        scale: s.
    """
    with torch.autocast(squares.device.type, enabled=False):
        gram = torch.bmm(down, down.transpose(1, 2))
        # ⟨2 W Aᵀ + s B (A Aᵀ), B⟩
        mixed = torch.baddbmm(products, up, gram, beta=2, alpha=scale)
    sums = (mixed * up).sum(-1, dtype=torch.float32)
    summed = torch.addcmul(squares, sums, squares.new_full((), scale))
    # Rounding may leave less than nothing of a row that the adapter cancels.
    return summed.clamp_(min=torch.finfo(torch.float32).tiny).sqrt_()
