"""The flat exchange: each (token, choice) row goes straight to the rank of its expert.

Many rows travel in slices, each a part of the rows of every pair of ranks: a slice is packed when
its turn comes and put in place when it arrives, so that rows are held once, not three times.

Shape suffixes: T tokens, E experts of a rank, P ranks, D hidden size, n rows sent (choices that
were not dropped), R rows received, m rows of a slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tamoe.anchor import Dispatched, anchor_for, recompute
from tamoe.first_order import first_order
from tamoe.ops import copy_rows_, gather_rows
from tamoe.precision import dot, weigh
from tamoe.record import Phase
from tamoe.row_order import RowOrder, repeated, sliced
from tamoe.schedules import Mover
from tamoe.summation import SumPlan, add_up, plan_sum, reorder


@dataclass(frozen=True, eq=False)
class Slice:
    """Rows that travel together."""

    send_splits: list[int]  # rows for each rank
    receive_splits: list[int]  # rows from each rank
    sent: slice  # which rows, in the order of sending
    place_m: torch.Tensor | None  # of what arrives, in expert order; None: as it arrives, all


@dataclass(frozen=True, eq=False)
class FlatRoute:
    """How the rows of one dispatch travel."""

    mover: Mover
    slices: tuple[Slice, ...]
    num_rows: int  # received
    token_n: torch.Tensor  # token of each row, in the order of sending: by slice, then by expert
    sum_plan: SumPlan
    weight_n: torch.Tensor | None  # factor of each row, with its graph

    def dispatch(self, x_TD: torch.Tensor) -> Dispatched:
        """Rows of this rank's experts, and what combine is to get."""
        row_RD, anchor_0D = _Dispatch.apply(x_TD, self)
        return Dispatched(row_RD, self.weight_n, anchor_0D)

    def combine(
        self, row_RD: torch.Tensor, weight_n: torch.Tensor | None, anchor_0D: torch.Tensor
    ) -> torch.Tensor:
        """Sums of the experts' outputs, ``[T, D]``."""
        out_TD: torch.Tensor = _Combine.apply(row_RD, weight_n, anchor_0D, self)
        return out_TD

    def send(
        self, x_TD: torch.Tensor, phase: Phase, weight_n: torch.Tensor | None = None
    ) -> torch.Tensor:
        """From tokens, times their weights, to rows in the order of this rank's experts."""
        row_RD = x_TD.new_empty(self.num_rows, x_TD.shape[1])
        for part in self.slices:
            arrived_mD = self.mover.move(
                self._packed(x_TD, weight_n, part.sent),
                part.send_splits,
                part.receive_splits,
                phase,
            )
            if part.place_m is None:
                return arrived_mD
            copy_rows_(row_RD, arrived_mD, None, part.place_m)
            del arrived_mD  # before the next slice
        return row_RD

    def _packed(
        self, x_TD: torch.Tensor, weight_n: torch.Tensor | None, sent: slice
    ) -> torch.Tensor:
        row_mD = gather_rows(x_TD, self.token_n[sent])
        return row_mD if weight_n is None else weigh(row_mD, weight_n[sent])

    def send_back(self, row_RD: torch.Tensor, phase: Phase) -> torch.Tensor:
        """From the order of this rank's experts back to the order of sending."""
        if len(self.slices) == 1:
            return self._moved_back(row_RD, self.slices[0], phase, None)
        row_nD = row_RD.new_empty(len(self.token_n), row_RD.shape[1])
        for part in self.slices:
            self._moved_back(row_RD, part, phase, row_nD[part.sent])
        return row_nD

    def _moved_back(
        self, row_RD: torch.Tensor, part: Slice, phase: Phase, into_mD: torch.Tensor | None
    ) -> torch.Tensor:
        row_mD = row_RD if part.place_m is None else gather_rows(row_RD, part.place_m)
        if into_mD is None:
            return self.mover.move(row_mD, part.receive_splits, part.send_splits, phase)
        return self.mover.move(row_mD, part.receive_splits, part.send_splits, phase, into_mD)


