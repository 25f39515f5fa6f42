"""Further router losses: loops in float64, limits, masks, and what each is for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from tamoe import LocalityLoss, TargetDivergence
from tamoe.functional import (
    balance_loss,
    locality_loss,
    pooled_balance_loss,
    sequence_balance_loss,
    squared_variation,
    target_divergence,
    z_loss,
)
from tamoe.solver import Workload, solve
from tamoe.topology import Topology
from tamoe.topology.errors import InputError
from tests.plan_rows import two_nodes


@st.composite
def batches(draw):
    """Logits, k choices with dropped ones, perhaps a mask; zero tokens and one expert too."""
    num_experts = draw(st.integers(1, 9))
    top_k = draw(st.integers(1, num_experts))
    tokens = draw(st.integers(0, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.normal(size=(tokens, num_experts)) * draw(st.sampled_from([0.1, 1, 10]))
    index = rng.random((tokens, num_experts)).argsort(1)[:, :top_k]
    index = np.where(rng.random(index.shape) < draw(st.sampled_from([0, 0.3])), -1, index)
    mask = torch.from_numpy(rng.random(tokens) < 0.6) if draw(st.booleans()) else None
    return torch.from_numpy(logits), torch.from_numpy(index), mask


def kept_rows(count, mask):
    return [t for t in range(count) if mask is None or mask[t]]


@given(batches())
@settings(max_examples=300, deadline=None)
def test_z_loss_equals_a_loop(batch):
    logits, _, mask = batch
    kept = kept_rows(len(logits), mask)
    squares = [math.log(sum(math.exp(z) for z in logits[t].tolist())) ** 2 for t in kept]
    expected = sum(squares) / len(kept) if kept else 0.0
    assert z_loss(logits, mask).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(batches())
@settings(max_examples=300, deadline=None)
def test_divergence_equals_a_loop_and_is_never_negative(batch):
    logits, _, mask = batch
    probs = logits.softmax(1)
    target = torch.arange(1.0, probs.shape[1] + 1, dtype=torch.float64)
    kept = kept_rows(len(probs), mask)
    expected = 0.0
    for e in range(probs.shape[1]):
        mean = sum(float(probs[t, e]) for t in kept) / len(kept) if kept else 0.0
        expected += mean * math.log(mean / float(target[e] / target.sum())) if mean else 0.0
    value = target_divergence(probs, target, mask).item()
    assert value == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert value >= -1e-12


@given(batches(), st.integers(1, 4))
@settings(max_examples=300, deadline=None)
def test_sequence_loss_is_the_mean_of_the_sequences_own_losses(batch, num_sequences):
    logits, index, mask = batch
    probs = logits.softmax(1)
    tokens = len(probs) // num_sequences * num_sequences
    probs, index = probs[:tokens], index[:tokens]
    mask = None if mask is None else mask[:tokens]
    length = tokens // num_sequences
    each = []
    for number in range(num_sequences):
        part = slice(number * length, (number + 1) * length)
        own = None if mask is None else mask[part]
        each.append(balance_loss(probs[part], index[part], own).item())
    value = sequence_balance_loss(probs, index, num_sequences, mask).item()
    assert value == pytest.approx(sum(each) / num_sequences, rel=1e-9, abs=1e-12)


def test_opposite_imbalances_cancel_where_layers_are_pooled():
    # Each layer sends all to one expert: 2 for each of them alone, 1 (even) for both together.
    probs = [torch.tensor([[1.0, 0.0]] * 4), torch.tensor([[0.0, 1.0]] * 4)]
    index = [torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1, dtype=torch.long)]
    each = [balance_loss(p, i).item() for p, i in zip(probs, index, strict=True)]
    assert each == [2.0, 2.0]
    assert pooled_balance_loss(probs, index).item() == 1.0


@given(batches())
@settings(max_examples=100, deadline=None)
def test_one_layer_pooled_is_its_balance_loss(batch):
    logits, index, mask = batch
    probs = logits.softmax(1)
    pooled = pooled_balance_loss([probs, probs], [index, index], mask).item()
    assert pooled == pytest.approx(balance_loss(probs, index, mask).item(), rel=1e-12, abs=1e-12)


def test_gradients_of_divergence_and_z_loss_pass_gradcheck():
    torch.manual_seed(0)
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(z_loss, (logits,))
    assert torch.autograd.gradcheck(lambda z: target_divergence(z.softmax(1), target), (logits,))


def test_padding_may_hold_nan():
    logits = torch.randn(4, 3)
    mask = torch.tensor([1, 1, 0, 0])
    padded = logits.clone()
    padded[2:] = float("nan")
    assert z_loss(padded, mask) == z_loss(logits[:2])
    probs = padded.softmax(1)
    assert target_divergence(probs, torch.ones(3), mask).isfinite()


def test_locality_is_zero_at_the_local_distribution_and_grows_with_what_leaves():
    local = torch.tensor([True, True, False, False])
    losses = []
    for remote in (0.01, 0.1, 0.5, 0.9):
        row = torch.tensor([(1 - remote) / 2] * 2 + [remote / 2] * 2)
        losses.append(locality_loss(row.expand(8, 4), local).item())
    assert losses[0] == pytest.approx(0, abs=1e-6)
    assert losses == sorted(losses)
    assert losses[1] > losses[0]


def test_variation_equals_numpy():
    values = torch.tensor([1.0, 4.0, 2.0, 9.0], dtype=torch.float64)
    expected = np.var(values.numpy(), ddof=1) / np.mean(values.numpy()) ** 2
    assert squared_variation(values).item() == pytest.approx(expected, rel=1e-9)
    assert squared_variation(torch.tensor([3.0])).item() == 0.0


# ---- as modules of a plan -----------------------------------------------------------------------


def steps_of_a_free_gate(loss, steps=400):
    """A gate of a bias alone, trained by a loss of its mean probabilities."""
    logits_N = torch.zeros(8, requires_grad=True)
    optimizer = torch.optim.Adam([logits_N], lr=0.05)
    noise = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        probs = (noise + logits_N).softmax(1)
        value = loss(probs, probs.topk(1).indices)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return (noise + logits_N).softmax(1).mean(0).detach()


def test_target_divergence_drives_mean_probabilities_to_the_target():
    loss = TargetDivergence(two_nodes(), rank=5)
    reached = steps_of_a_free_gate(loss)
    torch.testing.assert_close(reached, torch.from_numpy(loss.share_N).float(), atol=2e-3, rtol=0)


def test_locality_loss_drives_all_but_its_remote_share_into_the_node():
    topology = Topology.from_tree("2x4", bandwidth_bytes_per_s=(3e10, 1e10))
    loss = LocalityLoss(solve(topology, Workload(), floor=0.25), rank=5, remote_share=0.05)
    reached = steps_of_a_free_gate(loss)
    assert reached[:4].sum().item() == pytest.approx(0.05, abs=5e-3)
    assert loss.near_N.tolist() == [False] * 4 + [True] * 4


def test_a_new_plan_moves_the_target():
    loss = TargetDivergence(two_nodes(ratio=5), rank=0)
    before = loss.row_N.clone()
    loss.set_plan(two_nodes(ratio=2))
    assert not torch.equal(before, loss.row_N)
    torch.testing.assert_close(
        loss.row_N.double(), torch.from_numpy(loss.share_N), rtol=1e-6, atol=0
    )


# ---- wrong input --------------------------------------------------------------------------------


def test_wrong_input_says_what_is_allowed():
    probs, index = torch.rand(4, 3), torch.zeros(4, 1, dtype=torch.long)
    with pytest.raises(InputError, match=r"logits_TN is \(4,\); allowed: \(tokens, experts\)"):
        z_loss(torch.zeros(4))
    with pytest.raises(InputError, match=r"target_N is \(2,\) and probs_TN has 3 experts"):
        target_divergence(probs, torch.ones(2))
    with pytest.raises(
        InputError, match="num_sequences is 3; allowed: 1 or more that divide the 4"
    ):
        sequence_balance_loss(probs, index, 3)
    with pytest.raises(InputError, match="has 1 layers and expert_index_LTK 2"):
        pooled_balance_loss([probs], [index, index])
    with pytest.raises(InputError, match="local_N has no True"):
        locality_loss(probs, torch.zeros(3, dtype=torch.bool))
    with pytest.raises(InputError, match="remote_share is 1; allowed: between 0 and 1"):
        locality_loss(probs, torch.ones(3, dtype=torch.bool), remote_share=1)
    with pytest.raises(InputError, match=r"mask_T is \(3,\) and logits_TN has 4 tokens"):
        z_loss(torch.zeros(4, 2), torch.ones(3))
    with pytest.raises(InputError, match="weight is -1; allowed: a finite number > 0"):
        TargetDivergence(two_nodes(), rank=0, weight=-1)
    with pytest.raises(InputError, match=r"plan is Rows; allowed: a tamoe.solver.Plan"):
        LocalityLoss(two_nodes(), rank=0)
