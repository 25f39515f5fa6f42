"""Which switches a survey speaks for: groups of nodes that a shared link holds back.

Two signs give a group away. One flow across its border is slower than both of its ends can do;
or one flow is not, but flows of several nodes at once are (an oversubscribed switch).
"""

from __future__ import annotations

import math

import numpy as np

from tamoe.topology.fit import median
from tamoe.topology.hierarchy import MIN_JUMP, Group, find_levels, group_tree, prune
from tamoe.topology.survey import Survey, Window, capacity
from tamoe.topology.times import held_back, limited_by_cpu, node_times

CONSTRAINED = 0.9  # a border that carries less than this share of what its nodes could is a switch
MAJORITY = 3  # nodes of equal speed that are needed to call another one slow


def candidate_tree(survey: Survey, *, met: bool = False) -> Group:
    """Switches that the times between nodes suggest, before any of them is judged.

    ``met``: from times as read in rounds of many pairs, before any was measured alone.
    """
    if limited_by_cpu(survey):
        return Group(tuple(range(len(survey.nodes))))
    levels = find_levels(_distances(survey, met=met), survey.noise)
    return group_tree(len(survey.nodes), levels.partitions)


def _distances(survey: Survey, *, met: bool = False) -> np.ndarray:
    """Times of one flow; pairs that a load holds back stand a clear step farther apart."""
    times_NN = node_times(survey, met=met)
    step = math.exp(2 * max(MIN_JUMP, 5 * survey.noise))
    for a, b in held_back(survey):
        times_NN[a, b] *= step
        times_NN[b, a] *= step
    return times_NN


def constrained(survey: Survey, group: Group) -> bool:
    """Whether the link above a group holds back what its nodes could exchange with the rest.

    Either one flow across it is slower than both of its ends can do, or many flows at once carry
    less than an even split of the ends' capacities would.
    """
    return _slow_across(survey, group) or any(
        window.total_bytes_per_s < CONSTRAINED * _possible(survey, window)
        for window in survey.windows
        if _leaves(survey, window, set(group.members))
    )


def _leaves(survey: Survey, window: Window, inside: set[int]) -> bool:
    """Whether all flows cross the border the same way, from or to more than one node inside."""
    ways = {tuple(survey.node_of[rank] in inside for rank in flow) for flow in window.flows}
    here = {survey.node_of[rank] for flow in window.flows for rank in flow} & inside
    # Flows of a single node say nothing of what its group can do.
    return ways in ({(True, False)}, {(False, True)}) and len(here) > 1


def _possible(survey: Survey, window: Window) -> float:
    node_of = survey.node_of
    sources = [node_of[i] for i, _ in window.flows]
    targets = [node_of[j] for _, j in window.flows]
    out = {n: capacity(survey, [n], out=True) or math.inf for n in set(sources)}
    into = {n: capacity(survey, [n], out=False) or math.inf for n in set(targets)}
    return math.fsum(
        min(out[a] / sources.count(a), into[b] / targets.count(b))
        for a, b in zip(sources, targets, strict=True)
    )


def _slow_across(survey: Survey, group: Group) -> bool:
    times_NN = _distances(survey)
    np.fill_diagonal(times_NN, np.inf)
    best = times_NN.min(axis=1)
    inside = set(group.members)
    outside = [n for n in range(len(best)) if n not in inside]
    excess = [times_NN[a, b] / max(best[a], best[b]) for a in inside for b in outside]
    return bool(excess) and math.log(median(excess)) > max(MIN_JUMP, 5 * survey.noise)


def judged_tree(survey: Survey) -> Group:
    """The switches that are needed to explain the measurement.

    A group and slow single nodes beside it look alike as pairs: with a majority in the group the
    nodes are slow; with two against one nothing decides, and the switch stays (the cost of every
    dispatch is the same under both readings).
    """
    tree = candidate_tree(survey)
    undecided = {
        parent.children
        for parent in tree.groups()
        if len(parent.children) == 2 and len(parent.members) <= MAJORITY
    }

    def keep(group: Group) -> bool:
        even = any(group in children for children in undecided)
        return even or constrained(survey, group)

    return prune(tree, keep)
