"""Topology files: JSON of schema ``tamoe.topology``, units in the keys."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import networkx as nx

from tamoe.topology.build import add_link
from tamoe.topology.documents import field, number, read_document, write_document
from tamoe.topology.errors import InputError
from tamoe.topology.graph import Topology
from tamoe.topology.link import Link, Pair

SCHEMA = "tamoe.topology"
SCHEMA_VERSION = "1.0"
_KNOWN = {
    "schema", "schema_version", "nodes", "contention", "overhead_s", "copy_bytes_per_s",
    "vertices", "links", "pairs", "provenance",
}  # fmt: skip


def topology_to_document(topology: Topology) -> dict[str, Any]:
    """The JSON object that a topology is stored as."""
    vertices = [{"name": name, **data} for name, data in topology.graph.nodes(data=True)]
    return {
        **topology.extra,
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "nodes": [list(ranks) for ranks in topology.nodes],
        "contention": topology.contention,
        "overhead_s": topology.overhead_s,
        "copy_bytes_per_s": topology.copy_bytes_per_s,
        "vertices": vertices,
        "links": [
            {"source": source, "target": target, **data}
            for source, target, data in topology.graph.edges(data=True)
        ],
        "pairs": [
            {"source_rank": i, "target_rank": j, **dataclasses.asdict(pair)}
            for (i, j), pair in sorted(topology.pairs.items())
        ],
        "provenance": dict(topology.provenance),
    }


def topology_from_document(document: Mapping[str, Any], where: str) -> Topology:
    """A topology from its JSON object; ``where`` begins the messages about what is wrong.

    Raises
    ------
    InputError
        A field is missing, of the wrong type or out of range.
    """
    graph = nx.DiGraph()
    for position, vertex in enumerate(_list(document, "vertices", where)):
        here = f"{where}: vertices[{position}]"
        name = field(vertex, "name", here)
        if not isinstance(name, str):
            raise InputError(f"{here}: name is {name!r}; allowed: a string")
        if name in graph:
            raise InputError(f"{here}: name {name!r} stands twice")
        kind = field(vertex, "kind", here)
        if kind not in ("device", "nic", "switch"):
            raise InputError(f"{here}: kind is {kind!r}; allowed: device, nic, switch")
        if kind == "device" and not isinstance(vertex.get("rank"), int):
            raise InputError(f"{here}: rank is {vertex.get('rank')!r}; a device needs a number")
        graph.add_node(name, **{key: value for key, value in vertex.items() if key != "name"})
    for position, link in enumerate(_list(document, "links", where)):
        _read_link(graph, link, f"{where}: links[{position}]")
    nodes, pairs = _read_nodes(document, where), _read_pairs(document, where)
    provenance = document.get("provenance", {})
    if not isinstance(provenance, Mapping):
        raise InputError(f"{where}: provenance is {provenance!r}; allowed: an object")
    overhead_s = number(document, "overhead_s", where, default=0.0)
    copy_bytes_per_s = document.get("copy_bytes_per_s")
    if copy_bytes_per_s is not None:
        copy_bytes_per_s = number(document, "copy_bytes_per_s", where, exclusive=True)
    try:
        return Topology(
            graph,
            nodes,
            document.get("contention", "shared"),
            overhead_s,
            copy_bytes_per_s,
            pairs,
            dict(provenance),
            {key: value for key, value in document.items() if key not in _KNOWN},
        )
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def load_topology(path: str | os.PathLike[str]) -> Topology:
    """Read a topology file.

    Raises
    ------
    InputError
        The file is missing, truncated, of another schema or version, or a field is wrong.
    """
    return topology_from_document(read_document(path, SCHEMA, SCHEMA_VERSION), str(path))


def save_topology(topology: Topology, path: str | os.PathLike[str]) -> None:
    """Write a topology file; it appears whole or not at all."""
    write_document(path, topology_to_document(topology))


def _read_link(graph: nx.DiGraph, link: Mapping[str, Any], where: str) -> None:
    source, target = (field(link, end, where) for end in ("source", "target"))
    for name in (source, target):
        if name not in graph:
            raise InputError(f"{where}: {name!r} is not a vertex")
    if graph.has_edge(source, target):
        raise InputError(f"{where}: {source} -> {target} stands twice")
    level = link.get("level", 0)
    if not isinstance(level, int) or level < 0:
        raise InputError(f"{where}: level is {level!r}; allowed: an integer >= 0")
    checked = Link(
        source,
        target,
        number(link, "bandwidth_bytes_per_s", where, exclusive=True),
        number(link, "latency_s", where, default=0.0),
        number(link, "burst_bytes", where, default=0.0),
        level,
        link.get("origin", "given"),
    )
    add_link(graph, checked)
    known = {spec.name for spec in dataclasses.fields(Link)}
    graph.edges[source, target].update({k: v for k, v in link.items() if k not in known})


def _read_nodes(document: Mapping[str, Any], where: str) -> tuple[tuple[int, ...], ...]:
    nodes = _list(document, "nodes", where)
    for position, ranks in enumerate(nodes):
        if not isinstance(ranks, list) or not all(type(rank) is int for rank in ranks) or not ranks:
            raise InputError(f"{where}: nodes[{position}] is {ranks!r}; allowed: a list of ranks")
    return tuple(tuple(ranks) for ranks in nodes)


def _read_pairs(document: Mapping[str, Any], where: str) -> dict[tuple[int, int], Pair]:
    pairs = {}
    for position, pair in enumerate(_list(document, "pairs", where) if "pairs" in document else ()):
        here = f"{where}: pairs[{position}]"
        ends = (field(pair, "source_rank", here), field(pair, "target_rank", here))
        if not all(type(rank) is int for rank in ends):
            raise InputError(f"{here}: ranks are {ends}; allowed: integers")
        alpha_s = number(pair, "alpha_s", here)
        beta_s_per_byte = number(pair, "beta_s_per_byte", here, exclusive=True)
        pairs[ends] = Pair(alpha_s, beta_s_per_byte, pair.get("origin", "measured"))
    return pairs


def _list(document: Mapping[str, Any], key: str, where: str) -> list[Any]:
    value = field(document, key, where)
    if not isinstance(value, list):
        raise InputError(f"{where}: {key} is {value!r}; allowed: a list")
    return value
