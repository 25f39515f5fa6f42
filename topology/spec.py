"""Emulated clusters in one line of text: a tree of nodes and switches, and the rates of its links.

The grammar, with spaces allowed around every part::

    SPEC  = TREE [":" RATE {"," RATE}] {";" ("node" N "=" RATE | "intra" "=" RATE)}
    TREE  = NODES "x" RANKS | nested lists of ranks per node          4x2   [[2,2],[2]]
    RATE  = number and unit: bit, kbit, mbit, gbit                    200mbit   2.5gbit

The rates are those of the uplinks: first the nodes', then each level of switches' (the root has
none). No rates at all leave every link unshaped. ``nodeN`` gives one node's uplink another rate;
``intra`` shapes the links of the ranks inside their nodes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from tamoe.topology.errors import InputError
from tamoe.topology.tree import Tree, TreeVertex, num_ranks, parse_tree, tree_depth, tree_vertices

if TYPE_CHECKING:
    from tamoe.topology.graph import Topology
    from tamoe.topology.link import Link

BURST_BYTES = 131072  # of each token bucket: two GSO packets; one would cost 13 % of the rate
PAYLOAD_SHARE = 1448 / 1514  # TCP payload of a full Ethernet frame, timestamps on, MTU 1500
UNSHAPED_BYTES_PER_S = 1e9  # about what loopback gives a pair of gloo ranks; never measured here
MAX_RANKS = 4096
_LONGEST_TEXT = 4000
_UNITS = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_RATE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)", re.IGNORECASE)
# Under 8 kbit/s a bucket of BURST_BYTES overflows the kernel's clock, over 32 Gbit/s its rate.
_LOWEST, _HIGHEST = 8 * 10**3, 32 * 10**9
_RATE_ALLOWED = "a number and a unit (bit, kbit, mbit, gbit) from 8kbit to 32gbit, such as 200mbit"


@dataclass(frozen=True)
class ClusterSpec:
    """The shape of an emulated cluster and the rates of its links, in bits per second.

    Parameters
    ----------
    tree
        An integer (one node with that many ranks) or nested tuples; see
        :mod:`tamoe.topology.tree`.
    uplink_bit_per_s
        Rate of the nodes' uplinks, then of each level of switches'; empty: unshaped.
    node_bit_per_s
        Pairs of a node's number and its own uplink rate.
    intra_bit_per_s
        Rate of each rank's link inside its node; None: the ranks share the node's loopback.

    Raises
    ------
    InputError
        The number of rates is not the number of levels, a rate is out of range, or a node does
        not exist.

    Examples
    --------
    >>> spec = ClusterSpec.parse("[[2,2],[2]]:400mbit,100mbit;node1=20mbit")
    >>> spec.num_nodes, spec.num_ranks, spec.nodes
    (3, 6, ((0, 1), (2, 3), (4, 5)))
    >>> print(spec)
    [[2,2],[2]]:400mbit,100mbit;node1=20mbit
    >>> spec.topology().uplink_bytes_per_s(1)[0] == 20e6 / 8 * 1448 / 1514
    True
    """

    tree: Tree
    uplink_bit_per_s: tuple[int, ...] = ()
    node_bit_per_s: tuple[tuple[int, int], ...] = ()
    intra_bit_per_s: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "node_bit_per_s", tuple(sorted(self.node_bit_per_s)))
        if self.num_ranks > MAX_RANKS:
            raise InputError(
                f"tree: {self.num_ranks} ranks; an emulated cluster has at most {MAX_RANKS}"
            )
        levels, given = tree_depth(self.tree), len(self.uplink_bit_per_s)
        if given not in (0, levels):
            raise InputError(
                f"{given} uplink rate{'s' * (given != 1)} for a tree with {levels} level"
                f"{'s' * (levels != 1)} of uplinks; allowed: {_levels_in_words(levels)}"
            )
        own = [node for node, _ in self.node_bit_per_s]
        for node in own:
            _check_node(node, self.num_nodes, levels)
        if len(set(own)) < len(own):
            raise InputError(f"node_bit_per_s is {self.node_bit_per_s}; allowed: each node once")
        rates = [*self.uplink_bit_per_s, *(rate for _, rate in self.node_bit_per_s)]
        for rate in (*rates, *([] if self.intra_bit_per_s is None else [self.intra_bit_per_s])):
            if not _LOWEST <= rate <= _HIGHEST:
                raise InputError(f"rate {rate} bit/s; allowed: {_RATE_ALLOWED}")

    @classmethod
    def parse(cls, text: str) -> ClusterSpec:
        """Read ``"4x2:200mbit"`` and the like; see the module for the grammar.

        Raises
        ------
        InputError
            The text is malformed; the message says at which character and what is allowed there.
        """
        return _Reader(text).spec()

    @cached_property
    def vertices(self) -> tuple[TreeVertex, ...]:
        """Switches and nodes in preorder."""
        return tree_vertices(self.tree)

    @property
    def num_ranks(self) -> int:
        """Number of ranks."""
        return num_ranks(self.tree)

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return len(self.nodes)

    @cached_property
    def nodes(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of each node."""
        return tuple(vertex.ranks for vertex in self.vertices if vertex.node is not None)

    def uplink_of(self, vertex: TreeVertex) -> int | None:
        """Rate of the link above a node or switch in bits per second; None where not shaped."""
        own = dict(self.node_bit_per_s)
        if vertex.node in own:
            return own[vertex.node]
        return self.uplink_bit_per_s[vertex.uplink_level - 1] if self.uplink_bit_per_s else None

    def topology(self) -> Topology:
        """The ground truth: what TCP payload each link carries, and its token bucket.

        A link that is not shaped is as fast as the processors; it gets a static value
        (``UNSHAPED_BYTES_PER_S``) and says so in its ``origin``.
        """
        import networkx as nx

        from tamoe.topology.build import add_both_ways
        from tamoe.topology.graph import Topology

        graph = nx.DiGraph()
        for vertex in self.vertices:
            graph.add_node(vertex.name, kind=vertex.kind)
            if vertex.parent is not None:
                rate = self.uplink_of(vertex)
                add_both_ways(graph, _link(vertex.name, vertex.parent, rate, vertex.uplink_level))
            if vertex.node is None:
                continue
            graph.nodes[vertex.name]["node"] = vertex.node
            for rank in vertex.ranks:
                graph.add_node(f"rank{rank}", kind="device", rank=rank, node=vertex.node)
                add_both_ways(graph, _link(f"rank{rank}", vertex.name, self.intra_bit_per_s, 0))
        provenance = {"made_by": "ClusterSpec", "cluster": str(self)}
        return Topology(graph, self.nodes, "shared", provenance=provenance)

    def __str__(self) -> str:
        rates = ",".join(rate_text(rate) for rate in self.uplink_bit_per_s)
        options = [f"node{node}={rate_text(rate)}" for node, rate in self.node_bit_per_s]
        if self.intra_bit_per_s is not None:
            options.append(f"intra={rate_text(self.intra_bit_per_s)}")
        return ";".join([_tree_text(self.tree) + (f":{rates}" if rates else ""), *options])


