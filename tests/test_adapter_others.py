"""Steering of DeepSpeed's, Megatron-Core's, TorchTitan's and FastMoE's gates."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from tamoe.adapters.fastmoe import gate_class
from tamoe.adapters.versions import FRAMEWORKS, require
from tamoe.functional import balance_loss, expert_counts
from tamoe.topology.errors import InputError
from tests.plan_rows import two_nodes
from tests.routers import (
    TITAN,
    megatron_router,
    near,
    needs_deepspeed,
    needs_megatron,
    needs_torchtitan,
    remote_target,
    titan_router,
)

# ---- DeepSpeed ----------------------------------------------------------------------------------


def top_k_gate(top_k: int, **options: Any) -> torch.nn.Module:
    from deepspeed.moe.sharded_moe import TopKGate

    torch.manual_seed(0)
    gate = TopKGate(16, 8, k=top_k, min_capacity=0, top2_2nd_expert_sampling=False, **options)
    torch.nn.init.normal_(gate.wg.weight, std=0.5)
    return gate


def scattered(routes: tuple[Any, ...]) -> torch.Tensor:
    """Weights ``[T, N]`` of seven sparse results."""
    index, weight = routes[3].T.long(), routes[5].T
    kept = torch.where(index >= 0, weight, 0.0)
    return torch.zeros(len(index), 8).scatter_add(1, index.clamp_min(0), kept)


@needs_deepspeed
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("drop_tokens", [False, True])
def test_an_even_plan_gives_what_deepspeed_gives(top_k, sparse, drop_tokens):
    from tamoe.adapters.deepspeed import steer

    gate = top_k_gate(top_k, drop_tokens=drop_tokens, use_rts=False, capacity_factor=1.25)
    x = torch.randn(40, 16)
    theirs = gate(x, None, sparse)
    state = set(gate.state_dict())
    handle = steer(gate, two_nodes(4, ratio=1.0), rank=0)
    assert set(gate.state_dict()) == state
    ours = gate(x, None, sparse)
    assert len(ours) == len(theirs) == (7 if sparse else 4)
    index = x.matmul(gate.wg.weight.T).topk(top_k).indices
    expected = balance_loss((x @ gate.wg.weight.T).softmax(1), index)
    assert float(ours[0]) == pytest.approx(float(expected), rel=1e-5)
    if top_k != 2:  # top2gating counts first choices alone
        assert float(ours[0]) == pytest.approx(float(theirs[0]), rel=1e-5)
        assert torch.equal(ours[-1].long(), theirs[-1].long())
    if sparse:
        assert int(ours[1]) == int(theirs[1])
        assert ours[2] == theirs[2]
        for at in (3, 4, 5):
            assert ours[at].shape == theirs[at].shape
            assert ours[at].dtype == theirs[at].dtype
        if not (top_k == 1 and drop_tokens):
            # What goes to each expert with which weight; in which place is free.
            torch.testing.assert_close(scattered(ours), scattered(theirs), rtol=1e-4, atol=1e-6)
        used = ours[3] >= 0
        slots = ours[3][used].long() * int(ours[1]) + ours[4][used].long()
        assert len(slots.unique()) == len(slots)
        assert (ours[4][used] < int(ours[1])).all()
    elif not (top_k == 1 and drop_tokens):  # which of equals stay is DeepSpeed's secret
        torch.testing.assert_close(ours[1].sum(2), theirs[1].sum(2), rtol=1e-4, atol=1e-6)
        assert torch.equal(ours[2].any(2), theirs[2].any(2))
        assert ours[1].shape == theirs[1].shape
        # No two tokens in one place of a buffer.
        assert (ours[2].sum(0) <= 1).all()
    handle.detach()
    again = gate(x, None, sparse)
    assert all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(again, theirs, strict=True)
    )
    assert "forward" not in gate.__dict__


@needs_deepspeed
def test_what_deepspeed_does_not_fit_is_refused():
    from tamoe.adapters.deepspeed import steer

    with pytest.raises(InputError, match="noisy_gate_policy='RSample'; allowed: 'Jitter' or None"):
        steer(top_k_gate(1, noisy_gate_policy="RSample"), two_nodes(), rank=0)
    with pytest.raises(InputError, match="looked for modules of class TopKGate"):
        steer(torch.nn.Linear(2, 2), two_nodes(), rank=0)
    with pytest.raises(InputError, match="plan was solved for top_k=2 and router '' takes 4"):
        steer(top_k_gate(4), near(), rank=0)


# ---- Megatron-Core ------------------------------------------------------------------------------


@pytest.fixture
def one_rank():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@needs_megatron
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"moe_router_pre_softmax": True},
        {"moe_router_score_function": "sigmoid", "moe_router_topk_scaling_factor": 2.5},
        {"moe_router_num_groups": 4, "moe_router_group_topk": 2},
        {
            "moe_router_num_groups": 2,
            "moe_router_group_topk": 1,
            "moe_router_pre_softmax": True,
        },
    ],
    ids=str,
)
def test_megatrons_router_reaches_the_target_and_is_itself_again(one_rank, options):
    from tamoe.adapters.megatron import steer

    router, plan = megatron_router(one_rank, **options).train(), near()

    def route(seed: int) -> Any:  # gating() wants CUDA, routing() does not
        x = torch.randn(512, 1, 16, generator=torch.Generator().manual_seed(seed))
        return router.routing(torch.nn.functional.linear(x, router.weight))

    before = route(0)
    with steer(router, two_nodes(4, ratio=1.0), rank=0):
        for mine, theirs in zip(route(0), before, strict=True):
            torch.testing.assert_close(mine, theirs)
    handle = steer(router, plan, rank=0)
    for step in range(200):
        handle.before_router(handle.layers[0], training=True)
        probs, chosen = route(step)
        assert torch.equal(probs > 0, chosen)
        if step == 149:
            handle.metrics()
    share = next(v for k, v in handle.metrics().items() if k.endswith("remote_share"))
    assert share == pytest.approx(remote_target(plan), abs=0.02)
    handle.detach()
    assert all(torch.equal(a, b) for a, b in zip(route(0), before, strict=True))
    assert "routing" not in router.__dict__


@needs_megatron
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("moe_router_load_balancing_type", "sinkhorn"),
        ("moe_router_load_balancing_type", "quantile_balancing"),
        ("moe_router_score_function", "sqrtsoftplus"),
        ("moe_router_score_function", "another"),
        ("moe_router_fusion", True),
        ("moe_enable_routing_replay", True),
    ],
)
def test_megatrons_other_ways_to_choose_are_refused(one_rank, option, value):
    from tamoe.adapters.megatron import steer

    router = megatron_router(one_rank)
    setattr(router.config, option, value)  # its own checks know more or less of them by version
    with pytest.raises(InputError, match=f"has {option}={value!r}; allowed: "):
        steer(router, near(), rank=0)
    assert "routing" not in router.__dict__


@needs_megatron
def test_numbers_that_megatrons_router_cannot_go_by_are_named(one_rank):
    from tamoe.adapters.megatron import steer

    router = megatron_router(one_rank).eval()
    handle = steer(router, near(), rank=0)
    logits = torch.randn(4, 1, 8)
    logits[2, 0, 3] = float("nan")
    with pytest.raises(
        InputError, match="logits of 1 of 4 tokens are not finite, the first is token 2"
    ):
        router.routing(logits)
    router.score_function = "sqrtsoftplus"
    with pytest.raises(InputError, match="score_function='sqrtsoftplus'; allowed: 'softmax' or"):
        router.routing(torch.randn(4, 1, 8))
    handle.detach()
    with pytest.raises(InputError, match=r"model is NoneType; allowed: a torch.nn.Module"):
        steer(None, near(), rank=0)


# ---- TorchTitan ---------------------------------------------------------------------------------


@needs_torchtitan
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"score_func": "softmax", "route_norm": True},
        {"num_expert_groups": 4, "num_limited_groups": 2},
    ],
    ids=str,
)
def test_torchtitans_router_reaches_the_target_and_is_itself_again(monkeypatch, options):
    from tamoe.adapters.torchtitan import steer

    monkeypatch.setattr(sys, "path", [*sys.path, str(TITAN)])
    router, plan = titan_router(**options).train(), near()

    def route(seed: int) -> Any:
        x = torch.randn(2, 256, 16, generator=torch.Generator().manual_seed(seed))
        return router(x, torch.linspace(-0.01, 0.01, 8))

    before = route(0)
    handle = steer(router, plan, rank=0)
    for step in range(200):
        route(step)
        if step == 149:
            handle.metrics()
    share = next(v for k, v in handle.metrics().items() if k.endswith("remote_share"))
    assert share == pytest.approx(remote_target(plan), abs=0.02)
    handle.detach()
    assert all(torch.equal(a, b) for a, b in zip(route(0), before, strict=True))
    assert not router._forward_hooks and not router._forward_pre_hooks


# ---- FastMoE ------------------------------------------------------------------------------------


def test_fastmoes_contract():
    plan = near()
    gate = gate_class(plan, rank=0)(16, 1, 8, 2)  # as FMoE calls it: d_model, experts, world, k
    for _ in range(100):
        index, score = gate(torch.randn(512, 16))
    assert (index.shape, index.dtype) == ((512, 2), torch.int64)
    torch.testing.assert_close(score.sum(1), torch.ones(512))
    counts = expert_counts(index, 8)
    assert float(counts[4:].sum()) / 1024 == pytest.approx(remote_target(plan), abs=0.04)
    assert gate.has_loss and gate.get_loss(clear=False) is not None
    gate.get_loss()
    assert not gate.has_loss
    assert len(gate(torch.randn(8, 16), return_all_scores=True)) == 3
    with pytest.raises(
        InputError, match="num_expert is 2 and world_size 8; allowed: as in the plan"
    ):
        gate_class(plan, rank=0)(16, 2, 8, 2)
    with pytest.raises(InputError, match="gate_bias is True"):
        gate_class(plan, rank=0)(16, 1, 8, 2, gate_bias=True)


# ---- versions -----------------------------------------------------------------------------------


def test_absent_and_unknown_versions_are_named(monkeypatch):
    monkeypatch.setitem(FRAMEWORKS, "other", ("no-such-package", ">=1", "nothing"))
    with pytest.raises(InputError, match="other is not installed; allowed: no-such-package>=1"):
        require("other")
    monkeypatch.setitem(FRAMEWORKS, "other", ("torch", ">=99", "nothing"))
    with pytest.raises(InputError, match=r"other is .*; allowed: >=99, which is what"):
        require("other")
