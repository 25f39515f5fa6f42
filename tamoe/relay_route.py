"""From the counts and positions of a dispatch to the hops of a hierarchical exchange.

A rank holds copies of the tokens that it relays: its own T tokens first, then what each hop brings,
highest switches first. Every hop is a list of copies to send on and of how many rows go where; the
last one stays inside the node and brings a row to each expert.

Shape suffixes: T tokens, M nodes, P ranks, L levels, E experts of a rank, C parts, n choices that
were not dropped, m copies.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tamoe.host_table import table_on
from tamoe.row_order import ranges, repeated
from tamoe.shares import Share, Told, counts_for_ranks
from tamoe.solver.relays import Relays
from tamoe.summation import Stage, plan_stage


@dataclass(frozen=True, eq=False)
class Hop:
    """Copies that travel together."""

    level: int  # of the switches that they cross; 0 inside the node
    copy_m: torch.Tensor  # which copies to send, sorted by the rank that they go to
    send_splits: tuple[int, ...]
    receive_splits: tuple[int, ...]

    @property
    def num_received(self) -> int:
        """Rows that this hop brings."""
        return sum(self.receive_splits)


@dataclass(frozen=True, eq=False)
class Hops:
    """All hops of a dispatch, highest switches first, the one inside the node last."""

    between: tuple[Hop, ...]
    inside: Hop
    stages: tuple[Stage, ...]  # for each hop: adds what comes back by it to the sums so far
    token_m: torch.Tensor  # token of each sum at the end of the way back
    most_rows: int  # that a rank of the node sends or gets inside it

    @property
    def all(self) -> tuple[Hop, ...]:
        """In order."""
        return (*self.between, self.inside)


# ---- what ranks tell each other ---------------------------------------------------------------


def positions_to_tell(share: Share, relays: Relays) -> list[torch.Tensor]:
    """Places of this rank's tokens in lists of copies, that each rank needs to know.

    A relay gets the places of the copies to send on, by target node, then those of the choices, by
    expert. Other ranks get nothing, nor does this one: on its own node it has the choices.
    """
    blocks = _forwarded(share, relays)
    choices_P = share.position_n.split([*map(sum, counts_for_ranks(share.own_M, relays))])
    tell = []
    for rank, node in enumerate(relays.node_of):
        if node == relays.node or relays.relay_PM[relays.rank][node] != rank:
            tell.append(share.position_n[:0])
            continue
        onward = [
            share.copies.position_TM[blocks[node, target], node]
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


def _forwarded(share: Share, relays: Relays) -> dict[tuple[int, int], torch.Tensor]:
    """Tokens of this rank that are copied from a node to a node; only pairs that have some."""
    counts = {
        (source, target): count
        for target, own in enumerate(share.own_M)
        for source, count in enumerate(own.arrive_M)
        if count
    }
    blocks = share.copies.entry_m.split(list(counts.values()))
    return dict(zip(counts, blocks, strict=False))


# ---- hops -------------------------------------------------------------------------------------


def first_hop(share: Share, relays: Relays) -> Hop:
    """The hop of the highest switches: this rank's own tokens set out, as it routed them."""
    level = relays.num_levels
    none = share.copies.entry_m[:0]
    onward = _own_onward(share, relays, none)
    blocks, sends = _blocks(level, onward, relays)
    receive_splits = _arrivals(share, relays)[1][level - 1]
    return Hop(level, torch.cat([none, *blocks]), _splits(relays, sends), receive_splits)


