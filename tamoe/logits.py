"""Logits of a router, and which experts they put first.

Shape suffixes: T tokens, D hidden size, K choices, N experts of the whole group.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch.nn import functional as F


def best_experts(score_TN: torch.Tensor, top_k: int) -> torch.Tensor:
    """The experts of the k highest scores, ``[T, K]``; of equal scores the lower expert's.

    >>> best_experts(torch.tensor([[1.0, 3.0, 3.0]]), 2).tolist()
    [[1, 2]]
    """
    # A stable sort, not topk: equal logits go to the lower expert on every device.
    return score_TN.sort(dim=1, descending=True, stable=True).indices[:, :top_k]


def wide_linear(x_TD: torch.Tensor, weight_ND: torch.Tensor) -> torch.Tensor:
    """Products of tokens and experts' vectors, ``[T, N]`` in float32 or wider.

    Narrow types round logits enough to flip choices (Switch Transformer, section 2.4).

    >>> wide_linear(torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(3, 4)).dtype
    torch.float32
    """
    dtype = torch.promote_types(torch.promote_types(x_TD.dtype, weight_ND.dtype), torch.float32)
    device = x_TD.device.type
    # meta, where shapes are traced, knows no autocast.
    with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
        return F.linear(x_TD.to(dtype), weight_ND.to(dtype))
