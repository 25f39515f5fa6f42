"""The one order in which every exchange adds up a token's expert outputs.

Floating-point sums depend on their order, so the order is part of the contract: first inside each
node by rank and expert number, then over nodes, then over each upper level of switches. Every
partial sum is made in the accumulation dtype, starts with its first term and is rounded to the wire
dtype, as it would be if it crossed the link. An exchange that sends every row and one that sends
partial sums then agree bit for bit.

Shape suffixes: n rows sent, m partial sums, T tokens, K choices, G groups, L levels, D hidden size,
P ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tamoe.host_table import table_on
from tamoe.ops import combine, copy_rows_
from tamoe.precision import weigh

# Sums of the first stage made at a time where there are several: many enough to hide the calls for
# each, few enough to take little memory.
LEAST_PIECE_BYTES, MOST_PIECE_BYTES = 2**20, 2**21
PIECES_ON = ("cpu",)  # cutting sums reads their offsets, which would wait for a GPU


@dataclass(frozen=True, eq=False)
class Stage:
    """Adds rows up to partial sums: terms ``offset_m1[m]`` to ``offset_m1[m + 1] - 1`` of each.

    ``index_n`` is the row of each term; ``first_m`` the row that starts each sum.
    """

    offset_m1: torch.Tensor
    index_n: torch.Tensor
    first_m: torch.Tensor


@dataclass(frozen=True, eq=False)
class SumPlan:
    """Stages from rows sent to one sum per token; ``token_m`` is the token of each last sum."""

    stages: tuple[Stage, ...]
    token_m: torch.Tensor
    num_tokens: int


def plan_sum(
    token_n: torch.Tensor,
    rank_n: torch.Tensor,
    num_tokens: int,
    groups: Sequence[Sequence[int]],
    num_sums: Sequence[int] | None = None,
) -> SumPlan:
    """Stages that add up rows sorted by expert.

    Parameters
    ----------
    token_n, rank_n
        Token of each row, and the rank that hosts its expert. Rows are in expert order.
    num_tokens
        Tokens T; those without a row sum to zero.
    groups
        Group of each rank at each level, from :func:`tamoe.solver.relays.sum_groups`.
    num_sums
        From :func:`count_sums`; None: counted here, which waits for the device.

    Examples
    --------
    >>> plan = plan_sum(torch.tensor([1, 0, 1]), torch.tensor([0, 1, 1]), 3, ())
    >>> add_up(torch.tensor([[1.0], [10.0], [100.0]]), plan).flatten().tolist()
    [10.0, 101.0, 0.0]
    """
    num_ranks = 1 + max((max(group) for group in groups), default=0)
    stages: list[Stage] = []
    lower_n = torch.zeros_like(rank_n)
    for level, group in enumerate((*groups, None)):
        if group is None:
            upper_n = torch.zeros_like(rank_n)
        else:
            upper_n = table_on(rank_n.device, group)[rank_n]
        made = None if num_sums is None else num_sums[level]
        if made != len(token_n):
            stage = plan_stage(token_n * num_ranks + upper_n, lower_n, num_ranks, made)
            made = len(stage.first_m)
        if made < len(token_n):
            stages.append(stage)
            token_n, rank_n, upper_n = (v[stage.first_m] for v in (token_n, rank_n, upper_n))
        lower_n = upper_n
    return SumPlan(tuple(stages), token_n, num_tokens)


def reorder(plan: SumPlan, order_n: torch.Tensor) -> SumPlan:
    """The same sums of rows that lie in another order, of which ``order_n`` are the old places.

    >>> plan = plan_sum(torch.tensor([1, 0, 1]), torch.tensor([0, 1, 1]), 2, ())
    >>> rows = torch.tensor([[100.0], [1.0], [10.0]])
    >>> add_up(rows, reorder(plan, torch.tensor([2, 0, 1]))).flatten().tolist()
    [10.0, 101.0]
    """
    if not plan.stages:
        return replace(plan, token_m=plan.token_m[order_n])
    place_n = torch.empty_like(order_n)
    place_n[order_n] = torch.arange(len(order_n), device=order_n.device)
    first = plan.stages[0]
    first = replace(first, index_n=place_n[first.index_n], first_m=place_n[first.first_m])
    return replace(plan, stages=(first, *plan.stages[1:]))


def count_sums(
    slot_TK: torch.Tensor, slots_per_rank: int, num_ranks: int, groups: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Sums that each level makes of a token's rows, then tokens that have a row, ``[L + 1]``.

    Parameters
    ----------
    slot_TK
        Slot of each choice, one past all where it was dropped.
    slots_per_rank, num_ranks
        Slots of each rank, and ranks.
    groups
        Group of each rank at each level.

    Examples
    --------
    Token 0 goes to both ranks of group 0, which makes one sum of its rows.

    >>> count_sums(torch.tensor([[0, 1], [2, 0], [3, 3]]), 1, 3, [[0, 0, 1]]).tolist()
    [3, 2]
    """
    counts = []
    for group in groups:
        num_groups = 1 + max(group)
        table = [number for number in group for _ in range(slots_per_rank)]
        group_of_slot = table_on(slot_TK.device, [*table, num_groups])
        group_TK = group_of_slot.index_select(0, slot_TK.flatten()).view_as(slot_TK)
        touch_TG = group_TK.new_zeros(len(slot_TK), num_groups + 1, dtype=torch.bool)
        counts.append(touch_TG.scatter_(1, group_TK, True)[:, :num_groups].sum())
    return torch.stack([*counts, (slot_TK < slots_per_rank * num_ranks).any(1).sum()])


