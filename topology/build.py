"""Topologies made from a description: trees of switches, or matrices of pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import networkx as nx
import numpy as np

from tamoe.topology.errors import InputError
from tamoe.topology.graph import Contention, Topology
from tamoe.topology.link import Link
from tamoe.topology.tree import parse_tree, tree_depth, tree_vertices


def add_link(graph: nx.DiGraph, link: Link) -> None:
    """Add a link to a graph, its fields as edge attributes."""
    data = dataclasses.asdict(link)
    graph.add_edge(data.pop("source"), data.pop("target"), **data)


def add_both_ways(graph: nx.DiGraph, link: Link) -> None:
    """Add a link and its twin in the other direction."""
    add_link(graph, link)
    add_link(graph, dataclasses.replace(link, source=link.target, target=link.source))


def from_tree(
    tree: str | int | Sequence[object],
    *,
    bandwidth_bytes_per_s: Sequence[float],
    latency_s: Sequence[float] | float = 0.0,
    contention: Contention = "shared",
) -> Topology:
    """A tree of switches and nodes with one bandwidth for each level.

    Parameters
    ----------
    tree
        ``"4x2"``, ``[[2, 2], [2]]``: see :mod:`tamoe.topology.tree`.
    bandwidth_bytes_per_s
        ``[0]`` of a device's link inside its node, ``[1]`` of a node's uplink, ``[2]`` and on of a
        switch's uplink, lowest switches first; the root has none. In bytes per second, > 0.
    latency_s
        The same for one-way latencies, or one number for all levels.
    contention
        ``"shared"``, or ``"pairwise"``: every ordered pair gets a link of its own, as fast as the
        slowest link of its route.

    Returns
    -------
    Topology

    Raises
    ------
    InputError
        The tree is malformed or there is not one value for each level.

    Examples
    --------
    >>> topology = from_tree("2x4", bandwidth_bytes_per_s=(3e11, 25e9))
    >>> topology.num_ranks, len(topology.links)
    (8, 20)
    """
    shape = parse_tree(tree)
    levels = 1 + tree_depth(shape)
    bandwidths = _per_level("bandwidth_bytes_per_s", bandwidth_bytes_per_s, levels)
    if isinstance(latency_s, int | float):
        latency_s = [latency_s] * levels
    latencies = _per_level("latency_s", latency_s, levels)
    graph = nx.DiGraph()
    nodes: list[tuple[int, ...]] = []
    for vertex in tree_vertices(shape):
        graph.add_node(vertex.name, kind=vertex.kind)
        if vertex.parent is not None:
            level = vertex.uplink_level
            up = Link(vertex.name, vertex.parent, bandwidths[level], latencies[level], level=level)
            add_both_ways(graph, up)
        if vertex.node is None:
            continue
        nodes.append(vertex.ranks)
        graph.nodes[vertex.name]["node"] = vertex.node
        for rank in vertex.ranks:
            graph.add_node(f"rank{rank}", kind="device", rank=rank, node=vertex.node)
            add_both_ways(graph, Link(f"rank{rank}", vertex.name, bandwidths[0], latencies[0]))
    topology = Topology(graph, tuple(nodes), "shared", provenance={"made_by": "from_tree"})
    return topology if contention == "shared" else as_pairwise(topology)


def as_pairwise(topology: Topology) -> Topology:
    """The same ranks with a link of its own for every ordered pair, itself included.

    Each link is as fast as the slowest link of the pair's route: the contention-free model of the
    TA-MoE paper (section 1.2 there).
    """
    graph = nx.DiGraph()
    for rank in range(topology.num_ranks):
        graph.add_node(f"rank{rank}", kind="device", rank=rank, node=topology.node_of[rank])
    for i in range(topology.num_ranks):
        for j in range(topology.num_ranks):
            pair, level = topology.pair(i, j), topology.level(i, j)
            bandwidth = 1 / pair.beta_s_per_byte
            link = Link(f"rank{i}", f"rank{j}", bandwidth, pair.alpha_s, 0.0, level, pair.origin)
            add_link(graph, link)
    return dataclasses.replace(topology, graph=graph, contention="pairwise")


def from_matrices(
    alpha_s: np.ndarray | Sequence[Sequence[float]],
    beta_s_per_byte: np.ndarray | Sequence[Sequence[float]],
    nodes: Iterable[Iterable[int]] | None = None,
) -> Topology:
    """A link of its own for every ordered pair, from latencies and inverse bandwidths.

    Parameters
    ----------
    alpha_s
        ``[P, P]``, one-way latency in seconds, >= 0. The diagonal is the price of a self-send.
    beta_s_per_byte
        ``[P, P]``, inverse bandwidth, > 0.
    nodes
        Partition of the ranks into nodes; every rank its own node if None.

    Returns
    -------
    Topology
        With ``contention="pairwise"``.

    Raises
    ------
    InputError
        The matrices are not square, of different size, not finite or out of range.

    Examples
    --------
    >>> topology = from_matrices([[0, 1e-5], [1e-5, 0]], [[1e-11, 1e-9], [1e-9, 1e-11]])
    >>> float(topology.beta_s_per_byte[0, 1])
    1e-09
    """
    alpha_PP = _square("alpha_s", alpha_s)
    beta_PP = _square("beta_s_per_byte", beta_s_per_byte)
    if alpha_PP.shape != beta_PP.shape:
        raise InputError(
            f"alpha_s is {alpha_PP.shape} and beta_s_per_byte {beta_PP.shape}; allowed: one shape"
        )
    if (beta_PP == 0).any():
        i, j = (int(index) for index in np.argwhere(beta_PP == 0)[0])
        raise InputError(f"beta_s_per_byte[{i}, {j}] is 0; allowed: > 0")
    num_ranks = len(alpha_PP)
    try:
        partition = [(r,) for r in range(num_ranks)] if nodes is None else [tuple(n) for n in nodes]
    except TypeError:
        raise InputError(f"nodes is {nodes!r}; allowed: lists of ranks") from None
    node_of = {rank: number for number, ranks in enumerate(partition) for rank in ranks}
    if sorted(r for ranks in partition for r in ranks) != list(range(num_ranks)):
        raise InputError(f"nodes is {partition}; allowed: every rank below {num_ranks} once")
    graph = nx.DiGraph()
    for rank in range(num_ranks):
        graph.add_node(f"rank{rank}", kind="device", rank=rank, node=node_of[rank])
    for i in range(num_ranks):
        for j in range(num_ranks):
            level = 0 if node_of[i] == node_of[j] else 1
            bandwidth = 1 / float(beta_PP[i, j])
            add_link(
                graph, Link(f"rank{i}", f"rank{j}", bandwidth, float(alpha_PP[i, j]), 0.0, level)
            )
    return Topology(graph, tuple(partition), "pairwise", provenance={"made_by": "from_matrices"})


def _per_level(name: str, values: Sequence[float], levels: int) -> list[float]:
    if not isinstance(values, Sequence | np.ndarray) or len(values) != levels:
        raise InputError(
            f"{name} is {values!r}; allowed: {levels} numbers, one a level: the device link inside "
            f"a node, then the node's uplink, then each level of switch uplinks"
        )
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError):
        raise InputError(f"{name} is {values!r}; allowed: numbers") from None


def _square(name: str, values: np.ndarray | Sequence[Sequence[float]]) -> np.ndarray:
    try:
        matrix = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{name} is not a table of numbers; allowed: (ranks, ranks)") from None
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise InputError(f"{name} has shape {matrix.shape}; allowed: (ranks, ranks)")
    if not np.isfinite(matrix).all() or (matrix < 0).any():
        bad = np.argwhere(~np.isfinite(matrix) | (matrix < 0))[0]
        i, j = (int(index) for index in bad)
        raise InputError(f"{name}[{i}, {j}] is {matrix[i, j]}; allowed: finite and >= 0")
    return matrix
