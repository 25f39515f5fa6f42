"""Routers of DeepSpeed, Megatron-Core and TorchTitan, and a plan that steers them near."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tamoe.solver import Plan, Workload, solve
from tamoe.topology import Topology

os.environ.setdefault("DS_ACCELERATOR", "cpu")
TITAN = Path(sys.prefix) / "torchtitan"  # to go into sys.path
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
needs_megatron = pytest.mark.skipif(
    find_spec("megatron") is None, reason="megatron-core is not installed"
)
needs_torchtitan = pytest.mark.skipif(
    not TITAN.is_dir(), reason="torchtitan is not installed beside: make frameworks"
)


def near(top_k: int = 2, tree: str = "2x4") -> Plan:
    topology = Topology.from_tree(tree, bandwidth_bytes_per_s=(4e10, 1e10))
    workload = Workload(tokens_per_rank=256, top_k=top_k, experts_per_rank=8 // topology.num_ranks)
    return solve(topology, workload, method="entropic", kl=0.3)


def remote_target(plan: Plan, rank: int = 0) -> float:
    target_N, mine = plan.target_N(rank), rank * 2 // plan.num_ranks
    return float(sum(target_N[e] for e in range(8) if e // 4 != mine) / target_N.sum())


def megatron_router(group: Any, **options: Any) -> torch.nn.Module:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        num_moe_experts=8,
        moe_router_topk=2,
        moe_router_load_balancing_type="none",
        use_cpu_initialization=True,
        **options,
    )
    groups = ProcessGroupCollection(tp=group, cp=group, tp_cp=group, tp_dp_cp=group)
    torch.manual_seed(0)
    router = TopKRouter(config, groups)
    torch.nn.init.normal_(router.weight, std=0.5)
    return router


def titan_router(**options: Any) -> torch.nn.Module:
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import TokenChoiceTopKRouter

    gate = Linear.Config(in_features=16, out_features=8, bias=False)
    config = TokenChoiceTopKRouter.Config(num_experts=8, gate=gate, top_k=2, **options)
    torch.manual_seed(0)
    router = config.build()
    torch.nn.init.normal_(router.gate.weight, std=0.5)
    return router
