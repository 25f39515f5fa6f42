"""The hierarchical exchange: a token crosses the link of a node once, sums cross back.

Weights are applied where the experts are, partial sums are made on every relay, and each is rounded
as in the flat exchange; so both agree bit for bit, in outputs and in gradients.

Shape suffixes: T tokens, P ranks, D hidden size, n choices that were not dropped, R rows received,
m copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tamoe.flat import arrangement
from tamoe.pipeline import run_in_turns
from tamoe.precision import accumulation_dtype, dot, weigh
from tamoe.record import Phase
from tamoe.relay_route import (
    Hop,
    Hops,
    num_positions,
    plan_hops,
    positions_to_tell,
    row_places,
    source_order,
)
from tamoe.schedules import Mover, Waiting
from tamoe.shares import Share, counts_of_parts
from tamoe.solver.relays import Relays
from tamoe.summation import add_stage


@dataclass(frozen=True, eq=False)
class Weights:
    """Factors of rows, sent along with a dispatch from the tokens to the experts."""

    weight_n: torch.Tensor  # where the tokens are, sorted by expert, with its graph
    weight_R: torch.Tensor  # where the experts are, in the order of their rows
    send_splits: tuple[int, ...]
    receive_splits: tuple[int, ...]
    arrangement_R: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class Part:
    """Some of a rank's tokens, which travel together while others are on the links."""

    tokens: slice
    hops: Hops
    place_R: torch.Tensor  # among the rows of this rank's experts, of each row that arrives

    def dispatch(
        self, x_TD: torch.Tensor, row_RD: torch.Tensor, mover: Mover, phase: Phase
    ) -> Iterator[Waiting | None]:
        """From tokens to rows in the order of this rank's experts."""
        copy_mD = x_TD[self.tokens]
        for hop in self.hops.between:
            rows = copy_mD.index_select(0, hop.copy_m)
            what = f"{phase}, hop of level {hop.level}"
            transfer = mover.transfer(rows, hop.send_splits, hop.receive_splits, what)
            for number in range(1, len(mover.nodes)):
                yield None
                yield transfer.start(number)
            copy_mD = torch.cat([copy_mD, transfer.received_RD])
        hop, place = self.hops.inside, 0
        for rows in mover.inside(copy_mD, hop.copy_m, hop.send_splits, hop.receive_splits, phase):
            row_RD.index_copy_(0, self.place_R[place : place + len(rows)], rows)
            place += len(rows)

    def combine(
        self, row_RD: torch.Tensor, out_TD: torch.Tensor, mover: Mover, phase: Phase
    ) -> Iterator[Waiting | None]:
        """From rows in the order of this rank's experts to a sum for each token."""
        hop = self.hops.inside
        back = mover.inside(row_RD, self.place_R, hop.receive_splits, hop.send_splits, phase)
        sum_mD = add_stage(torch.cat(back), hop.stage)
        for hop in reversed(self.hops.between):
            left = len(sum_mD) - hop.num_received
            what = f"{phase}, hop of level {hop.level}"
            rows = sum_mD[left:]
            transfer = mover.transfer(rows, hop.receive_splits, hop.send_splits, what)
            for number in range(1, len(mover.nodes)):
                yield None
                yield transfer.start(number)
            sum_mD = add_stage(torch.cat([sum_mD[:left], transfer.received_RD]), hop.stage)
        out_TD[self.tokens].index_copy_(0, self.hops.token_m, sum_mD)


