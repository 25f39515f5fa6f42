"""A routing drawn after a target: what its tokens touch, which marginals alone do not tell.

How many nodes a token's experts lie on depends on which of them it chooses together. So tokens are
sampled, each expert for its share of them.

Shape suffixes: P ranks, N experts of a group, M nodes, S sampled tokens, L levels of sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tamoe.solver.relays import Relays, make_relays, sum_groups
from tamoe.solver.workload import Workload
from tamoe.topology.graph import Topology

SAMPLES = 256  # tokens of each rank; the spread of a node's touches is then below 3 %


def sample_routing(
    topology: Topology,
    workload: Workload,
    target_PN: np.ndarray,
    rank_of_N: Sequence[int],
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts, copies from node to node and sums of a sampled routing, to scale.

    They are ``[P, N]``, ``[P, M, M]`` and ``[P, L + 1]``: sums of a rank's rows at each level, then
    its tokens. Counts are those of the target but for chance.

    Examples
    --------
    >>> topology = Topology.from_tree("2x1", bandwidth_bytes_per_s=(4e9, 1e9))
    >>> workload = Workload(tokens_per_rank=100, top_k=1, hidden_size=8)
    >>> sampled = sample_routing(topology, workload, np.eye(2) * 100, [0, 1])
    >>> counts_PN, forward_PMM, sums_PL = sampled
    >>> counts_PN.tolist(), float(forward_PMM.sum()), sums_PL.tolist()
    ([[100.0, 0.0], [0.0, 100.0]], 0.0, [[100.0, 100.0], [100.0, 100.0]])
    """
    generator = np.random.default_rng(seed)
    groups, num_nodes = sum_groups(topology), len(topology.nodes)
    samples = min(SAMPLES, workload.tokens_per_rank)
    scale = workload.tokens_per_rank / samples
    node_of_N = np.array([topology.node_of[rank] for rank in rank_of_N])
    counts_PN = np.zeros(target_PN.shape)
    forward_PMM = np.zeros((topology.num_ranks, num_nodes, num_nodes))
    sums_PL = np.zeros((topology.num_ranks, len(groups) + 1))
    sums_PL[:, -1] = workload.tokens_per_rank
    for rank in range(topology.num_ranks):
        share_N = chosen_shares(target_PN[rank], workload.top_k)
        chosen_SN = draw_by_share(share_N, samples, generator)
        counts_PN[rank] = scale * chosen_SN.sum(0)
        touch_SM = np.stack([chosen_SN[:, node_of_N == m].any(1) for m in range(num_nodes)], 1)
        relays = make_relays(rank, topology.nodes, groups)
        forward_PMM[rank] = scale * forwarding(touch_SM, relays)
        for level, group_M in enumerate(relays.group_LM):
            touched = [touch_SM[:, np.equal(group_M, g)].any(1) for g in set(group_M)]
            sums_PL[rank, level] = scale * np.sum(touched)
    return counts_PN, forward_PMM, sums_PL


def chosen_shares(target_N: np.ndarray, top_k: int) -> np.ndarray:
    """Share of a rank's tokens that choose each expert, 0 to 1; they add up to ``top_k``.

    What a target has beyond all tokens for one expert goes to the others.

    >>> chosen_shares(np.array([3.0, 1.0]), 1).tolist()
    [0.75, 0.25]
    >>> chosen_shares(np.array([8.0, 1.0, 1.0]), 2).tolist()
    [1.0, 0.5, 0.5]
    """
    weight_N = np.maximum(target_N, 1e-12 * target_N.max())
    share_N, full_N = weight_N * (top_k / weight_N.sum()), np.zeros(len(weight_N), dtype=bool)
    while (share_N > 1).any():
        full_N |= share_N >= 1
        share_N = weight_N * ((top_k - full_N.sum()) / max(weight_N[~full_N].sum(), 1e-300))
        share_N[full_N] = 1.0
    return share_N


def draw_by_share(share_N: np.ndarray, samples: int, generator: np.random.Generator) -> np.ndarray:
    """Which experts each sampled token chooses, ``[S, N]``, each in its share of the tokens.

    ``share_N`` adds up to the experts of a token. Systematic sampling: shares lie in random order
    on a line, and the choices are the experts at the points a whole number from a random first one.
    Drawn one after another by weight, experts with much would get too little (Horvitz, Thompson).

    >>> generator = np.random.default_rng(0)
    >>> draw_by_share(np.array([1.0, 0.5, 0.5]), 1000, generator).sum(0).tolist()
    [1000, 499, 501]
    """
    order_SN = generator.permuted(np.tile(np.arange(len(share_N)), (samples, 1)), axis=1)
    end_SN = share_N[order_SN].cumsum(1)
    end_SN[:, -1] = np.rint(share_N.sum())  # whatever rounding says
    passed_SN = np.floor(end_SN + generator.uniform(size=(samples, 1))).astype(int)
    chosen_SN = np.zeros((samples, len(share_N)), dtype=bool)
    np.put_along_axis(chosen_SN, order_SN, np.diff(passed_SN, axis=1, prepend=0) > 0, 1)
    return chosen_SN


def forwarding(touch_SM: np.ndarray, relays: Relays) -> np.ndarray:
    """Tokens of a rank that are copied from node to node, ``[M, M]``.

    ``touch_SM`` says on which nodes each token's experts lie.
    """
    num_tokens, num_nodes = touch_SM.shape
    forward_MM = np.zeros((num_nodes, num_nodes))

    def spread(members: list[int], home_S: np.ndarray, level: int) -> None:
        if level == 0:
            return
        group_M = relays.group_LM[level - 1]
        for group in dict.fromkeys(group_M[node] for node in members):
            inside = np.array([node for node in members if group_M[node] == group])
            turned = (np.arange(num_tokens)[:, None] + np.arange(len(inside))) % len(inside)
            first = np.take_along_axis(touch_SM[:, inside], turned, 1).argmax(1)
            entry_S = inside[turned[np.arange(num_tokens), first]]
            at_home_S = np.isin(home_S, inside)
            leaves_S = touch_SM[:, inside].any(1) & ~at_home_S
            np.add.at(forward_MM, (home_S[leaves_S], entry_S[leaves_S]), 1)
            spread(inside.tolist(), np.where(at_home_S, home_S, entry_S), level - 1)

    home_S = np.full(num_tokens, relays.node)
    spread(list(range(num_nodes)), home_S, relays.num_levels)
    return forward_MM
