"""The hierarchical exchange: a token crosses the link of a node once, sums cross back.

Weights are applied where the experts are, partial sums are made on every relay, and each is rounded
as in the flat exchange; so both agree bit for bit, in outputs and in gradients.

Shape suffixes: T tokens, P ranks, D hidden size, n choices that were not dropped, R rows received,
m copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tamoe.flat import arrangement, dot
from tamoe.record import Phase
from tamoe.relay_route import (
    Hops,
    Told,
    counts_for_ranks,
    num_positions,
    plan_hops,
    positions_to_tell,
)
from tamoe.relays import Copies, Relays
from tamoe.schedules import Mover
from tamoe.summation import accumulation_dtype, add_stage, weigh


@dataclass(frozen=True, eq=False)
class Weights:
    """Factors of rows, sent along with a dispatch from the tokens to the experts."""

    weight_n: torch.Tensor  # where the tokens are, sorted by expert, with its graph
    weight_R: torch.Tensor  # where the experts are, in the order of their rows
    send_splits: tuple[int, ...]
    receive_splits: tuple[int, ...]
    arrangement_R: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class RelayRoute:
    """How the rows of one dispatch travel."""

    mover: Mover
    num_tokens: int
    hops: Hops
    weights: Weights | None
    _sent: list[torch.Tensor | None]  # the weights as the experts' ranks got them, with the graph

    def dispatch(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Rows of this rank's experts, ``[R, D]``."""
        weight_n = None if self.weights is None else self.weights.weight_n
        row_RD: torch.Tensor
        row_RD, self._sent[0] = _Dispatch.apply(x_TD, weight_n, self)
        return row_RD

    def combine(self, row_RD: torch.Tensor) -> torch.Tensor:
        """Sums of the experts' outputs, ``[T, D]``."""
        out_TD: torch.Tensor = _Combine.apply(row_RD, self._sent[0], self)
        return out_TD

    def send(self, x_TD: torch.Tensor, phase: Phase) -> torch.Tensor:
        """From tokens to rows in the order of this rank's experts."""
        copy_mD = x_TD
        for hop in self.hops.between:
            rows = self.mover.move(
                copy_mD.index_select(0, hop.copy_m), hop.send_splits, hop.receive_splits, phase
            )
            copy_mD = torch.cat([copy_mD, rows])
        hop = self.hops.inside
        row_RD = self.mover.move(
            copy_mD.index_select(0, hop.copy_m), hop.send_splits, hop.receive_splits, phase
        )
        arrangement_R = self.hops.arrangement_R
        return row_RD if arrangement_R is None else row_RD.index_select(0, arrangement_R)

    def send_back(self, row_RD: torch.Tensor, phase: Phase) -> torch.Tensor:
        """From rows in the order of this rank's experts to a sum for each token."""
        if self.hops.arrangement_R is not None:
            row_RD = torch.empty_like(row_RD).index_copy_(0, self.hops.arrangement_R, row_RD)
        hop = self.hops.inside
        back = self.mover.move(row_RD, hop.receive_splits, hop.send_splits, phase)
        sum_mD = add_stage(back, hop.stage)
        for hop in reversed(self.hops.between):
            left = len(sum_mD) - hop.num_received
            back = self.mover.move(sum_mD[left:], hop.receive_splits, hop.send_splits, phase)
            sum_mD = add_stage(torch.cat([sum_mD[:left], back]), hop.stage)
        out_TD = row_RD.new_zeros(self.num_tokens, row_RD.shape[1])
        return out_TD.index_copy_(0, self.hops.token_m, sum_mD)


def plan_relays(
    mover: Mover,
    relays: Relays,
    copies: Copies,
    position_n: torch.Tensor,
    weight_n: torch.Tensor | None,
    dtype: torch.dtype,
    own_P: Sequence[Told],
    told_P: Sequence[Told],
) -> RelayRoute:
    """Tell the relays which copies go where, and plan both ways.

    Parameters
    ----------
    mover
        Moves the rows, in rounds.
    relays
        Who relays.
    copies, position_n, weight_n
        Of this rank's tokens; place on the node of its expert and factor of each kept choice,
        sorted by expert.
    dtype
        Of the rows.
    own_P, told_P
        Counts that this rank told each rank, and that each told it.
    """
    tell = positions_to_tell(own_P, copies, position_n, relays)
    message = [block.to(torch.int32) for block in tell]
    own = relays.nodes[relays.node].index(relays.rank)
    sent_PE = counts_for_ranks(own_P, relays)
    received_PE = [told.choices_pE[own] for told in told_P]
    hear = [num_positions(told, source, relays) for source, told in enumerate(told_P)]
    width = 0  # words of a weight; their bits travel in the same message as the positions
    if weight_n is not None:
        wide_n = weight_n.detach().to(accumulation_dtype(dtype))
        width = wide_n.element_size() // 4
        words = wide_n.contiguous().view(torch.int32).split([width * sum(c) for c in sent_PE])
        message = [torch.cat(pair) for pair in zip(message, words, strict=True)]
    sizes = [
        n for pair in zip(hear, received_PE, strict=True) for n in (pair[0], width * sum(pair[1]))
    ]
    heard = replace(mover, schedule="single").move(
        torch.cat(message).unsqueeze(1),
        [len(block) for block in message],
        [sum(pair) for pair in zip(sizes[::2], sizes[1::2], strict=True)],
        "counts",
    )
    pieces = heard.squeeze(1).split(sizes)
    weights = None
    if weight_n is not None:
        place_R = arrangement(list(enumerate(received_PE)), position_n.device)
        weight_R = torch.cat(pieces[1::2]).view(wide_n.dtype)
        weights = Weights(
            weight_n,
            weight_R if place_R is None else weight_R[place_R],
            tuple(map(sum, sent_PE)),
            tuple(map(sum, received_PE)),
            place_R,
        )
    hops = plan_hops(own_P, told_P, copies, position_n, pieces[::2], relays)
    return RelayRoute(mover, copies.num_tokens, hops, weights, [None])


class _Dispatch(torch.autograd.Function):
    """Rows and weights out; the backward pass returns the gradients of both."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: torch.Tensor, weight_n: torch.Tensor | None, route: RelayRoute
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.route = route
        row_RD = route.send(x_TD, "dispatch")
        return row_RD, None if route.weights is None else route.weights.weight_R.clone()

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
        ctx.save_for_backward(row_RD, weight_R)
        return route.send_back(weigh(row_RD, weight_R), "combine")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        grad_RD = ctx.route.send(grad_TD.contiguous(), "combine_backward")
        if not ctx.weighted:
            return grad_RD, None, None
        row_RD, weight_R = ctx.saved_tensors
        return weigh(grad_RD, weight_R), dot(grad_RD, row_RD), None
