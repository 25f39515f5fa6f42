"""Steered routers of DeepSpeed, Megatron-Core and TorchTitan in training on two emulated ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from tamoe.adapters.handle import Handle
from tamoe.topology import run_ranks
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

CLUSTER = "2x1:400mbit"
pytestmark = [pytest.mark.ranks, pytest.mark.emulated, pytest.mark.slow]


def _train_deepspeed(rank: int, how: str) -> tuple[float, float, bool]:
    import deepspeed
    from deepspeed.moe.layer import MoE

    from tamoe.adapters.deepspeed import steer

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    torch.manual_seed(0)
    plan = near(tree="2x1")
    layer = MoE(
        16,
        torch.nn.Linear(16, 16),
        num_experts=8,
        ep_size=2,
        k=2,
        drop_tokens=False,
        top2_2nd_expert_sampling=False,
    )
    layer.set_deepspeed_parallelism()
    x = torch.randn(256, 16, generator=torch.Generator().manual_seed(rank))
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    before = layer(x)[0].detach()
    handle = steer(layer, plan, how=how)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3 if how == "bias" else 3e-2)
    for step in range(200):
        own = torch.Generator().manual_seed(1000 * rank + step)
        out, loss, _ = layer(torch.randn(256, 16, generator=own))
        ((out - 1).square().mean() * (how == "bias") + loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 149:
            handle.metrics()
    share = next(v for k, v in handle.metrics().items() if k.endswith("remote_share"))
    handle.detach()
    layer.load_state_dict(state)
    return share, remote_target(plan, rank), torch.equal(layer(x)[0], before)


@needs_deepspeed
def test_deepspeeds_layer_on_two_ranks_reaches_the_target_by_bias():
    for share, wanted, same in run_ranks(CLUSTER, _train_deepspeed, "bias", timeout_s=200):
        assert share == pytest.approx(wanted, abs=0.02)
        assert same


@needs_deepspeed
def test_deepspeeds_layer_on_two_ranks_moves_towards_the_target_by_loss():
    for share, wanted, _ in run_ranks(CLUSTER, _train_deepspeed, "loss", timeout_s=200):
        assert abs(share - wanted) < abs(0.5 - wanted) / 2


# ---- routers alone, with experts that all ranks share -------------------------------------------


def megatron(rank: int) -> tuple[torch.nn.Module, Handle, Callable[[torch.Tensor], Any]]:
    """A router, its handle, and a route whose result is a tuple of tensors."""
    from tamoe.adapters.megatron import steer

    alone = [dist.new_group([other]) for other in range(2)][rank]
    router = megatron_router(alone).train()
    handle = steer(router, near(tree="2x1"), rank=rank)

    def route(x_TD: torch.Tensor) -> Any:  # gating() wants CUDA, routing() does not
        if handle.undo:
            handle.before_router(handle.layers[0], training=True)
        return router.routing(F.linear(x_TD.unsqueeze(1), router.weight))

    return router, handle, route


def torchtitan(rank: int) -> tuple[torch.nn.Module, Handle, Callable[[torch.Tensor], Any]]:
    from tamoe.adapters.torchtitan import steer

    sys.path.append(str(TITAN))
    router = titan_router().train()
    handle = steer(router, near(tree="2x1"), rank=rank)
    return router, handle, lambda x_TD: router(x_TD.unsqueeze(0))


def dense(result: Any) -> torch.Tensor:
    """Weights ``[T, N]`` of what either router returns."""
    if len(result) == 2:
        return result[0].reshape(-1, 8)
    weight_TK, index_TK = (part.reshape(-1, 2) for part in result[:2])
    return torch.zeros(len(index_TK), 8).scatter(1, index_TK, weight_TK.float())


def _train_router(
    rank: int, make: Callable[[int], tuple[torch.nn.Module, Handle, Callable[..., Any]]]
) -> tuple[float, float, bool]:
    router, handle, route = make(rank)
    state = {name: value.clone() for name, value in router.state_dict().items()}
    torch.manual_seed(0)
    experts = torch.nn.Linear(16, 8 * 16)
    parameters = [*router.parameters(), *experts.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    probe_TD = torch.randn(64, 16, generator=torch.Generator().manual_seed(7))
    with handle.off():
        before = route(probe_TD)
    for step in range(200):
        own = torch.Generator().manual_seed(1000 * rank + step)
        x_TD = torch.randn(256, 16, generator=own)
        out_TD = (dense(route(x_TD)).unsqueeze(2) * experts(x_TD).view(-1, 8, 16)).sum(1)
        (out_TD - x_TD.flip(1)).square().mean().backward()
        for parameter in parameters:
            if parameter.grad is not None:  # Megatron's router has a parameter that it never uses
                dist.all_reduce(parameter.grad)
                parameter.grad /= 2
        optimizer.step()
        optimizer.zero_grad()
        if step == 149:
            handle.metrics()  # start counting
    share = next(v for k, v in handle.metrics().items() if k.endswith("remote_share"))
    handle.detach()
    router.load_state_dict(state)
    again = route(probe_TD)
    same = all(torch.equal(a, b) for a, b in zip(before, again, strict=True))
    return share, remote_target(near(tree="2x1"), rank), same


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(megatron, marks=needs_megatron),
        pytest.param(torchtitan, marks=needs_torchtitan),
    ],
)
def test_routers_on_two_ranks_reach_the_target_by_bias(make):
    for share, wanted, same in run_ranks(CLUSTER, _train_router, make, timeout_s=200):
        assert share == pytest.approx(wanted, abs=0.02)
        assert same
