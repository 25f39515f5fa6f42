"""Which ranks pass a token on, so that it crosses the links of each node and switch once.

A token leaves its rank once for every group of nodes (highest switches first) that hosts one of
its experts, with one copy. In each group it lands on a node that hosts one, and is copied from
there to the others. On a node it lands on the rank with the local index of the token's own rank
(rail-aligned), which passes it on to the ranks of its experts. Sums travel the same way back.

Shape suffixes: M nodes, P ranks, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tamoe.topology.graph import Topology


@dataclass(frozen=True, eq=False)
class Relays:
    """The static part: who relays for whom, as one rank sees it.

    Parameters
    ----------
    rank
        This rank.
    nodes
        Ranks of each node.
    groups
        Group of each rank at each level of the sum, from :func:`sum_groups`.
    """

    rank: int
    nodes: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, ...], ...]
    node: int  # of this rank
    node_of: tuple[int, ...]
    group_LM: tuple[tuple[int, ...], ...]  # group of each node at each level
    relay_PM: tuple[tuple[int, ...], ...]  # rank that relays tokens of a rank on a node
    served: tuple[int, ...]  # ranks whose tokens this rank relays on its node, itself among them

    @property
    def num_levels(self) -> int:
        """Hops between nodes; one more stays inside the node."""
        return len(self.groups)

    def level(self, node: int, other: int) -> int:
        """Hop that connects two nodes: 1 for nodes of one lowest switch, 0 for the same node."""
        return sum(group_M[node] != group_M[other] for group_M in self.group_LM)


def make_relays(
    rank: int, nodes: tuple[tuple[int, ...], ...], groups: Sequence[Sequence[int]]
) -> Relays:
    """Work out who relays for whom.

    Examples
    --------
    >>> relays = make_relays(0, ((0, 1, 2), (3, 4)), ((0, 0, 0, 1, 1),))
    >>> relays.relay_PM  # ranks 0 and 2 share rank 3 as their relay on the second node
    ((0, 3), (1, 4), (2, 3), (0, 3), (1, 4))
    >>> make_relays(3, ((0, 1, 2), (3, 4)), ((0, 0, 0, 1, 1),)).served
    (0, 2, 3)
    """
    num_ranks = sum(map(len, nodes))
    node_of = [0] * num_ranks
    local_of = [0] * num_ranks
    for number, ranks in enumerate(nodes):
        for local, member in enumerate(ranks):
            node_of[member], local_of[member] = number, local
    relay_PM = tuple(
        tuple(ranks[local_of[source] % len(ranks)] for ranks in nodes)
        for source in range(num_ranks)
    )
    node = node_of[rank]
    return Relays(
        rank=rank,
        nodes=tuple(map(tuple, nodes)),
        groups=tuple(tuple(group) for group in groups),
        node=node,
        node_of=tuple(node_of),
        group_LM=tuple(tuple(group[ranks[0]] for ranks in nodes) for group in groups),
        relay_PM=relay_PM,
        served=tuple(s for s in range(num_ranks) if relay_PM[s][node] == rank),
    )


def sum_groups(topology: Topology | None) -> tuple[tuple[int, ...], ...]:
    """Group of each rank at each level of the sum: nodes, then the switches above them.

    The level that holds all ranks in one group is left out: it is the sum itself.

    Examples
    --------
    >>> sum_groups(Topology.from_tree([[2, 1], [1]], bandwidth_bytes_per_s=(4.0, 2.0, 1.0)))
    ((0, 0, 1, 2), (0, 0, 0, 1))
    >>> sum_groups(None)
    ()
    """
    if topology is None:
        return ()
    leaders = [ranks[0] for ranks in topology.nodes]
    level_of = [[topology.level(i, j) for j in leaders] for i in leaders]
    highest = max(max(row) for row in level_of)
    groups = [tuple(range(len(leaders)))]
    groups += [_connected(level_of, level) for level in range(1, highest)]
    by_rank = [tuple(of_node[node] for node in topology.node_of) for of_node in groups]
    distinct = dict.fromkeys(by_rank)
    return tuple(group for group in distinct if len(set(group)) > 1)


def _connected(level_of: Sequence[Sequence[int]], highest: int) -> tuple[int, ...]:
    """Number of each node's group when links up to a level are there; by first node."""
    group = list(range(len(level_of)))
    for i, row in enumerate(level_of):
        for j, level in enumerate(row):
            if level <= highest and group[i] != group[j]:
                old, new = max(group[i], group[j]), min(group[i], group[j])
                group = [new if g == old else g for g in group]
    number = {g: index for index, g in enumerate(sorted(set(group)))}
    return tuple(number[g] for g in group)
