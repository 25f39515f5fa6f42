"""Gates: choices and weights by definition; steering, scopes, wrong input."""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import tamoe.gate
import tamoe.loss_totals
from tamoe import GShardGate, NaiveGate, SwitchGate, TopologyBias, TopologyLoss
from tamoe.capacity import TopologyCapacity
from tamoe.functional import balance_loss, expert_counts, topology_loss
from tamoe.gates import Gate, steering
from tamoe.scope import mark_scope, restore_scopes, scope_of, state_scopes
from tamoe.topology.errors import InputError
from tests.gate_inputs import seeded, tokens
from tests.plan_rows import Rows, two_nodes

# ---- choices and weights ------------------------------------------------------------------------


@given(
    num_tokens=st.integers(0, 20),
    num_experts=st.integers(1, 8),
    kind=st.sampled_from(["naive", "switch", "gshard"]),
    masked=st.booleans(),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_routing_equals_its_definition_in_float64(num_tokens, num_experts, kind, masked, data):
    top_k = 1 if kind == "switch" else data.draw(st.integers(1, num_experts))
    options = {} if kind == "switch" else {"top_k": top_k}
    make = {"naive": NaiveGate, "switch": SwitchGate, "gshard": GShardGate}[kind]
    gate = seeded(make, 5, num_experts, dtype=torch.float64, **options)
    x = tokens(num_tokens, 5, seed=num_tokens).double()
    mask = torch.arange(num_tokens) % 3 != 1 if masked else None
    index, weight, probs, aux_loss = gate(x, mask)
    assert index.dtype == torch.int64 and index.shape == weight.shape == (num_tokens, top_k)
    for t in range(num_tokens):
        logits = (gate.weight @ x[t]).tolist()
        exponents = [math.exp(z - max(logits)) for z in logits]
        full = [e / sum(exponents) for e in exponents]
        assert probs[t].tolist() == pytest.approx(full, rel=1e-9)
        if masked and not mask[t]:
            assert index[t].tolist() == [-1] * top_k and weight[t].tolist() == [0] * top_k
            continue
        chosen = sorted(range(num_experts), key=lambda e: -logits[e])[:top_k]
        assert index[t].tolist() == chosen
        total = 1 if top_k == 1 else sum(full[e] for e in chosen)
        assert weight[t].tolist() == pytest.approx([full[e] / total for e in chosen], rel=1e-9)
    factor = 0 if kind == "naive" else 0.01
    expected = factor * balance_loss(probs, index, mask)
    assert aux_loss.item() == pytest.approx(expected.item(), abs=1e-12)


def test_equal_logits_go_to_the_lower_expert():
    # Whole numbers from 0 to 3 over 200 experts: ties everywhere.
    gate = NaiveGate(4, 200, top_k=100)
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 4, (4, 200))
    with torch.no_grad():
        gate.weight.copy_(torch.from_numpy(levels.T))
    index = gate(torch.eye(4)).expert_index_TK
    expected = [sorted(range(200), key=lambda e: (-row[e], e))[:100] for row in levels]
    assert index.tolist() == expected


def test_every_gate_learns_from_the_task_through_its_weights():
    for gate in (NaiveGate(8, 4, top_k=1), SwitchGate(8, 4), GShardGate(8, 4), NaiveGate(8, 4)):
        routing = gate(tokens(32, 8))
        (routing.weight_TK * torch.arange(1.0, 1 + gate.top_k)).square().sum().backward()
        assert gate.weight.grad.abs().max() > 1e-4, gate


def test_logits_are_float32_whatever_the_model_and_autocast_are():
    gate = seeded(NaiveGate, 16, 8).bfloat16()
    x = tokens(64).bfloat16()
    expected = (x.float() @ gate.weight.float().T).softmax(1)
    for routing in (gate(x), torch.autocast("cpu", dtype=torch.bfloat16)(gate)(x)):
        assert routing.probs_TN.dtype == routing.weight_TK.dtype == torch.float32
        torch.testing.assert_close(routing.probs_TN, expected, rtol=1e-6, atol=1e-7)


def test_random_routing_drops_second_choices_with_one_minus_twice_their_weight():
    gate = seeded(GShardGate, 16, 8, random_routing=True)
    x = tokens(40_000)
    routing, calm = gate(x), gate.eval()(x)
    assert (routing.expert_index_TK[:, 0] == calm.expert_index_TK[:, 0]).all()
    second = calm.weight_TK[:, 1].detach()
    dropped = (routing.expert_index_TK[:, 1] < 0).double()
    assert (calm.expert_index_TK >= 0).all()
    for low in (0.0, 0.1, 0.2, 0.3, 0.4):
        bin_T = (second >= low) & (second < low + 0.1)
        expected = (1 - 2 * second[bin_T]).mean().item()
        error = 4 * (0.25 / max(int(bin_T.sum()), 1)) ** 0.5
        assert dropped[bin_T].mean().item() == pytest.approx(expected, abs=error)


