"""Results documents made up for tests of figures and report."""

from __future__ import annotations

import math

import numpy as np

from tamoe.experiments.results import Document, complete_setting, empty_strategy
from tamoe.topology.formats import topology_to_document
from tamoe.topology.graph import Topology

STRATEGIES = (
    ("even", "even", None, 0.75),
    ("capacity 1.25", "capacity", None, 0.75),
    ("ta-moe loss kl=0.5", "loss", 0.5, 0.3),
    ("bias kl=0.5", "bias", 0.5, 0.2),
    ("bias kl=0.3", "bias", 0.3, 0.05),
)


def example_setting(name: str = "steep", cluster: str = "4x2:50mbit") -> Document:
    """A complete setting whose numbers follow from simple rules."""
    topology = Topology.from_tree("4x2", bandwidth_bytes_per_s=(1.2e9, 6e6), latency_s=(3e-5, 6e-5))
    setting: Document = {
        "setting": name,
        "cluster": cluster,
        "label": "emulated",
        "nodes": [list(ranks) for ranks in topology.nodes],
        "steps": 48,
        "compute_step_s": 0.15,
        "complete": True,
        "workload": {
            "tokens_per_rank": 1024,
            "top_k": 2,
            "hidden_size": 64,
            "element_bytes": 4,
            "experts_per_rank": 4,
            "placement": None,
            "ep_groups": None,
            "num_experts": 32,
            "num_blocks": 2,
            "num_ranks": 8,
        },
        "topology": topology_to_document(topology),
        "strategies": [_strategy(*row) for row in STRATEGIES],
    }
    return complete_setting(setting)


def _strategy(name: str, kind: str, kl: float | None, remote: float) -> Document:
    entry = empty_strategy(name, kind, kl, "one gate shared by all ranks")
    step_s = 0.15 + 1.05 * remote / 0.75
    local_PN = np.kron(np.eye(4), np.ones((2, 8)))
    counts_PN = np.where(local_PN > 0, (1 - remote) / 8, remote / 24) * 2048
    cost = 0.02 * (0.75 - remote)
    curve = [
        {"step": s, "time_s": s * step_s, "val_loss": 2.2 + 2.2 * math.exp(-s / 12) + cost}
        for s in range(0, 49 if kind == "even" else 65, 8)
    ]
    at_end = curve[6]["val_loss"]
    # Hierarchical saves a third of what even traffic takes, and costs 0.05 s of its own. What auto
    # takes is right but for even, and for the loss it makes no difference.
    relayed_s = 0.2 + (step_s - 0.15) * (1 - remote / 2.25)
    exchanges = {"flat": _timed(step_s), "hierarchical": _timed(relayed_s)}
    auto = "hierarchical" if relayed_s < step_s and kind == "capacity" else "flat"
    entry.update(
        **exchanges[auto],
        auto_exchange=auto,
        auto_reason=f"{auto}: 1 ms where the other takes 2 ms (simulated)",
        exchanges=exchanges,
        predicted_exchange_s=0.9 * (step_s - 0.15),
        exchange_alone_s=0.95 * (step_s - 0.15),
        predicted_alone_s=0.9 * (step_s - 0.15),
        allreduce_s=0.04,
        remote_share=remote,
        counts_PN=counts_PN.tolist(),
        target_PN=counts_PN.tolist() if kl else None,
        curve=curve,
        val_loss_own=at_end,
        val_loss_foreign=at_end + cost,
        val_loss_no_bias=at_end + 2 * cost,
        busiest_expert=1.2,
        dropped_share=0.0,
    )
    return entry


def _timed(step_s: float) -> Document:
    return {"step_s": step_s, "tokens_per_s": 8192 / step_s, "exchange_s": step_s - 0.15}
