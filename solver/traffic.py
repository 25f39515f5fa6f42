"""What each exchange moves between ranks: rows of every hop of a dispatch; combine goes back.

The flat exchange sends a row for each (token, expert). The hierarchical one sends a copy of a token
to each node that hosts one of its experts, then a row for each expert inside that node.

Shape suffixes: P ranks, N experts of a group, M nodes, L levels of sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tamoe.solver.relays import make_relays, sum_groups
from tamoe.topology.graph import Topology


def flat_rows(counts_PN: np.ndarray, rank_of_N: Sequence[int]) -> np.ndarray:
    """Rows that each rank sends to each rank in a flat dispatch, ``[P, P]``.

    Parameters
    ----------
    counts_PN
        ``[P, N]``, tokens that each rank sends to each expert.
    rank_of_N
        Rank of each expert.

    Examples
    --------
    >>> flat_rows(np.array([[1, 2, 3, 4], [0, 0, 0, 5]]), [0, 0, 1, 1]).tolist()
    [[3.0, 7.0], [0.0, 5.0]]
    """
    rows_PP = np.zeros((len(counts_PN), len(counts_PN)))
    np.add.at(rows_PP.T, np.asarray(rank_of_N), np.asarray(counts_PN, dtype=np.float64).T)
    return rows_PP


def hierarchical_rows(
    topology: Topology,
    counts_PN: np.ndarray,
    forward_PMM: np.ndarray,
    rank_of_N: Sequence[int],
) -> list[np.ndarray]:
    """Rows of each hop of a hierarchical dispatch: highest switches first, inside nodes last.

    Parameters
    ----------
    topology
        Nodes and the switches above them.
    counts_PN
        ``[P, N]``, tokens that each rank sends to each expert.
    forward_PMM
        ``[P, M, M]``, tokens of each rank that are copied from a node to a node.
    rank_of_N
        Rank of each expert.

    Returns
    -------
    list
        ``[P, P]`` for each hop: rows from rank to rank.

    Examples
    --------
    >>> topology = Topology.from_tree("2x2", bandwidth_bytes_per_s=(4e9, 1e9))
    >>> forward_PMM = np.zeros((4, 2, 2))
    >>> forward_PMM[1, 0, 1] = 6  # six tokens of rank 1 have experts on the second node
    >>> counts_PN = np.array([[0, 0, 0, 0], [0, 0, 4, 5], [0, 0, 0, 0], [0, 0, 0, 0]])
    >>> between, inside = hierarchical_rows(topology, counts_PN, forward_PMM, range(4))
    >>> np.argwhere(between).tolist(), int(between[1, 3])  # rank 3 is its relay there
    ([[1, 3]], 6)
    >>> inside[3].tolist()
    [0.0, 0.0, 4.0, 5.0]
    """
    relays = make_relays(0, topology.nodes, sum_groups(topology))
    num_ranks = topology.num_ranks
    hops = np.zeros((relays.num_levels + 1, num_ranks, num_ranks))
    inside_PP = flat_rows(counts_PN, rank_of_N)
    for source in range(num_ranks):
        relay_M = relays.relay_PM[source]
        for target_node, source_node in np.argwhere(forward_PMM[source].T):
            level = relays.level(source_node, target_node)
            hop = relays.num_levels - level
            sender, receiver = relay_M[source_node], relay_M[target_node]
            hops[hop, sender, receiver] += forward_PMM[source, source_node, target_node]
        for rank, node in enumerate(relays.node_of):
            hops[-1, relay_M[node], rank] += inside_PP[source, rank]
    return list(hops)


def sum_rows(rows_P: np.ndarray, sums_PL: np.ndarray) -> np.ndarray:
    """Sums that a flat combine makes of a rank's rows, and adds up again, ``[P]``.

    A token's rows are added up for each node, then for each upper level of switches, then for the
    token. A level that would leave as many sums as there were is left out.

    Parameters
    ----------
    rows_P
        Rows of the tokens of each rank.
    sums_PL
        ``[P, L + 1]``, sums at each level, then tokens that have a row.

    Examples
    --------
    Of 15 rows of five tokens, 10 sums are made for two nodes, and 5 of those.

    >>> sum_rows(np.array([15.0]), np.array([[10.0, 5.0]])).tolist()
    [25.0]
    """
    left_P, found_P = rows_P, np.zeros(len(rows_P))
    for sums_P in sums_PL.T:
        added_P = sums_P + np.where(found_P > 0, left_P, 0.0)  # of rows that were sums themselves
        found_P = found_P + np.where(sums_P < left_P, added_P, 0.0)
        left_P = sums_P
    return np.maximum(found_P, left_P)


def told_bytes(
    topology: Topology,
    counts_PN: np.ndarray,
    forward_PMM: np.ndarray,
    rank_of_N: Sequence[int],
    *,
    weight_bytes: int = 4,
) -> np.ndarray:
    """Bytes beside the rows of a hierarchical dispatch, from rank to rank, ``[P, P]``.

    A relay is told which copies to send on, 4 bytes each; the rank of an expert gets the weights.
    The other arguments are those of :func:`hierarchical_rows`.

    Parameters
    ----------
    weight_bytes
        Of a weight as it travels: 4, 8 for rows of float64, 0 without weights.

    Examples
    --------
    >>> topology = Topology.from_tree("2x1", bandwidth_bytes_per_s=(4e9, 1e9))
    >>> counts_PN, forward_PMM = np.array([[0, 3], [0, 0]]), np.zeros((2, 2, 2))
    >>> told_bytes(topology, counts_PN, forward_PMM, range(2)).tolist()
    [[0.0, 24.0], [0.0, 0.0]]
    """
    relays = make_relays(0, topology.nodes, sum_groups(topology))
    rows_PP = flat_rows(counts_PN, rank_of_N)
    told_PP = rows_PP * weight_bytes
    for source, own in enumerate(relays.node_of):
        for node, ranks in enumerate(relays.nodes):
            if node != own:
                onward = forward_PMM[source, node].sum()
                choices = rows_PP[source, list(ranks)].sum()
                told_PP[source, relays.relay_PM[source][node]] += 4 * (onward + choices)
    return told_PP
