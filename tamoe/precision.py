"""In what precision sums and products of rows are made, and when they are rounded."""

from __future__ import annotations

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32.

    >>> accumulation_dtype(torch.bfloat16)
    torch.float32
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def weigh(row_nD: torch.Tensor, weight_n: torch.Tensor) -> torch.Tensor:
    """Rows times their weights, made in the accumulation dtype and rounded to the rows' dtype."""
    wide = accumulation_dtype(row_nD.dtype)
    return (row_nD.to(wide) * weight_n.to(wide).unsqueeze(1)).to(row_nD.dtype)


def dot(a_nD: torch.Tensor, b_nD: torch.Tensor) -> torch.Tensor:
    """Dot product of each pair of rows, ``[n]`` in the accumulation dtype."""
    wide = accumulation_dtype(a_nD.dtype)
    if len(a_nD) == 1:  # torch adds up a single long row in another order, by several threads
        return dot(a_nD.expand(2, -1), b_nD.expand(2, -1))[:1]
    return (a_nD.to(wide) * b_nD.to(wide)).sum(1)
