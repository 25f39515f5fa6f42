"""Topology: a cluster's links as a graph, the ranks on it and the routes between them.

Vertices are devices (one a rank), NICs (one a node: devices hang on it, the node's uplink leaves
it) and switches. Edges are directed links; a link is shared, so its load is the sum over all pairs
routed through it. With ``contention="pairwise"`` every ordered pair has a link of its own, which
is the model of the TA-MoE paper.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

import networkx as nx
import numpy as np

from tamoe.topology.errors import InputError, whole
from tamoe.topology.link import LINK_FIELDS, Link, Pair

Contention = Literal["shared", "pairwise"]
MAX_DENSE_RANKS = 4096  # a dense float64 view of more ranks takes over 128 MiB


@dataclass(frozen=True, eq=False)
class Topology:
    """A cluster: frozen graph, node partition, routes, and where each number comes from.

    Build one with :meth:`from_tree`, :meth:`from_matrices`, :meth:`load` or
    :func:`tamoe.topology.probe`.

    Parameters
    ----------
    graph
        ``networkx.DiGraph``. Vertices have ``kind`` ("device", "nic", "switch"), devices ``rank``,
        devices and NICs ``node``. Edges have the fields of :class:`Link`.
    nodes
        Tuple of tuples of ranks; a partition of ``range(num_ranks)``.
    contention
        ``"shared"``: pairs share the links on their routes. ``"pairwise"``: each pair has its own.
    overhead_s
        Time that a rank needs for each message that it sends, whatever its size.
    copy_bytes_per_s
        Rate at which a rank copies to itself; None where unknown.
    pairs
        Measured values of single pairs; other pairs follow from their routes.
    provenance
        How the numbers were obtained: command, versions, seed. Free form, JSON values.
    extra
        Keys of a file that this version does not know; they are written back.

    Examples
    --------
    >>> topology = Topology.from_tree([[2, 2], [2]], bandwidth_bytes_per_s=(1e11, 1e10, 4e9))
    >>> topology.nodes
    ((0, 1), (2, 3), (4, 5))
    >>> topology.uplink_bytes_per_s(0)
    (10000000000.0, 10000000000.0)
    >>> topology.level(0, 1), topology.level(0, 2), topology.level(0, 4)
    (0, 1, 2)
    """

    graph: nx.DiGraph
    nodes: tuple[tuple[int, ...], ...]
    contention: Contention = "shared"
    overhead_s: float = 0.0
    copy_bytes_per_s: float | None = None
    pairs: Mapping[tuple[int, int], Pair] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not nx.is_frozen(self.graph):
            object.__setattr__(self, "graph", nx.freeze(self.graph.copy()))
        object.__setattr__(self, "nodes", tuple(tuple(ranks) for ranks in self.nodes))
        for name in ("pairs", "provenance", "extra"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        ranks = sorted(rank for node in self.nodes for rank in node)
        if not ranks or ranks != list(range(len(ranks))):
            raise InputError(
                f"nodes is {self.nodes}; allowed: every rank from 0 to {max(len(ranks) - 1, 0)} "
                f"in exactly one node"
            )
        if sorted(self._device) != ranks:
            raise InputError(
                f"graph: {len(self._device)} devices for {len(ranks)} ranks; every rank of nodes "
                f"needs one vertex of kind 'device' with that rank"
            )
        for ends in self.pairs:
            if not all(0 <= rank < len(ranks) for rank in ends):
                raise InputError(f"pairs has {ends}; allowed: ranks from 0 to {len(ranks) - 1}")
        if self.contention not in ("shared", "pairwise"):
            raise InputError(f"contention is {self.contention!r}; allowed: 'shared', 'pairwise'")
        if not (math.isfinite(self.overhead_s) and self.overhead_s >= 0):
            raise InputError(f"overhead_s is {self.overhead_s}; allowed: finite and >= 0")
        if self.copy_bytes_per_s is not None and not self.copy_bytes_per_s > 0:
            raise InputError(f"copy_bytes_per_s is {self.copy_bytes_per_s}; allowed: > 0 or None")

    def __reduce__(self) -> tuple[Any, ...]:
        # Mapping proxies do not pickle, and a Topology travels between ranks.
        values = (getattr(self, spec.name) for spec in dataclasses.fields(self))
        return (
            Topology,
            tuple(dict(v) if isinstance(v, MappingProxyType) else v for v in values),
        )

    # ---- size and structure -------------------------------------------------------------------

    @property
    def num_ranks(self) -> int:
        """Number of ranks P."""
        return sum(len(ranks) for ranks in self.nodes)

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return len(self.nodes)

    @cached_property
    def node_of(self) -> tuple[int, ...]:
        """Number of the node of each rank."""
        where = {rank: number for number, ranks in enumerate(self.nodes) for rank in ranks}
        return tuple(where[rank] for rank in range(len(where)))

    @cached_property
    def links(self) -> tuple[Link, ...]:
        """Every link, in a fixed order; routes refer to positions in it."""
        return tuple(
            Link(source, target, **{k: v for k, v in data.items() if k in LINK_FIELDS})
            for source, target, data in self.graph.edges(data=True)
        )

    @cached_property
    def num_levels(self) -> int:
        """1 + the highest level of any pair of ranks."""
        return 1 + int(self.level_PP.max())

    @cached_property
    def _device(self) -> dict[int, str]:
        return {
            data["rank"]: name
            for name, data in self.graph.nodes(data=True)
            if data.get("kind") == "device"
        }

    @cached_property
    def _link_index(self) -> dict[tuple[str, str], int]:
        return {(link.source, link.target): index for index, link in enumerate(self.links)}

    # ---- routes -------------------------------------------------------------------------------

    def route(self, source_rank: int, target_rank: int) -> tuple[int, ...]:
        """Positions in :attr:`links` of the links from one rank to another.

        A rank's route to itself is the one that a message inside its node would take: its own
        device link up and down, or its own self-loop where the graph has one.
        """
        self._check_rank("source_rank", source_rank)
        self._check_rank("target_rank", target_rank)
        return self._routes_from(source_rank)[target_rank]

    def _routes_from(self, source_rank: int) -> tuple[tuple[int, ...], ...]:
        cache: dict[int, tuple[tuple[int, ...], ...]] = self._route_cache
        if source_rank not in cache:
            start = self._device[source_rank]
            paths = nx.single_source_shortest_path(self.graph, start)
            routes = []
            for rank in range(self.num_ranks):
                if rank == source_rank:
                    routes.append(self._self_route(start))
                    continue
                path = paths.get(self._device[rank])
                if path is None:
                    raise InputError(f"graph: no route from rank {source_rank} to rank {rank}")
                hops = itertools.pairwise(path)
                routes.append(tuple(self._link_index[hop] for hop in hops))
            cache[source_rank] = tuple(routes)
        return cache[source_rank]

    @cached_property
    def _route_cache(self) -> dict[int, tuple[tuple[int, ...], ...]]:
        return {}

    def _self_route(self, device: str) -> tuple[int, ...]:
        if self.graph.has_edge(device, device):
            return (self._link_index[device, device],)
        for hub in self.graph.successors(device):
            if self.graph.nodes[hub].get("kind") == "nic" and self.graph.has_edge(hub, device):
                return (self._link_index[device, hub], self._link_index[hub, device])
        return ()

    def level(self, source_rank: int, target_rank: int) -> int:
        """Highest level of a link between two ranks; 0 inside a node."""
        if source_rank == target_rank:
            return 0
        route = self.route(source_rank, target_rank)
        return max((self.links[index].level for index in route), default=0)

    # ---- dense views --------------------------------------------------------------------------

    @cached_property
    def level_PP(self) -> np.ndarray:
        """Level of every pair, ``[P, P]``."""
        self._check_dense("level_PP", "level(i, j)")
        ranks = range(self.num_ranks)
        return np.array([[self.level(i, j) for j in ranks] for i in ranks])

    @cached_property
    def alpha_s(self) -> np.ndarray:
        """One-way latency of every pair in seconds, ``[P, P]``; sums over the route."""
        self._check_dense("alpha_s", "pair(i, j)")
        return self._pairwise("alpha_s")

    @cached_property
    def beta_s_per_byte(self) -> np.ndarray:
        """Inverse bandwidth of one flow alone on every pair, ``[P, P]``."""
        self._check_dense("beta_s_per_byte", "pair(i, j)")
        return self._pairwise("beta_s_per_byte")

    def _pairwise(self, name: str) -> np.ndarray:
        ranks = range(self.num_ranks)
        return np.array([[getattr(self.pair(i, j), name) for j in ranks] for i in ranks])

    def pair(self, source_rank: int, target_rank: int) -> Pair:
        """Latency and inverse bandwidth of one flow: measured, or from the links of its route."""
        if (source_rank, target_rank) in self.pairs:
            return self.pairs[source_rank, target_rank]
        links = [self.links[index] for index in self.route(source_rank, target_rank)]
        if not links:
            beta = 0.0 if self.copy_bytes_per_s is None else 1 / self.copy_bytes_per_s
            return Pair(0.0, beta, "given")
        slowest = min(links, key=lambda link: link.bandwidth_bytes_per_s)
        return Pair(
            math.fsum(link.latency_s for link in links),
            1 / slowest.bandwidth_bytes_per_s,
            slowest.origin,
        )

    @cached_property
    def incidence(self) -> Any:
        """``scipy.sparse.csr_array`` ``[links, P·P]``: 1 where the pair's route has the link."""
        from scipy import sparse

        self._check_dense("incidence", "route(i, j)")
        num = self.num_ranks
        rows: list[int] = []
        columns: list[int] = []
        for i in range(num):
            for j, route in enumerate(self._routes_from(i)):
                rows.extend(route)
                columns.extend([i * num + j] * len(route))
        ones = np.ones(len(rows))
        return sparse.csr_array((ones, (rows, columns)), shape=(len(self.links), num * num))

    def uplink_bytes_per_s(self, node: int) -> tuple[float, float]:
        """Bandwidth (out of, into) a node: sums over the links that cross its border.

        Infinite for the only node of a cluster, which has no border to cross.
        """
        whole("node", node, 0, self.num_nodes - 1)
        inside = {name for name, data in self.graph.nodes(data=True) if data.get("node") == node}
        out = math.fsum(
            link.bandwidth_bytes_per_s
            for link in self.links
            if link.source in inside and link.target not in inside
        )
        into = math.fsum(
            link.bandwidth_bytes_per_s
            for link in self.links
            if link.source not in inside and link.target in inside
        )
        return (out or math.inf, into or math.inf)

    def subset(self, ranks: Sequence[int]) -> Topology:
        """The part of the topology between some of its ranks, renumbered from 0 in that order.

        >>> Topology.from_tree("4x2", bandwidth_bytes_per_s=(8e9, 1e9)).subset([2, 3, 6]).nodes
        ((0, 1), (2,))
        """
        for rank in ranks:
            self._check_rank("ranks", rank)
        if not ranks or len(set(ranks)) != len(ranks):
            raise InputError(f"ranks is {list(ranks)}; allowed: one or more ranks, each once")
        number = {rank: position for position, rank in enumerate(ranks)}
        nodes = [tuple(number[r] for r in node if r in number) for node in self.nodes]
        kept_nodes = [index for index, node in enumerate(nodes) if node]
        node_number = {old: new for new, old in enumerate(kept_nodes)}
        graph = nx.DiGraph(self.graph)
        graph.remove_nodes_from([self._device[r] for r in range(self.num_ranks) if r not in number])
        graph.remove_nodes_from(
            [n for n, d in self.graph.nodes(data=True) if d.get("node") not in (None, *kept_nodes)]
        )
        for data in graph.nodes.values():
            if data.get("node") is not None:
                data["node"] = node_number[data["node"]]
            if data.get("kind") == "device":
                data["rank"] = number[data["rank"]]
        graph = nx.relabel_nodes(
            graph, {self._device[old]: f"rank{new}" for old, new in number.items()}
        )
        pairs = {
            (number[i], number[j]): pair
            for (i, j), pair in self.pairs.items()
            if i in number and j in number
        }
        kept = tuple(node for node in nodes if node)
        return dataclasses.replace(self, graph=graph, nodes=kept, pairs=pairs)

    # ---- making, loading, saving --------------------------------------------------------------

    @classmethod
    def from_tree(
        cls,
        tree: str | int | Sequence[object],
        *,
        bandwidth_bytes_per_s: Sequence[float],
        latency_s: Sequence[float] | float = 0.0,
        contention: Contention = "shared",
    ) -> Topology:
        """A tree of switches and nodes; see :func:`tamoe.topology.build.from_tree`."""
        from tamoe.topology.build import from_tree

        return from_tree(
            tree,
            bandwidth_bytes_per_s=bandwidth_bytes_per_s,
            latency_s=latency_s,
            contention=contention,
        )

    @classmethod
    def from_matrices(
        cls,
        alpha_s: np.ndarray | Sequence[Sequence[float]],
        beta_s_per_byte: np.ndarray | Sequence[Sequence[float]],
        nodes: Iterable[Iterable[int]] | None = None,
    ) -> Topology:
        """A link for every ordered pair; see :func:`tamoe.topology.build.from_matrices`."""
        from tamoe.topology.build import from_matrices

        return from_matrices(alpha_s, beta_s_per_byte, nodes)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Topology:
        """Read a topology file; raises :class:`InputError` naming the field that is wrong."""
        from tamoe.topology.formats import load_topology

        return load_topology(path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the topology as JSON of schema ``tamoe.topology``."""
        from tamoe.topology.formats import save_topology

        save_topology(self, path)

    # ---- checks -------------------------------------------------------------------------------

    def _check_rank(self, name: str, rank: int) -> None:
        whole(name, rank, 0, self.num_ranks - 1)

    def _check_dense(self, view: str, accessor: str) -> None:
        if self.num_ranks > MAX_DENSE_RANKS:
            raise InputError(
                f"{view} is dense and this topology has {self.num_ranks} ranks; allowed: up to "
                f"{MAX_DENSE_RANKS}. Use {accessor} instead"
            )
