"""Who measures with whom, and when: rounds of pairs that do not share a node or a switch.

The circle method pairs ``n`` members in ``n - 1`` rounds (``n`` if odd), every pair once. Applied
to ranks it would put several flows on one NIC and read half the link, so it is applied to nodes,
with one active rank in each, and to the children of a switch, with one active rank below each.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import chain

RankPair = tuple[int, int]
Round = tuple[RankPair, ...]


def circle_rounds(count: int) -> tuple[Round, ...]:
    """Rounds of disjoint pairs of ``range(count)`` in which every pair meets exactly once.

    Parameters
    ----------
    count
        Number of members, >= 0.

    Returns
    -------
    tuple of rounds
        ``count - 1`` rounds, ``count`` if it is odd: then each member rests once.

    Examples
    --------
    >>> circle_rounds(4)
    (((0, 3), (1, 2)), ((3, 1), (2, 0)), ((2, 3), (0, 1)))
    """
    if count < 2:
        return ()
    size = count + count % 2  # an odd count gets a ghost; whoever meets it rests
    turning = size - 1
    rounds = []
    for turn in range(turning):
        # One member stays, the others turn. Its side alternates, so that everyone begins
        # about half of its pairs.
        pairs = [(turn, turning) if turn % 2 == 0 else (turning, turn)]
        pairs += [((turn + k) % turning, (turn - k) % turning) for k in range(1, size // 2)]
        rounds.append(tuple(pair for pair in pairs if max(pair) < count))
    return tuple(rounds)


def group_rounds(groups: Sequence[Sequence[int]], seed: int | None = None) -> tuple[Round, ...]:
    """Rounds in which every two groups of ranks meet once, with one active rank in each.

    The active rank of a group moves on from round to round, so that other NICs and other paths
    take part. Equal positions in the groups meet (the same rail).

    Parameters
    ----------
    groups
        Ranks of each group (the ranks of a node, or all ranks below a switch); none is empty.
    seed
        Order of the groups: random from this seed, as given if None.

    Returns
    -------
    tuple of rounds

    Examples
    --------
    >>> group_rounds([(0, 1), (2, 3), (4, 5)])
    (((2, 4),), ((5, 1),), ((0, 2),))
    """
    order = list(range(len(groups)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    return tuple(
        tuple((_active(groups[order[a]], turn), _active(groups[order[b]], turn)) for a, b in pairs)
        for turn, pairs in enumerate(circle_rounds(len(groups)))
    )


def _active(ranks: Sequence[int], turn: int) -> int:
    return ranks[turn % len(ranks)]


def local_rounds(
    nodes: Sequence[Sequence[int]],
    machine_of_node: Sequence[int],
    limit: int | None = None,
    pairs_per_node: int | None = None,
) -> tuple[Round, ...]:
    """Rounds of pairs inside the nodes, all nodes at once.

    Parameters
    ----------
    nodes
        Ranks of each node.
    machine_of_node
        Number of the machine whose processors the node uses. Emulated nodes share one.
    limit
        Most pairs that may be active on a machine at once; None for no limit. Ranks that share
        processors measure each other's computing, not the link.
    pairs_per_node
        Most pairs of a node; the first rounds of the circle are kept. None for all.

    Returns
    -------
    tuple of rounds

    Examples
    --------
    >>> local_rounds([(0, 1), (2, 3)], [0, 1])
    (((0, 1), (2, 3)),)
    >>> local_rounds([(0, 1), (2, 3)], [0, 0], limit=1)
    (((0, 1),), ((2, 3),))
    """
    waiting: dict[int, list[Round]] = {}
    for ranks, machine in zip(nodes, machine_of_node, strict=True):
        left = len(ranks) ** 2 if pairs_per_node is None else pairs_per_node
        for turn, pairs in enumerate(circle_rounds(len(ranks))):
            kept = tuple((ranks[a], ranks[b]) for a, b in pairs[:left])
            left -= len(kept)
            turns = waiting.setdefault(machine, [])
            turns.extend([()] * (turn + 1 - len(turns)))
            turns[turn] += kept
    per_machine = [
        list(chain.from_iterable(split_round(pairs, limit) for pairs in turns))
        for turns in waiting.values()
    ]
    length = max(map(len, per_machine), default=0)
    return tuple(
        tuple(chain.from_iterable(rounds[turn] for rounds in per_machine if turn < len(rounds)))
        for turn in range(length)
    )


def split_round(pairs: Round, limit: int | None) -> list[Round]:
    """A round cut into rounds of at most ``limit`` pairs; empty ones are left out.

    >>> split_round(((0, 1), (2, 3), (4, 5)), 2)
    [((0, 1), (2, 3)), ((4, 5),)]
    """
    step = len(pairs) if limit is None else max(1, limit)
    return [pairs[start : start + step] for start in range(0, len(pairs), max(1, step))]


def flows_between(
    sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], most: int = 64
) -> Round:
    """One-to-one flows from the ranks of some nodes to the ranks of others, spread evenly.

    Every rank takes part in one flow at most. Nodes are served in turn, so that a few flows
    already use all of them.

    >>> flows_between([(0, 1), (2, 3)], [(4, 5)])
    ((0, 4), (2, 5))
    """
    return tuple(zip(in_turn(sources)[:most], in_turn(targets)[:most], strict=False))


def in_turn(groups: Sequence[Sequence[int]]) -> list[int]:
    """The first of every group, then the second of every group, and so on.

    >>> in_turn([(0, 1, 2), (3,), (4, 5)])
    [0, 3, 4, 1, 5, 2]
    """
    longest = max(map(len, groups), default=0)
    return [ranks[i] for i in range(longest) for ranks in groups if i < len(ranks)]
