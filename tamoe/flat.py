"""The flat exchange: each (token, choice) row goes straight to the rank of its expert.

Shape suffixes: T tokens, E experts of a rank, P ranks, D hidden size, n rows sent (choices that
were not dropped), R rows received.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tamoe.host_table import table_on
from tamoe.ops import copy_rows_, gather_rows
from tamoe.precision import dot, weigh
from tamoe.record import Phase
from tamoe.schedules import Mover
from tamoe.summation import SumPlan, add_up, plan_sum


@dataclass(frozen=True, eq=False)
class FlatRoute:
    """How the rows of one dispatch travel."""

    mover: Mover
    send_splits: tuple[int, ...]  # rows for each rank
    receive_splits: tuple[int, ...]  # rows from each rank
    token_n: torch.Tensor  # token of each row; rows are sorted by expert, then by token
    arrangement_R: torch.Tensor | None  # place, as received, of each row in expert order
    sum_plan: SumPlan
    weight_n: torch.Tensor | None  # factor of each row, with its graph

    def dispatch(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows of this rank's experts, ``[R, D]``, and the weights that combine is to get."""
        row_RD: torch.Tensor = _Dispatch.apply(x_TD, self)
        return row_RD, self.weight_n

    def combine(self, row_RD: torch.Tensor, weight_n: torch.Tensor | None) -> torch.Tensor:
        """Sums of the experts' outputs, ``[T, D]``."""
        out_TD: torch.Tensor = _Combine.apply(row_RD, weight_n, self)
        return out_TD

    def send(self, row_nD: torch.Tensor, phase: Phase) -> torch.Tensor:
        """From the order of sending to the order of this rank's experts."""
        row_RD = self.mover.move(row_nD, self.send_splits, self.receive_splits, phase)
        return row_RD if self.arrangement_R is None else gather_rows(row_RD, self.arrangement_R)

    def send_back(self, row_RD: torch.Tensor, phase: Phase) -> torch.Tensor:
        """From the order of this rank's experts back to the order of sending."""
        if self.arrangement_R is not None:
            in_expert_order_RD, row_RD = row_RD, torch.empty_like(row_RD)
            copy_rows_(row_RD, in_expert_order_RD, None, self.arrangement_R)
        return self.mover.move(row_RD, self.receive_splits, self.send_splits, phase)


def plan_flat(
    mover: Mover,
    num_tokens: int,
    token_n: torch.Tensor,
    weight_n: torch.Tensor | None,
    sent_PE: Sequence[Sequence[int]],
    received_PE: Sequence[Sequence[int]],
    groups: Sequence[Sequence[int]],
    num_sums: Sequence[int] | None = None,
) -> FlatRoute:
    """Plan both ways.

    Parameters
    ----------
    mover
        Moves the rows.
    num_tokens
        Tokens T of this rank.
    token_n, weight_n
        Token and factor of each kept choice, sorted by expert, then by token.
    sent_PE, received_PE
        Rows for the experts of each rank, and from each rank for the experts of this one.
    groups
        Group of each rank at each level of the sum.
    num_sums
        See :func:`~tamoe.summation.plan_sum`.
    """
    send_splits = tuple(map(sum, sent_PE))
    rank_n = repeated(send_splits, token_n.device)
    return FlatRoute(
        mover=mover,
        send_splits=send_splits,
        receive_splits=tuple(map(sum, received_PE)),
        token_n=token_n,
        arrangement_R=arrangement(list(enumerate(received_PE)), token_n.device),
        sum_plan=plan_sum(token_n, rank_n, num_tokens, groups, num_sums),
        weight_n=weight_n,
    )


def repeated(counts: Sequence[int], device: torch.device) -> torch.Tensor:
    """Numbers 0, 1, … each as often as counted.

    >>> repeated([2, 0, 1], torch.device("cpu")).tolist()
    [0, 0, 2]
    """
    numbers = torch.arange(len(counts), device=device)
    return numbers.repeat_interleave(table_on(device, counts), output_size=sum(counts))


def arrangement(
    blocks: Sequence[tuple[int, Sequence[int]]], device: torch.device
) -> torch.Tensor | None:
    """Place of each row that experts want by expert, then source; None if it is there already.

    ``blocks`` are (source rank, rows for each local expert), in the order of arrival.

    >>> arrangement([(1, [1, 1]), (0, [1, 0])], torch.device("cpu")).tolist()
    [2, 0, 1]
    """
    num_sources = 1 + max(source for source, _ in blocks)
    keys = [e * num_sources + source for source, rows in blocks for e in range(len(rows))]
    if keys == sorted(keys):
        return None
    counts = [count for _, rows in blocks for count in rows]
    key_R = table_on(device, keys)[repeated(counts, device)]
    return torch.argsort(key_R, stable=True)


class _Dispatch(torch.autograd.Function):
    """Rows out; the backward pass returns their gradients and adds them up, as combine does."""

    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, route: FlatRoute) -> torch.Tensor:
        ctx.route = route
        return route.send(gather_rows(x_TD, route.token_n), "dispatch")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad_nD = ctx.route.send_back(grad_RD.contiguous(), "dispatch_backward")
        return add_up(grad_nD, ctx.route.sum_plan), None


class _Combine(torch.autograd.Function):
    """Rows back and added up; the backward pass sends the sum's gradient out, as dispatch does.

    The weights are applied where the tokens are: the product is rounded to the rows' dtype, so it
    has the same bits as if the expert's rank had made it, and weights need not travel.
    """

    @staticmethod
    def forward(
        ctx: Any, row_RD: torch.Tensor, weight_n: torch.Tensor | None, route: FlatRoute
    ) -> torch.Tensor:
        ctx.route, ctx.weighted = route, weight_n is not None
        row_nD = route.send_back(row_RD.contiguous(), "combine")
        if weight_n is None:
            return add_up(row_nD, route.sum_plan)
        ctx.save_for_backward(row_nD if ctx.needs_input_grad[1] else None, weight_n)
        return add_up(row_nD, route.sum_plan, weight_n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        grad_nD = gather_rows(grad_TD, ctx.route.token_n)
        grad_weight_n = None
        if ctx.weighted:
            row_nD, weight_n = ctx.saved_tensors
            if row_nD is not None:
                grad_weight_n = dot(grad_nD, row_nD).to(weight_n.dtype)
            grad_nD = weigh(grad_nD, weight_n)
        return ctx.route.send(grad_nD, "combine_backward"), grad_weight_n, None
