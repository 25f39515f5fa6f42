"""Routings drawn after a target: their counts and touches against closed forms."""

import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

from tamoe.solver import Workload
from tamoe.solver.sampling import chosen_shares, draw_by_share, sample_routing
from tamoe.topology import Topology


def test_sampled_touches_are_those_of_the_closed_form() -> None:
    topology = Topology.from_tree("4x2", bandwidth_bytes_per_s=(1e10, 1e9))
    workload = Workload(tokens_per_rank=256, top_k=8, hidden_size=8, experts_per_rank=8)
    _, forward_PMM, _ = sample_routing(
        topology, workload, np.full((8, 64), 32.0), [e // 8 for e in range(64)]
    )
    touched = 1 - math.comb(48, 8) / math.comb(64, 8)  # an expert among the 16 of a node
    assert forward_PMM.sum() / (8 * 3 * 256) == pytest.approx(touched, abs=0.01)


def test_sampled_counts_are_those_of_a_steep_target() -> None:
    """By weight, one after another, the far experts would get 501 of a token's rows, not 400."""
    topology = Topology.from_tree("4x2", bandwidth_bytes_per_s=(1e10, 1e9))
    workload = Workload(tokens_per_rank=1000, top_k=2, hidden_size=8)
    near_PP = np.kron(np.eye(4), np.ones((2, 2)))
    target_PN = np.where(near_PP > 0, 800.0, 400 / 6)
    sampled = [sample_routing(topology, workload, target_PN, range(8), seed) for seed in range(20)]
    counts_PN = np.mean([counts_PN for counts_PN, _, _ in sampled], axis=0)
    # 5,120 tokens of each rank: a count has a spread of 5.6 of the 800, 3.5 of the 67.
    assert counts_PN == pytest.approx(target_PN, abs=25)
    assert (counts_PN * (near_PP == 0)).sum(1).mean() == pytest.approx(400, rel=0.02)
    assert all((counts_PN.sum(1) == 2000).all() for counts_PN, _, _ in sampled)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.data())
def test_shares_add_up_and_tokens_choose_distinct_experts(target_N, data) -> None:
    target_N = np.array(target_N) + 1e-3
    top_k = data.draw(st.integers(1, len(target_N)))
    share_N = chosen_shares(target_N, top_k)
    assert share_N.sum() == pytest.approx(top_k)
    assert (share_N >= 0).all()
    assert (share_N <= 1).all()
    below_N = share_N < 1 - 1e-9  # experts that not all choose keep their proportions
    if below_N.any():
        ratio_N = share_N[below_N] / target_N[below_N]
        assert ratio_N == pytest.approx(ratio_N[0])
    chosen_SN = draw_by_share(share_N, 50, np.random.default_rng(0))
    assert (chosen_SN.sum(1) == top_k).all()
    assert chosen_SN[:, share_N > 1 - 1e-12].all()