def rate_text(bit_per_s: int) -> str:
    """A rate in the largest unit that writes it as a whole number.

    >>> rate_text(200_000_000), rate_text(2_500_000)
    ('200mbit', '2500kbit')
    """
    unit = next(name for name in reversed(_UNITS) if bit_per_s % _UNITS[name] == 0)
    return f"{bit_per_s // _UNITS[unit]}{unit}"


def payload_bytes_per_s(bit_per_s: float) -> float:
    """TCP payload that a link of this rate carries, in bytes per second.

    >>> round(payload_bytes_per_s(200e6))
    23910172
    """
    return bit_per_s / 8 * PAYLOAD_SHARE


def _link(source: str, target: str, bit_per_s: int | None, level: int) -> Link:
    from tamoe.topology.link import Link

    if bit_per_s is None:
        return Link(source, target, UNSHAPED_BYTES_PER_S, level=level, origin="static")
    bandwidth = payload_bytes_per_s(bit_per_s)
    return Link(source, target, bandwidth, burst_bytes=BURST_BYTES, level=level)


def _tree_text(tree: Tree) -> str:
    if isinstance(tree, int):
        return str(tree)
    if all(isinstance(child, int) and child == tree[0] for child in tree):
        return f"{len(tree)}x{tree[0]}"
    return f"[{','.join(_list_text(child) for child in tree)}]"


def _list_text(tree: Tree) -> str:
    return str(tree) if isinstance(tree, int) else f"[{','.join(map(_list_text, tree))}]"