def plan_flat(
    mover: Mover,
    num_tokens: int,
    token_n: torch.Tensor,
    weight_n: torch.Tensor | None,
    sent_PE: Sequence[Sequence[int]],
    received_PE: Sequence[Sequence[int]],
    groups: Sequence[Sequence[int]],
    num_sums: Sequence[int] | None = None,
    num_slices: int = 1,
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
    num_slices
        Slices that the rows travel in, >= 1, the same on all ranks; from
        :func:`~tamoe.solver.parts.slices_for`.
    """
    send_splits, receive_splits = ([*map(sum, way)] for way in (sent_PE, received_PE))
    order = RowOrder([received_PE])
    place_R = None if order.is_by_source() else order.by_source(token_n.device)
    rank_n = repeated(send_splits, token_n.device)
    sum_plan = plan_sum(token_n, rank_n, num_tokens, groups, num_sums)
    slices: tuple[Slice, ...] = (Slice(send_splits, receive_splits, slice(None), place_R),)
    if num_slices > 1:
        slices, order_n = _cut(send_splits, receive_splits, place_R, num_slices, token_n.device)
        token_n, sum_plan = token_n[order_n], reorder(sum_plan, order_n)
        weight_n = None if weight_n is None else weight_n[order_n]
    return FlatRoute(
        mover=mover,
        slices=slices,
        num_rows=sum(receive_splits),
        token_n=token_n,
        sum_plan=sum_plan,
        weight_n=weight_n,
    )


def _cut(
    send_splits: list[int],
    receive_splits: list[int],
    place_R: torch.Tensor | None,
    num_slices: int,
    device: torch.device,
) -> tuple[tuple[Slice, ...], torch.Tensor]:
    """Slices, and the row in expert order at each place in the order of sending."""
    sent, received = (sliced(way, num_slices, device) for way in (send_splits, receive_splits))
    slices, begin = [], 0
    for (sends, sent_m), (receives, received_m) in zip(sent, received, strict=True):
        place_m = received_m if place_R is None else place_R[received_m]
        slices.append(Slice(sends, receives, slice(begin, begin + len(sent_m)), place_m))
        begin += len(sent_m)
    return tuple(slices), torch.cat([sent_m for _, sent_m in sent])


class _Dispatch(torch.autograd.Function):
    """Rows out; the backward pass returns their gradients and adds them up, as combine does."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: torch.Tensor, route: FlatRoute
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.route = route
        row_RD = route.send(x_TD, "dispatch")
        return row_RD, anchor_for(ctx, row_RD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None]:
        recompute(ctx)
        grad_nD = ctx.route.send_back(grad_RD.contiguous(), "dispatch_backward")
        return add_up(grad_nD, ctx.route.sum_plan), None


class _Combine(torch.autograd.Function):
    """Rows back and added up; the backward pass sends the sum's gradient out, as dispatch does.

    The weights are applied where the tokens are: the product is rounded to the rows' dtype, so it
    has the same bits as if the expert's rank had made it, and weights need not travel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        row_RD: torch.Tensor,
        weight_n: torch.Tensor | None,
        anchor_0D: torch.Tensor,
        route: FlatRoute,
    ) -> torch.Tensor:
        ctx.route = route
        row_RD = row_RD.contiguous()
        if weight_n is None or not ctx.needs_input_grad[1]:
            ctx.save_for_backward(None, weight_n, anchor_0D)
            # No name here for the rows that come back: they are freed while they are added up.
            return add_up(route.send_back(row_RD, "combine"), route.sum_plan, weight_n)
        row_nD = route.send_back(row_RD, "combine")
        ctx.save_for_backward(row_nD, weight_n, anchor_0D)
        return add_up(row_nD, route.sum_plan, weight_n)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        row_nD, weight_n, anchor_0D = ctx.saved_tensors
        grad_weight_n = None
        if row_nD is not None:
            grad_nD = gather_rows(grad_TD, ctx.route.token_n)
            grad_weight_n = dot(grad_nD, row_nD).to(weight_n.dtype)
            del grad_nD
        grad_RD = ctx.route.send(grad_TD, "combine_backward", weight_n)
        return grad_RD, grad_weight_n, torch.zeros_like(anchor_0D), None