def test_random_drops_leave_their_places_to_others():
    # One place an expert. Token 0 gives its second choice weight 0: it is always dropped, and the
    # place goes to token 1, whose two weights are 1/2 and never dropped.
    gate = GShardGate(2, 2, random_routing=True, capacity=0.5, drop="position")
    with torch.no_grad():
        gate.weight.copy_(100 * torch.eye(2))
    routing = gate(torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
    assert routing.expert_index_TK.tolist() == [[0, -1], [-1, 1]]


def test_random_routing_never_drops_a_first_choice():
    gate = GShardGate(4, 4, top_k=4, random_routing=True)
    nn.init.zeros_(gate.weight)  # four weights of 1/4: half of the other choices go
    index = gate(tokens(4000, 4)).expert_index_TK
    assert (index[:, 0] == 0).all()
    assert (index[:, 1:] < 0).double().mean().item() == pytest.approx(0.5, abs=0.02)


def test_padding_takes_no_part_in_capacity_nor_in_the_spread():
    options = {"capacity": 0.7, "drop": "position"}
    results = []
    for padding in (0, 50):
        gate = seeded(NaiveGate, 16, 8, steer=TopologyBias(two_nodes(), rank=0), **options)
        x = torch.cat([tokens(100), torch.full((padding, 16), 1e4)])
        routing = gate(x, torch.arange(100 + padding) < 100)
        results.append((routing.expert_index_TK[:100].tolist(), gate.steer.spread.item()))
        assert (routing.expert_index_TK[100:] == -1).all()
    assert results[0][0] == results[1][0]
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)


def test_jitter_multiplies_the_input_in_training_only():
    gate = seeded(SwitchGate, 16, 8, jitter=0.1, generator=torch.Generator().manual_seed(1))
    x = tokens(32)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
    expected = ((x * (0.9 + 0.2 * noise)) @ gate.weight.T).softmax(1)
    torch.testing.assert_close(gate(x).probs_TN, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gate.eval()(x).probs_TN, (x @ gate.weight.T).softmax(1))


# ---- steering -----------------------------------------------------------------------------------


def test_topology_loss_takes_choices_before_drops():
    loss = TopologyLoss(two_nodes(), rank=6)
    options = {"scope": "rank", "steer": loss, "aux_weight": 0.5}
    gate = seeded(GShardGate, 16, 8, capacity=0.3, drop="probs", **options)
    free = seeded(GShardGate, 16, 8)(tokens(256))
    penalty = torch.from_numpy(two_nodes().penalty_N(6))
    expected = 0.5 * topology_loss(free.probs_TN, free.expert_index_TK, penalty)
    assert gate(tokens(256)).aux_loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_bias_acts_on_selection_only():
    bias = TopologyBias(two_nodes(), rank=2, fixed=True)
    gate = seeded(NaiveGate, 16, 8, steer=bias).eval()
    x = tokens(500)
    logits = x @ gate.weight.T
    routing = gate(x)
    chosen = (logits + bias.bias_N).topk(2, 1).indices
    assert (routing.expert_index_TK == chosen).all()
    assert (routing.expert_index_TK != logits.topk(2, 1).indices).any()
    torch.testing.assert_close(routing.weight_TK, logits.gather(1, chosen).softmax(1))
    torch.testing.assert_close(routing.probs_TN, logits.softmax(1))


def test_bias_is_updated_in_training_with_the_choices_before_drops():
    gates = [
        seeded(NaiveGate, 16, 8, steer=TopologyBias(two_nodes(), rank=2), **options)
        for options in ({}, {"capacity": 0.3, "drop": "probs"}, {"auto_update": False})
    ]
    mask = torch.arange(300) % 2 == 0
    for gate in gates:
        for step in range(3):
            routing = gate(tokens(300, seed=step), mask)
            if not gate.auto_update:
                gate.steer.update(expert_counts(routing.expert_index_TK, 8))
        before = gate.steer.unit_bias_N.clone()
        gate.eval()(tokens(300, seed=9))
        assert (gate.steer.unit_bias_N == before).all()
        assert gate.steer.steps.item() == 3
    for gate in gates[1:]:
        torch.testing.assert_close(gate.steer.unit_bias_N, gates[0].steer.unit_bias_N)


@pytest.mark.parametrize("drop", ["none", "probs", "position", "random"])
@pytest.mark.parametrize("masked", [False, True])
def test_routing_runs_without_reading_the_device(drop, masked):
    # On meta tensors any .item(), bool() or index by a mask raises.
    capacity = None if drop == "none" else TopologyCapacity(two_nodes(), rank=0)
    for limit in (capacity, capacity and 1.25):
        options = {"capacity": limit, "drop": drop, "aux_weight": 1.0, "random_routing": True}
        gate = GShardGate(16, 8, steer=TopologyBias(two_nodes(), rank=0), **options).to("meta")
        mask = torch.ones(32, dtype=torch.bool, device="meta") if masked else None
        routing = gate(torch.empty(32, 16, device="meta"), mask)
        assert routing.expert_index_TK.shape == (32, 2)


