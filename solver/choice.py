"""Which exchange is faster for a dispatch: both predicted, with the link that each waits for.

Touches (how many nodes a token's experts lie on) depend on the routing and not on its marginals
alone, so they are sampled: each token draws its experts one after another by the rank's row.

Shape suffixes: P ranks, N experts of a group, M nodes, S sampled tokens, K choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tamoe.solver.cost import CostModel, cost_model
from tamoe.solver.relays import Relays, make_relays, sum_groups
from tamoe.solver.traffic import flat_rows, hierarchical_rows, told_bytes
from tamoe.solver.workload import Workload
from tamoe.topology.errors import InputError
from tamoe.topology.graph import Topology

SAMPLES = 256  # tokens of each rank; the spread of a node's touches is then below 3 %
MOST_RANKS = 256  # beyond, sampling every rank takes seconds
# A hop between nodes more means messages that the model does not see; a gain has to be worth them.
LEAST_GAIN = 0.1


@dataclass(frozen=True)
class Choice:
    """The exchange to take, and why; times of one dispatch and combine, simulated."""

    kind: str  # "flat" or "hierarchical"
    reason: str
    flat_s: float
    hierarchical_s: float


def choose_exchange(
    topology: Topology, workload: Workload, target_PN: np.ndarray, *, parts: int = 4, seed: int = 0
) -> Choice:
    """The faster exchange for tokens that are routed after a target.

    Parameters
    ----------
    topology
        Links, nodes and switches.
    workload
        Tokens, bytes and experts; one group of all ranks.
    target_PN
        ``[P, N]`` tokens that each rank sends to each expert.
    parts
        Parts that the hierarchical exchange cuts the tokens into.
    seed
        Of the sample.

    Returns
    -------
    Choice

    Raises
    ------
    InputError
        The workload has several groups, or there are more than 256 ranks.

    Examples
    --------
    >>> topology = Topology.from_tree("2x4", bandwidth_bytes_per_s=(1e11, 1e9))
    >>> workload = Workload(tokens_per_rank=1024, top_k=8, hidden_size=1024, experts_per_rank=8)
    >>> choice = choose_exchange(topology, workload, np.full((8, 64), 128.0))
    >>> choice.kind, round(choice.flat_s / choice.hierarchical_s, 1)
    ('hierarchical', 3.9)
    """
    num_ranks = topology.num_ranks
    if workload.ep_groups is not None and len(workload.ep_groups) > 1:
        raise InputError("workload has several ep_groups; allowed: one group of all ranks")
    if num_ranks > MOST_RANKS:
        raise InputError(f"topology has {num_ranks} ranks; allowed: up to {MOST_RANKS}")
    if len(topology.nodes) == 1:
        return Choice(
            "flat", "flat: there is one node, so no link between nodes to spare", 0.0, 0.0
        )
    ranks = workload.groups(num_ranks)[0]
    rank_of_N = [ranks[position] for position in workload.expert_position_N(num_ranks)]
    counts_PN, forward_PMM = sample_routing(topology, workload, target_PN, rank_of_N, seed)
    model = cost_model(topology, workload, "intra")
    row_bytes = workload.token_bytes
    flat_PP = flat_rows(counts_PN, rank_of_N) * row_bytes
    hops = hierarchical_rows(topology, counts_PN, forward_PMM, rank_of_N)
    told_PP = told_bytes(topology, counts_PN, forward_PMM, rank_of_N)
    there = [hop_PP * row_bytes for hop_PP in hops]
    there[0] = there[0] + told_PP
    back = [hop_PP.T * row_bytes for hop_PP in hops]
    flat = [_ended(model, flat_PP), _ended(model, flat_PP.T)]
    relayed = [[_ended(model, bytes_PP) for bytes_PP in way] for way in (there, back)]
    flat_s = sum(float(times.max()) for times in flat)
    hierarchical_s = sum(_in_turns([float(times.max()) for times in way], parts) for way in relayed)
    kind = "hierarchical" if hierarchical_s < (1 - LEAST_GAIN) * flat_s else "flat"
    slowest = flat[0] if kind == "flat" else max(relayed[0], key=lambda times: times.max())
    link = topology.links[int(slowest[: model.num_links].argmax())]
    reason = (
        f"{kind}: {min(flat_s, hierarchical_s) * 1e3:.3g} ms for dispatch and combine where "
        f"{'hierarchical' if kind == 'flat' else 'flat'} takes "
        f"{max(flat_s, hierarchical_s) * 1e3:.3g} ms (simulated); link {link.source} to "
        f"{link.target} ends last"
    )
    if kind == "flat" and hierarchical_s < flat_s:
        reason = f"flat: hierarchical would gain less than {LEAST_GAIN:.0%} (simulated)"
    return Choice(kind, reason, flat_s, hierarchical_s)


def _ended(model: CostModel, bytes_PP: np.ndarray) -> np.ndarray:
    """When each link ends; links without traffic are not waited for."""
    times_R = model.row_times_s(bytes_PP)
    return np.where(model.seconds_per_byte @ bytes_PP.ravel() > 0, times_R, 0.0)


def _in_turns(hop_s: Sequence[float], parts: int) -> float:
    """Hops that overlap but for the first or last part: the longest, and a part of the others."""
    longest = max(hop_s)
    return longest + (sum(hop_s) - longest) / parts


def sample_routing(
    topology: Topology,
    workload: Workload,
    target_PN: np.ndarray,
    rank_of_N: Sequence[int],
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Counts ``[P, N]`` and copies from node to node ``[P, M, M]`` of a sampled routing, to scale.

    Examples
    --------
    >>> topology = Topology.from_tree("2x1", bandwidth_bytes_per_s=(4e9, 1e9))
    >>> workload = Workload(tokens_per_rank=100, top_k=1, hidden_size=8)
    >>> counts_PN, forward_PMM = sample_routing(topology, workload, np.eye(2) * 100, [0, 1])
    >>> counts_PN.tolist(), float(forward_PMM.sum())
    ([[100.0, 0.0], [0.0, 100.0]], 0.0)
    """
    generator = np.random.default_rng(seed)
    groups, num_nodes = sum_groups(topology), len(topology.nodes)
    samples = min(SAMPLES, workload.tokens_per_rank)
    scale = workload.tokens_per_rank / samples
    node_of_N = np.array([topology.node_of[rank] for rank in rank_of_N])
    counts_PN = np.zeros(target_PN.shape)
    forward_PMM = np.zeros((topology.num_ranks, num_nodes, num_nodes))
    for rank in range(topology.num_ranks):
        weight_N = np.maximum(target_PN[rank], 1e-12 * target_PN[rank].max())
        draw_SN = generator.exponential(size=(samples, len(weight_N))) / weight_N
        index_SK = np.argpartition(draw_SN, workload.top_k - 1, axis=1)[:, : workload.top_k]
        counts_PN[rank] = scale * np.bincount(index_SK.ravel(), minlength=len(weight_N))
        touch_SM = np.zeros((samples, num_nodes), dtype=bool)
        touch_SM[np.arange(samples)[:, None], node_of_N[index_SK]] = True
        relays = make_relays(rank, topology.nodes, groups)
        forward_PMM[rank] = scale * forwarding(touch_SM, relays)
    return counts_PN, forward_PMM


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
