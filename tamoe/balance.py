"""Balance and topology losses as pure functions of tensors.

Every loss here is 1 at even routing, whatever the number of ranks, experts, choices and tokens;
:func:`tamoe.functional.convention_factor` gives the scale of other systems. Gradients flow through
the probabilities only. Shape suffixes: T tokens, K choices, N experts of the whole group, L layers,
B sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tamoe.groups import process_group
from tamoe.loss_totals import check_shapes, expert_counts, totals, widened
from tamoe.topology.errors import InputError

if TYPE_CHECKING:
    from tamoe.groups import Group


def topology_loss(
    probs_TN: torch.Tensor,
    expert_index_TK: torch.Tensor,
    penalty_N: torch.Tensor,
    mask_T: torch.Tensor | None = None,
    counts_N: torch.Tensor | None = None,
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
    counts_N
        ``[N]``: :func:`expert_counts` of these choices and mask, where they are counted already.

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
    num_experts = check_shapes(probs_TN, expert_index_TK, penalty_N, mask_T, counts_N)
    mass_N, counts_N, tokens = totals(probs_TN, expert_index_TK, mask_T, counts_N)
    weight_N = penalty_N.detach().to(mass_N.dtype)
    weight_N = weight_N / weight_N.mean()
    top_k = max(expert_index_TK.shape[1], 1)
    share_N = counts_N / (top_k * tokens)
    return num_experts * (weight_N * (mass_N / tokens) * share_N).sum()


def balance_loss(
    probs_TN: torch.Tensor,
    expert_index_TK: torch.Tensor,
    mask_T: torch.Tensor | None = None,
    counts_N: torch.Tensor | None = None,
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
    return topology_loss(probs_TN, expert_index_TK, ones_N, mask_T, counts_N)


def group_balance_loss(
    probs_TN: torch.Tensor,
    expert_index_TK: torch.Tensor,
    group: Group = None,
    mask_T: torch.Tensor | None = None,
    counts_N: torch.Tensor | None = None,
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
    probs_TN, expert_index_TK, mask_T, counts_N
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
    num_experts = check_shapes(probs_TN, expert_index_TK, None, mask_T, counts_N)
    mass_N, counts_N, tokens = totals(probs_TN, expert_index_TK, mask_T, counts_N, least=0)
    total = group_sum(torch.cat([mass_N, counts_N, tokens.reshape(1)]), group)
    mass_N, counts_N, tokens = total.split([num_experts, num_experts, 1])
    tokens = tokens.detach().clamp_min(1)
    top_k = max(expert_index_TK.shape[1], 1)
    return num_experts * ((mass_N / tokens) * (counts_N.detach() / (top_k * tokens))).sum()


def group_sum(value: torch.Tensor, group: Group = None) -> torch.Tensor:
    """Sum over the ranks of a group, with the gradient of the sum of the ranks' equal losses.

    Collective forward, not backward. *Averaging* gradients over the group gives the gradient of a
    loss of this sum.

    >>> group_sum(torch.tensor([1.0, 2.0])).tolist()
    [1.0, 2.0]
    """
    resolved = process_group(group)
    if resolved is None:
        return value
    total = value.detach().clone()
    torch.distributed.all_reduce(total, group=resolved)
    # The gradient is the own part's, times the number of equal losses.
    return total + torch.distributed.get_world_size(resolved) * (value - value.detach())


def pooled_balance_loss(
    probs_LTN: Sequence[torch.Tensor],
    expert_index_LTK: Sequence[torch.Tensor],
    mask_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """The balance loss of all layers' tokens together, as Transformers has it, but 1 when even.

    Opposite imbalances of two layers cancel in it; the mean of :func:`balance_loss` over layers
    sees them. Times k it equals Transformers' ``load_balancing_loss_func``.

    Parameters
    ----------
    probs_LTN, expert_index_LTK
        Probabilities and choices of each layer, as :func:`topology_loss` takes them.
    mask_T
        ``[T]``, the same for every layer.

    Returns
    -------
    torch.Tensor
        Scalar.

    Raises
    ------
    InputError
        There is no layer, or their numbers differ.

    Examples
    --------
    >>> probs_LTN = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    >>> index_LTK = [torch.tensor([[0]]), torch.tensor([[1]])]
    >>> pooled_balance_loss(probs_LTN, index_LTK).item()  # each layer alone: 2
    1.0
    """
    if not probs_LTN or len(probs_LTN) != len(expert_index_LTK):
        raise InputError(
            f"probs_LTN has {len(probs_LTN)} layers and expert_index_LTK "
            f"{len(expert_index_LTK)}; allowed: as many, one or more"
        )
    mask = None if mask_T is None else mask_T.repeat(len(probs_LTN))
    return balance_loss(torch.cat(list(probs_LTN)), torch.cat(list(expert_index_LTK)), mask)


def sequence_balance_loss(
    probs_TN: torch.Tensor,
    expert_index_TK: torch.Tensor,
    num_sequences: int,
    mask_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """The balance loss of each sequence by itself, averaged (DeepSeek-V2 and -V3).

    Parameters
    ----------
    probs_TN, expert_index_TK, mask_T
        As for :func:`topology_loss`; the tokens of a sequence follow each other.
    num_sequences
        B, >= 1, divides T. A sequence of which no token is left counts as 0.

    Returns
    -------
    torch.Tensor
        Scalar, 1 where every sequence is even.

    Raises
    ------
    InputError
        Shapes do not fit together.

    Examples
    --------
    >>> probs_TN, index_TK = torch.eye(2), torch.tensor([[0], [1]])
    >>> balance_loss(probs_TN, index_TK).item(), sequence_balance_loss(probs_TN, index_TK, 2).item()
    (1.0, 2.0)
    """
    num_experts = check_shapes(probs_TN, expert_index_TK, None, mask_T)
    tokens, top_k = expert_index_TK.shape
    if num_sequences < 1 or tokens % num_sequences:
        raise InputError(
            f"num_sequences is {num_sequences}; allowed: 1 or more that divide the {tokens} tokens"
        )
    wide_TN, keep_T = widened(probs_TN, mask_T)
    length = tokens // num_sequences
    mass_BN = wide_TN.reshape(num_sequences, length, num_experts).sum(1)
    left_B1 = keep_T.reshape(num_sequences, length, 1).sum(1).clamp_min(1).to(wide_TN.dtype)
    # Every sequence has experts of its own, so that one count serves all of them.
    sequence_T1 = torch.arange(num_sequences, device=probs_TN.device).repeat_interleave(length)[
        :, None
    ]
    apart_TK = torch.where(expert_index_TK < 0, -1, expert_index_TK + num_experts * sequence_T1)
    counts = expert_counts(apart_TK, num_sequences * num_experts, keep_T).to(wide_TN.dtype)
    share_BN = counts.reshape(num_sequences, num_experts) / (max(top_k, 1) * left_B1)
    return num_experts * (mass_BN / left_B1 * share_BN).sum(1).mean()
