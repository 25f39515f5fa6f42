"""An exchange for each of several expert-parallel groups, from the Plan of all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tamoe.exchange import Exchange
from tamoe.solver import Plan, Workload, solve
from tamoe.topology import InputError, Topology, run_ranks

GROUPS = ((0, 2), (1, 3))


def plan_of(ep_groups: tuple[tuple[int, ...], ...] | None) -> Plan:
    topology = Topology.from_tree("2x2", bandwidth_bytes_per_s=(1e10, 1e7))
    workload = Workload(
        tokens_per_rank=512,
        top_k=2,
        hidden_size=64,
        element_bytes=4,
        experts_per_rank=2,
        ep_groups=ep_groups,
    )
    return solve(topology, workload, floor=0.25)


def in_groups(rank: int) -> dict[str, Any]:
    handles = [dist.new_group(list(members)) for members in GROUPS]
    pairs = [dist.new_group(list(members)) for members in ((0, 1), (2, 3))]
    group, pair = handles[rank % 2], pairs[rank // 2]
    exchange = Exchange(plan_of(GROUPS), group=group)
    generator = torch.Generator().manual_seed(rank)
    x_TD = torch.randn(9, 64, generator=generator)
    index_TK = torch.randint(0, 4, (9, 2), generator=generator)
    row_RD, handle = exchange.dispatch(x_TD, index_TK, num_experts=4)
    told = {}
    asked = {
        "several": (plan_of(GROUPS), pair),
        "all": (plan_of(GROUPS), None),
        "turned": (plan_of(((2, 0), (3, 1))), group),
        "one": (plan_of(None), pair),
    }
    for name, (plan, some) in asked.items():
        try:
            Exchange(plan, group=some)
        except InputError as error:
            told[name] = str(error)
    return {
        "nodes": exchange.nodes,
        "reason": exchange.reason,
        "sums": torch.equal(exchange.combine(row_RD, handle), x_TD + x_TD),
        "told": told,
    }


@pytest.mark.ranks
def test_a_plan_for_several_groups_makes_the_exchange_of_each() -> None:
    answers = run_ranks(4, in_groups, timeout_s=120)
    for rank, answer in enumerate(answers):
        assert answer["nodes"] == ((0,), (1,))
        assert answer["sums"]
        assert answer["reason"] == answers[0]["reason"]  # all groups take the same one
        assert "dispatch and combine, forward and backward, take" in answer["reason"]
        pair = (0, 1) if rank < 2 else (2, 3)
        told = answer["told"]
        assert f"4 ranks and the group 2, {pair} of the job" in told["several"]
        assert "one of the plan's ep_groups, in that order of ranks: (0, 2), (1, 3)" in told["all"]
        assert "of the job; allowed: one of the plan's ep_groups" in told["turned"]
        assert "Take topology.subset(ranks)" in told["one"]
