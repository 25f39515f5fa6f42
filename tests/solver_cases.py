"""Random clusters and workloads for the solver's tests, and an oracle that shares no code with it.

The oracle has one unknown for each rank and expert, walks the routes with networkx itself, writes
every constraint densely and hands the problem to cvxpy with Clarabel.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx
import numpy as np

from tamoe.solver import Workload
from tamoe.topology.build import add_link, as_pairwise, from_matrices, from_tree
from tamoe.topology.graph import Topology
from tamoe.topology.link import Link, Pair

KINDS = ("shared tree", "pairwise tree", "matrices", "digraph", "slow node", "one node", "one rank")


@dataclass(frozen=True)
class Case:
    """Arguments of one call of solve()."""

    seed: int
    kind: str
    topology: Topology
    workload: Workload
    floor: float
    self_send: str


def random_case(seed: int, max_ranks: int = 8) -> Case:
    """A case whose kind follows from its seed, so that any run of seeds has them all."""
    rng = np.random.default_rng(seed)
    kind = KINDS[seed % len(KINDS)]
    topology = _with_extras(_topology(kind, rng, max_ranks), rng)
    workload = _workload(topology.num_ranks, rng)
    priced = all(topology.route(rank, rank) for rank in range(topology.num_ranks))
    if rng.random() < 0.6:
        floor = float(rng.choice([0, 0, 0.1, 0.5] if priced else [0.1, 0.5]))
        return Case(seed, kind, topology, workload, floor, "intra")
    # Without a floor, keeping everything local would be the answer; that has its own test.
    known = topology.copy_bytes_per_s is not None
    self_send = "copy" if known else "free"
    return Case(seed, kind, topology, workload, float(rng.choice([0.05, 0.3, 0.9])), self_send)


def _topology(kind: str, rng: np.random.Generator, max_ranks: int) -> Topology:
    if kind == "matrices":
        num = int(rng.integers(2, max_ranks + 1))
        alpha = rng.random((num, num)) * 1e-4 * (rng.random() < 0.5)
        return from_matrices(alpha, 10 ** -rng.uniform(7, 10, size=(num, num)))
    if kind == "digraph":
        return _digraph(int(rng.integers(2, max_ranks + 1)), rng)
    if kind == "slow node":
        nodes, ranks = int(rng.integers(2, 5)), int(rng.integers(1, 3))
        topology = from_tree([ranks] * nodes, bandwidth_bytes_per_s=(1e10, 1e8))
        return _changed(
            topology, {"nic0": {"bandwidth_bytes_per_s": 1e8 / rng.choice([2, 10, 50])}}
        )
    if kind in ("one node", "one rank"):
        ranks = 1 if kind == "one rank" else int(rng.integers(2, max_ranks + 1))
        return _jittered(from_tree(ranks, bandwidth_bytes_per_s=(1e10,), latency_s=1e-6), rng)
    tree, depth = _random_tree(rng, max_ranks)
    rates = tuple(10 ** rng.uniform(7, 10, size=1 + depth))
    latencies = tuple(rng.random(1 + depth) * 1e-4 * (rng.random() < 0.5))
    topology = _jittered(from_tree(tree, bandwidth_bytes_per_s=rates, latency_s=latencies), rng)
    return as_pairwise(topology) if kind == "pairwise tree" else topology


def _random_tree(rng: np.random.Generator, max_ranks: int) -> tuple[list[object], int]:
    """Nested lists with unequal nodes and switches, and the number of uplink levels."""
    depth = int(rng.integers(1, 4))
    left = max_ranks

    def subtree(levels: int) -> object:
        nonlocal left
        if levels == 0:
            ranks = int(rng.integers(1, max(1, min(4, left - 1)) + 1))
            left -= ranks
            return ranks
        children = [subtree(levels - 1)]
        while left > 0 and rng.random() < 0.6:
            children.append(subtree(levels - 1 if rng.random() < 0.7 else 0))
        return children

    tree = subtree(depth)
    assert isinstance(tree, list)
    return tree, depth


def _digraph(num: int, rng: np.random.Generator) -> Topology:
    while True:
        graph = nx.DiGraph()
        for rank in range(num):
            graph.add_node(f"rank{rank}", kind="device", rank=rank, node=rank)
        for switch in range(int(rng.integers(0, 4))):
            graph.add_node(f"switch{switch}", kind="switch")
        for source in graph.nodes:
            for target in graph.nodes:
                own = source == target
                if rng.random() < 0.5 and (not own or source.startswith("rank")):
                    rate, latency = 10 ** rng.uniform(7, 9), 1e-4 * rng.random()
                    add_link(graph, Link(source, target, rate, latency, 0.0, 1))
        reachable = dict(nx.all_pairs_shortest_path_length(graph))
        if all(f"rank{j}" in reachable[f"rank{i}"] for i in range(num) for j in range(num)):
            return Topology(graph, tuple((rank,) for rank in range(num)))


def _jittered(topology: Topology, rng: np.random.Generator) -> Topology:
    graph = nx.DiGraph(topology.graph)
    spread, burst = rng.choice([0.0, 0.1, 1.0]), rng.choice([0.0, 0.0, 1e5])
    for _, _, data in graph.edges(data=True):
        data["bandwidth_bytes_per_s"] *= float(np.exp(spread * rng.standard_normal()))
        data["burst_bytes"] = float(burst * rng.random() * (rng.random() < 0.5))
    return dataclasses.replace(topology, graph=graph)


def _changed(topology: Topology, changes: dict[str, dict[str, float]]) -> Topology:
    """Other values on the uplinks and downlinks of NICs."""
    graph = nx.DiGraph(topology.graph)
    for vertex, values in changes.items():
        for source, target, data in graph.edges(data=True):
            ends = {source, target}
            if vertex in ends and any(name.startswith("switch") for name in ends):
                data.update({name: float(value) for name, value in values.items()})
    return dataclasses.replace(topology, graph=graph)


def _with_extras(topology: Topology, rng: np.random.Generator) -> Topology:
    changes: dict[str, object] = {}
    if rng.random() < 0.3:
        changes["overhead_s"] = 1e-5 * float(rng.random())
    if rng.random() < 0.4:
        changes["copy_bytes_per_s"] = float(10 ** rng.uniform(8, 11))
    if rng.random() < 0.3:
        ranks = range(topology.num_ranks)
        changes["pairs"] = {
            (i, j): Pair(
                1e-4 * float(rng.random()),
                topology.pair(i, j).beta_s_per_byte * float(rng.choice([1.0, 1.04, 1.2, 3.0])),
            )
            for i in ranks
            for j in ranks
            if rng.random() < 0.3 and topology.pair(i, j).beta_s_per_byte > 0
        }
    return dataclasses.replace(topology, **changes)  # type: ignore[arg-type]


def _workload(num_ranks: int, rng: np.random.Generator) -> Workload:
    fields: dict[str, object] = {
        "tokens_per_rank": int(rng.integers(1, 3000)),
        "hidden_size": int(rng.integers(1, 1025)),
    }
    size = num_ranks
    if num_ranks % 2 == 0 and rng.random() < 0.3:
        order = rng.permutation(num_ranks).tolist()
        size = num_ranks // 2
        fields["ep_groups"] = (tuple(order[:size]), tuple(order[size:]))
    if rng.random() < 0.3:
        num_experts = int(rng.integers(1, 2 * size + 1))
        fields["placement"] = tuple(rng.integers(0, size, size=num_experts).tolist())
    else:
        fields["experts_per_rank"] = int(rng.integers(1, 4))
        num_experts = size * int(fields["experts_per_rank"])  # type: ignore[call-overload]
    fields["top_k"] = int(rng.integers(1, min(4, num_experts) + 1))
    return Workload(**fields)  # type: ignore[arg-type]


# ---- the oracle -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limit:
    """T >= constant_s + Σ seconds · tokens, with one coefficient for each rank and expert."""

    constant_s: float
    seconds_PN: np.ndarray


def expert_ranks(case: Case) -> np.ndarray:
    """Rank that each rank reaches under each expert number, ``[P, N]``, written from the rules."""
    num, workload = case.topology.num_ranks, case.workload
    groups = workload.ep_groups or (tuple(range(num)),)
    where: list[list[int]] = [[] for _ in range(num)]
    for group in groups:
        if workload.placement is not None:
            homes = [group[position] for position in workload.placement]
        else:
            homes = [rank for rank in group for _ in range(workload.experts_per_rank)]
        for rank in group:
            where[rank] = homes
    return np.array(where)


def limits(case: Case) -> list[Limit]:
    """Every limit on the time of an exchange, pair by pair and expert by expert."""
    topology, workload = case.topology, case.workload
    home_PN = expert_ranks(case)
    token_bytes = workload.hidden_size * workload.element_bytes
    groups = workload.ep_groups or (tuple(range(topology.num_ranks)),)
    overhead_s = (len(groups[0]) - 1) * topology.overhead_s
    bandwidth: dict[tuple[str, str], float] = {}
    users: dict[tuple[str, str], list[tuple[int, int]]] = {}
    found = []
    for group in groups:
        for i in group:
            for j in group:
                if i == j and case.self_send != "intra":
                    continue
                path = _path(topology.graph, i, j)
                for edge in path:
                    users.setdefault(edge, []).append((i, j))
                    bandwidth[edge] = topology.graph.edges[edge]["bandwidth_bytes_per_s"]
                measured = topology.pairs.get((i, j))
                beta = max((1 / bandwidth[edge] for edge in path), default=0.0)
                if measured is not None and measured.beta_s_per_byte > 1.05 * beta:
                    used = _uses(home_PN, [(i, j)])
                    seconds_PN = used * token_bytes * measured.beta_s_per_byte
                    found.append(Limit(measured.alpha_s + overhead_s, seconds_PN))
    for edge, pairs in users.items():
        alpha_s = max(_alpha(topology, i, j) for i, j in pairs) + overhead_s
        seconds_PN = _uses(home_PN, pairs) * token_bytes / bandwidth[edge]
        credit_s = topology.graph.edges[edge].get("burst_bytes", 0.0) / bandwidth[edge]
        found.append(Limit(alpha_s - credit_s, seconds_PN))
        found.append(Limit(alpha_s, np.zeros_like(seconds_PN)))
    if case.self_send == "copy":
        for rank in range(topology.num_ranks):
            used = _uses(home_PN, [(rank, rank)])
            found.append(Limit(0.0, used * token_bytes / topology.copy_bytes_per_s))
    return found


def _path(graph: nx.DiGraph, i: int, j: int) -> list[tuple[str, str]]:
    if i != j:
        path = nx.single_source_shortest_path(graph, f"rank{i}")[f"rank{j}"]
        return list(pairwise(path))
    name = f"rank{i}"
    if graph.has_edge(name, name):
        return [(name, name)]
    for hub in graph[name]:
        if graph.nodes[hub]["kind"] == "nic":
            return [(name, hub), (hub, name)]
    return []


def _alpha(topology: Topology, i: int, j: int) -> float:
    if (i, j) in topology.pairs:
        return topology.pairs[i, j].alpha_s
    return sum(topology.graph.edges[edge]["latency_s"] for edge in _path(topology.graph, i, j))


def _uses(home_PN: np.ndarray, pairs: list[tuple[int, int]]) -> np.ndarray:
    used = np.zeros(home_PN.shape)
    for i, j in pairs:
        used[i] += home_PN[i] == j
    return used


def oracle(
    case: Case,
    scale_s: float,
    *,
    kl: float = 0.0,
    even_time_s: float = 1.0,
    time_limit: float = 0.0,
) -> tuple[float, np.ndarray]:
    """Least T in units of ``scale_s`` and the dispatch ``[P, N]`` that reaches it.

    With ``kl``, least T/even_time_s + kl·(1/PkS)Σ c log(c/even); with ``time_limit`` (in units of
    ``scale_s``), least divergence among the dispatches that end by it.
    """
    import cvxpy as cp

    workload, home_PN = case.workload, expert_ranks(case)
    (num, num_experts), tokens = home_PN.shape, workload.tokens_per_rank
    even = workload.top_k * tokens / num_experts
    x_PN, time = cp.Variable((num, num_experts)), cp.Variable()  # tokens / even
    groups = workload.ep_groups or (tuple(range(num)),)
    constraints = [cp.sum(x_PN, axis=1) == num_experts, x_PN >= case.floor, x_PN * even <= tokens]
    constraints += [cp.sum(x_PN[list(group)], axis=0) == len(group) for group in groups]
    rows = limits(case)
    matrix = np.array([limit.seconds_PN.ravel() for limit in rows]) * (even / scale_s)
    constants = np.array([limit.constant_s for limit in rows]) / scale_s
    if rows:
        constraints.append(matrix @ cp.vec(x_PN, order="C") + constants <= time)
    divergence = -cp.sum(cp.entr(x_PN)) / (num * num_experts)
    if time_limit:
        objective = divergence
        constraints.append(time == time_limit)
    else:
        constraints.append(time >= 0)
        objective = time * scale_s / even_time_s + kl * divergence if kl else time
    problem = cp.Problem(cp.Minimize(objective), constraints)
    value = problem.solve(solver=cp.CLARABEL)
    return float(value), np.asarray(x_PN.value) * even


def time_of(case: Case, target_PN: np.ndarray) -> float:
    """Time of a dispatch, limit by limit."""
    return max(
        (row.constant_s + (row.seconds_PN * target_PN).sum() for row in limits(case)), default=0
    )
