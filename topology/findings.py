"""What stands out in a survey: slow nodes, slow links, pairs that differ by direction.

A node is slow when its own capacity is below that of its siblings, a link when one pair stays
behind what both of its ends reach with others. Both must exceed the noise by far, and a pair is
measured again, alone, before it is called slow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tamoe.topology.fit import PairFit, median
from tamoe.topology.hierarchy import (
    MIN_JUMP,
    Group,
    Levels,
    Partition,
    best_partition,
    find_levels,
    members_of,
)
from tamoe.topology.survey import SAME, Survey, capacity
from tamoe.topology.switches import MAJORITY
from tamoe.topology.times import limited_by_cpu, rank_times

SLOW_LATENCY = 2.1  # times the median of the level (ClusterKit's figure)
SYMMETRIC = 0.9  # ratio of the two directions below which a pair is called asymmetric
MAX_LINKAGE_RANKS = 2048  # a full matrix of times beyond this is not worth its minutes

RankPair = tuple[int, int]


@dataclass(frozen=True)
class SlowNode:
    """A node that one direction of its uplink holds back."""

    node: int
    direction: str  # "out" or "into"
    bandwidth_bytes_per_s: float
    siblings_bytes_per_s: float  # median of the other children of its switch


@dataclass(frozen=True)
class SlowLink:
    """A pair of ranks that stays behind what both reach with others."""

    source_rank: int
    target_rank: int
    bandwidth_bytes_per_s: float
    expected_bytes_per_s: float


def meeting_group(tree: Group, a: int, b: int) -> Group:
    """The lowest group that has both nodes.

    >>> meeting_group(Group((Group((0, 1)), 2)), 1, 2).depth
    2
    """
    for child in tree.children:
        if isinstance(child, Group) and {a, b} <= set(child.members):
            return meeting_group(child, a, b)
    return tree


def threshold(survey: Survey) -> float:
    """Least difference in log time that counts as slow."""
    return max(MIN_JUMP, 5 * survey.noise)


def expected_rates(survey: Survey, tree: Group) -> dict[RankPair, float]:
    """What each measured pair between nodes should get: the slower of its ends' usual rates.

    The usual rate of a node is the best that it reaches, out or in, with other nodes that meet it
    at the same switch.
    """
    meets = {ends: meeting_group(tree, *ends) for ends in survey.between()}
    rates: dict[tuple[int, str, Group], list[float]] = {}
    for (i, j), fit in _between(survey):
        a, b = survey.node_of[i], survey.node_of[j]
        for key in ((a, "out", meets[a, b]), (b, "into", meets[a, b])):
            rates.setdefault(key, []).append(fit.bandwidth_bytes_per_s)
    usual = {key: _usual(values) for key, values in rates.items()}
    expected = {}
    for (i, j), _ in _between(survey):
        a, b = survey.node_of[i], survey.node_of[j]
        expected[i, j] = min(usual[a, "out", meets[a, b]], usual[b, "into", meets[a, b]])
    return expected


def _usual(rates: list[float]) -> float:
    return median([rate for rate in rates if rate >= SAME * max(rates)])


def _between(survey: Survey) -> Iterable[tuple[RankPair, PairFit]]:
    return (
        (pair, fit)
        for pair, fit in survey.fits.items()
        if survey.node_of[pair[0]] != survey.node_of[pair[1]]
    )


def suspects(survey: Survey, tree: Group, *, latency: bool) -> tuple[RankPair, ...]:
    """Measured pairs between nodes that should be measured again, worst first.

    ``latency`` False leaves latencies out: ranks that share processors wait for each other, and
    what they see is the scheduler.
    """
    if limited_by_cpu(survey):
        return ()
    expected = expected_rates(survey, tree)
    usual_alpha = _usual_latencies(survey, tree) if latency else {}
    found: dict[RankPair, float] = {}
    for pair, fit in _between(survey):
        if pair in survey.copied:
            continue
        share = fit.bandwidth_bytes_per_s / expected[pair]
        if share < SAME:
            found[pair] = share
        ends = meeting_group(tree, survey.node_of[pair[0]], survey.node_of[pair[1]])
        if latency and fit.alpha_s > SLOW_LATENCY * usual_alpha[ends]:
            found.setdefault(pair, usual_alpha[ends] / fit.alpha_s)
    return tuple(sorted(found, key=lambda pair: found[pair]))


def _usual_latencies(survey: Survey, tree: Group) -> dict[Group, float]:
    values: dict[Group, list[float]] = {}
    for (i, j), fit in _between(survey):
        group = meeting_group(tree, survey.node_of[i], survey.node_of[j])
        values.setdefault(group, []).append(fit.alpha_s)
    return {group: median(alphas) for group, alphas in values.items()}


def slow_nodes(survey: Survey, tree: Group) -> tuple[SlowNode, ...]:
    """Nodes whose uplink is slower than those of the other children of their switch.

    Three nodes at least must be faster, or nothing says which of them is usual.
    """
    found: list[SlowNode] = []
    if limited_by_cpu(survey):
        return ()
    for group in tree.groups():
        for node in (child for child in group.children if isinstance(child, int)):
            others = [child for child in group.children if child != node]
            for out in (True, False):
                slow = _slower(survey, node, others, out)
                if slow is not None:
                    found.append(slow)
    return tuple(sorted(found, key=lambda slow: (slow.node, slow.direction)))


def _slower(survey: Survey, node: int, others: list[Group | int], out: bool) -> SlowNode | None:
    own = capacity(survey, [node], out=out)
    rates = {child: capacity(survey, members_of(child), out=out) for child in others}
    known = {child: rate for child, rate in rates.items() if rate is not None}
    if own is None or not known:
        return None
    usual = median(list(known.values()))
    limit = math.exp(threshold(survey))
    faster = [m for child, rate in known.items() if rate > own * limit for m in members_of(child)]
    if usual <= own * limit or len(faster) < MAJORITY:
        return None
    return SlowNode(node, "out" if out else "into", own, usual)


def slow_links(survey: Survey, tree: Group) -> tuple[SlowLink, ...]:
    """Measured pairs that stay behind what both of their ends reach with others."""
    if limited_by_cpu(survey):
        return ()
    limit = math.exp(threshold(survey))
    expected = expected_rates(survey, tree)
    return tuple(
        SlowLink(*pair, fit.bandwidth_bytes_per_s, expected[pair])
        for pair, fit in sorted(_between(survey))
        if pair not in survey.copied and fit.bandwidth_bytes_per_s * limit < expected[pair]
    )


def asymmetric_pairs(survey: Survey) -> tuple[RankPair, ...]:
    """Pairs between nodes whose two directions differ, the slower direction named."""
    found: list[RankPair] = []
    if limited_by_cpu(survey):
        return ()
    for (i, j), fit in _between(survey):
        back = survey.fits.get((j, i))
        if back is None or survey.copied & {(i, j), (j, i)}:
            continue
        if fit.bandwidth_bytes_per_s < SYMMETRIC * back.bandwidth_bytes_per_s:
            found.append((i, j))
    return tuple(sorted(found))


def partition_report(survey: Survey, hosts: Partition) -> dict[str, Any]:
    """The partition that the times alone give, compared with the hosts.

    ``adjusted_rand_index`` is 1 where both agree, null where times cannot tell: one host, one rank
    on each, or too many ranks for a full matrix.
    """
    count = len(survey.node_of)
    if not (1 < len(hosts) < count <= MAX_LINKAGE_RANKS) or not survey.fits:
        return {"measured": None, "adjusted_rand_index": None}
    levels = find_levels(rank_times(survey), survey.noise)
    measured, score = best_partition(levels, hosts)
    return {
        "measured": [list(group) for group in measured],
        "adjusted_rand_index": round(score, 6),
        "levels": len(levels.partitions),
    }


def tree_report(levels: Levels) -> dict[str, Any]:
    """How well a tree explains the times between nodes."""
    return {
        "is_tree": levels.is_tree,
        "cophenetic_correlation": round(levels.correlation, 4),
        "max_deviation": round(levels.max_deviation, 4),
        "jumps": [round(jump, 4) for jump in levels.jumps],
    }
