"""Auxiliary losses: value at even routing and at the target, gradients, masks, scales, groups."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from tamoe.functional import (
    balance_loss,
    convention_factor,
    expert_counts,
    group_balance_loss,
    topology_loss,
)
from tamoe.topology.errors import InputError

COMPILER = shutil.which("g++") or shutil.which("clang++")


def brute_force_loss(probs, index, penalty, mask) -> float:
    """The formula token by token and choice by choice, in float64."""
    tokens, num_experts = probs.shape
    kept = [t for t in range(tokens) if mask is None or mask[t]]
    if not kept:
        return 0.0
    mean = sum(penalty) / num_experts
    total = 0.0
    for expert in range(num_experts):
        count = sum(1 for t in kept for choice in index[t] if choice == expert)
        probability = sum(float(probs[t, expert]) for t in kept) / len(kept)
        total += penalty[expert] / mean * probability * count / (index.shape[1] * len(kept))
    return num_experts * total


@st.composite
def batches(draw):
    """Any batch: zero tokens, one expert, k = N, -1 indices, with or without a mask."""
    num_experts = draw(st.integers(1, 9))
    top_k = draw(st.integers(1, num_experts))
    tokens = draw(st.integers(0, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    probs = torch.from_numpy(rng.dirichlet(np.ones(num_experts), size=tokens))
    index = rng.random((tokens, num_experts)).argsort(1)[:, :top_k]
    index = np.where(rng.random(index.shape) < draw(st.sampled_from([0, 0.3, 1])), -1, index)
    penalty = torch.from_numpy(rng.uniform(0.05, 20, num_experts))
    mask = torch.from_numpy(rng.random(tokens) < 0.6) if draw(st.booleans()) else None
    return probs.reshape(tokens, num_experts), torch.from_numpy(index), penalty, mask


@given(batches())
@settings(max_examples=200, deadline=None)
def test_loss_and_counts_equal_a_loop_over_tokens(batch):
    probs, index, penalty, mask = batch
    expected = brute_force_loss(probs, index.numpy(), penalty.tolist(), mask)
    assert topology_loss(probs, index, penalty, mask).item() == pytest.approx(expected, abs=1e-12)
    counts = expert_counts(index, probs.shape[1], mask)
    for factor in (1, 2):
        counted = topology_loss(probs, index, penalty, mask, factor * counts).item()
        assert counted == pytest.approx(factor * expected, abs=1e-12)
    assert topology_loss(probs, index, 7 * penalty, mask).item() == pytest.approx(
        expected, abs=1e-12
    )
    flat = brute_force_loss(probs, index.numpy(), [1.0] * probs.shape[1], mask)
    assert balance_loss(probs, index, mask).item() == pytest.approx(flat, abs=1e-12)
    counts = expert_counts(index, probs.shape[1], mask)
    kept = index if mask is None else index[mask]
    assert counts.tolist() == [int((kept == e).sum()) for e in range(probs.shape[1])]
    assert counts.dtype == torch.int64


@given(
    ranks=st.integers(1, 16),
    experts_per_rank=st.integers(1, 4),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_loss_is_one_at_even_routing_for_every_size_and_penalty(ranks, experts_per_rank, data):
    num_experts = ranks * experts_per_rank
    top_k = data.draw(st.integers(1, num_experts))
    seed = data.draw(st.integers(0, 2**32 - 1))
    penalty = torch.from_numpy(np.random.default_rng(seed).uniform(0.01, 100, num_experts))
    # Token t takes experts t, t+1, ... around the circle: every expert exactly k times.
    index = (torch.arange(num_experts)[:, None] + torch.arange(top_k)) % num_experts
    probs = torch.full((num_experts, num_experts), 1 / num_experts, dtype=torch.float64)
    assert topology_loss(probs, index, penalty).item() == pytest.approx(1, abs=1e-12)
    assert topology_loss(probs.float(), index, penalty.float()).item() == pytest.approx(1, abs=2e-6)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_loss_at_the_target_is_harmonic_over_arithmetic_mean(target):
    # Exactly the target as counts, and as probabilities of every token.
    index = torch.repeat_interleave(torch.arange(len(target)), torch.tensor(target)).unsqueeze(1)
    share = torch.tensor(target, dtype=torch.float64) / sum(target)
    probs = share.expand(len(index), -1)
    harmonic = len(target) / sum(1 / c for c in target)
    arithmetic = sum(target) / len(target)
    value = topology_loss(probs, index, 1 / share).item()
    assert value == pytest.approx(harmonic / arithmetic, rel=1e-12)
    assert value <= 1 + 1e-12


def test_gradient_is_the_penalised_share_of_each_expert_and_only_for_probabilities():
    rng = torch.Generator().manual_seed(3)
    probs = torch.rand(6, 4, generator=rng, dtype=torch.float64, requires_grad=True)
    penalty = torch.rand(4, generator=rng, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 1], [0, 2], [1, 0], [3, 0], [2, -1], [0, 1]])
    topology_loss(probs, index, penalty).backward()
    counts = torch.tensor([5, 3, 2, 1], dtype=torch.float64)
    weight = penalty.detach() / penalty.detach().mean()
    expected = 4 * weight * counts / (2 * 6) / 6  # N · w · c/(kS) · dm/dp
    torch.testing.assert_close(probs.grad, expected.expand(6, 4), rtol=1e-12, atol=0)
    assert penalty.grad is None


def test_padding_with_nan_leaves_value_and_gradient_clean():
    probs = torch.full((4, 2), 0.5, requires_grad=True)
    with torch.no_grad():
        probs[3] = float("nan")
    index, mask = torch.tensor([[0], [1], [0], [1]]), torch.tensor([1, 1, 1, 0])
    loss = topology_loss(probs, index, torch.ones(2), mask)
    loss.backward()
    assert loss.item() == pytest.approx(1.0)
    assert probs.grad.isfinite().all() and (probs.grad[3] == 0).all()


def test_bfloat16_probabilities_are_summed_in_float32():
    # A bfloat16 sum of 4,096 values of 1/64 stops at 4 of 64.
    probs = torch.full((4096, 64), 1 / 64, dtype=torch.bfloat16)
    loss = topology_loss(probs, torch.arange(4096).remainder(64).unsqueeze(1), torch.ones(64))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[pytest.mark.slow, pytest.mark.skipif(not COMPILER, reason="no C++ compiler")],
        ),
    ],
)
def test_loss_compiles_as_one_graph_with_equal_value_and_gradient(backend):
    torch._dynamo.reset()
    compiled = torch.compile(topology_loss, fullgraph=True, backend=backend)
    rng = torch.Generator().manual_seed(0)
    index = torch.randint(-1, 8, (32, 2), generator=rng)
    penalty, mask = torch.rand(8, generator=rng) + 0.1, torch.rand(32, generator=rng) < 0.7
    for arguments in ((), (mask,)):
        results = []
        for function in (topology_loss, compiled):
            logits = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
            logits.requires_grad_()
            loss = function(logits.softmax(1), index, penalty, *arguments)
            loss.backward()
            results.append((loss.detach(), logits.grad))
        torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)


# ---- conventions of other systems, each formula written out as its source computes it -----------


def deepspeed_topk_loss(probs, index):
    """topkgating: mean over experts of mean gates times mean mask, times N², over k."""
    num_experts, top_k = probs.shape[1], index.shape[1]
    mask = torch.zeros_like(probs).scatter_(1, index, 1.0)
    return (probs.mean(0) * mask.mean(0)).mean() * num_experts * num_experts / top_k


def transformers_loss(probs, index):
    """load_balancing_loss_func of one layer: one-hot of every slot, mean over tokens, summed."""
    one_hot = torch.nn.functional.one_hot(index, probs.shape[1]).to(probs)
    return (one_hot.mean(0) * probs.mean(0).unsqueeze(0)).sum() * probs.shape[1]


def fastmoe_loss(probs, index, workers):
    """GShardGate: first choices over S, mean over experts, times (experts of one worker)²."""
    num_experts = probs.shape[1]
    share = torch.zeros(num_experts, dtype=probs.dtype)
    for choice in index[:, 0].tolist():
        share[choice] += 1 / len(index)
    return (share * probs.mean(0)).mean() * (num_experts // workers) ** 2


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_conventions_of_other_systems_differ_by_their_factor(top_k, workers):
    rng = torch.Generator().manual_seed(top_k * 10 + workers)
    probs = torch.randn(64, 8, generator=rng, dtype=torch.float64).softmax(1)
    index = probs.topk(top_k, 1).indices
    ours, first = balance_loss(probs, index), balance_loss(probs, index[:, :1])
    sizes = {"top_k": top_k, "num_ranks": workers}
    theirs = {
        "tamoe": (ours, ours),
        "deepspeed": (ours, deepspeed_topk_loss(probs, index)),
        "transformers": (ours, transformers_loss(probs, index)),
        "fastmoe": (first, fastmoe_loss(probs, index, workers)),
    }
    for convention, (mine, other) in theirs.items():
        factor = convention_factor(convention, **sizes)
        assert (mine * factor).item() == pytest.approx(other.item(), rel=1e-12), convention


# ---- wrong input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probs", "index", "penalty", "mask", "message"),
    [
        ((4, 3), (5, 1), (3,), None, r"probs_TN is \(4, 3\) and expert_index_TK \(5, 1\)"),
        ((4, 3), (4,), (3,), None, r"expert_index_TK \(4,\)"),
        ((4, 3), (4, 1), (2,), None, r"penalty_N is \(2,\) and probs_TN has 3 experts"),
        ((4, 3), (4, 1), (3,), (3,), r"mask_T is \(3,\) and probs_TN has 4 tokens"),
    ],
)
def test_shapes_that_do_not_fit_are_named(probs, index, penalty, mask, message):
    arguments = torch.ones(probs), torch.zeros(index, dtype=torch.int64), torch.ones(penalty)
    with pytest.raises(InputError, match=message):
        topology_loss(*arguments, None if mask is None else torch.ones(mask))


def test_experts_that_are_not_there_are_named():
    for index, low, high in (([[0], [3]], 0, 3), ([[-2], [1]], -2, 1)):
        message = f"expert_index_TK has numbers from {low} to {high}; allowed: 0 to 2, and -1"
        with pytest.raises(InputError, match=message):
            expert_counts(torch.tensor(index), 3)
    with pytest.raises(InputError, match=r"expert_index_TK is torch.float32; allowed: integers"):
        expert_counts(torch.rand(4, 2), 3)


def test_counts_of_another_size_are_named():
    probs, index = torch.ones(4, 3), torch.zeros(4, 1, dtype=torch.int64)
    for loss in (balance_loss, group_balance_loss):
        with pytest.raises(InputError, match=r"counts_N is \(2,\) and probs_TN has 3 experts"):
            loss(probs, index, counts_N=torch.ones(2))


def test_unknown_conventions_and_sizes_below_one_are_named():
    with pytest.raises(InputError, match="convention is 'tutel'; allowed: 'tamoe', 'deepspeed'"):
        convention_factor("tutel", top_k=2)
    with pytest.raises(InputError, match="top_k is 0; allowed: >= 1"):
        convention_factor("tamoe", top_k=0)


# ---- over a group -------------------------------------------------------------------------------


def _tokens_of(rank: int) -> torch.Tensor:
    return torch.randn((5, 0, 9)[rank], 6, generator=torch.Generator().manual_seed(rank)).double()


def _group_loss_and_gradient(rank: int) -> tuple[float, torch.Tensor]:
    weight = _gate_weight()
    probs = (_tokens_of(rank) @ weight.T).softmax(1)
    loss = group_balance_loss(probs, probs.topk(2, 1).indices)
    loss.backward()
    gradient = weight.grad.clone()
    torch.distributed.all_reduce(gradient)
    return loss.item(), gradient / 3  # dense gradients are averaged over ranks


def _gate_weight() -> nn.Parameter:
    rng = torch.Generator().manual_seed(7)
    return nn.Parameter(torch.randn(4, 6, generator=rng, dtype=torch.float64))


def test_group_loss_without_ranks_is_the_balance_loss_with_its_gradient():
    gradients = []
    for function in (balance_loss, group_balance_loss):
        weight = _gate_weight()
        probs = (_tokens_of(2) @ weight.T).softmax(1)
        function(probs, probs.topk(2, 1).indices).backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=0)
    empty = group_balance_loss(torch.zeros(0, 4), torch.zeros(0, 2, dtype=torch.int64))
    assert empty.item() == 0


@pytest.mark.ranks
def test_averaged_gradients_of_the_group_loss_are_those_of_all_tokens_in_one_batch():
    from tamoe.topology import run_ranks

    weight = _gate_weight()
    probs = (torch.cat([_tokens_of(rank) for rank in range(3)]) @ weight.T).softmax(1)
    expected = balance_loss(probs, probs.topk(2, 1).indices)
    expected.backward()
    for value, gradient in run_ranks(3, _group_loss_and_gradient, timeout_s=60):
        assert value == pytest.approx(expected.item(), rel=1e-12)
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-10, atol=1e-14)
