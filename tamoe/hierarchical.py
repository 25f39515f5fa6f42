"""The hierarchical exchange: a token crosses the link of a node once, sums cross back.

Weights are applied where the experts are, partial sums are made on every relay, and each is rounded
as in the flat exchange; so both agree bit for bit, in outputs and in gradients.

Shape suffixes: T tokens, P ranks, D hidden size, n choices that were not dropped, R rows received,
m copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tamoe.anchor import Dispatched, anchor_for, recompute
from tamoe.first_order import first_order
from tamoe.ops import copy_rows_
from tamoe.pipeline import run_in_turns
from tamoe.precision import dot, weigh
from tamoe.record import Phase
from tamoe.relay_route import Hops, first_hop, plan_hops, source_order
from tamoe.row_order import CountsCPE, RowOrder
from tamoe.schedules import Mover
from tamoe.shares import Share
from tamoe.solver.parts import part_shares
from tamoe.solver.relays import Relays
from tamoe.summation import add_stage
from tamoe.telling import Weights, Words, tell_positions
from tamoe.transfer import Waiting


@dataclass(frozen=True, eq=False)
class Part:
    """Some of a rank's tokens, which travel together while others are on the links."""

    mover: Mover
    relays: Relays
    share: Share
    number: int
    order: RowOrder
    at_once: bool  # rows set out before positions: nothing hides those, and other parts follow
    largest: float  # rows of the largest part over those of this one

    @cached_property
    def told(self) -> Words:
        """Positions for relays, sent when first asked for."""
        return tell_positions(self.mover, self.share, self.relays)

    @cached_property
    def place_R(self) -> torch.Tensor:
        """Of each row that arrives, among the rows of this rank's experts."""
        return self.order.places(self.number, source_order(self.relays), self.share.key.device)

    @cached_property
    def hops(self) -> Hops:
        """All hops; waits for what other ranks tell."""
        return plan_hops(self.share, self.told.heard_P(), self.relays)

    def dispatch(
        self, x_TD: torch.Tensor, row_RD: torch.Tensor, phase: Phase
    ) -> Iterator[Waiting | None]:
        """From tokens to rows in the order of this rank's experts."""
        if not self.at_once:
            _ = self.told
        copy_mD = x_TD[self.share.tokens]
        for number in range(self.relays.num_levels):
            hop = self.hops.between[number] if number else first_hop(self.share, self.relays)
            what = f"{phase}, hop of level {hop.level}"
            num_held = len(copy_mD)
            held_mD = copy_mD.new_empty(num_held + hop.num_received, copy_mD.shape[1])
            transfer = self.mover.transfer(
                copy_mD.index_select(0, hop.copy_m),
                hop.send_splits,
                hop.receive_splits,
                what,
                held_mD[num_held:],
            )
            for turn in range(1, len(self.mover.nodes)):
                yield None
                arrived = transfer.start(turn)
                _ = self.told
                yield arrived if self.at_once else self._planned(arrived)
                del arrived
            del transfer  # and the rows that it sent
            held_mD[:num_held] = copy_mD
            copy_mD = held_mD
        hop = self.hops.inside
        for begin, rows in self.mover.inside(
            copy_mD, hop.copy_m, hop.send_splits, hop.receive_splits, *self._most_rows, phase
        ):
            copy_rows_(row_RD, rows, None, self.place_R[begin : begin + len(rows)])

    @property
    def _most_rows(self) -> tuple[int, int]:
        """Inside the node, of this part and of the largest one."""
        return self.hops.most_rows, round(self.largest * self.hops.most_rows)

    def _planned(self, wait: Waiting) -> Waiting:
        """Plan the other hops while rows of the first one are under way."""

        def planned() -> None:
            _ = self.hops
            wait()

        return planned

    def combine(
        self,
        row_RD: torch.Tensor,
        weight_R: torch.Tensor | None,
        out_TD: torch.Tensor,
        phase: Phase,
    ) -> Iterator[Waiting | None]:
        """From rows in the order of this rank's experts to a sum for each token."""
        hop = self.hops.inside
        back_mD = row_RD.new_empty(len(hop.copy_m), row_RD.shape[1])
        for begin, rows in self.mover.inside(
            row_RD,
            self.place_R,
            hop.receive_splits,
            hop.send_splits,
            *self._most_rows,
            phase,
            weight_R,
        ):
            back_mD[begin : begin + len(rows)] = rows
        sum_mD = add_stage(back_mD, self.hops.stages[-1])
        del back_mD
        ways = list(zip(self.hops.between, self.hops.stages, strict=False))
        for hop, stage in reversed(ways):
            left = len(sum_mD) - hop.num_received
            what = f"{phase}, hop of level {hop.level}"
            held_mD = sum_mD.new_empty(left + len(hop.copy_m), sum_mD.shape[1])
            transfer = self.mover.transfer(
                sum_mD[left:], hop.receive_splits, hop.send_splits, what, held_mD[left:]
            )
            for turn in range(1, len(self.mover.nodes)):
                yield None
                yield transfer.start(turn)
            held_mD[:left] = sum_mD[:left]
            del transfer, sum_mD  # before there are new sums beside them
            sum_mD = add_stage(held_mD, stage)
            del held_mD
        out_tD = out_TD[self.share.tokens]
        if len(sum_mD) < len(out_tD):
            out_tD.zero_()  # some have no sum
        copy_rows_(out_tD, sum_mD, None, self.hops.token_m)


