"""Routings of a given shape and size, to time exchanges on.

Shape suffixes: T tokens, K choices, P ranks, N experts of a group, p ranks of a group, L links.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tamoe.topology.graph import Topology

Groups = tuple[tuple[int, ...], ...]
HIDDEN_SIZE, EXPERTS_PER_RANK, MOST_TOKENS = 256, 4, 4096


@dataclass(frozen=True, eq=False)
class Case:
    """Tokens of every rank and how likely each of its experts is; distinct experts for a token."""

    name: str
    groups: Groups  # which exchange at the same time, all alike
    tokens: int
    top_k: int
    hidden_size: int
    weight_pN: np.ndarray  # by place in the group; a row may be all 0: no tokens


def make_case(
    topology: Topology, groups: Groups, name: str, link_s: float, top_k: int, seed: int
) -> Case:
    """A routing whose flat exchange keeps the busiest link between nodes busy for so long.

    Parameters
    ----------
    topology, groups
        The cluster, and groups that exchange at the same time, all of one shape.
    name
        "even", "uneven" (every rank has favourites of its own), "one-hot" (all tokens to the same
        experts), "empty", or "local 4": experts on the own node 4 times as likely.
    link_s
        Seconds, > 0; fewer where a rank would have over 4,096 tokens.
    top_k
        Experts of each token; at most all there are.
    seed
        Of the favourites.

    Examples
    --------
    >>> topology = Topology.from_tree("2x1", bandwidth_bytes_per_s=(1e9, 1e7))
    >>> make_case(topology, ((0, 1),), "even", 0.1, 2, 0).tokens  # half of 1 kB for each choice
    976
    """
    local = topology.subset(groups[0])
    num_experts = local.num_ranks * EXPERTS_PER_RANK
    top_k = min(top_k, num_experts)
    generator = np.random.default_rng(seed)
    weight_pN = np.ones((local.num_ranks, num_experts))
    if name == "uneven":
        weight_pN = np.exp(1.5 * generator.normal(size=weight_pN.shape))
    elif name.startswith("local"):
        weight_pN = np.where(_near(local), float(name.split()[1]), 1.0)
    elif name == "one-hot":
        weight_pN = np.tile(1.0 * (np.arange(num_experts) < top_k), (local.num_ranks, 1))
    elif name == "empty":
        weight_pN = np.zeros_like(weight_pN)
    return sized(topology, groups, f"{name}, {link_s:.2g} s, top-{top_k}", weight_pN, link_s, top_k)


def everyone(topology: Topology) -> Groups:
    """One group of all ranks.

    >>> everyone(Topology.from_tree("2x1", bandwidth_bytes_per_s=(1e9, 1e7)))
    ((0, 1),)
    """
    return (tuple(range(topology.num_ranks)),)


def inside_case(topology: Topology, tokens: int, top_k: int) -> Case:
    """Even routing among the experts of a token's own node: nothing crosses links between nodes.

    Parameters
    ----------
    topology
        The cluster; all its ranks are one group.
    tokens
        Of each rank.
    top_k
        Experts of each token; fewer where the smallest node has fewer.

    Examples
    --------
    >>> topology = Topology.from_tree("2x1", bandwidth_bytes_per_s=(1e9, 1e7))
    >>> inside_case(topology, 100, 2).weight_pN.tolist()
    [[1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]]
    """
    top_k = min(top_k, EXPERTS_PER_RANK * min(map(len, topology.nodes)))
    name = f"inside, {tokens} tokens, top-{top_k}"
    return Case(name, everyone(topology), tokens, top_k, HIDDEN_SIZE, 1.0 * _near(topology))


def _near(local: Topology) -> np.ndarray:
    """Whether each expert is on the node of each rank, ``[p, N]``."""
    node_p = np.array(local.node_of)
    return node_p[:, None] == node_p.repeat(EXPERTS_PER_RANK)[None, :]


def sized(
    topology: Topology,
    groups: Groups,
    name: str,
    weight_pN: np.ndarray,
    link_s: float,
    top_k: int,
) -> Case:
    """A case with as many tokens as keep the busiest link between nodes busy for so long."""
    share_pN = weight_pN / np.maximum(weight_pN.sum(1, keepdims=True), 1e-300)
    share_pp = share_pN.reshape(len(weight_pN), len(weight_pN), -1).sum(2)
    token_PP = np.zeros((topology.num_ranks, topology.num_ranks))
    for ranks in groups:
        token_PP[np.ix_(ranks, ranks)] = share_pp * top_k * HIDDEN_SIZE * 4
    np.fill_diagonal(token_PP, 0.0)
    bandwidth_L = np.array([link.bandwidth_bytes_per_s for link in topology.links])
    between_L = np.array([link.level > 0 for link in topology.links])
    token_s = ((topology.incidence @ token_PP.ravel()) / bandwidth_L * between_L).max(initial=0.0)
    tokens = int(np.clip(link_s / token_s, 8, MOST_TOKENS)) if token_s else 8
    return Case(name, groups, tokens, top_k, HIDDEN_SIZE, weight_pN)


def routing(case: Case, place: int, seed: int) -> torch.Tensor:
    """Experts of the tokens of the rank at a place of its group, ``[T, K]``."""
    weight_N = torch.tensor(case.weight_pN[place], dtype=torch.float64)
    tokens = case.tokens if bool(weight_N.any()) else 0
    generator = torch.Generator().manual_seed(seed)
    return draw_experts(weight_N.clamp_min(1e-300), tokens, case.top_k, generator)


def draw_experts(
    weight_N: torch.Tensor, tokens: int, top_k: int, generator: torch.Generator
) -> torch.Tensor:
    """Distinct experts for each token by weight, ``[T, K]``; drawn in the dtype of the weights.

    >>> draw_experts(torch.tensor([1.0, 1e-9]), 2, 1, torch.Generator().manual_seed(0)).tolist()
    [[0], [0]]
    """
    # Smallest exponential variates: a draw without replacement by weight.
    draw_TN = torch.empty(tokens, len(weight_N), dtype=weight_N.dtype)
    draw_TN = draw_TN.exponential_(generator=generator) / weight_N
    return draw_TN.topk(top_k, largest=False).indices
