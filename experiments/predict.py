"""What the cost model says of the exchanges that the demo measured (simulated)."""

from __future__ import annotations

import dataclasses

import networkx as nx
import numpy as np

from tamoe.experiments.results import Document
from tamoe.solver import Workload, exchange_time_s
from tamoe.topology.formats import topology_from_document
from tamoe.topology.graph import Topology


def predict_exchanges(part: Document) -> None:
    """Fill in what the cost model says of the counts that were reached, and of the targets.

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
