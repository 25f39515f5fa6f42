"""The graph of a surveyed cluster: switches, NICs, devices, and a number on every link."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx

from tamoe.topology.build import add_link
from tamoe.topology.fit import PairFit, median
from tamoe.topology.graph import Topology
from tamoe.topology.hierarchy import Group, members_of
from tamoe.topology.link import Link, Origin, Pair
from tamoe.topology.survey import Survey, burst_bytes, capacity

UNKNOWN_BYTES_PER_S = 1.25e9  # 10 Gbit/s, stands where nothing is known


@dataclass(frozen=True)
class _Values:
    bandwidth_bytes_per_s: float
    burst_bytes: float
    origin: Origin


def build_topology(survey: Survey, tree: Group, provenance: Mapping[str, Any]) -> Topology:
    """The topology of a survey, complete or not: unmeasured links are interpolated.

    Parameters
    ----------
    survey
        What was measured.
    tree
        Switches over the nodes.
    provenance
        Free-form JSON values to store with it.

    Returns
    -------
    Topology
    """
    graph = nx.DiGraph()
    latencies = _latencies(survey, tree)
    if len(survey.nodes) > 1:
        _add_switches(graph, survey, tree, latencies)
    for node, ranks in enumerate(survey.nodes):
        graph.add_node(f"nic{node}", kind="nic", node=node)
        for rank in ranks:
            graph.add_node(f"rank{rank}", kind="device", rank=rank, node=node)
            for out in (True, False):
                values = _device_values(survey, rank, out=out)
                add_link(graph, _link(f"rank{rank}", f"nic{node}", out, values, latencies[0], 0))
    pairs = {
        ends: Pair(
            fit.alpha_s,
            fit.beta_s_per_byte,
            "interpolated" if ends in survey.copied else "measured",
        )
        for ends, fit in survey.fits.items()
    }
    return Topology(
        graph,
        survey.nodes,
        "shared",
        survey.overhead_s,
        survey.copy_bytes_per_s,
        pairs,
        provenance,
    )


def _link(lower: str, upper: str, out: bool, values: _Values, latency_s: float, level: int) -> Link:
    source, target = (lower, upper) if out else (upper, lower)
    return Link(
        source,
        target,
        values.bandwidth_bytes_per_s,
        latency_s,
        values.burst_bytes,
        level,
        values.origin,
    )


def _add_switches(
    graph: nx.DiGraph, survey: Survey, tree: Group, latencies: Sequence[float]
) -> None:
    numbers = iter(range(len(survey.nodes) + 1))

    def add(group: Group) -> str:
        name = f"switch{next(numbers)}"
        graph.add_node(name, kind="switch")
        for child in group.children:
            lower = f"nic{child}" if isinstance(child, int) else add(child)
            level = 1 if isinstance(child, int) else 1 + child.depth
            if isinstance(child, int):
                graph.add_node(lower, kind="nic", node=child)
            for out in (True, False):
                values = _uplink_values(survey, members_of(child), out=out)
                add_link(graph, _link(lower, name, out, values, latencies[level], level))
        return name

    add(tree)


def _uplink_values(survey: Survey, members: tuple[int, ...], *, out: bool) -> _Values:
    measured = capacity(survey, members, out=out)
    if measured is not None:
        return _Values(measured, burst_bytes(survey, members, out=out), "measured")
    others = [capacity(survey, [node], out=out) for node in range(len(survey.nodes))]
    known = [value for value in others if value is not None]
    if known:
        return _Values(median(known), 0.0, "interpolated")
    stated = [
        rate
        for node, rate in enumerate(survey.interface_bytes_per_s)
        if node in members and rate is not None
    ]
    return _Values(math.fsum(stated) or UNKNOWN_BYTES_PER_S, 0.0, "static")


def _device_values(survey: Survey, rank: int, *, out: bool) -> _Values:
    node_of = survey.node_of
    local: dict[int, list[PairFit]] = {}
    for (i, j), fit in survey.fits.items():
        if node_of[i] == node_of[j]:
            local.setdefault(i if out else j, []).append(fit)
    if rank in local and not survey.cpu_bound:
        return _middle(local[rank], "measured")
    # Ranks that share processors differ by chance: one value for all of a node.
    mates = [fits for other, fits in local.items() if node_of[other] == node_of[rank]]
    everyone = [fit for fits in mates or local.values() for fit in fits]
    if everyone:
        return _middle(everyone, "measured" if rank in local else "interpolated")
    if survey.copy_bytes_per_s is not None:
        return _Values(survey.copy_bytes_per_s, 0.0, "interpolated")
    return _Values(UNKNOWN_BYTES_PER_S, 0.0, "static")


def _middle(fits: Sequence[PairFit], origin: Origin) -> _Values:
    return _Values(
        median([fit.bandwidth_bytes_per_s for fit in fits]),
        median([fit.burst_bytes for fit in fits]),
        origin,
    )


def _latencies(survey: Survey, tree: Group) -> list[float]:
    """Latency of a link of each level, such that routes of the level add up to its median."""
    inside = [fit.alpha_s for fits in survey.inside().values() for fit in fits]
    sums = [median(inside) if inside else 0.0]
    by_level: dict[int, list[float]] = {}
    for (a, b), fits in survey.between().items():
        by_level.setdefault(_meeting_level(tree, a, b), []).extend(fit.alpha_s for fit in fits)
    for level in range(1, tree.depth + 1):
        sums.append(max(sums[-1], median(by_level[level])) if level in by_level else sums[-1])
    return [sums[0] / 2] + [(high - low) / 2 for low, high in itertools.pairwise(sums)]


def _meeting_level(tree: Group, a: int, b: int) -> int:
    level = tree.depth
    for group in tree.groups():
        if {a, b} <= set(group.members):
            level = min(level, group.depth)
    return level


def without_samples(topology: Topology) -> Topology:
    """The topology without its raw samples, which may be many times its size."""
    kept = {key: value for key, value in topology.provenance.items() if key != "samples"}
    return replace(topology, provenance=kept)
