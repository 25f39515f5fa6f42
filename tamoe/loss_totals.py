"""What auxiliary losses count and sum over the tokens of a batch.

Shape suffixes: T tokens, K choices, N experts of the whole group.
"""

from __future__ import annotations

import torch

from tamoe.topology.errors import InputError


def expert_counts(
    expert_index_TK: torch.Tensor, num_experts: int, mask_T: torch.Tensor | None = None
) -> torch.Tensor:
    """How many choices each expert got, over all K choices.

    Parameters
    ----------
    expert_index_TK
        ``[T, K]`` integers, 0 to ``num_experts`` - 1; -1 is not counted. Checked on the CPU.
    num_experts
        N.
    mask_T
        ``[T]``; tokens where it is 0 are not counted. None counts all.

    Returns
    -------
    torch.Tensor
        ``[N]`` int64, the same on every run: integer sums do not depend on their order.

    Examples
    --------
    >>> expert_counts(torch.tensor([[0, 1], [2, -1]]), 4)
    tensor([1, 1, 1, 0])
    """
    if expert_index_TK.is_floating_point():
        raise InputError(f"expert_index_TK is {expert_index_TK.dtype}; allowed: integers")
    if mask_T is not None:
        expert_index_TK = torch.where(mask_T.bool().unsqueeze(1), expert_index_TK, -1)
    flat = expert_index_TK.reshape(-1).long() + 1  # slot 0 takes the dropped choices
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device)
    if torch.compiler.is_compiling():
        return counts.scatter_add(0, flat, torch.ones_like(flat))[1:]
    try:
        return counts.scatter_add(0, flat, torch.ones_like(flat))[1:]
    except RuntimeError as error:
        if "out of bounds" not in str(error):
            raise
        low, high = int(flat.min()) - 1, int(flat.max()) - 1
        raise InputError(
            f"expert_index_TK has numbers from {low} to {high}; allowed: 0 to {num_experts - 1}, "
            f"and -1 for none"
        ) from None


def totals(
    probs_TN: torch.Tensor,
    expert_index_TK: torch.Tensor,
    mask_T: torch.Tensor | None,
    counts_N: torch.Tensor | None = None,
    least: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Summed probabilities, counts and number of tokens (not below ``least``), in one dtype."""
    probs_TN, keep_T = widened(probs_TN, mask_T)
    tokens = keep_T.sum().to(probs_TN.dtype)
    if counts_N is None:
        counts_N = expert_counts(expert_index_TK, probs_TN.shape[1], mask_T)
    return probs_TN.sum(0), counts_N.detach().to(probs_TN.dtype), tokens.clamp_min(least)


def widened(
    values_TN: torch.Tensor, mask_T: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The values in float32 or wider, 0 for tokens that are left out; and which are kept."""
    values_TN = values_TN.to(torch.promote_types(values_TN.dtype, torch.float32))
    if mask_T is None:
        return values_TN, torch.ones(len(values_TN), dtype=torch.bool, device=values_TN.device)
    keep_T = mask_T.bool()
    # where, not a product: padding may hold NaN, and NaN · 0 is NaN.
    return torch.where(keep_T.unsqueeze(1), values_TN, 0.0), keep_T


def check_shapes(
    probs_TN: torch.Tensor,
    expert_index_TK: torch.Tensor,
    penalty_N: torch.Tensor | None,
    mask_T: torch.Tensor | None,
    counts_N: torch.Tensor | None = None,
) -> int:
    """Number of experts N, where the shapes fit together; :class:`InputError` where not."""
    if probs_TN.ndim != 2 or expert_index_TK.ndim != 2 or len(probs_TN) != len(expert_index_TK):
        raise InputError(
            f"probs_TN is {tuple(probs_TN.shape)} and expert_index_TK "
            f"{tuple(expert_index_TK.shape)}; allowed: (tokens, experts) and (tokens, choices)"
        )
    for name, row_N in (("penalty_N", penalty_N), ("counts_N", counts_N)):
        if row_N is not None and row_N.shape != probs_TN.shape[1:]:
            raise InputError(
                f"{name} is {tuple(row_N.shape)} and probs_TN has {probs_TN.shape[1]} experts; "
                f"allowed: one number an expert"
            )
    if mask_T is not None and mask_T.shape != probs_TN.shape[:1]:
        raise InputError(
            f"mask_T is {tuple(mask_T.shape)} and probs_TN has {len(probs_TN)} tokens; "
            f"allowed: one number a token"
        )
    return probs_TN.shape[1]