def test_steering_off_removes_the_bias_everywhere_and_comes_back():
    plan = two_nodes()
    gates = [seeded(NaiveGate, 16, 8, steer=TopologyBias(plan, rank=2)) for _ in range(2)]
    model, plain = nn.ModuleList(gates), seeded(NaiveGate, 16, 8)
    before = gates[0].steer.steps.clone()
    with steering(model, False):
        for gate in gates:
            assert (gate(tokens(64)).expert_index_TK == plain(tokens(64)).expert_index_TK).all()
        assert gates[0].steer.steps == before
    with pytest.raises(RuntimeError, match="inside"), steering(model, False):
        raise RuntimeError("inside")
    assert all(gate.steering for gate in gates)
    assert (gates[0](tokens(64)).expert_index_TK != plain(tokens(64)).expert_index_TK).any()


def test_balance_loss_beside_a_bias_uses_unbiased_probabilities_and_biased_counts():
    gate = seeded(GShardGate, 16, 8, steer=TopologyBias(two_nodes(), rank=0), aux_weight=1.0)
    assert gate.balance_over == "group"  # of one rank here
    routing = gate(tokens(512))
    expected = balance_loss(routing.probs_TN, routing.expert_index_TK)
    assert routing.aux_loss.item() == pytest.approx(expected.item(), rel=1e-6)
    mask = torch.arange(512) % 3 > 0
    routing = gate(tokens(512), mask)
    expected = balance_loss(routing.probs_TN, routing.expert_index_TK, mask)
    assert routing.aux_loss.item() == pytest.approx(expected.item(), rel=1e-6)
    gate.balance_counts = "first"
    routing = gate(tokens(512))
    expected = balance_loss(routing.probs_TN, routing.expert_index_TK[:, :1])
    assert routing.aux_loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_bias_and_the_balance_loss_beside_it_share_one_count(monkeypatch):
    made = []
    for module in (tamoe.gate, tamoe.loss_totals):
        own = module.expert_counts
        monkeypatch.setattr(module, "expert_counts", lambda *a, f=own: made.append(1) or f(*a))
    gate = seeded(GShardGate, 16, 8, steer=TopologyBias(two_nodes(), rank=0))
    for train, counts in ((True, 1), (False, 1)):
        gate.train(train)(tokens(64))
        assert len(made) == counts
        made.clear()
    seeded(NaiveGate, 16, 8)(tokens(64))
    assert not made


def test_shared_gate_with_a_topology_loss_warns_unless_there_is_nothing_to_steer():
    loss = TopologyLoss(two_nodes(), rank=0)
    with pytest.warns(UserWarning, match="ranks' losses average out over one gate") as caught:
        NaiveGate(16, 8, steer=loss)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NaiveGate(16, 8, steer=loss, scope="rank")
        NaiveGate(16, 8, steer=TopologyBias(two_nodes(), rank=0))
        NaiveGate(16, 8, steer=TopologyLoss(two_nodes(ratio=1.0), rank=0))


@pytest.mark.ranks
def test_group_balance_is_collective_in_training_only():
    from tamoe.topology import run_ranks

    expected = _gate_loss_of_all_tokens()
    for training, alone, own in run_ranks(2, _gate_loss, timeout_s=60):
        assert training == pytest.approx(expected, rel=1e-5)
        assert alone == pytest.approx(own, rel=1e-5)


def _gate_loss_of_all_tokens() -> float:
    gate = seeded(NaiveGate, 16, 8, aux_weight=1.0)
    return gate(torch.cat([tokens(30, seed=0), tokens(70, seed=1)])).aux_loss.item()


def _gate_loss(rank: int) -> tuple[float, float, float]:
    gate = seeded(NaiveGate, 16, 8, aux_weight=1.0, balance_over="group")
    x = tokens((30, 70)[rank], seed=rank)
    training = gate(x).aux_loss.item()
    evaluated = gate.eval()(x)  # would hang on one rank if it asked the other
    own = balance_loss(evaluated.probs_TN, evaluated.expert_index_TK).item()
    return training, evaluated.aux_loss.item(), own


# ---- scopes -------------------------------------------------------------------------------------


