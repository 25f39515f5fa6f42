"""What each way of each exchange moves between the ranks of a group, and works on beside.

Shape suffixes: p ranks of a group, N experts of it, M nodes, L levels of sums.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from tamoe.solver.parts import num_parts, part_shares, slices_for
from tamoe.solver.traffic import flat_rows, hierarchical_rows, sum_rows, told_bytes
from tamoe.topology.graph import Topology

Exchange = Literal["flat single", "flat rounds", "hierarchical"]
Way = Literal["dispatch", "combine", "combine_backward", "dispatch_backward"]
EXCHANGES: tuple[Exchange, ...] = ("flat single", "flat rounds", "hierarchical")
WAYS: tuple[Way, ...] = ("dispatch", "combine")  # measured, with constants of their own
# Gradients go the other way: combine's as tokens do in a dispatch, dispatch's as sums in a combine.
ALL_WAYS: tuple[Way, ...] = (*WAYS, "combine_backward", "dispatch_backward")
Key = tuple[Exchange, Way]
KEYS: tuple[Key, ...] = tuple(itertools.product(EXCHANGES, WAYS))


@dataclass(frozen=True, eq=False)
class Rows:
    """Bytes of one group's dispatch, between its ranks by their place in the group.

    Parameters
    ----------
    ranks
        Ranks of the group.
    hops_pp
        ``[p, p]`` bytes of each hop: one for a flat exchange; for a hierarchical one those between
        nodes, highest switches first, then the one inside nodes.
    own_bytes_p
        Bytes of the tokens of each rank; of a flat combine, of the sums that it makes and of those
        that it adds up again, and in its backward pass, of products of rows.
    weights_pp
        ``[p, p]`` where a rank also tells another weights of rows, or in the backward pass hears of
        their gradients; a dispatch that does also tells where copies go. None: nothing is told.
    parts
        Shares of the tokens that travel together, in the order of a dispatch; of a flat exchange,
        of the rows, all equal.
    """

    ranks: tuple[int, ...]
    hops_pp: Sequence[np.ndarray]
    own_bytes_p: Sequence[float] = ()
    weights_pp: np.ndarray | None = None
    parts: Sequence[float] = (1.0,)


def rows_of_group(
    local: Topology,
    ranks: tuple[int, ...],
    counts_pN: np.ndarray,
    forward_pMM: np.ndarray,
    rank_of_N: Sequence[int],
    row_bytes: int,
    tokens_p: Sequence[float],
    sums_pL: np.ndarray,
) -> dict[tuple[str, str], Rows]:
    """What a group moves, for each way of each exchange, from its counts and touches.

    Parameters
    ----------
    local
        Topology of the group's ranks.
    ranks
        The group.
    counts_pN
        ``[p, N]`` tokens that each rank of the group sends to each of its experts.
    forward_pMM
        ``[p, M, M]`` tokens of each rank that are copied from a node to a node.
    rank_of_N
        Place in the group of the rank of each expert.
    row_bytes
        Bytes of a token.
    tokens_p
        Tokens of each rank of the group.
    sums_pL
        ``[p, L + 1]`` sums that each level makes of a rank's rows, from nodes up, then tokens that
        have a row.

    Examples
    --------
    >>> topology = Topology.from_tree("2x1", bandwidth_bytes_per_s=(4e9, 1e9))
    >>> counts_pN, forward_pMM = np.array([[0, 3], [0, 0]]), np.zeros((2, 2, 2))
    >>> sums_pL = np.array([[3, 3], [0, 0]])
    >>> rows = rows_of_group(topology, (0, 1), counts_pN, forward_pMM, (0, 1), 8, [3, 0], sums_pL)
    >>> rows["flat rounds", "combine"].hops_pp[0].tolist()
    [[0.0, 24.0], [0.0, 0.0]]
    """
    token_bytes_p = [tokens * row_bytes for tokens in tokens_p]
    flat_pp = flat_rows(counts_pN, rank_of_N) * row_bytes
    slices = slices_for(flat_pp.sum(1).max(initial=0.0))  # with drops a few more than these
    flat = Rows(ranks, [flat_pp], token_bytes_p, parts=[1 / slices] * slices)
    sent_p = flat_pp.sum(1)
    sums_bytes_p = sum_rows(sent_p, np.asarray(sums_pL) * row_bytes)
    of_flat = {
        "dispatch": flat,
        "combine": replace(flat, own_bytes_p=sums_bytes_p.tolist()),
        # Rows times weights, and with the rows that came, for gradients of weights.
        "combine_backward": replace(flat, own_bytes_p=(2 * sent_p).tolist()),
        "dispatch_backward": replace(flat, own_bytes_p=sums_bytes_p.tolist()),
    }
    hops = hierarchical_rows(local, counts_pN, forward_pMM, rank_of_N)
    hops_pp = [hop_pp * row_bytes for hop_pp in hops]
    position_pp = told_bytes(local, counts_pN, forward_pMM, rank_of_N)
    far_bytes_p = np.asarray(forward_pMM).sum((1, 2)) * row_bytes
    parts = part_shares(num_parts(max(token_bytes_p), max(far_bytes_p)))
    rows = Rows(ranks, hops_pp, token_bytes_p, parts=parts)
    weighed = replace(rows, weights_pp=flat_pp > 0)
    relayed = {
        "dispatch": replace(weighed, hops_pp=[hops_pp[0] + position_pp, *hops_pp[1:]]),
        "combine": rows,
        "combine_backward": rows,
        "dispatch_backward": weighed,
    }
    moved = {("hierarchical", way): of_way for way, of_way in relayed.items()}
    return moved | {(e, way): of_way for e in EXCHANGES[:2] for way, of_way in of_flat.items()}