def plan_stage(
    sum_n: torch.Tensor, lower_n: torch.Tensor, num_lower: int, num_sums: int | None
) -> Stage:
    """Add up rows of equal ``sum_n``, in order of ``lower_n``, then as given; sums are ascending.

    Parameters
    ----------
    sum_n
        Number of the sum that each row belongs to, >= 0.
    lower_n
        Group of each row one level below, 0 to ``num_lower`` - 1.
    num_lower
        Number of those groups.
    num_sums
        Number of different sums; None: counted here, which waits for the device.

    Examples
    --------
    >>> stage = plan_stage(torch.tensor([1, 0, 1]), torch.tensor([1, 0, 0]), 2, 2)
    >>> add_stage(torch.tensor([[1.0], [10.0], [100.0]]), stage).flatten().tolist()
    [10.0, 101.0]
    """
    order_n = torch.argsort(sum_n * num_lower + lower_n, stable=True)
    sorted_n = sum_n[order_n]
    starts_n = torch.ones_like(sorted_n, dtype=torch.bool)
    starts_n[1:] = sorted_n[1:] != sorted_n[:-1]
    if num_sums is None:
        num_sums = int(starts_n.sum())
    # nonzero() would wait for the device. Each row that starts a sum tells its place; the others
    # write behind all sums, where the number of rows comes at last.
    sum_n = torch.where(starts_n, starts_n.cumsum(0) - 1, num_sums)
    offset_m1 = sum_n.new_empty(num_sums + 1)
    offset_m1.scatter_(0, sum_n, torch.arange(len(sum_n), device=sum_n.device))
    offset_m1[num_sums:].fill_(len(sum_n))
    return Stage(offset_m1, order_n, order_n[offset_m1[:-1]])


def add_up(
    row_nD: torch.Tensor, plan: SumPlan, weight_n: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum of each token's rows in the canonical order, ``[T, D]`` in the rows' dtype.

    With weights, every row is multiplied by its own and rounded before it is added.
    """
    if len(plan.stages) > 1 and row_nD.device.type in PIECES_ON:
        row_nD = _add_up_in_pieces(row_nD, plan.stages, weight_n)
    else:
        for stage in plan.stages:
            row_nD, weight_n = add_stage(row_nD, stage, weight_n), None
        if weight_n is not None:  # no token has two rows
            row_nD = weigh(row_nD, weight_n)
    if plan.stages and len(row_nD) == plan.num_tokens:  # sums are in the order of their tokens
        return row_nD
    out_TD = row_nD.new_zeros(plan.num_tokens, row_nD.shape[1])
    copy_rows_(out_TD, row_nD, None, plan.token_m)
    return out_TD


def _add_up_in_pieces(
    row_nD: torch.Tensor, stages: Sequence[Stage], weight_n: torch.Tensor | None
) -> torch.Tensor:
    """All stages for some sums at a time, so that partial sums take little memory.

    The sums of every stage are in the order of their tokens, so those that a range of sums is made
    of are a range, too.
    """
    num_sums, width = len(stages[-1].first_m), row_nD.shape[1]
    out_mD = row_nD.new_empty(num_sums, width)
    first_bytes = len(stages[0].first_m) * width * row_nD.element_size()
    piece_bytes = min(max(first_bytes // 6, LEAST_PIECE_BYTES), MOST_PIECE_BYTES)
    size = max(1, piece_bytes * num_sums // max(first_bytes, 1))
    for begin in range(0, num_sums, size):
        part = slice(begin, min(begin + size, num_sums))
        parts: list[tuple[torch.Tensor, torch.Tensor, int]] = []
        for stage in reversed(stages):
            terms = slice(*stage.offset_m1[[part.start, part.stop]].tolist())
            offset_m1 = stage.offset_m1[part.start : part.stop + 1] - terms.start
            parts.insert(0, (offset_m1, stage.index_n[terms], terms.start))
            part = terms
        rows = row_nD
        for number, (offset_m1, index_j, start) in enumerate(parts):
            weight_j = None if number or weight_n is None else weight_n[index_j]
            rows = combine(rows, offset_m1, index_j - start if number else index_j, weight_j)
        out_mD[begin : begin + len(rows)] = rows
    return out_mD


def add_stage(
    row_nD: torch.Tensor, stage: Stage, weight_n: torch.Tensor | None = None
) -> torch.Tensor:
    """Sums of one stage, made in the accumulation dtype and rounded to the rows' dtype."""
    weight_J = None if weight_n is None else weight_n[stage.index_n]
    return combine(row_nD, stage.offset_m1, stage.index_n, weight_J)
