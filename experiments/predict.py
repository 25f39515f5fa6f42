"""What the cost model says of the exchanges that the demo measures (simulated)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import networkx as nx
import numpy as np

from tamoe.experiments.results import Document
from tamoe.experiments.strategies import Strategy
from tamoe.solver import Plan, Workload, exchange_time_s
from tamoe.solver.choice import Choice, choose_exchange
from tamoe.topology.formats import topology_from_document
from tamoe.topology.graph import Topology


def choose_exchanges(
    topology: Topology,
    workload: Workload,
    strategies: Sequence[Strategy],
    plans: Mapping[float, Plan],
) -> dict[str, Choice]:
    """What ``Exchange(plan)`` takes for each strategy, by name; for even ones without a plan."""
    num_ranks = topology.num_ranks
    num_experts = workload.num_experts(num_ranks)
    even = workload.tokens_per_rank * workload.top_k / num_experts
    even_PN = np.full((num_ranks, num_experts), even)
    targets = {s.name: even_PN if s.kl is None else plans[s.kl].target_PN for s in strategies}
    return {name: choose_exchange(topology, workload, x_PN) for name, x_PN in targets.items()}


def predict_exchanges(part: Document) -> None:
    """Fill in what the cost model says of the counts that were reached, and of the targets.

    It is about the flat exchange: what a hierarchical one moves does not follow from counts alone.

    A link's burst credit refills while nothing is sent. So each exchange starts with what one pause
    brings back: in training the ranks' computing, alone the agreement on counts.
    """
    if not part.get("topology") or not part.get("workload"):
        return
    topology = topology_from_document(part["topology"], "results: topology")
    names = [field.name for field in dataclasses.fields(Workload)]
    workload = Workload(**{name: part["workload"][name] for name in names})
    layers = part["workload"]["num_blocks"]
    pause_s = part.get("compute_step_s", 0.0) / (4 * layers)
    for strategy in part["strategies"]:
        for key, counts, pause in (
            ("predicted_exchange_s", strategy["counts_PN"], pause_s),
            ("predicted_alone_s", strategy["counts_PN"], strategy["alone_pause_s"] or 0.0),
            ("target_exchange_s", strategy["target_PN"], pause_s),
        ):
            if counts is not None:
                counts_PN = np.asarray(counts)
                strategy[key] = step_exchange_s(topology, workload, counts_PN, layers, pause)


def step_exchange_s(
    topology: Topology, workload: Workload, counts_PN: np.ndarray, layers: int, pause_s: float
) -> float:
    """Simulated time of a step's exchanges: two each way for each layer, forward and backward."""
    paused = with_credit_of(topology, pause_s)
    there = exchange_time_s(paused, workload, counts_PN, direction="dispatch")
    back = exchange_time_s(paused, workload, counts_PN, direction="combine")
    return 2 * layers * (there + back)


def with_credit_of(topology: Topology, pause_s: float) -> Topology:
    """The topology with the burst credit that each link regains in a pause."""
    graph = nx.DiGraph(topology.graph)
    for edge in graph.edges.values():
        refilled = pause_s * edge["bandwidth_bytes_per_s"]
        edge["burst_bytes"] = min(edge["burst_bytes"], refilled)
    return dataclasses.replace(topology, graph=graph)