def test_scope_marks_parameters_and_state_by_name():
    gate = NaiveGate(4, 8, scope="rank", steer=TopologyBias(two_nodes(), rank=0))
    model = nn.ModuleDict({"gate": gate, "expert": mark_scope(nn.Linear(2, 2), "expert")})
    model["plain"] = nn.Linear(2, 2)
    scopes = state_scopes(model)
    assert scope_of(model["gate"].weight) == "rank"
    assert scope_of(model["plain"].weight) == "shared"
    assert set(scopes) == set(model.state_dict())
    assert {name for name, scope in scopes.items() if scope == "rank"} == {
        "gate.weight",
        *(f"gate.steer.{name}" for name in ("unit_bias_N", "moving_share_N", "spread", "steps")),
    }
    assert scopes["expert.weight"] == "expert"
    assert scope_of(NaiveGate(4, 8).weight) == "shared"
    # A shared gate's bias still belongs to its rank.
    shared = state_scopes(NaiveGate(4, 8, steer=TopologyBias(two_nodes(), rank=0)))
    assert shared["weight"] == "shared" and shared["steer.unit_bias_N"] == "rank"
    with pytest.raises(InputError, match="scope is 'dense'; allowed: 'shared', 'rank', 'expert'"):
        mark_scope(nn.Linear(1, 1), "dense")


@pytest.mark.parametrize("lose", ["deepcopy", "meta"])
def test_scopes_that_torch_drops_are_restored(lose):
    def make():
        gate = NaiveGate(4, 8, scope="rank", steer=TopologyBias(two_nodes(), rank=0))
        expert = mark_scope(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "expert")
        return nn.ModuleDict({"gate": gate, "expert": expert, "plain": nn.Linear(2, 2)})

    expected = state_scopes(make())
    assert expected["gate.weight"] == "rank" and expected["expert.1.running_mean"] == "expert"
    if lose == "deepcopy":
        model = copy.deepcopy(make())
    else:
        with torch.device("meta"):
            model = make()
        model.to_empty(device="cpu")
    assert scope_of(model["gate"].weight) == "shared"  # lost: torch made a new parameter
    restore_scopes(model)
    assert scope_of(model["gate"].weight) == "rank"
    assert scope_of(model["expert"][0].bias) == "expert"
    assert state_scopes(model) == expected


# ---- wrong input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 9}, "top_k is 9; allowed: 1 to 8"),
        ({"top_k": 0}, "top_k is 0; allowed: 1 to 8"),
        ({"scope": "expert"}, "scope is 'expert'; allowed: 'shared', 'rank'"),
        ({"drop": "oldest"}, "drop is 'oldest'; allowed: 'none', 'probs', 'position', 'random'"),
        ({"capacity": 1.2}, "capacity is 1.2 and drop 'none'; allowed: a capacity with"),
        ({"drop": "probs"}, "capacity is None and drop 'probs'"),
        ({"capacity": 0.0, "drop": "probs"}, "capacity is 0.0; allowed: a finite number > 0"),
        ({"capacity": "even", "drop": "probs"}, "capacity is 'even'; allowed: a finite number > 0"),
        ({"aux_weight": -1}, "aux_weight is -1.0; allowed: finite and >= 0"),
        ({"weights": "all"}, "weights is 'all'; allowed: 'chosen', 'full'"),
        ({"balance_over": "node"}, "balance_over is 'node'; allowed: 'rank', 'group'"),
        ({"steer": nn.Linear(1, 1)}, "steer is Linear; allowed: TopologyLoss, TargetDivergence"),
        (
            {"steer": TopologyBias(two_nodes(ranks_per_node=2), rank=0)},
            "steer: its plan has 4 experts and the gate 8",
        ),
        (
            {"steer": TopologyBias(Rows(np.array([[9.0] + [1.0] * 7])), rank=0), "top_k": 2},
            "sends 0.562 of a rank's choices to one expert; allowed with top_k=2: at most 0.500",
        ),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(InputError) as caught:
        NaiveGate(16, 8, **options)
    assert message in str(caught.value)


def test_wrong_sizes_and_inputs_are_named():
    with pytest.raises(InputError, match="num_experts is 0; allowed: a whole number >= 1"):
        NaiveGate(16, 0, top_k=1)
    with pytest.raises(InputError, match="jitter is 1; allowed: 0 to 1"):
        SwitchGate(16, 8, jitter=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'capcity'"):
        NaiveGate(16, 8, capcity=1.0)
    with pytest.raises(InputError, match=r"x_TD is \(2, 3, 16\); allowed: \(tokens, 16\)"):
        NaiveGate(16, 8)(torch.zeros(2, 3, 16))
    with pytest.raises(InputError, match=r"mask_T is \(3,\); allowed: \(2,\)"):
        NaiveGate(16, 8)(torch.zeros(2, 16), torch.ones(3))
    with pytest.raises(InputError, match="factor is nan; allowed: a finite number > 0"):
        TopologyCapacity(two_nodes(), rank=0, factor=float("nan"))


def test_gate_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Gate(16, 8, top_k=1)
