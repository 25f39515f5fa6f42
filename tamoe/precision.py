"""In what precision sums and products of rows are made, and when they are rounded."""

from __future__ import annotations

import torch

from tamoe.pieces import pieces


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32.

    >>> accumulation_dtype(torch.bfloat16)
    torch.float32
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def weigh(row_nD: torch.Tensor, weight_n: torch.Tensor) -> torch.Tensor:
    """Rows times their weights, made in the accumulation dtype and rounded to the rows' dtype."""
    wide = accumulation_dtype(row_nD.dtype)
    out_nD, weight_n1 = torch.empty_like(row_nD), weight_n.to(wide).unsqueeze(1)
    for piece in pieces(row_nD):
        out_nD[piece] = row_nD[piece].to(wide) * weight_n1[piece]
    return out_nD


def dot(a_nD: torch.Tensor, b_nD: torch.Tensor) -> torch.Tensor:
    """Dot product of each pair of rows, ``[n]`` in the accumulation dtype."""
    wide = accumulation_dtype(a_nD.dtype)
    out_n = a_nD.new_empty(len(a_nD), dtype=wide)
    for piece in pieces(a_nD):
        product_mD = a_nD[piece].to(wide) * b_nD[piece]
        if len(product_mD) == 1:  # torch adds up a single long row in another order, by threads
            product_mD = product_mD.repeat(2, 1)
        out_n[piece] = product_mD.sum(1)[: piece.stop - piece.start]
    return out_n
