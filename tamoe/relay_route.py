"""From the counts and positions of a dispatch to the hops of a hierarchical exchange.

A rank holds copies of the tokens that it relays: its own T tokens first, then what each hop brings,
highest switches first. Every hop is a list of copies to send on and of how many rows go where; the
last one stays inside the node and brings a row to each expert.

Shape suffixes: T tokens, M nodes, P ranks, L levels, E experts of a rank, n choices that were not
dropped, m copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from tamoe.flat import repeated
from tamoe.relays import Copies
from tamoe.shares import Told, counts_for_ranks
from tamoe.solver.relays import Relays
from tamoe.summation import Stage, plan_stage


@dataclass(frozen=True, eq=False)
class Hop:
    """Copies that travel together, and the sum that their way back ends in."""

    level: int  # of the switches that it crosses; 0 inside the node
    copy_m: torch.Tensor  # which copies to send, sorted by the rank that they go to
    send_splits: tuple[int, ...]
    receive_splits: tuple[int, ...]
    stage: Stage  # adds what comes back to the sums so far, by copy

    @property
    def num_received(self) -> int:
        """Rows that this hop brings."""
        return sum(self.receive_splits)


@dataclass(frozen=True, eq=False)
class Hops:
    """All hops of a dispatch, highest switches first, the one inside the node last."""

    between: tuple[Hop, ...]
    inside: Hop
    token_m: torch.Tensor  # token of each sum at the end of the way back


# ---- what ranks tell each other ---------------------------------------------------------------


def positions_to_tell(
    own_P: Sequence[Told], copies: Copies, position_n: torch.Tensor, relays: Relays
) -> list[torch.Tensor]:
    """Places of this rank's tokens in lists of copies, that each rank needs to know.

    A relay gets the places of the copies to send on, by target node, then those of the choices, by
    expert. Other ranks get nothing, nor does this one: on its own node it has the choices.

    Parameters
    ----------
    own_P
        The counts that this rank tells each rank.
    copies
        Of this rank's tokens.
    position_n
        Place of each choice's token on the node of its expert; choices are sorted by expert.
    relays
        Who relays.
    """
    blocks = _forwarded(own_P, copies, relays)
    choices_P = position_n.split([*map(sum, counts_for_ranks(own_P, relays))])
    tell = []
    for rank, node in enumerate(relays.node_of):
        if node == relays.node or relays.relay_PM[relays.rank][node] != rank:
            tell.append(position_n[:0])
            continue
        onward = [
            copies.position_TM[blocks[node, target], node]
            for target in range(len(relays.nodes))
            if (node, target) in blocks
        ]
        tell.append(torch.cat([*onward, *(choices_P[p] for p in relays.nodes[node])]))
    return tell


def num_positions(told: Told, source: int, relays: Relays) -> int:
    """How many places ``source`` tells this rank."""
    if relays.node_of[source] == relays.node or source not in relays.served:
        return 0
    return sum(told.forward_M) + sum(map(sum, told.choices_pE))


def _forwarded(
    own_P: Sequence[Told], copies: Copies, relays: Relays
) -> dict[tuple[int, int], torch.Tensor]:
    """Tokens of this rank that are copied from a node to a node; only pairs that have some."""
    counts = {
        (source, target): count
        for target, ranks in enumerate(relays.nodes)
        for source, count in enumerate(own_P[ranks[0]].arrive_M)
        if count
    }
    blocks = copies.entry_m.split(list(counts.values()))
    return dict(zip(counts, blocks, strict=False))


# ---- hops -------------------------------------------------------------------------------------


def plan_hops(
    own_P: Sequence[Told],
    told_P: Sequence[Told],
    copies: Copies,
    position_n: torch.Tensor,
    heard_P: Sequence[torch.Tensor],
    relays: Relays,
) -> Hops:
    """Every hop of one dispatch.

    Parameters
    ----------
    own_P, told_P
        The counts that this rank told each rank, and those that each told it.
    copies, position_n
        Of this rank's own tokens.
    heard_P
        Places that each rank told this one, from :func:`positions_to_tell`.
    relays
        Who relays.
    """
    near = sorted(relays.nodes[relays.node])
    none = position_n[:0]
    onward, choices = _own_copies(own_P, copies, position_n, relays)
    start_of, receive_LP = _arrivals(told_P, copies.num_tokens, relays)
    for source in relays.served:
        if relays.node_of[source] != relays.node:
            slot_m = _ranges(start_of[source], told_P[source].arrive_M, none)
            _relayed(
                source, slot_m[heard_P[source].long()], told_P[source], onward, choices, relays
            )
    blocks = [torch.cat([none, *(choices[s, p] for s in relays.served)]) for p in near]
    copy_m = torch.cat(blocks)
    inside = Hop(
        0,
        copy_m,
        _splits(relays, {p: len(block) for p, block in zip(near, blocks, strict=True)}),
        _splits(relays, {p: _rows_through(p, told_P, relays) for p in near}),
        plan_stage(copy_m, torch.zeros_like(copy_m), 1),
    )
    sums_m = copy_m[inside.stage.first_m]  # copies that have a sum so far, ascending
    between: list[Hop] = []
    for level in range(1, 1 + relays.num_levels):
        receive_splits = receive_LP[level - 1]
        left_m = sums_m[: len(sums_m) - sum(receive_splits)]  # the others go back by this hop
        hop = _hop(level, receive_splits, left_m, onward, relays)
        sums_m = torch.cat([left_m, hop.copy_m])[hop.stage.first_m]
        between.insert(0, hop)
    return Hops(tuple(between), inside, sums_m)


def _hop(
    level: int,
    receive_splits: tuple[int, ...],
    left_m: torch.Tensor,
    onward: dict[tuple[int, int], torch.Tensor],
    relays: Relays,
) -> Hop:
    """The hop between nodes of one level; its sums are ordered by the groups below that level."""
    group_M = relays.group_LM[level - 1]
    blocks, lower, sends = [left_m], [torch.full_like(left_m, group_M[relays.node])], {}
    for rank, node in enumerate(relays.node_of):
        if relays.level(relays.node, node) == level:
            block = [onward[s, node] for s in relays.served if relays.relay_PM[s][node] == rank]
            sends[rank] = sum(map(len, block))
            blocks += block
            lower += [torch.full_like(copy_m, group_M[node]) for copy_m in block]
    sum_m = torch.cat(blocks)
    stage = plan_stage(sum_m, torch.cat(lower), 1 + max(group_M))
    return Hop(level, sum_m[len(left_m) :], _splits(relays, sends), receive_splits, stage)


def _own_copies(
    own_P: Sequence[Told], copies: Copies, position_n: torch.Tensor, relays: Relays
) -> tuple[dict[tuple[int, int], torch.Tensor], dict[tuple[int, int], torch.Tensor]]:
    """This rank's tokens to send to each node, and those for each rank of its own node."""
    me, none = relays.rank, position_n[:0]
    blocks = _forwarded(own_P, copies, relays)
    onward = {
        (me, node): blocks.get((relays.node, node), none) for node in range(len(relays.nodes))
    }
    choices_P = position_n.split([*map(sum, counts_for_ranks(own_P, relays))])
    return onward, {(me, p): choices_P[p] for p in relays.nodes[relays.node]}


