"""Forwarding trees: from which node a token's copy comes to each node that hosts its experts.

Shape suffixes: T tokens, M nodes, P ranks, C parts, n choices that were not dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from tamoe.host_table import table_on
from tamoe.solver.relays import Relays


@dataclass(frozen=True, eq=False)
class Copies:
    """Where the tokens of one rank are copied to, and from where.

    On its own node a token is at position t. On another node the copies are listed by the node
    that they come from, then by token; ``position_TM`` is the place in that list.
    """

    num_tokens: int
    position_TM: torch.Tensor
    entry_m: torch.Tensor  # token of each copy, by target node, source node, token


def plan_forwarding(key_n: torch.Tensor, num_tokens: int, relays: Relays) -> torch.Tensor:
    """Forwarding trees of this rank's tokens, without waiting for the device.

    Parameters
    ----------
    key_n
        ``[T·K]``, node that hosts the expert of each choice, M where the choice was dropped.
    num_tokens
        Tokens T.
    relays
        The static part.

    Returns
    -------
    torch.Tensor
        ``parent_TM``, node that a token's copy on each node comes from, -1 where there is none.

    Examples
    --------
    >>> from tamoe.solver.relays import make_relays
    >>> relays = make_relays(0, ((0,), (1,), (2,)), ((0, 1, 2), (0, 1, 1)))
    >>> plan_forwarding(torch.tensor([1, 2, 2, 3]), 2, relays).tolist()  # 0 to 1, 1 to 2
    [[-1, 0, 1], [-1, -1, 0]]
    """
    num_nodes, device = len(relays.nodes), key_n.device
    touch_TM = torch.zeros(num_tokens, num_nodes + 1, dtype=torch.bool, device=device)
    if num_tokens:
        touch_TM.scatter_(1, key_n.view(num_tokens, -1), True)
    touch_TM = touch_TM[:, :num_nodes]
    parent_TM = torch.full(touch_TM.shape, -1, dtype=torch.int64, device=device)
    home_T = torch.full((num_tokens,), relays.node, device=device)
    _spread(touch_TM, parent_TM, list(range(num_nodes)), home_T, relays.group_LM)
    return parent_TM


def count_copies(
    parent_TM: torch.Tensor, part_T: torch.Tensor | None = None, num_parts: int = 1
) -> torch.Tensor:
    """Tokens of each part that are copied from node to node, ``[C, M, M]``.

    Examples
    --------
    >>> parent_TM = torch.tensor([[-1, 0, 1], [-1, -1, 0]])
    >>> count_copies(parent_TM).tolist()
    [[[0, 1, 1], [0, 0, 1], [0, 0, 0]]]
    """
    num_nodes = parent_TM.shape[1]
    num_pairs = num_nodes * num_nodes + 1
    pair_MT = _pairs(parent_TM)
    if part_T is not None:
        pair_MT = pair_MT + num_pairs * part_T
    count = torch.zeros(num_parts * num_pairs, dtype=torch.int64, device=parent_TM.device)
    count.scatter_add_(0, pair_MT.flatten(), torch.ones_like(pair_MT).flatten())
    return count.view(num_parts, num_pairs)[:, :-1].unflatten(1, (num_nodes, num_nodes)).mT


def list_copies(parent_TM: torch.Tensor, forward_MM: Sequence[Sequence[int]]) -> Copies:
    """The lists of copies, once the host knows how many there are from node to node.

    Examples
    --------
    >>> parent_TM = torch.tensor([[-1, 0, 1], [-1, -1, 0]])
    >>> copies = list_copies(parent_TM, [[0, 1, 1], [0, 0, 1], [0, 0, 0]])
    >>> copies.entry_m.tolist(), copies.position_TM[:, 2].tolist()
    ([0, 1, 0], [1, 0])
    """
    num_tokens, num_nodes = parent_TM.shape
    device = parent_TM.device
    order_m = torch.argsort(_pairs(parent_TM).flatten(), stable=True)[: sum(map(sum, forward_MM))]
    entry_m = order_m % max(num_tokens, 1)
    target_m = order_m // max(num_tokens, 1)
    received_M = [sum(column) for column in zip(*forward_MM, strict=True)]
    start_M = table_on(device, [0, *accumulate(received_M)][:num_nodes])
    position_TM = torch.arange(num_tokens, device=device)[:, None].repeat(1, num_nodes)
    place_m = torch.arange(len(entry_m), device=device)
    position_TM[entry_m, target_m] = place_m - start_M[target_m]
    return Copies(num_tokens, position_TM, entry_m)


def _pairs(parent_TM: torch.Tensor) -> torch.Tensor:
    """Number of (target node, source node) of each copy, ``[M, T]``; M² where there is none."""
    num_nodes = parent_TM.shape[1]
    targets = torch.arange(num_nodes, device=parent_TM.device) * num_nodes
    return torch.where(parent_TM >= 0, targets + parent_TM, num_nodes * num_nodes).T


def _spread(
    touch_TM: torch.Tensor,
    parent_TM: torch.Tensor,
    members: list[int],
    home_T: torch.Tensor,
    group_LM: Sequence[Sequence[int]],
) -> None:
    """Copy tokens from their node ``home_T`` in a group to the groups that it consists of."""
    if len(group_LM) <= 1:  # the groups are nodes
        nodes = table_on(home_T.device, members)
        wanted = touch_TM[:, nodes] & (nodes != home_T[:, None])
        parent_TM[:, nodes] = torch.where(wanted, home_T[:, None], parent_TM[:, nodes])
        return
    of_node = group_LM[-1]
    for group in dict.fromkeys(of_node[node] for node in members):
        inside = [node for node in members if of_node[node] == group]
        nodes = table_on(home_T.device, inside)
        at_home_T = (home_T[:, None] == nodes).any(1)
        entry_T = torch.where(at_home_T, home_T, _first_touched(touch_TM, nodes))
        leaves_T = touch_TM[:, nodes].any(1) & ~at_home_T
        entry_T1 = entry_T[:, None]
        before_T1 = parent_TM.gather(1, entry_T1)
        from_T1 = torch.where(leaves_T[:, None], home_T[:, None], before_T1)
        parent_TM.scatter_(1, entry_T1, from_T1)
        _spread(touch_TM, parent_TM, inside, entry_T, group_LM[:-1])


def _first_touched(touch_TM: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor:
    """A node that each token touches; counting starts elsewhere from token to token.

    That spreads the copying over the nodes of a group.
    """
    num_tokens, size = len(touch_TM), len(nodes)
    places = torch.arange(size, device=nodes.device)
    turned_Tm = (torch.arange(num_tokens, device=nodes.device)[:, None] + places) % size
    touched_Tm = touch_TM[:, nodes].gather(1, turned_Tm)
    first_T1 = touched_Tm.to(torch.int8).argmax(1, keepdim=True)
    return nodes[turned_Tm.gather(1, first_T1)].squeeze(1)