def plan_hops(share: Share, heard_P: Sequence[torch.Tensor], relays: Relays) -> Hops:
    """Every hop of one part.

    Parameters
    ----------
    share
        The part.
    heard_P
        Places that each rank told this one, from :func:`positions_to_tell`.
    relays
        Who relays.
    """
    me, near, none = relays.rank, sorted(relays.nodes[relays.node]), share.position_n[:0]
    onward = _own_onward(share, relays, none)
    choices_P = share.position_n.split([*map(sum, counts_for_ranks(share.own_M, relays))])
    choices = {(me, p): choices_P[p] for p in near}
    start_of, receive_LP = _arrivals(share, relays)
    for source in relays.served:
        if relays.node_of[source] != relays.node:
            told = share.told_P[source]
            slot_m = ranges(start_of[source], told.arrive_M, none.device)
            _relayed(source, slot_m[heard_P[source].long()], told, onward, choices, relays)
    rows_pp = _rows_inside(share.told_P, relays)
    blocks = [torch.cat([none, *(choices[s, p] for s in relays.served)]) for p in near]
    copy_m = torch.cat(blocks)
    inside = Hop(
        0,
        copy_m,
        _splits(relays, {p: len(block) for p, block in zip(near, blocks, strict=True)}),
        _splits(relays, {p: rows_pp[p, me] for p in near}),
    )
    # A copy comes only to a node that hosts one of its experts, so all that came have a sum; of
    # this rank's own tokens those that reach so far.
    num_sums = [
        reached + sum(map(sum, receive_LP[level:])) for level, reached in enumerate(share.reach_L)
    ]
    stages = [plan_stage(copy_m, torch.zeros_like(copy_m), 1, num_sums[0])]
    sums_m = copy_m[stages[0].first_m]  # copies that have a sum so far, ascending
    between: list[Hop] = []
    for level in range(1, 1 + relays.num_levels):
        receive_splits = receive_LP[level - 1]
        left_m = sums_m[: len(sums_m) - sum(receive_splits)]  # the others go back by this hop
        hop, stage = _hop(level, receive_splits, left_m, onward, num_sums[level], relays)
        sums_m = torch.cat([left_m, hop.copy_m])[stage.first_m]
        between.insert(0, hop)
        stages.insert(0, stage)
    ways = [(sum(rows_pp[i, j] for j in near), sum(rows_pp[j, i] for j in near)) for i in near]
    most_rows = max(map(max, ways))
    return Hops(tuple(between), inside, tuple(stages), sums_m, most_rows)


def _hop(
    level: int,
    receive_splits: tuple[int, ...],
    left_m: torch.Tensor,
    onward: dict[tuple[int, int], torch.Tensor],
    num_sums: int,
    relays: Relays,
) -> tuple[Hop, Stage]:
    """The hop between nodes of one level; its sums are ordered by the groups below that level."""
    group_M = relays.group_LM[level - 1]
    blocks, sends = _blocks(level, onward, relays)
    copy_m = torch.cat([left_m[:0], *blocks])
    ranks = repeated(_splits(relays, sends), left_m.device)
    group_P = table_on(left_m.device, [group_M[node] for node in relays.node_of])
    lower_m = torch.cat([torch.full_like(left_m, group_M[relays.node]), group_P[ranks]])
    stage = plan_stage(torch.cat([left_m, copy_m]), lower_m, 1 + max(group_M), num_sums)
    return Hop(level, copy_m, _splits(relays, sends), receive_splits), stage


def _blocks(
    level: int, onward: dict[tuple[int, int], torch.Tensor], relays: Relays
) -> tuple[list[torch.Tensor], dict[int, int]]:
    """Copies to send by the hop of a level, by target rank, and how many go to each."""
    blocks, sends = [], {}
    for rank, node in enumerate(relays.node_of):
        if relays.level(relays.node, node) == level:
            block = [
                onward[s, node]
                for s in relays.served
                if relays.relay_PM[s][node] == rank and (s, node) in onward
            ]
            sends[rank] = sum(map(len, block))
            blocks += block
    return blocks, sends


def _own_onward(
    share: Share, relays: Relays, none: torch.Tensor
) -> dict[tuple[int, int], torch.Tensor]:
    """This rank's own tokens to send to each node."""
    blocks = _forwarded(share, relays)
    return {
        (relays.rank, node): blocks.get((relays.node, node), none)
        for node in range(len(relays.nodes))
    }


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


def _arrivals(share: Share, relays: Relays) -> tuple[dict[int, list[int]], list[tuple[int, ...]]]:
    """First copy of what comes for a source from each node; rows from each rank by level."""
    start_of = {source: [0] * len(relays.nodes) for source in relays.served}
    receive_LP: list[tuple[int, ...]] = []
    place, told_P = share.copies.num_tokens, share.told_P
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


def _rows_inside(told_P: Sequence[Told], relays: Relays) -> dict[tuple[int, int], int]:
    """Rows that each rank of this node passes on to each; all its ranks agree."""
    near = relays.nodes[relays.node]
    rows_pp = dict.fromkeys(itertools.product(near, near), 0)
    for relay_M, told in zip(relays.relay_PM, told_P, strict=True):
        for rank, counts_E in zip(near, told.choices_pE, strict=True):
            rows_pp[relay_M[relays.node], rank] += sum(counts_E)
    return rows_pp


def source_order(relays: Relays) -> list[int]:
    """Sources of the rows for this rank's experts, in the order in which a part's rows arrive."""
    return [
        source
        for relay in sorted(relays.nodes[relays.node])
        for source in range(len(relays.node_of))
        if relays.relay_PM[source][relays.node] == relay
    ]


def _splits(relays: Relays, rows: dict[int, int]) -> tuple[int, ...]:
    return tuple(rows.get(rank, 0) for rank in range(len(relays.node_of)))
