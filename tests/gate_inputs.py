"""Tokens and plans for tests of gates."""

from __future__ import annotations

import torch

from tamoe.solver import Plan, Workload, solve
from tamoe.topology import Topology


def tokens(count: int, hidden: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed))


def plan_of(tree: str = "2x4", experts_per_rank: int = 1, top_k: int = 2) -> Plan:
    topology = Topology.from_tree(tree, bandwidth_bytes_per_s=(3e10, 1e10))
    workload = Workload(tokens_per_rank=512, top_k=top_k, experts_per_rank=experts_per_rank)
    return solve(topology, workload, floor=0.25)


def seeded(make, *arguments, **options):
    torch.manual_seed(0)
    return make(*arguments, **options)
