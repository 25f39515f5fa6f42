"""Trees of switches and nodes: the shape of a cluster as nested lists.

An integer is one node with that many ranks, a list is one switch: ``"4x2"`` is ``[2, 2, 2, 2]``,
``[[2, 2], [2]]`` is a root switch over two leaf switches with two nodes and one node.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tamoe.topology.errors import InputError

Tree = int | tuple["Tree", ...]
ALLOWED = "'NODESxRANKS' such as '4x2', or nested lists of ranks per node such as '[[2,2],[2]]'"


@dataclass(frozen=True, slots=True)
class TreeVertex:
    """A switch or a node of a tree, with the vertex above it."""

    name: str  # "switch0", "nic3"
    kind: str  # "switch" or "nic"
    parent: str | None  # None for the root
    uplink_level: int  # level of the link to the parent: 1 for a node, 2 and more for a switch
    ranks: tuple[int, ...]  # every rank below
    node: int | None  # number of the node, None for a switch


def parse_tree(value: str | int | Sequence[object]) -> Tree:
    """Read a tree from a string, an integer or nested sequences.

    Parameters
    ----------
    value
        ``"4x2"``, ``"[[2,2],[2]]"``, ``8`` (one node) or ``[[2, 2], [2]]``.

    Returns
    -------
    Tree
        An integer, or nested tuples of integers.

    Raises
    ------
    InputError
        The text is malformed, a node has no rank or a switch has nothing below it.

    Examples
    --------
    >>> parse_tree("4x2")
    (2, 2, 2, 2)
    >>> parse_tree("[[2,2],[2]]")
    ((2, 2), (2,))
    """
    if isinstance(value, str):
        return _parse_text(value.strip())
    return _checked(value, value)


def _parse_text(text: str) -> Tree:
    nodes, times, ranks = text.partition("x")
    if times:
        if not (nodes.isdecimal() and ranks.isdecimal() and int(nodes) and int(ranks)):
            raise InputError(f"tree {text!r}: expected {ALLOWED}")
        return _checked([int(ranks)] * int(nodes), text)
    try:
        return _checked(json.loads(text), text)
    except (json.JSONDecodeError, RecursionError) as error:
        where = f" at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(f"tree {text!r}: malformed{where}; expected {ALLOWED}") from None


def _checked(value: object, whole: object) -> Tree:
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise InputError(f"tree {whole!r}: a node has {value} ranks; it needs at least 1")
        return value
    if isinstance(value, list | tuple):
        if not value:
            raise InputError(f"tree {whole!r}: a switch has nothing below it; expected {ALLOWED}")
        return tuple(_checked(child, whole) for child in value)
    raise InputError(f"tree {whole!r}: {value!r} is neither a number of ranks nor a list")


def tree_depth(tree: Tree) -> int:
    """Number of uplink levels: 0 for a single node, 1 for nodes on one switch, and so on.

    >>> tree_depth(parse_tree("[[2,2],[2]]"))
    2
    """
    return 0 if isinstance(tree, int) else 1 + max(tree_depth(child) for child in tree)


def num_ranks(tree: Tree) -> int:
    """Number of ranks in the tree.

    >>> num_ranks(parse_tree("4x2"))
    8
    """
    return tree if isinstance(tree, int) else sum(num_ranks(child) for child in tree)


def tree_vertices(tree: Tree) -> tuple[TreeVertex, ...]:
    """All switches and nodes in preorder; ranks and nodes are numbered from left to right.

    >>> [v.name for v in tree_vertices(parse_tree("[[2,2],[2]]"))]
    ['switch0', 'switch1', 'nic0', 'nic1', 'switch2', 'nic2']
    """
    numbers = {"switch": 0, "nic": 0, "rank": 0}

    def take(what: str, count: int = 1) -> int:
        numbers[what] += count
        return numbers[what] - count

    def walk(subtree: Tree, parent: str | None) -> Iterator[TreeVertex]:
        if isinstance(subtree, int):
            node, first = take("nic"), take("rank", subtree)
            ranks = tuple(range(first, first + subtree))
            yield TreeVertex(f"nic{node}", "nic", parent, 1, ranks, node)
            return
        name, first = f"switch{take('switch')}", numbers["rank"]
        ranks = tuple(range(first, first + num_ranks(subtree)))
        yield TreeVertex(name, "switch", parent, 1 + tree_depth(subtree), ranks, None)
        for child in subtree:
            yield from walk(child, name)

    return tuple(walk(tree, None))
