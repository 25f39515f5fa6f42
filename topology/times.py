"""Times of one message size between all nodes or all ranks, from whatever pairs were measured."""

from __future__ import annotations

import math
from collections.abc import Mapping

import networkx as nx
import numpy as np

from tamoe.topology.fit import median
from tamoe.topology.survey import Survey

REFERENCE_BYTES = 1 << 20  # the message whose time is compared when levels are looked for
CLEARLY = 2.0  # times slower than inside nodes: what a network must be to be told from processors
UNLOADED = 0.9  # a pair that keeps this share of its rate under load is held back by nothing


def node_times(survey: Survey, *, met: bool = False) -> np.ndarray:
    """Time of the reference message between nodes, ``[nodes, nodes]``; the slower direction.

    ``met``: as read in rounds of many pairs.
    """
    times: dict[tuple[int, int], float] = {}
    for (a, b), fits in survey.between(met=met).items():
        key = (min(a, b), max(a, b))
        times[key] = max(times.get(key, 0.0), median([f.time_s(REFERENCE_BYTES) for f in fits]))
    return filled_times(len(survey.nodes), times)


def limited_by_cpu(survey: Survey) -> bool:
    """Whether what lies between nodes is as good as what ranks on shared processors can do.

    Then nothing is known of the network but that, and differences are the scheduler's.
    """
    inside = [f.time_s(REFERENCE_BYTES) for fits in survey.inside().values() for f in fits]
    between = [f.time_s(REFERENCE_BYTES) for fits in survey.between().values() for f in fits]
    if not (survey.cpu_bound and inside and between):
        return False
    return median(between) < CLEARLY * median(inside)


def held_back(survey: Survey) -> set[tuple[int, int]]:
    """Pairs of nodes that are slower than their best partners while all nodes are loaded.

    None where the best partners too are slower than one flow alone: then the machine, not the
    network, is what the load has filled. By how much a pair is slower says nothing: that depends
    on how many others it met.
    """
    loaded: dict[tuple[int, int], float] = {}
    for window in survey.loads:
        (a,) = {survey.node_of[i] for i, _ in window.flows}
        (b,) = {survey.node_of[j] for _, j in window.flows}
        key = (min(a, b), max(a, b))
        loaded[key] = min(loaded.get(key, math.inf), window.total_bytes_per_s)
    best: dict[int, float] = {}
    for ends, rate in loaded.items():
        for node in ends:
            best[node] = max(best.get(node, 0.0), rate)
    if not best or median([best[node] / _one_flow(survey, node) for node in best]) < UNLOADED:
        return set()
    return {
        ends for ends, rate in loaded.items() if rate < UNLOADED * min(best[ends[0]], best[ends[1]])
    }


def _one_flow(survey: Survey, node: int) -> float:
    flows = survey.flows
    touching = (flows.source_F == node) | (flows.target_F == node)
    rates = flows.rate_F[touching & (flows.source_F != flows.target_F)]
    return float(rates.max(initial=1.0))


def rank_times(survey: Survey) -> np.ndarray:
    """Time of the reference message between ranks, ``[P, P]``; unmeasured pairs as their nodes."""
    node_of = survey.node_of
    between_NN = node_times(survey)
    inside = {
        node: median([fit.time_s(REFERENCE_BYTES) for fit in fits])
        for (node, _), fits in survey.inside().items()
    }
    usual = median(list(inside.values())) if inside else float(between_NN.min(initial=1.0))
    count = len(node_of)
    time_PP = np.ones((count, count))
    for i in range(count):
        for j in range(count):
            a, b = node_of[i], node_of[j]
            time_PP[i, j] = inside.get(a, usual) if a == b else between_NN[a, b]
    for (i, j), fit in survey.fits.items():
        time_PP[i, j] = fit.time_s(REFERENCE_BYTES)
    return time_PP


def filled_times(count: int, times_s: Mapping[tuple[int, int], float]) -> np.ndarray:
    """A full matrix from some of its entries: the others get the worst step of the best relay.

    That is the value that single linkage gives them, so it adds no level.
    """
    matrix = np.full((count, count), np.nan)
    graph = nx.Graph()
    graph.add_nodes_from(range(count))
    for (a, b), time in times_s.items():
        matrix[a, b] = matrix[b, a] = time
        graph.add_edge(a, b, weight=time)
    missing = np.isnan(matrix)
    np.fill_diagonal(missing, False)
    if missing.any():
        usual = median(list(times_s.values())) if times_s else 1.0
        forest = nx.minimum_spanning_tree(graph)
        for start in range(count):
            for end, worst in _worst_steps(forest, start).items():
                if missing[start, end]:
                    matrix[start, end] = worst
        matrix[np.isnan(matrix)] = usual
    np.fill_diagonal(matrix, 1.0)
    return matrix


def _worst_steps(forest: nx.Graph, start: int) -> dict[int, float]:
    worst = {start: 0.0}
    for parent, child in nx.bfs_edges(forest, start):
        worst[child] = max(worst[parent], forest.edges[parent, child]["weight"])
    return worst