def _levels_in_words(levels: int) -> str:
    if levels == 0:
        return "none, a single node has no uplink"
    words = ["the nodes' uplink", *["a switch uplink"] * (levels - 1)]
    return f"none, or {levels} ({', '.join(words)})"


def _check_node(node: int, num_nodes: int, levels: int) -> None:
    if not 0 <= node < num_nodes or levels == 0:
        allowed = f"node0 to node{num_nodes - 1}" if levels else "none, a single node has no uplink"
        raise InputError(f"node{node} does not exist or has no uplink; allowed: {allowed}")


class _Part(NamedTuple):
    text: str  # without spaces around it
    at: int  # where it begins, counted from 1

    def split(self, separator: str) -> list[_Part]:
        parts, at = [], self.at
        for text in self.text.split(separator):
            lead = len(text) - len(text.lstrip())
            parts.append(_Part(text.strip(), at + lead))
            at += len(text) + len(separator)
        return parts


class _Reader:
    """Reads a specification; knows at which character each part begins."""

    def __init__(self, text: str) -> None:
        if not isinstance(text, str) or len(text) > _LONGEST_TEXT:
            got = f"{len(text)} characters" if isinstance(text, str) else repr(text)
            raise InputError(
                f"cluster is {got}; allowed: text of at most {_LONGEST_TEXT} characters such as "
                f"'4x2:200mbit'"
            )
        self.text = text

    def spec(self) -> ClusterSpec:
        head, *options = _Part(self.text, 1).split(";")
        tree_part, *rate_parts = head.split(":")
        if len(rate_parts) > 1:
            raise self._error(rate_parts[1], "follows a second ':'", "one ':', before the rates")
        tree = self._tree(tree_part)
        rates: tuple[int, ...] = ()
        if rate_parts:
            rates = tuple(self._rate(part) for part in rate_parts[0].split(","))
            self._checked(rate_parts[0], tree, rates)
        own: dict[int, int] = {}
        intra = None
        for option in options:
            node, rate = self._option(option)
            if (intra is not None) if node is None else (node in own):
                raise self._error(option, "sets the same rate again", "each rate once")
            if node is None:
                intra = rate
            else:
                own[node] = rate
                self._checked(option, tree, rates, ((node, rate),))
        return ClusterSpec(tree, rates, tuple(own.items()), intra)

    def _tree(self, part: _Part) -> Tree:
        flat = re.fullmatch(r"(\d+)\s*x\s*(\d+)", part.text)
        # A length limit first: "999999999x2" would be written out as a list.
        if flat and max(map(len, flat.groups())) > len(str(MAX_RANKS)):
            raise self._error(part, "has too many ranks", f"at most {MAX_RANKS}")
        try:
            tree = parse_tree("".join(part.text.split()) if flat else part.text)
        except InputError as error:
            raise InputError(f"cluster {self.text!r}, character {part.at}: {error}") from None
        self._checked(part, tree)
        return tree

    def _rate(self, part: _Part) -> int:
        match = _RATE.fullmatch(part.text)
        unit = match[2].lower() if match else ""
        if match is None or unit not in _UNITS:
            hint = "; bps would be bytes" if unit.endswith("bps") else ""
            raise self._error(part, f"is no rate{hint}", _RATE_ALLOWED)
        rate = round(Fraction(match[1]) * _UNITS[unit])
        if not _LOWEST <= rate <= _HIGHEST:
            raise self._error(part, "is out of range", _RATE_ALLOWED)
        return rate

    def _option(self, part: _Part) -> tuple[int | None, int]:
        """The node (None: intra) and its rate."""
        name, *value = part.split("=")
        node = re.fullmatch(r"node(\d{1,9})", name.text)
        if len(value) != 1 or not (node or name.text == "intra"):
            raise self._error(part, "is no option", "nodeN=RATE, intra=RATE")
        return (int(node[1]) if node else None), self._rate(value[0])

    def _checked(self, part: _Part, *fields: Any) -> None:
        try:
            ClusterSpec(*fields)
        except InputError as error:
            raise InputError(f"cluster {self.text!r}, character {part.at}: {error}") from None

    def _error(self, part: _Part, problem: str, allowed: str) -> InputError:
        what = f"{part.text!r} {problem}" if part.text else "something is missing"
        return InputError(f"cluster {self.text!r}, character {part.at}: {what}; allowed: {allowed}")