@dataclass(frozen=True, eq=False)
class RelayRoute:
    """How the rows of one dispatch travel."""

    mover: Mover
    num_tokens: int
    num_rows: int
    parts: tuple[Part, ...]  # the largest first
    weights: Weights | None

    def dispatch(self, x_TD: torch.Tensor) -> Dispatched:
        """Rows of this rank's experts, and what combine is to get."""
        weight = None if self.weights is None else self.weights.weight
        return Dispatched(*_Dispatch.apply(x_TD, weight, self))

    def combine(
        self, row_RD: torch.Tensor, weight_R: torch.Tensor | None, anchor_0D: torch.Tensor
    ) -> torch.Tensor:
        """Sums of the experts' outputs, ``[T, D]``."""
        out_TD: torch.Tensor = _Combine.apply(row_RD, weight_R, anchor_0D, self)
        return out_TD

    def send(self, x_TD: torch.Tensor, phase: Phase) -> torch.Tensor:
        """From tokens to rows in the order of this rank's experts."""
        row_RD = x_TD.new_empty(self.num_rows, x_TD.shape[1])
        with self.mover.recorded(phase, x_TD, self._sends):
            self._run([part.dispatch(x_TD, row_RD, phase) for part in self.parts])
        return row_RD

    def send_back(
        self, row_RD: torch.Tensor, weight_R: torch.Tensor | None, phase: Phase
    ) -> torch.Tensor:
        """From rows in the order of this rank's experts to a weighted sum for each token.

        The smallest part goes first, as the links wait for its sums inside the node.
        """
        out_TD = row_RD.new_empty(self.num_tokens, row_RD.shape[1])
        with self.mover.recorded(phase, row_RD, self._sends_back):
            parts = reversed(self.parts)
            self._run([part.combine(row_RD, weight_R, out_TD, phase) for part in parts])
        return out_TD

    def _sends(self) -> Iterator[Sequence[int]]:
        return (hop.send_splits for part in self.parts for hop in part.hops.all)

    def _sends_back(self) -> Iterator[Sequence[int]]:
        return (hop.receive_splits for part in self.parts for hop in part.hops.all)

    def _run(self, parts: list[Iterator[Waiting | None]]) -> None:
        num_hops, num_rounds = self.parts[0].relays.num_levels, len(self.mover.nodes) - 1
        try:
            run_in_turns(parts, num_hops, num_rounds, self._start_weights)
        except BaseException:
            self.mover.leave_node()
            raise

    def _start_weights(self) -> None:
        if self.weights is not None:
            self.weights.start()


def plan_relays(
    mover: Mover,
    relays: Relays,
    shares: Sequence[Share],
    counts: tuple[CountsCPE, CountsCPE],
    weights: tuple[torch.Tensor, torch.Tensor] | None,
    dtype: torch.dtype,
) -> RelayRoute:
    """Plan both ways, as far as that needs nothing from other ranks but counts.

    Parameters
    ----------
    mover
        Moves the rows, in rounds.
    relays
        Who relays.
    shares
        The parts that the tokens travel in.
    counts
        Rows of each part for the experts of each rank, and from each rank for those of this one.
    weights
        Factors of all flat choices, and the kept choices, sorted by part, by expert, then by token.
    dtype
        Of the rows.
    """
    sent_CPE, received_CPE = counts
    order, num_parts = RowOrder(received_CPE), len(shares)
    part_share = part_shares(num_parts)
    return RelayRoute(
        mover,
        shares[-1].tokens.stop,
        sum(sum(map(sum, counts_PE)) for counts_PE in received_CPE),
        tuple(
            Part(
                mover,
                relays,
                share,
                part,
                order,
                part == 0 and num_parts > 1,
                part_share[0] / part_share[part],
            )
            for part, share in enumerate(shares)
        ),
        None if weights is None else Weights(mover, *weights, dtype, sent_CPE, order),
    )


class _Dispatch(torch.autograd.Function):
    """Rows, weights and an anchor out; the backward pass returns the gradients of the first two."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: torch.Tensor, weight: torch.Tensor | None, route: RelayRoute
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        ctx.route = route
        row_RD = route.send(x_TD, "dispatch")
        anchor_0D = anchor_for(ctx, row_RD)
        weight_R = None if route.weights is None else route.weights.weight_R.clone()
        fixed = [] if ctx.needs_input_grad[0] else [row_RD, anchor_0D]
        if weight_R is not None and not ctx.needs_input_grad[1]:
            fixed.append(weight_R)
        ctx.mark_non_differentiable(*fixed)
        return row_RD, weight_R, anchor_0D

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_RD: torch.Tensor, grad_weight_R: torch.Tensor | None, _: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        recompute(ctx)
        route: RelayRoute = ctx.route
        grad_TD = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_TD = route.send_back(grad_RD.contiguous(), None, "dispatch_backward")
        if ctx.needs_input_grad[1]:
            assert route.weights is not None and grad_weight_R is not None
            grad_weight = route.weights.send_back(grad_weight_R)
        return grad_TD, grad_weight, None


class _Combine(torch.autograd.Function):
    """Weighted rows back and added up; the backward pass sends the sum's gradient out."""

    @staticmethod
    def forward(
        ctx: Any,
        row_RD: torch.Tensor,
        weight_R: torch.Tensor | None,
        anchor_0D: torch.Tensor,
        route: RelayRoute,
    ) -> torch.Tensor:
        ctx.route = route
        weighed_RD = row_RD if weight_R is not None and ctx.needs_input_grad[1] else None
        ctx.save_for_backward(weighed_RD, weight_R, anchor_0D)
        return route.send_back(row_RD.contiguous(), weight_R, "combine")

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        row_RD, weight_R, anchor_0D = ctx.saved_tensors
        grad_RD = ctx.route.send(grad_TD.contiguous(), "combine_backward")
        grad_weight_R = None if row_RD is None else dot(grad_RD, row_RD)
        if weight_R is not None:
            grad_RD = weigh(grad_RD, weight_R)
        return grad_RD, grad_weight_R, torch.zeros_like(anchor_0D), None
