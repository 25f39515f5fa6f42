"""Levels of a cluster from times alone: single linkage on the logarithm of a message's time.

Single linkage gives the subdominant ultrametric: the distance of two members is the worst step of
the best relay path between them, which is what a tree of links does to a flow. One bad pair never
splits a group, because the others of the group are still near.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tamoe.topology.errors import InputError

MIN_JUMP = math.log(1.15)  # a smaller step in time is no level
MIN_CORRELATION = 0.95  # below it, or above MAX_DEVIATION, the times are not those of a tree
MAX_DEVIATION = 0.3  # in log time

Partition = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Levels:
    """Partitions found in a matrix of times, finest first, and how tree-like the matrix is.

    ``jumps`` are the steps in log time above each partition. ``correlation`` is the cophenetic
    one, ``max_deviation`` the largest difference between log time and the tree's.
    """

    partitions: tuple[Partition, ...]
    jumps: tuple[float, ...]
    correlation: float
    max_deviation: float

    @property
    def is_tree(self) -> bool:
        """Whether a tree explains the times."""
        return self.correlation >= MIN_CORRELATION and self.max_deviation <= MAX_DEVIATION


@dataclass(frozen=True)
class Group:
    """Members below one switch: numbers of nodes, or groups below further switches."""

    children: tuple[Group | int, ...]

    @property
    def members(self) -> tuple[int, ...]:
        """Every node below, in increasing order."""
        return tuple(sorted(m for child in self.children for m in members_of(child)))

    @property
    def depth(self) -> int:
        """1 for a switch with nodes alone, one more for each level of switches below."""
        return 1 + max((c.depth for c in self.children if isinstance(c, Group)), default=0)

    def groups(self) -> Iterator[Group]:
        """This group and all below, parents first."""
        yield self
        for child in self.children:
            if isinstance(child, Group):
                yield from child.groups()


def members_of(child: Group | int) -> tuple[int, ...]:
    """Nodes below a child of a group.

    >>> members_of(3), members_of(Group((Group((0, 2)), 1)))
    ((3,), (0, 1, 2))
    """
    return (child,) if isinstance(child, int) else child.members


def find_levels(time_s: np.ndarray | Sequence[Sequence[float]], noise: float = 0.0) -> Levels:
    """Groups of members that are nearer to each other than to the rest, at every level.

    Parameters
    ----------
    time_s
        ``[n, n]``, time of one message of the same size between every two members, in seconds,
        > 0 off the diagonal. The slower direction of two counts.
    noise
        Median ``|log|`` of the ratio of repeated samples. A level is a jump of more than
        ``max(log 1.15, 5 * noise)`` between consecutive merge heights.

    Returns
    -------
    Levels
        Without partitions where all members are equally near.

    Raises
    ------
    InputError
        The matrix is not square, or a time is not finite and > 0.

    Examples
    --------
    >>> near, far = 1e-3, 5e-3
    >>> find_levels([[0, near, far], [near, 0, far], [far, far, 0]]).partitions
    (((0, 1), (2,)),)
    """
    distance_NN = _log_distance(time_s)
    count = len(distance_NN)
    if count < 2:
        return Levels((), (), 1.0, 0.0)
    from scipy.cluster.hierarchy import cophenet, fcluster, linkage
    from scipy.spatial.distance import squareform

    condensed = squareform(distance_NN, checks=False)
    merges = linkage(condensed, "single")
    heights = merges[:, 2]
    steps = np.diff(heights)
    cuts = np.flatnonzero(steps > max(MIN_JUMP, 5 * noise))
    partitions = [
        _partition(fcluster(merges, (heights[k] + heights[k + 1]) / 2, "distance")) for k in cuts
    ]
    tree = cophenet(merges)
    return Levels(
        tuple(partitions),
        tuple(float(steps[k]) for k in cuts),
        _correlation(tree, condensed),
        float(np.abs(tree - condensed).max()),
    )


def _log_distance(time_s: Any) -> np.ndarray:
    matrix = np.asarray(time_s, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise InputError(f"time_s has shape {matrix.shape}; allowed: (members, members)")
    off = ~np.eye(len(matrix), dtype=bool)
    if not (np.isfinite(matrix[off]).all() and (matrix[off] > 0).all()):
        raise InputError("time_s has entries that are not finite and > 0 off its diagonal")
    both = np.maximum(matrix, matrix.T)
    np.fill_diagonal(both, 1.0)
    distance = np.log(both) - (np.log(both[off].min()) if off.any() else 0.0)
    np.fill_diagonal(distance, 0.0)
    return distance


def _correlation(tree: np.ndarray, condensed: np.ndarray) -> float:
    # Where all distances are alike there is nothing to correlate; what deviates is noise.
    if np.ptp(condensed) < MIN_JUMP or np.ptp(tree) < MIN_JUMP / 10:
        return 1.0
    return float(np.corrcoef(tree, condensed)[0, 1])


def _partition(labels: np.ndarray) -> Partition:
    groups: dict[int, list[int]] = {}
    for member, label in enumerate(labels):
        groups.setdefault(int(label), []).append(member)
    return tuple(sorted(tuple(group) for group in groups.values()))


def group_tree(count: int, partitions: Sequence[Partition]) -> Group:
    """The tree of groups that nested partitions of ``range(count)`` describe.

    A group with one member is that member, one equal to its only child is that child.

    Examples
    --------
    >>> group_tree(3, [((0, 1), (2,))])
    Group(children=(Group(children=(0, 1)), 2))
    """
    current: dict[int, Group | int] = {member: member for member in range(count)}
    for partition in (*partitions, (tuple(range(count)),)):
        merged: dict[int, Group | int] = {}
        for group in partition:
            inside = [current[member] for member in sorted(group) if member in current]
            merged[min(group)] = inside[0] if len(inside) == 1 else Group(tuple(inside))
        current = merged
    (root,) = current.values()
    return root if isinstance(root, Group) else Group((root,))


def prune(tree: Group, keep: Callable[[Group], bool]) -> Group:
    """The tree without the groups below its root that are not kept; their children move up.

    >>> prune(Group((Group((0, 1)), 2)), lambda group: False)
    Group(children=(0, 1, 2))
    """
    children: list[Group | int] = []
    for child in tree.children:
        if isinstance(child, int):
            children.append(child)
            continue
        pruned = prune(child, keep)
        # Judged as it was measured, before its own children moved.
        children.extend([pruned] if keep(child) else pruned.children)
    return Group(tuple(sorted(children, key=lambda child: members_of(child)[0])))


def best_partition(levels: Levels, reference: Partition) -> tuple[Partition, float]:
    """The measured partition that is nearest to another one, and their adjusted Rand index.

    All members together and every member alone are candidates too.

    >>> levels = find_levels([[0, 1, 9], [1, 0, 9], [9, 9, 0]])
    >>> best_partition(levels, ((0, 1), (2,)))
    (((0, 1), (2,)), 1.0)
    """
    members = sorted(member for group in reference for member in group)
    candidates: list[Partition] = list(levels.partitions)
    candidates += [(tuple(members),), tuple((member,) for member in members)]
    scores = [adjusted_rand_index(candidate, reference) for candidate in candidates]
    best = int(np.argmax(scores))
    return candidates[best], scores[best]


def adjusted_rand_index(first: Partition, second: Partition) -> float:
    """Agreement of two partitions of the same members: 1 for equal ones, about 0 by chance.

    Hubert and Arabie, Journal of Classification 2, 1985.

    >>> adjusted_rand_index(((0, 1), (2, 3)), ((2, 3), (0, 1)))
    1.0
    >>> round(adjusted_rand_index(((0, 1), (2, 3)), ((0, 2), (1, 3))), 3)
    -0.5
    """
    total = sum(map(len, first))
    both = sum(math.comb(len(set(a) & set(b)), 2) for a in first for b in second)
    pairs_first = sum(math.comb(len(group), 2) for group in first)
    pairs_second = sum(math.comb(len(group), 2) for group in second)
    chance = pairs_first * pairs_second / max(1, math.comb(total, 2))
    most = (pairs_first + pairs_second) / 2
    return 1.0 if most == chance else (both - chance) / (most - chance)
