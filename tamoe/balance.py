"""Auxiliary losses as pure functions of tensors.

Every loss here is 1 at even routing, whatever the number of ranks, experts, choices and tokens;
:func:`convention_factor` gives the scale of other systems. Gradients flow through the
probabilities only. Shape suffixes: T tokens, K choices, N experts of the whole group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tamoe.groups import process_group
from tamoe.topology.errors import InputError

if TYPE_CHECKING:
    from tamoe.groups import Group

CONVENTIONS = ("tamoe", "deepspeed", "transformers", "fastmoe")


def expert_counts(
    expert_index_TK: torch.Tensor, num_experts: int, mask_T: torch.Tensor | None = None
) -> torch.Tensor:
    """How many choices each expert got, over all K choices.

    Parameters
    ----------
    expert_index_TK
        ``[T, K]`` integers, 0 to ``num_experts`` - 1; -1 is not counted.
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
    if mask_T is not None:
        expert_index_TK = torch.where(mask_T.bool().unsqueeze(1), expert_index_TK, -1)
    flat = expert_index_TK.reshape(-1).long() + 1  # slot 0 takes the dropped choices
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device)
    return counts.scatter_add(0, flat, torch.ones_like(flat))[1:]


def topology_loss(
    probs_TN: torch.Tensor,
    expert_index_TK: torch.Tensor,
    penalty_N: torch.Tensor,
    mask_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """The topology loss of one rank: ``N · Σ_e w_e · m_e · c_e / (k·S)``.

    w is the penalty scaled to mean 1, m_e the mean probability of expert e, c_e the number of
    choices of e over all k choices, S the number of tokens. The loss is 1 at even routing. With
    ``w ∝ 1/ĉ`` its fixed point is the target ĉ, and its value there is HM(ĉ)/AM(ĉ) <= 1.

    Pass the choices that the gate made *before* capacity or random drops: the loss steers what the
    gate wants. A choice of -1 counts for no expert and stays in the denominator k·S, so drops
    lower the value, never the gradient of the experts that are left.

    Parameters
    ----------
    probs_TN
        ``[T, N]``, probabilities of the gate, rows sum to 1. The only differentiable input.
    expert_index_TK
        ``[T, K]`` integers, 0 to N - 1, or -1.
    penalty_N
        ``[N]``, > 0, any scale: a row of ``Plan.penalty_N``.
    mask_T
        ``[T]``; tokens where it is 0 (padding) are left out. None keeps all.

    Returns
    -------
    torch.Tensor
        Scalar, float32 or wider; 0 where no token is left. Multiply by the weight of the loss.

    Raises
    ------
    InputError
        Shapes do not fit together.

    Notes
    -----
    TA-MoE (NeurIPS 2022), topology-aware auxiliary loss, in the scale of GShard's loss divided
    by k. Runs under ``torch.compile(fullgraph=True)`` and never waits for the device.

    Examples
    --------
    >>> probs_TN = torch.full((4, 4), 0.25)
    >>> index_TK = torch.tensor([[0], [1], [2], [3]])
    >>> topology_loss(probs_TN, index_TK, torch.tensor([1.0, 1.0, 5.0, 5.0])).item()
    1.0
    """
    num_experts = _check_shapes(probs_TN, expert_index_TK, penalty_N, mask_T)
    mass_N, counts_N, tokens = _totals(probs_TN, expert_index_TK, mask_T)
    weight_N = penalty_N.detach().to(mass_N.dtype)
    weight_N = weight_N / weight_N.mean()
    top_k = max(expert_index_TK.shape[1], 1)
    share_N = counts_N / (top_k * tokens)
    return num_experts * (weight_N * (mass_N / tokens) * share_N).sum()


def balance_loss(
    probs_TN: torch.Tensor, expert_index_TK: torch.Tensor, mask_T: torch.Tensor | None = None
) -> torch.Tensor:
    """The balance loss of GShard and Switch on one rank: :func:`topology_loss` without penalty.

    Parameters, result and errors are those of :func:`topology_loss`.

    Examples
    --------
    >>> probs_TN = torch.tensor([[0.75, 0.25], [0.75, 0.25]])
    >>> balance_loss(probs_TN, torch.tensor([[0], [0]])).item()
    1.5
    """
    ones_N = torch.ones(probs_TN.shape[-1], device=probs_TN.device)
    return topology_loss(probs_TN, expert_index_TK, ones_N, mask_T)


def group_balance_loss(
    probs_TN: torch.Tensor,
    expert_index_TK: torch.Tensor,
    group: Group = None,
    mask_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """The balance loss on counts and probabilities averaged over all ranks of a group.

    Use it beside a :class:`~tamoe.TopologyBias`: there every rank is uneven on purpose, and a
    balance loss of one rank's own numbers would fight the bias. Tokens count equally, also where
    ranks hold different numbers of them.

    Collective: every rank of the group calls it. One all-reduce forward, none backward. The
    gradient is that of the sum of the ranks' losses, so that *averaging* gradients over the group,
    as for any dense parameter, gives the gradient of the loss itself.

    Parameters
    ----------
    probs_TN, expert_index_TK, mask_T
        As for :func:`topology_loss`.
    group
        ProcessGroup, 1-D DeviceMesh or None for the default group. Without torch.distributed this
        is :func:`balance_loss`.

    Returns
    -------
    torch.Tensor
        Scalar, equal on all ranks.

    Examples
    --------
    >>> group_balance_loss(torch.full((2, 2), 0.5), torch.tensor([[0], [1]])).item()
    1.0
    """
    num_experts = _check_shapes(probs_TN, expert_index_TK, None, mask_T)
    mass_N, counts_N, tokens = _totals(probs_TN, expert_index_TK, mask_T, least=0)
    size, total = 1, torch.cat([mass_N.detach(), counts_N, tokens.reshape(1)])
    resolved = process_group(group)
    if resolved is not None:
        size = torch.distributed.get_world_size(resolved)
        torch.distributed.all_reduce(total, group=resolved)
    all_mass_N, all_counts_N, all_tokens = total.split([num_experts, num_experts, 1])
    all_tokens = all_tokens.clamp_min(1)
    # The value is the group's; the gradient is the own part's, times the number of equal losses.
    mass_N = all_mass_N + size * (mass_N - mass_N.detach())
    top_k = max(expert_index_TK.shape[1], 1)
    return num_experts * ((mass_N / all_tokens) * (all_counts_N / (top_k * all_tokens))).sum()


def convention_factor(convention: str, *, top_k: int, num_ranks: int = 1) -> float:
    """What a loss of this module is multiplied by to stand in another system's scale.

    Parameters
    ----------
    convention
        - ``"tamoe"``: 1 at even routing.
        - ``"deepspeed"``: ``topkgating``, which divides by k, so 1 at even routing as well. Its
          top-1 and top-2 gates count first choices only: pass ``expert_index_TK[:, :1]``.
        - ``"transformers"``: ``load_balancing_loss_func`` sums over the k slots: k at even
          routing. It pools all layers; the factor holds for one layer.
        - ``"fastmoe"``: GShardGate squares the experts *of one worker*: 1/W² at even routing under
          W workers. It counts first choices only: pass ``expert_index_TK[:, :1]``.
    top_k
        k, >= 1.
    num_ranks
        W, ranks of the expert-parallel group, >= 1. Only ``"fastmoe"`` depends on it.

    Returns
    -------
    float
        theirs / ours. To reproduce a published weight, use ours times weight times this.

    Raises
    ------
    InputError
        The convention is unknown or a number is below 1.

    Examples
    --------
    >>> convention_factor("transformers", top_k=2)
    2.0
    >>> convention_factor("fastmoe", top_k=2, num_ranks=8)
    0.015625
    """
    if convention not in CONVENTIONS:
        raise InputError(
            f"convention is {convention!r}; allowed: {', '.join(map(repr, CONVENTIONS))}"
        )
    for name, value in (("top_k", top_k), ("num_ranks", num_ranks)):
        if value < 1:
            raise InputError(f"{name} is {value}; allowed: >= 1")
    if convention == "transformers":
        return float(top_k)
    return 1.0 / num_ranks**2 if convention == "fastmoe" else 1.0


def _totals(
    probs_TN: torch.Tensor,
    expert_index_TK: torch.Tensor,
    mask_T: torch.Tensor | None,
    least: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Summed probabilities, counts and number of tokens (not below ``least``), in one dtype."""
    probs_TN = probs_TN.to(torch.promote_types(probs_TN.dtype, torch.float32))
    tokens = torch.full((), len(probs_TN), dtype=probs_TN.dtype, device=probs_TN.device)
    if mask_T is not None:
        keep_T = mask_T.bool()
        # where, not a product: padding may hold NaN, and NaN · 0 is NaN.
        probs_TN = torch.where(keep_T.unsqueeze(1), probs_TN, 0.0)
        tokens = keep_T.sum().to(probs_TN.dtype)
    counts_N = expert_counts(expert_index_TK, probs_TN.shape[1], mask_T).to(probs_TN.dtype)
    return probs_TN.sum(0), counts_N, tokens.clamp_min(least)


def _check_shapes(
    probs_TN: torch.Tensor,
    expert_index_TK: torch.Tensor,
    penalty_N: torch.Tensor | None,
    mask_T: torch.Tensor | None,
) -> int:
    if probs_TN.ndim != 2 or expert_index_TK.ndim != 2 or len(probs_TN) != len(expert_index_TK):
        raise InputError(
            f"probs_TN is {tuple(probs_TN.shape)} and expert_index_TK "
            f"{tuple(expert_index_TK.shape)}; allowed: (tokens, experts) and (tokens, choices)"
        )
    if penalty_N is not None and penalty_N.shape != probs_TN.shape[1:]:
        raise InputError(
            f"penalty_N is {tuple(penalty_N.shape)} and probs_TN has {probs_TN.shape[1]} experts; "
            f"allowed: one number an expert"
        )
    if mask_T is not None and mask_T.shape != probs_TN.shape[:1]:
        raise InputError(
            f"mask_T is {tuple(mask_T.shape)} and probs_TN has {len(probs_TN)} tokens; "
            f"allowed: one number a token"
        )
    return probs_TN.shape[1]