def _relayed(
    source: int,
    copy_m: torch.Tensor,
    told: Told,
    onward: dict[tuple[int, int], torch.Tensor],
    choices: dict[tuple[int, int], torch.Tensor],
    relays: Relays,
) -> None:
    """Deal out the copies that this rank sends on for ``source``, as it told them."""
    near = relays.nodes[relays.node]
    pieces = copy_m.split([*told.forward_M, *map(sum, told.choices_pE)])
    onward |= {(source, node): pieces[node] for node in range(len(relays.nodes))}
    choices |= dict(zip([(source, p) for p in near], pieces[len(relays.nodes) :], strict=True))


def _arrivals(
    told_P: Sequence[Told], num_own: int, relays: Relays
) -> tuple[dict[int, list[int]], list[tuple[int, ...]]]:
    """First copy of what comes for a source from each node; rows from each rank by level."""
    start_of = {source: [0] * len(relays.nodes) for source in relays.served}
    receive_LP: list[tuple[int, ...]] = []
    place = num_own
    for level in range(relays.num_levels, 0, -1):
        rows = {}
        for rank, node in enumerate(relays.node_of):
            if relays.level(relays.node, node) != level:
                continue
            rows[rank] = 0
            for source in relays.served:
                if relays.relay_PM[source][node] == rank:
                    start_of[source][node] = place
                    place += told_P[source].arrive_M[node]
                    rows[rank] += told_P[source].arrive_M[node]
        receive_LP.insert(0, _splits(relays, rows))
    return start_of, receive_LP


def _rows_through(relay: int, told_P: Sequence[Told], relays: Relays) -> int:
    """Rows for this rank's experts that a rank of its node passes on."""
    own = relays.nodes[relays.node].index(relays.rank)
    return sum(
        sum(told_P[source].choices_pE[own])
        for source in range(len(relays.node_of))
        if relays.relay_PM[source][relays.node] == relay
    )


def source_order(relays: Relays) -> list[int]:
    """Sources of the rows for this rank's experts, in the order in which a part's rows arrive."""
    return [
        source
        for relay in sorted(relays.nodes[relays.node])
        for source in range(len(relays.node_of))
        if relays.relay_PM[source][relays.node] == relay
    ]


def row_places(
    received_cPE: Sequence[Sequence[Sequence[int]]], sources: Sequence[int], device: torch.device
) -> list[torch.Tensor]:
    """Place of every arriving row of each part: by expert, then by source, then by part.

    Rows of a part arrive by source, in the order of ``sources``, then by expert.

    Examples
    --------
    >>> received_cPE = [[[1, 2]], [[1, 0]]]  # two parts, one source, two experts
    >>> [place.tolist() for place in row_places(received_cPE, [0], torch.device("cpu"))]
    [[0, 2, 3], [1]]
    """
    num_ranks, num_local = len(received_cPE[0]), len(received_cPE[0][0])
    start_cPE = [[[0] * num_local for _ in range(num_ranks)] for _ in received_cPE]
    place = 0
    for expert in range(num_local):
        for source in range(num_ranks):
            for part, counts_PE in enumerate(received_cPE):
                start_cPE[part][source][expert] = place
                place += counts_PE[source][expert]
    places = []
    for counts_PE, start_PE in zip(received_cPE, start_cPE, strict=True):
        counts = [counts_PE[source][expert] for source in sources for expert in range(num_local)]
        starts = [start_PE[source][expert] for source in sources for expert in range(num_local)]
        begins = [0, *accumulate(counts)]
        shift = torch.tensor([a - b for a, b in zip(starts, begins, strict=False)], device=device)
        row_R = torch.arange(sum(counts), device=device)
        places.append(row_R + shift[repeated(counts, device)])
    return places


def _splits(relays: Relays, rows: dict[int, int]) -> tuple[int, ...]:
    return tuple(rows.get(rank, 0) for rank in range(len(relays.node_of)))


def _ranges(starts: Iterable[int], counts: Iterable[int], like: torch.Tensor) -> torch.Tensor:
    pieces = [
        torch.arange(start, start + count, device=like.device)
        for start, count in zip(starts, counts, strict=True)
        if count
    ]
    return torch.cat([like, *pieces])