@dataclass(frozen=True, eq=False)
class RelayRoute:
    """How the rows of one dispatch travel."""

    mover: Mover
    num_tokens: int
    num_rows: int
    parts: tuple[Part, ...]
    weights: Weights | None

    def dispatch(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows of this rank's experts, ``[R, D]``, and their weights, for combine."""
        weight_n = None if self.weights is None else self.weights.weight_n
        row_RD: torch.Tensor
        weight_R: torch.Tensor | None
        row_RD, weight_R = _Dispatch.apply(x_TD, weight_n, self)
        return row_RD, weight_R

    def combine(self, row_RD: torch.Tensor, weight_R: torch.Tensor | None) -> torch.Tensor:
        """Sums of the experts' outputs, ``[T, D]``."""
        out_TD: torch.Tensor = _Combine.apply(row_RD, weight_R, self)
        return out_TD

    def send(self, x_TD: torch.Tensor, phase: Phase) -> torch.Tensor:
        """From tokens to rows in the order of this rank's experts."""
        row_RD = x_TD.new_empty(self.num_rows, x_TD.shape[1])
        with self.mover.recorded(phase, x_TD, (hop.send_splits for hop in self._hops())):
            self._run([part.dispatch(x_TD, row_RD, self.mover, phase) for part in self.parts])
        return row_RD

    def send_back(self, row_RD: torch.Tensor, phase: Phase) -> torch.Tensor:
        """From rows in the order of this rank's experts to a sum for each token."""
        out_TD = row_RD.new_zeros(self.num_tokens, row_RD.shape[1])
        with self.mover.recorded(phase, row_RD, (hop.receive_splits for hop in self._hops())):
            self._run([part.combine(row_RD, out_TD, self.mover, phase) for part in self.parts])
        return out_TD

    def _hops(self) -> Iterator[Hop]:
        for part in self.parts:
            yield from (*part.hops.between, part.hops.inside)

    def _run(self, parts: list[Iterator[Waiting | None]]) -> None:
        run_in_turns(parts, len(self.parts[0].hops.between), len(self.mover.nodes) - 1)


def plan_relays(
    mover: Mover,
    relays: Relays,
    shares: Sequence[Share],
    weight_n: torch.Tensor | None,
    dtype: torch.dtype,
) -> RelayRoute:
    """Tell the relays which copies go where, and plan both ways.

    Parameters
    ----------
    mover
        Moves the rows, in rounds.
    relays
        Who relays.
    shares
        The parts that the tokens travel in.
    weight_n
        Factor of each kept choice of all parts, sorted by expert, then by token.
    dtype
        Of the rows.
    """
    num_ranks, own = len(relays.node_of), relays.nodes[relays.node].index(relays.rank)
    sent_PE, received_PE = counts_of_parts(shares, relays)
    pieces_P: list[list[torch.Tensor]] = [[] for _ in range(num_ranks)]
    sizes_P: list[list[int]] = [[] for _ in range(num_ranks)]
    for share in shares:
        tell = positions_to_tell(share.own_P, share.copies, share.position_n, relays)
        for rank, told in enumerate(share.told_P):
            pieces_P[rank].append(tell[rank].to(torch.int32))
            sizes_P[rank].append(num_positions(told, rank, relays))
    if weight_n is not None:  # their bits travel in the same message as the positions
        wide_n = weight_n.detach().to(accumulation_dtype(dtype))
        width = wide_n.element_size() // 4
        words = wide_n.contiguous().view(torch.int32).split([width * sum(c) for c in sent_PE])
        for rank in range(num_ranks):
            pieces_P[rank].append(words[rank])
            sizes_P[rank].append(width * sum(received_PE[rank]))
    heard = replace(mover, schedule="single").move(
        torch.cat([piece for pieces in pieces_P for piece in pieces]).unsqueeze(1),
        [sum(map(len, pieces)) for pieces in pieces_P],
        [sum(sizes) for sizes in sizes_P],
        "counts",
    )
    heard_P = [
        block.split(sizes)
        for block, sizes in zip(heard.squeeze(1).split([*map(sum, sizes_P)]), sizes_P, strict=True)
    ]
    weights = None
    if weight_n is not None:
        place_R = arrangement(list(enumerate(received_PE)), heard.device)
        weight_R = torch.cat([pieces[-1] for pieces in heard_P]).view(wide_n.dtype)
        weights = Weights(
            weight_n,
            weight_R if place_R is None else weight_R[place_R],
            tuple(map(sum, sent_PE)),
            tuple(map(sum, received_PE)),
            place_R,
        )
    received_cPE = [[told.choices_pE[own] for told in share.told_P] for share in shares]
    places = row_places(received_cPE, source_order(relays), heard.device)
    parts = tuple(
        Part(
            share.tokens,
            plan_hops(
                share.own_P,
                share.told_P,
                share.copies,
                share.position_n,
                [pieces[number] for pieces in heard_P],
                relays,
            ),
            places[number],
        )
        for number, share in enumerate(shares)
    )
    num_tokens = sum(share.copies.num_tokens for share in shares)
    return RelayRoute(mover, num_tokens, sum(map(sum, received_PE)), parts, weights)


class _Dispatch(torch.autograd.Function):
    """Rows and weights out; the backward pass returns the gradients of both."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: torch.Tensor, weight_n: torch.Tensor | None, route: RelayRoute
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.route = route
        row_RD = route.send(x_TD, "dispatch")
        weight_R = None if route.weights is None else route.weights.weight_R.clone()
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(row_RD)
        if weight_R is not None and not ctx.needs_input_grad[1]:
            ctx.mark_non_differentiable(weight_R)
        return row_RD, weight_R

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_RD: torch.Tensor, grad_weight_R: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        route: RelayRoute = ctx.route
        grad_TD = grad_weight_n = None
        if ctx.needs_input_grad[0]:
            grad_TD = route.send_back(grad_RD.contiguous(), "dispatch_backward")
        if ctx.needs_input_grad[1]:
            assert route.weights is not None and grad_weight_R is not None
            weights = route.weights
            if weights.arrangement_R is not None:
                as_sent = torch.empty_like(grad_weight_R)
                grad_weight_R = as_sent.index_copy_(0, weights.arrangement_R, grad_weight_R)
            grad_weight_n = replace(route.mover, schedule="single").move(
                grad_weight_R.unsqueeze(1),
                weights.receive_splits,
                weights.send_splits,
                "dispatch_backward",
            )
            grad_weight_n = grad_weight_n.squeeze(1).to(weights.weight_n.dtype)
        return grad_TD, grad_weight_n, None


class _Combine(torch.autograd.Function):
    """Weighted rows back and added up; the backward pass sends the sum's gradient out."""

    @staticmethod
    def forward(
        ctx: Any, row_RD: torch.Tensor, weight_R: torch.Tensor | None, route: RelayRoute
    ) -> torch.Tensor:
        ctx.route, ctx.weighted = route, weight_R is not None
        if weight_R is None:
            return route.send_back(row_RD.contiguous(), "combine")
        ctx.save_for_backward(row_RD if ctx.needs_input_grad[1] else None, weight_R)
        return route.send_back(weigh(row_RD, weight_R), "combine")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        grad_RD = ctx.route.send(grad_TD.contiguous(), "combine_backward")
        if not ctx.weighted:
            return grad_RD, None, None
        row_RD, weight_R = ctx.saved_tensors
        return weigh(grad_RD, weight_R), None if row_RD is None else dot(grad_RD, row_RD), None
