"""Sigmoid, noisy, group-limited and FasterMoE's gates, expert bias: loops, budgets, wrong input."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from tamoe import (
    ExpertBias,
    FasterGate,
    GroupLimit,
    GShardGate,
    LocalityLoss,
    NaiveGate,
    NoisyGate,
    SigmoidGate,
    SwitchGate,
    TargetDivergence,
    TopologyBias,
    TopologyLoss,
)
from tamoe.functional import balance_loss, expert_counts, sequence_balance_loss, z_loss
from tamoe.noisy_gate import keep_probability
from tamoe.solver import Workload, solve
from tamoe.topology import Topology
from tamoe.topology.errors import InputError
from tests.gate_inputs import plan_of, tokens
from tests.plan_rows import two_nodes

# ---- sigmoid ------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(0, 20),
    num_experts=st.integers(1, 9),
    full=st.booleans(),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_sigmoid_gate_equals_a_loop(seed, count, num_experts, full, data):
    top_k = data.draw(st.integers(1, num_experts))
    torch.manual_seed(seed)
    bias = ExpertBias(num_experts)
    bias.bias_N.normal_(std=0.3)
    gate = SigmoidGate(
        4,
        num_experts,
        top_k=top_k,
        route_scale=2.5,
        expert_bias=bias,
        weights="full" if full else "chosen",
    ).eval()
    x = torch.randn(count, 4)
    routing = gate(x)
    scores = (x.double() @ gate.weight.double().T).sigmoid()
    for t in range(count):
        ranked = sorted(
            range(num_experts), key=lambda e: -(scores[t, e] + bias.bias_N[e].double()).item()
        )
        chosen = routing.expert_index_TK[t].tolist()
        assert sorted(chosen) == sorted(ranked[:top_k])
        total = 1.0 if full else sum(scores[t, e].item() for e in chosen)
        for slot, e in enumerate(chosen):
            expected = 2.5 * scores[t, e].item() / total
            assert routing.weight_TK[t, slot].item() == pytest.approx(expected, rel=1e-4)


def test_expert_bias_balances_a_skewed_gate_without_a_loss():
    torch.manual_seed(0)
    bias = ExpertBias(8, speed=0.05, decay=0.05)
    gate = SigmoidGate(16, 8, top_k=2, expert_bias=bias)
    with torch.no_grad():
        gate.weight[0] += 0.2
    x = tokens(2048) + 1.0  # a common direction: expert 0 is everyone's favourite
    first = gate(x)
    assert first.aux_loss.item() == 0.0
    before = expert_counts(first.expert_index_TK, 8).double()
    for _ in range(200):
        counts = expert_counts(gate(x).expert_index_TK, 8).double()
    assert before.max() / before.mean() > 2
    assert counts.max() / counts.mean() < 1.15


def test_expert_bias_moves_by_its_speed_that_decays():
    bias = ExpertBias(2, speed=0.5, decay=1.0)
    bias.update(torch.tensor([3, 1]))
    bias.update(torch.tensor([3, 1]))
    assert bias.bias_N.tolist() == [-0.75, 0.75]  # .5, then .5 / 2
    bias.update(torch.tensor([2, 2]))
    assert bias.bias_N.tolist() == [-0.75, 0.75]
    again = ExpertBias(2, speed=0.5, decay=1.0)
    again.load_state_dict(bias.state_dict())
    for one in (bias, again):
        one.update(torch.tensor([3, 1]))
    assert torch.equal(bias.bias_N, again.bias_N)


def test_expert_bias_stays_float32_in_a_narrow_model():
    gate = SigmoidGate(16, 8, expert_bias=ExpertBias(8)).to(torch.bfloat16)
    assert gate.expert_bias.bias_N.dtype == torch.float32


# ---- group limit --------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    count=st.integers(0, 10),
    score=st.sampled_from(["max", "top2"]),
    data=st.data(),
)
@settings(max_examples=300, deadline=None)
def test_group_limit_equals_a_loop(seed, sizes, count, score, data):
    top_groups = data.draw(st.integers(1, len(sizes)))
    rng = np.random.default_rng(seed)
    group_of = rng.permutation([g for g, size in enumerate(sizes) for _ in range(size)]).tolist()
    scores = rng.normal(size=(count, len(group_of)))
    allowed = GroupLimit(group_of, top_groups, score=score)(torch.from_numpy(scores))
    for t in range(count):
        worth = []
        for group in range(len(sizes)):
            own = sorted(scores[t, e] for e in range(len(group_of)) if group_of[e] == group)
            worth.append(own[-1] if score == "max" else sum(own[-2:]))
        taken = sorted(range(len(sizes)), key=lambda g: -worth[g])[:top_groups]
        assert allowed[t].tolist() == [group in taken for group in group_of]


@given(seed=st.integers(0, 2**32 - 1), top_groups=st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_a_limited_gate_stays_within_its_nodes_and_its_loss_counts_what_it_dispatches(
    seed, top_groups
):
    torch.manual_seed(seed)
    plan = plan_of("4x2", experts_per_rank=2)
    limit = GroupLimit.of_nodes(plan, top_groups, score="top2")
    gate = GShardGate(16, 16, top_k=4, limit=limit, aux_weight=1.0)
    routing = gate(torch.randn(32, 16))
    node_N = torch.tensor([e // 4 for e in range(16)])
    for row in node_N[routing.expert_index_TK]:
        assert len(set(row.tolist())) <= top_groups
    assert (routing.expert_index_TK.sort(1).values.diff(dim=1) > 0).all()
    expected = balance_loss(routing.probs_TN, routing.expert_index_TK)
    assert routing.aux_loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_nodes_of_a_plan_become_groups():
    assert GroupLimit.of_nodes(plan_of("2x4"), 1).group_of_N.tolist() == [0] * 4 + [1] * 4
    uneven = Topology.from_tree([3, 1], bandwidth_bytes_per_s=(3e10, 1e10))
    plan = solve(uneven, Workload(tokens_per_rank=64, top_k=1), floor=0.25)
    assert GroupLimit.of_nodes(plan, 1).group_of_N.tolist() == [0, 0, 0, 1]


# ---- noisy --------------------------------------------------------------------------------------


def normal_cdf(value: float) -> float:
    return 0.5 * (1 + math.erf(value / math.sqrt(2)))


@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 10),
    num_experts=st.integers(2, 7),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_noisy_load_equals_a_loop_over_the_other_experts(seed, count, num_experts, data):
    top_k = data.draw(st.integers(1, num_experts - 1))
    rng = np.random.default_rng(seed)
    clean, spread = rng.normal(size=(count, num_experts)), rng.uniform(0.1, 2, (count, num_experts))
    noisy = clean + spread * rng.normal(size=clean.shape)
    found = keep_probability(*map(torch.from_numpy, (noisy, clean, spread)), top_k)
    for t in range(count):
        for e in range(num_experts):
            others = sorted(np.delete(noisy[t], e), reverse=True)
            expected = normal_cdf((clean[t, e] - others[top_k - 1]) / spread[t, e])
            assert found[t, e].item() == pytest.approx(expected, abs=1e-9)


def test_noisy_loss_equals_a_loop_in_training_and_evaluation():
    torch.manual_seed(0)
    gate = NoisyGate(16, 6, top_k=2, aux_weight=1.0, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        gate.noise_weight.normal_(std=0.1)
    x = tokens(40)

    def variation(values):
        return statistics.variance(values) / statistics.fmean(values) ** 2

    routing = gate(x)
    importance = [sum(routing.weight_TK[routing.expert_index_TK == e].tolist()) for e in range(6)]
    clean = x.double() @ gate.weight.double().T
    spread = torch.nn.functional.softplus(x.double() @ gate.noise_weight.double().T) + 1e-2
    noise = torch.randn(40, 6, generator=torch.Generator().manual_seed(3)).double()
    load = keep_probability(clean + noise * spread, clean, spread, 2).sum(0).tolist()
    expected = variation(importance) + variation(load)
    assert routing.aux_loss.item() == pytest.approx(expected, rel=1e-4)

    calm = gate.eval()(x)
    counts = expert_counts(calm.expert_index_TK, 6).tolist()
    importance = [sum(calm.weight_TK[calm.expert_index_TK == e].tolist()) for e in range(6)]
    expected = variation(importance) + variation(counts)
    assert calm.aux_loss.item() == pytest.approx(expected, rel=1e-4)


def test_noise_is_drawn_in_training_only_and_learns():
    gate = NoisyGate(16, 6, generator=torch.Generator().manual_seed(0))
    x = tokens(64)
    assert not torch.equal(gate(x).probs_TN, gate(x).probs_TN)
    gate(x).aux_loss.backward()
    assert gate.noise_weight.grad.abs().sum() > 0
    gate.eval()
    assert torch.equal(gate(x).probs_TN, gate(x).probs_TN)
    assert {p.tamoe_scope for p in NoisyGate(16, 6, scope="rank").parameters()} == {"rank"}


def test_a_masked_token_counts_nowhere_in_the_noisy_loss():
    torch.manual_seed(0)
    gate = NoisyGate(16, 6, aux_weight=1.0).eval()
    x, mask = tokens(20), torch.arange(20) < 12
    assert gate(x, mask).aux_loss.item() == pytest.approx(gate(x[:12]).aux_loss.item(), rel=1e-6)


# ---- options of all gates -----------------------------------------------------------------------


def test_z_loss_first_choices_and_sequences_are_options():
    torch.manual_seed(0)
    x = tokens(24)
    plain = GShardGate(16, 8, aux_weight=1.0)
    routing = plain(x)
    logits = x @ plain.weight.T

    def like(**options):
        gate = GShardGate(16, 8, aux_weight=1.0, **options)
        gate.weight = plain.weight
        return gate(x).aux_loss.item()

    assert like(z_weight=0.5) == pytest.approx(
        routing.aux_loss.item() + 0.5 * z_loss(logits).item(), rel=1e-5
    )
    first = balance_loss(routing.probs_TN, routing.expert_index_TK[:, :1])
    assert like(balance_counts="first") == pytest.approx(first.item(), rel=1e-5)
    by_sequence = sequence_balance_loss(routing.probs_TN, routing.expert_index_TK, 3)
    assert like(balance_over="sequence", sequence_length=8) == pytest.approx(
        by_sequence.item(), rel=1e-5
    )


def test_divergences_stand_beside_the_balance_loss():
    torch.manual_seed(0)
    x = tokens(24)
    for loss in (TargetDivergence(two_nodes(), rank=0), LocalityLoss(plan_of("2x4"), rank=0)):
        gate = GShardGate(16, 8, steer=loss, scope="rank", aux_weight=0.5)
        routing = gate(x)
        both = balance_loss(routing.probs_TN, routing.expert_index_TK) + loss(
            routing.probs_TN, routing.expert_index_TK
        )
        assert routing.aux_loss.item() == pytest.approx(0.5 * both.item(), rel=1e-5)
        with pytest.warns(UserWarning, match=f"with a {type(loss).__name__}"):
            GShardGate(16, 8, steer=loss)


def test_any_gate_takes_jitter_and_fastmoe_adds_it_to_logits():
    x = tokens(64)
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    gate = NaiveGate(16, 8, jitter=0.2, generator=generator)
    noise = torch.rand(64, 16, generator=torch.Generator().manual_seed(1))
    expected = (x * (1 + 0.2 * (2 * noise - 1)) @ gate.weight.T).softmax(1)
    torch.testing.assert_close(gate(x).probs_TN, expected)
    gate = SwitchGate(
        16, 8, jitter=0.2, jitter_on="logits", generator=torch.Generator().manual_seed(1)
    )
    noise = torch.rand(64, 8, generator=torch.Generator().manual_seed(1))
    expected = (x @ gate.weight.T + 1 + 0.2 * (2 * noise - 1)).softmax(1)
    torch.testing.assert_close(gate(x).probs_TN, expected)


def test_a_topology_bias_steers_a_limited_sigmoid_gate_with_expert_bias():
    torch.manual_seed(0)
    plan = plan_of("2x4", experts_per_rank=2)
    bias = TopologyBias(plan, rank=0)
    gate = SigmoidGate(
        16,
        16,
        top_k=2,
        steer=bias,
        expert_bias=ExpertBias(16, speed=1e-4),
        limit=GroupLimit.of_nodes(plan, 2, score="top2"),
    )
    for seed in range(200):
        routing = gate(tokens(512, seed=seed))
    near = (routing.expert_index_TK < 8).double().mean().item()
    assert near == pytest.approx(float(bias.share_N[:8].sum()), abs=0.02)


def test_logits_that_are_no_numbers_are_refused_but_not_in_padding():
    gate = NaiveGate(16, 8)
    x = tokens(4)
    x[2, 3] = float("nan")
    with pytest.raises(
        InputError, match="logits of 1 of 4 tokens are not finite, the first is token 2"
    ):
        gate(x)
    routing = gate(x, torch.tensor([1, 1, 0, 1]))
    assert routing.expert_index_TK[2].tolist() == [-1, -1]
    assert gate(tokens(4), torch.zeros(4)).aux_loss.item() == 0.0


@pytest.mark.parametrize("kind", [NaiveGate, SigmoidGate, NoisyGate, SwitchGate])
def test_padding_that_is_no_number_leaves_gradients_whole(kind):
    torch.manual_seed(0)
    gate = kind(16, 8, aux_weight=1.0)
    x, mask = tokens(12), torch.arange(12) < 8
    x[8:] = float("nan")
    routing = gate(x, mask)
    (routing.aux_loss + routing.weight_TK.sum()).backward()
    assert gate.weight.grad.isfinite().all()
    assert gate.weight.grad.abs().sum() > 0


def test_state_that_differs_by_rank_says_so_and_is_made_anew():
    gate = FasterGate(16, 8, plan=plan_of("2x4"), rank=7)
    assert gate.near.tamoe_scope == "rank"
    limit, bias = GroupLimit([0, 0, 1], 1), ExpertBias(3)
    for module, buffer in ((gate.near, "near_N"), (limit, "expert_GM"), (bias, "bias_N")):
        before = getattr(module, buffer).clone()
        module.to_empty(device="meta").to_empty(device="cpu")
        module.reset_parameters()
        assert torch.equal(getattr(module, buffer), before)


def test_a_topology_loss_steers_a_sigmoid_gate_that_an_expert_bias_balances():
    loss = TopologyLoss(two_nodes(), rank=0)
    gate = SigmoidGate(16, 8, scope="rank", steer=loss, expert_bias=ExpertBias(8))
    assert gate.aux_weight == 0.01
    assert SigmoidGate(16, 8, expert_bias=ExpertBias(8)).aux_weight == 0.0


def test_wrong_options_say_what_is_allowed():
    plan = plan_of("2x4")
    for options, message in (
        ({"z_weight": -1.0}, "z_weight is -1.0; allowed: finite and >= 0"),
        ({"jitter": 1.5}, "jitter is 1.5; allowed: 0 to 1"),
        ({"sequence_length": 4}, "sequence_length is 4 and balance_over 'rank'"),
        ({"balance_over": "sequence"}, "sequence_length is None and balance_over 'sequence'"),
        ({"balance_counts": "last"}, "balance_counts is 'last'; allowed: 'all', 'first'"),
        ({"steer": 3}, "steer is int; allowed: TopologyLoss, TargetDivergence, LocalityLoss, Topo"),
        ({"limit": ExpertBias(8)}, "limit is ExpertBias; allowed: GroupLimit, None"),
        ({"expert_bias": ExpertBias(4)}, "expert_bias is for 4 experts and the gate has 8"),
        ({"limit": GroupLimit([0, 1, 1, 1, 1, 1, 1, 1], 1)}, "may hold only 1 experts"),
    ):
        with pytest.raises(InputError, match=message):
            GShardGate(16, 8, **options)
    with pytest.raises(InputError, match=r"group_of_N is .* allowed: 0 to G - 1, each for some"):
        GroupLimit([0, 2], 1)
    with pytest.raises(InputError, match="top_groups is 3; allowed: 1 to 2"):
        GroupLimit([0, 1], 3)
    with pytest.raises(InputError, match="score is 'sum'; allowed: 'max', 'top2'"):
        GroupLimit([0, 1], 1, score="sum")
    with pytest.raises(InputError, match="speed is 0; allowed: finite and > 0"):
        ExpertBias(4, speed=0)
    with pytest.raises(InputError, match="counts_N is"):
        ExpertBias(4).update(torch.ones(3))
    with pytest.raises(InputError, match="remote_share is 2; allowed: 0 to 1"):
        FasterGate(16, 8, plan=plan, rank=0, remote_share=2)
    with pytest.raises(InputError, match="steer is given; allowed: None"):
        FasterGate(16, 8, plan=plan, rank=0, steer=TopologyBias(plan, rank=0))
    with pytest.raises(InputError, match="top_k is 5 and the rank's node has 4 experts"):
        FasterGate(16, 8, plan=plan, rank=0, top_k=5)
    with pytest.raises(InputError, match="jitter_on is 'output'"):
        SwitchGate(16, 8, jitter_on="output")
    gate = GShardGate(16, 8, balance_over="sequence", sequence_length=5)
    with pytest.raises(InputError, match="sequence_length is 5 and there are 12 tokens"):
        gate(tokens(12))
