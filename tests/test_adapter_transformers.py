"""Steering of real Transformers models: it changes what it should alone, and reaches its target.

``test_transformers_versions.py`` runs them under Transformers 4.57, too.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from tamoe.adapters.transformers import steer
from tamoe.experiments.tiny_models import FAMILIES, TOP_K, batch, tiny_model
from tamoe.plan_module import PlanRows
from tamoe.solver import Plan, Workload, solve
from tamoe.topology import Topology, run_ranks
from tamoe.topology.errors import InputError
from tests.plan_rows import Rows, two_nodes

pytest.importorskip("transformers")


def even() -> PlanRows:
    return two_nodes(4, ratio=1.0)


def near() -> Plan:
    """Rank 0 of two nodes of four keeps most choices in its node."""
    topology = Topology.from_tree("2x4", bandwidth_bytes_per_s=(4e10, 1e10))
    return solve(topology, Workload(tokens_per_rank=256, top_k=TOP_K), method="entropic", kl=0.3)


def marks(model: torch.nn.Module) -> list[tuple]:
    """What a handle may change: hooks, attributes of instances, state."""
    return [
        (name, sorted(module.__dict__), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_even_plan_changes_nothing_and_detaching_leaves_nothing(family):
    model = tiny_model(family).eval()
    tokens = batch()
    with torch.no_grad():
        before, was, state = model(tokens).logits, marks(model), set(model.state_dict())
        handle = steer(model, even(), rank=0)
        assert set(model.state_dict()) == state
        torch.testing.assert_close(model(tokens).logits, before, rtol=1e-4, atol=1e-5)
        handle.detach()
        assert torch.equal(model(tokens).logits, before)
        assert marks(model) == was
        handle = steer(model, near(), rank=0)
        assert not torch.allclose(model(tokens).logits, before, rtol=1e-4, atol=1e-5)
        with handle.off():
            torch.testing.assert_close(model(tokens).logits, before, rtol=1e-4, atol=1e-5)
        with handle:
            pass
        assert torch.equal(model(tokens).logits, before)
        with steer(model, near(), rank=0, how="loss"):
            assert torch.equal(model(tokens).logits, before)
        assert marks(model) == was


# The others, and Transformers 4, with TAMOE_FAMILIES=all.
EVERY = os.environ.get("TAMOE_FAMILIES") == "all"
ON_RANKS = ("mixtral", "deepseek_v3", *(("qwen3_moe", "olmoe") if EVERY else ()))


def average_gradients(parameters):
    """Over all ranks, as data-parallel training does."""
    for parameter in parameters:
        if parameter.grad is None:  # an expert without a token on this rank has one on another
            parameter.grad = torch.zeros_like(parameter)
    grads = [parameter.grad for parameter in parameters]
    flat = torch.nn.utils.parameters_to_vector(grads)
    dist.all_reduce(flat)
    torch.nn.utils.vector_to_parameters(flat / dist.get_world_size(), grads)


def trained_on_a_rank(rank, families, how):
    """Remote shares of both layers, at first and at the end, what they should be, and whether the
    model is itself again."""
    topology = Topology.from_tree("2x1", bandwidth_bytes_per_s=(4e10, 1e10))
    workload = Workload(tokens_per_rank=128, top_k=TOP_K, experts_per_rank=4)
    plan = solve(topology, workload, method="entropic", kl=0.3)
    target_N, found = plan.target_N(rank), {}
    wanted = 1 - target_N[4 * rank : 4 * rank + 4].sum() / target_N.sum()
    for family in families:
        model = tiny_model(family)
        handle = steer(model, plan, how=how, weight=1.0 if how == "loss" else None)
        own = set(handle.router_parameters()) if how == "loss" else set()
        shared = [p for p in model.parameters() if p not in own]
        groups = [{"params": shared}, {"params": list(own), "lr": 1e-2}]
        optimizer, shares = torch.optim.AdamW(groups, lr=1e-3), []
        for step in range(200):
            tokens = batch(size=4, seed=1000 * rank + step)
            loss = model(tokens, labels=tokens).loss + handle.loss()
            optimizer.zero_grad()
            loss.backward()
            average_gradients(shared)
            optimizer.step()
            if step in (0, 149, 199):
                numbers = handle.metrics()
                shares.append([v for k, v in numbers.items() if k.endswith("/remote_share")])
        handle.detach()
        twin = tiny_model(family).eval()
        twin.load_state_dict(model.state_dict())
        with torch.no_grad():
            same = torch.equal(twin(tokens).logits, model.eval()(tokens).logits)
        found[family] = (shares[0], shares[-1], wanted, same)
    return found


@pytest.mark.ranks
@pytest.mark.emulated
@pytest.mark.slow
def test_ranks_that_train_together_reach_their_targets():
    for found in run_ranks("2x1:400mbit", trained_on_a_rank, ON_RANKS, "bias", timeout_s=280):
        for family, (_, shares, wanted, same) in found.items():
            assert shares == pytest.approx([wanted, wanted], abs=0.02), family
            assert same, family


@pytest.mark.ranks
@pytest.mark.emulated
@pytest.mark.slow
def test_ranks_with_routers_of_their_own_move_towards_their_targets_by_loss():
    given = ("2x1:400mbit", trained_on_a_rank, ON_RANKS[:1], "loss")
    for found in run_ranks(*given, timeout_s=280):
        for family, (first, last, wanted, same) in found.items():
            for before, after in zip(first, last, strict=True):
                assert abs(before - wanted) > 0.1, family
                assert abs(after - wanted) < 0.6 * abs(before - wanted), family
            assert same, family


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ON_RANKS])
def test_the_bias_reaches_the_target_in_200_steps_of_training(family):
    model = tiny_model(family)
    plan = near()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    handle = steer(model, plan, rank=0)
    for step in range(200):
        tokens = batch(size=4, seed=step)
        loss = model(tokens, labels=tokens).loss + handle.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 149:
            handle.metrics()  # start counting
    wanted = plan.target_N(0)[4:].sum() / plan.target_N(0).sum()
    numbers = handle.metrics()
    shares = [value for key, value in numbers.items() if key.endswith("/remote_share")]
    assert len(shares) == 2
    assert shares == pytest.approx([wanted, wanted], abs=0.02)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "deepseek_v3", "gpt_oss"])
def test_the_loss_moves_a_router_towards_the_target(family):
    model = tiny_model(family)
    plan = near()
    handle = steer(model, plan, rank=0, how="loss", weight=1.0)
    optimizer = torch.optim.AdamW(handle.router_parameters(), lr=3e-2)
    first = None
    for step in range(100):
        model(batch(seed=step))
        loss = handle.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        numbers = handle.metrics()
        share = sum(v for k, v in numbers.items() if k.endswith("/remote_share")) / 2
        first = share if first is None else first
    wanted = plan.target_N(0)[4:].sum() / plan.target_N(0).sum()
    assert abs(share - wanted) < 0.5 * abs(first - wanted)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_checkpointed_activations_give_the_same_gradients_and_counts(family):
    found = []
    for checkpointed in (False, True):
        model = tiny_model(family)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        handle = steer(model, near(), rank=0, weight=0.1)
        for step in range(3):
            model.zero_grad()
            tokens = batch(seed=step)
            (model(tokens, labels=tokens).loss + handle.loss()).backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((grads, [layer.seen_N.clone() for layer in handle.layers]))
    (grads, counts), (again, recounted) = found
    assert all(torch.equal(a, b) for a, b in zip(counts, recounted, strict=True))
    assert counts[0].sum() == 3 * 8 * 32 * TOP_K
    for name, grad in grads.items():
        torch.testing.assert_close(again[name], grad, rtol=1e-4, atol=1e-6)


def test_padding_is_not_counted():
    model = tiny_model("mixtral")
    handle = steer(model, near(), rank=0)
    mask = torch.ones(8, 32, dtype=torch.long)
    mask[:, 20:] = 0
    model(batch(), attention_mask=mask)
    assert all(layer.seen_N.sum() == 8 * 20 * TOP_K for layer in handle.layers)


def test_state_and_plan_go_on_where_they_were():
    model = tiny_model("mixtral")
    handle = steer(model, near(), rank=0)
    for step in range(5):
        model(batch(seed=step))
    state = handle.state_dict()
    twin = steer(tiny_model("mixtral"), near(), rank=0)
    twin.load_state_dict(state)
    for layer, other in zip(handle.layers, twin.layers, strict=True):
        assert torch.equal(layer.bias.bias_N, other.bias.bias_N)
    before = handle.layers[0].bias.bias_N.clone()
    handle.set_plan(even())
    assert not torch.equal(handle.layers[0].bias.bias_N, before)
    topology = Topology.from_tree("2x4", bandwidth_bytes_per_s=(4e10, 1e10))
    other = solve(topology, Workload(tokens_per_rank=256, top_k=1), method="entropic", kl=0.3)
    before = handle.layers[0].bias.bias_N.clone()
    with pytest.raises(InputError, match=r"solved for top_k=1 and router .* takes 2; allowed"):
        handle.set_plan(other)
    assert torch.equal(handle.layers[0].bias.bias_N, before)


def test_evaluation_moves_no_bias_and_updates_can_be_left_to_the_caller():
    model = tiny_model("mixtral")
    handle = steer(model, near(), rank=0)
    handle.auto_update = False
    for step in range(3):
        model(batch(seed=step))
    bias = handle.layers[0].bias
    assert bias.steps == 0
    handle.update()
    assert bias.steps == 1
    model.eval()
    handle.auto_update = True
    for step in range(3):
        model(batch(seed=step))
    model.train()
    model(batch())
    assert bias.steps == 1  # nothing was counted in training since


def test_a_compiled_router_is_one_graph_and_chooses_the_same():
    torch._dynamo.reset()
    model = tiny_model("mixtral").eval()
    with steer(model, near(), rank=0) as handle:
        router = next(
            (m for n, m in model.named_modules() if type(m).__name__ == "MixtralTopKRouter"), None
        )
        if router is None:
            pytest.skip("routes inside a block that loops over experts")
        x = torch.randn(64, 32)
        expected = router(x)
        compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
        found = compiled(x)
        assert torch.equal(found[2], expected[2])
        torch.testing.assert_close(found[1], expected[1])
        assert handle.layers[0].seen_N.sum() == 2 * 64 * TOP_K


def test_a_bias_that_is_off_learns_nothing_and_submodules_may_be_called_alone():
    model = tiny_model("mixtral")
    handle = steer(model, near(), rank=0)
    for step in range(4):
        model.model(batch(seed=step))  # not the model that was steered
    bias = handle.layers[0].bias
    assert bias.steps == 3
    was = bias.bias_N.clone()
    with handle.off():
        model(batch())
        model(batch())
    assert torch.equal(bias.bias_N, was)
    assert bias.steps == 3
    with pytest.raises(InputError, match="is steered already; allowed: one handle"):
        steer(model, near(), rank=0)
    handle.detach()
    steer(model, near(), rank=0).detach()


# ---- wrong input --------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_and_leaves_the_model_alone():
    model = tiny_model("mixtral")
    was = marks(model)
    small = Rows(torch.ones(4, 4).double().numpy())
    with pytest.raises(InputError, match=r"plan has 4 experts and router 'model.layers.0"):
        steer(model, small, rank=0)
    topology = Topology.from_tree("2x4", bandwidth_bytes_per_s=(4e10, 1e10))
    with pytest.raises(InputError, match=r"plan was solved for top_k=1 and router .* takes 2"):
        steer(model, solve(topology, Workload(top_k=1), floor=0.3), rank=0)
    with pytest.raises(InputError, match="rank is 8; allowed: 0 to 7"):
        steer(model, near(), rank=8)
    with pytest.raises(InputError, match=r"rank is None and torch.distributed is not initialised"):
        steer(model, near())
    with pytest.raises(InputError, match="how is 'magic'; allowed: 'bias', 'loss'"):
        steer(model, near(), rank=0, how="magic")
    with pytest.raises(InputError, match=r"model is Linear .* has no known router; looked for"):
        steer(torch.nn.Linear(4, 4), near(), rank=0)
    with pytest.raises(InputError, match=r"plan is 'plan.json'; allowed: a tamoe.solver.Plan"):
        steer(model, "plan.json", rank=0)
    assert marks(model) == was


def test_a_router_that_nothing_explains_is_refused():
    model = tiny_model("mixtral")
    kinds = {type(module).__name__: module for module in model.modules()}
    router = kinds.get("MixtralTopKRouter") or kinds["MixtralSparseMoeBlock"]
    own = type(router).forward

    def odd(self, hidden_states):
        first, *rest = own(self, hidden_states)
        return (
            first * 2 if type(router).__name__.endswith("Block") else first,
            *(r * 2 for r in rest),
        )

    router.forward = odd.__get__(router)
    with pytest.raises(InputError, match=r"not supported|does not add weighted experts"):
        steer(model, near(), rank=0)


def test_reentrant_checkpointing_is_named_where_it_cuts_off_the_loss():
    model = tiny_model("mixtral")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    handle = steer(model, near(), rank=0, how="loss")
    model(batch())
    with pytest.raises(InputError, match="use_reentrant=False"):
        handle.loss()
