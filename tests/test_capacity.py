"""Capacities and drops: against loops over choices, and in gates."""

from __future__ import annotations

import copy
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from tamoe import NaiveGate
from tamoe.capacity import TopologyCapacity, even_capacity, within_capacity
from tamoe.functional import expert_counts
from tests.gate_inputs import seeded, tokens
from tests.plan_rows import Rows, two_nodes


def loop_within_capacity(index, capacity, priority):
    """One choice after another: by priority, then choice number, then token."""
    num_tokens, top_k = index.shape
    order = [(j, t) for j in range(top_k) for t in range(num_tokens)]
    if priority is not None:
        order.sort(key=lambda place: -priority[place[1], place[0]])  # sort is stable
    room, keep = list(capacity), np.zeros(index.shape, dtype=bool)
    for j, t in order:
        expert = index[t, j]
        if expert >= 0 and room[expert] > 0:
            room[expert] -= 1
            keep[t, j] = True
    return keep


@given(
    num_tokens=st.integers(0, 40),
    num_experts=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
    ties=st.booleans(),
    with_priority=st.booleans(),
    data=st.data(),
)
@settings(max_examples=300, deadline=None)
def test_kept_choices_equal_a_loop(num_tokens, num_experts, seed, ties, with_priority, data):
    top_k = data.draw(st.integers(1, num_experts))
    rng = np.random.default_rng(seed)
    index = rng.random((num_tokens, num_experts)).argsort(1)[:, :top_k]
    index = np.where(rng.random(index.shape) < 0.2, -1, index)
    capacity = rng.integers(0, 8, num_experts)
    priority = rng.random(index.shape)
    priority = np.round(priority, 1) if ties else priority
    priority = priority if with_priority else None
    keep = within_capacity(
        torch.from_numpy(index),
        torch.from_numpy(capacity),
        None if priority is None else torch.from_numpy(priority),
    )
    np.testing.assert_array_equal(keep.numpy(), loop_within_capacity(index, capacity, priority))
    for expert in range(num_experts):  # exact: no place is left empty while a choice is dropped
        wanted = int((index == expert).sum())
        kept = int((keep.numpy() & (index == expert)).sum())
        assert kept == min(wanted, capacity[expert])


@given(
    num_tokens=st.integers(0, 100_000),
    num_experts=st.integers(1, 512),
    top_k=st.integers(1, 8),
    factor=st.decimals("0.01", "8", places=2),
)
@settings(max_examples=300, deadline=None)
def test_even_capacity_is_the_exact_ceiling(num_tokens, num_experts, top_k, factor):
    exact = math.ceil(Fraction(factor) * top_k * num_tokens / num_experts)
    sizes = {"top_k": top_k, "factor": float(factor)}
    assert even_capacity(num_tokens, num_experts, **sizes) == exact
    assert even_capacity(torch.tensor(num_tokens), num_experts, **sizes).item() == exact


@given(st.lists(st.integers(1, 500), min_size=1, max_size=12), st.decimals("0.1", "3", places=1))
@settings(max_examples=200, deadline=None)
def test_topology_capacity_is_the_ceiling_of_factor_times_target(target, factor):
    # Targets with the noise of a solver must not round up to one more token.
    noisy = np.array([target], dtype=float) * (1 + 1e-8)
    capacity = TopologyCapacity(Rows(noisy), rank=0, factor=float(factor))
    exact = [math.ceil(Fraction(factor) * count) for count in target]
    assert capacity(sum(target)).tolist() == exact
    assert capacity(torch.tensor(sum(target))).tolist() == exact


@pytest.mark.parametrize("drop", ["probs", "position", "random"])
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_gate_drops_exactly_what_its_policy_says(drop, top_k):
    generator = torch.Generator().manual_seed(5)
    options = {"top_k": top_k, "capacity": 0.5, "drop": drop, "generator": generator}
    gate = seeded(NaiveGate, 16, 8, **options)
    x = tokens(100)
    free = copy.copy(gate)
    free.capacity, free.drop = None, "none"
    index = free(x).expert_index_TK
    priority = None
    if drop == "probs":
        priority = free(x).probs_TN.gather(1, index).detach().numpy()
    elif drop == "random":
        priority = torch.rand(index.shape, generator=torch.Generator().manual_seed(5)).numpy()
    capacity = [math.ceil(0.5 * top_k * 100 / 8)] * 8
    keep = loop_within_capacity(index.numpy(), capacity, priority)
    routing = gate(x)
    np.testing.assert_array_equal(routing.expert_index_TK.numpy(), np.where(keep, index, -1))
    expected = torch.where(torch.from_numpy(keep), free(x).weight_TK, 0.0)
    torch.testing.assert_close(routing.weight_TK, expected, rtol=0, atol=0)
    assert 0 < keep.sum() < keep.size


def test_topology_capacity_in_a_gate_follows_the_target():
    capacity = TopologyCapacity(two_nodes(), rank=5, factor=1.0)
    gate = seeded(NaiveGate, 16, 8, capacity=capacity, drop="position")
    kept = expert_counts(gate(tokens(2048)).expert_index_TK, 8)
    wanted = expert_counts(seeded(NaiveGate, 16, 8)(tokens(2048)).expert_index_TK, 8)
    # 4,096 choices: 4096 · (1/24) = 170.67 outside the node, 4096 · 5/24 = 853.33 inside.
    limit = torch.tensor([171] * 4 + [854] * 4)
    assert kept.tolist() == torch.minimum(wanted, limit).tolist()
    assert (wanted[:4] > 171).all()


def test_renormalized_weights_take_over_what_was_dropped():
    options = {"top_k": 3, "capacity": 0.6, "drop": "probs"}
    for weights in ("chosen", "full"):
        plain = seeded(NaiveGate, 16, 8, weights=weights, **options)(tokens(200))
        full = seeded(NaiveGate, 16, 8, weights=weights, top_k=3)(tokens(200))
        gate = seeded(NaiveGate, 16, 8, weights=weights, renormalize=True, **options)
        routing = gate(tokens(200))
        kept = (routing.expert_index_TK >= 0).any(1)
        sums = routing.weight_TK.sum(1)
        torch.testing.assert_close(sums[kept], full.weight_TK.sum(1)[kept])
        assert (sums[~kept] == 0).all()
        ratio = routing.weight_TK * plain.weight_TK.sum(1, keepdim=True)
        torch.testing.assert_close(ratio, plain.weight_TK * sums.unsqueeze(1))
        routing.weight_TK.square().sum().backward()
        assert gate.weight.grad.isfinite().all()
