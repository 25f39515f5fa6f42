"""Sums that the cost model counts for a flat combine, against the stages of its real sums."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from tamoe.solver import Workload
from tamoe.solver.relays import sum_groups
from tamoe.solver.sampling import sample_routing
from tamoe.solver.traffic import sum_rows
from tamoe.summation import count_sums, plan_sum
from tamoe.topology import Topology

TREES: list[Any] = ["1x4", "2x2", "4x2", "4x1", [3, 1], [[2, 1], [2]], [[2, 2], [1, 3]]]
EACH = 2  # experts of a rank


def tree(shape: Any) -> Topology:
    levels = 3 if any(isinstance(part, list) for part in shape) else 2
    return Topology.from_tree(shape, bandwidth_bytes_per_s=[1e9] * levels)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(TREES),
    st.integers(1, 8),
    st.integers(0, 200),
    st.sampled_from([0.0, 1.5, 40.0]),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.integers(0, 10_000),
)
def test_sums_are_those_of_the_stages(
    shape: Any, top_k: int, tokens: int, skew: float, dropped: float, seed: int
) -> None:
    groups, num_ranks = sum_groups(tree(shape)), tree(shape).num_ranks
    generator = np.random.default_rng(seed)
    top_k = min(top_k, EACH * num_ranks)
    draw_TN = generator.exponential(size=(tokens, EACH * num_ranks))
    draw_TN /= np.exp(skew * generator.normal(size=EACH * num_ranks))
    expert_TK = draw_TN.argsort(axis=1)[:, :top_k]
    kept_TK = generator.random(expert_TK.shape) >= dropped
    slot_TK = torch.from_numpy(np.where(kept_TK, expert_TK, EACH * num_ranks))
    sums_L = count_sums(slot_TK, EACH, num_ranks, groups).numpy()
    counted = sum_rows(np.array([kept_TK.sum()]), sums_L[None])
    order = np.argsort(expert_TK[kept_TK], kind="stable")
    token_n, rank_n = np.nonzero(kept_TK)[0][order], expert_TK[kept_TK][order] // EACH
    plan = plan_sum(torch.from_numpy(token_n), torch.from_numpy(rank_n), tokens, groups)
    made = sum(len(stage.first_m) for stage in plan.stages)
    again = sum(len(stage.index_n) for stage in plan.stages[1:])
    # Rows that are no terms of a sum are weighed all the same.
    assert counted.tolist() == [max(made + again, len(np.unique(token_n)))]


@pytest.mark.parametrize("shape", TREES, ids=str)
def test_a_sampled_routing_has_the_sums_of_its_levels(shape: Any) -> None:
    topology = tree(shape)
    num_experts = EACH * topology.num_ranks
    distinct = [len(set(group)) for group in sum_groups(topology)]
    for top_k in (1, num_experts):  # each level makes one sum of a token, or one for each group
        workload = Workload(5000, top_k, 8, experts_per_rank=EACH)
        target_PN = np.full((topology.num_ranks, num_experts), 5000.0 * top_k / num_experts)
        place_N = np.arange(num_experts) // EACH
        _, _, sums_PL = sample_routing(topology, workload, target_PN, place_N)
        per_token_L = [1 if top_k == 1 else number for number in distinct] + [1]
        assert sums_PL == pytest.approx(5000.0 * np.tile(per_token_L, (len(sums_PL), 1)))
