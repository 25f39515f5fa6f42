"""Sums that the cost model counts for a flat combine, against the stages of its real sums."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from tamoe.solver.choice import forwarding
from tamoe.solver.relays import make_relays, sum_groups
from tamoe.solver.traffic import sum_rows
from tamoe.summation import plan_sum
from tamoe.topology import Topology

TREES: list[Any] = ["1x4", "2x2", "4x2", "4x1", [3, 1], [[2, 1], [2]], [[2, 2], [1, 3]]]
EACH = 2  # experts of a rank


def tree(shape: Any) -> Topology:
    levels = 3 if any(isinstance(part, list) for part in shape) else 2
    return Topology.from_tree(shape, bandwidth_bytes_per_s=[1e9] * levels)


def counted_and_made(
    shape: Any, weight_N: np.ndarray, tokens: int, top_k: int
) -> tuple[float, float]:
    """What the model counts for rank 0, and what its real plan of sums makes and adds up again."""
    topology = tree(shape)
    generator = np.random.default_rng(0)
    draw_TN = generator.exponential(size=(tokens, len(weight_N))) / weight_N
    expert_TK = np.sort(np.argsort(draw_TN, axis=1)[:, :top_k], axis=1)
    rank_TK = expert_TK // EACH
    groups = sum_groups(topology)
    counts_PN = np.zeros((topology.num_ranks, len(weight_N)))
    counts_PN[0] = np.bincount(expert_TK.ravel(), minlength=len(weight_N))
    num_nodes = len(topology.nodes)
    touch_TM = np.zeros((tokens, num_nodes), dtype=bool)
    touch_TM[np.arange(tokens)[:, None], np.array(topology.node_of)[rank_TK]] = True
    forward_PMM = np.zeros((topology.num_ranks, num_nodes, num_nodes))
    forward_PMM[0] = forwarding(touch_TM, make_relays(0, topology.nodes, groups))
    rank_of_N = np.arange(len(weight_N)) // EACH
    given_P = [tokens] + [0] * (topology.num_ranks - 1)
    counted_P = sum_rows(topology, counts_PN, forward_PMM, rank_of_N, given_P)
    assert not counted_P[1:].any()
    order = np.argsort(expert_TK.ravel(), kind="stable")
    token_n, rank_n = (torch.from_numpy(v) for v in (order // top_k, rank_TK.ravel()[order]))
    stages = plan_sum(token_n, rank_n, tokens, groups).stages
    sums = sum(len(stage.first_m) for stage in stages)
    again = sum(len(stage.index_n) for stage in stages[1:])
    return float(counted_P[0]), float(max(sums + again, tokens))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(TREES), st.integers(1, 8), st.integers(1, 200), st.booleans())
def test_sums_are_counted_where_all_tokens_go_to_the_same_experts(
    shape: Any, top_k: int, tokens: int, last: bool
) -> None:
    num_experts = EACH * tree(shape).num_ranks
    top_k = min(top_k, num_experts)
    weight_N = np.where(np.arange(num_experts) < top_k, 1e12, 1e-12)
    counted, made = counted_and_made(shape, weight_N[::-1] if last else weight_N, tokens, top_k)
    assert counted == made


@pytest.mark.parametrize("shape", TREES[1:], ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 4, 8])
def test_sums_of_even_routing_are_counted_nearly(shape: Any, top_k: int) -> None:
    num_experts = EACH * tree(shape).num_ranks
    counted, made = counted_and_made(shape, np.ones(num_experts), 2000, min(top_k, num_experts))
    assert counted == pytest.approx(made, rel=0.12)
