"""Hierarchical = flat = one process, to the bit, whatever the nodes and the routing."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tamoe.exchange import Exchange
from tamoe.precision import dot, weigh
from tamoe.relays import list_copies, plan_forwarding
from tamoe.solver.relays import make_relays, sum_groups
from tamoe.summation import add_up, plan_sum
from tamoe.topology import Topology, run_ranks
from tamoe.topology.tree import parse_tree, tree_depth

SHAPES = {
    1: ["1x1"],
    2: ["1x2", "2x1"],
    3: ["1x3", "3x1", "[2,1]", "[[1,1],[1]]"],
    4: ["1x4", "2x2", "4x1", "[3,1]", "[[1,1],[1,1]]", "[[2,1],[1]]", "[[1,1],[1,[1]]]"],
    5: ["1x5", "5x1", "[2,2,1]", "[[2,1],[2]]", "[1,4]"],
    6: ["1x6", "2x3", "3x2", "6x1", "[[2,2],[2]]", "[4,1,1]"],
    7: ["1x7", "7x1", "[4,2,1]", "[[1,2],[3,1]]"],
    8: ["1x8", "2x4", "4x2", "8x1", "[3,3,2]", "[[2,2],[2,2]]", "[[[1,1],[2]],[[1,1],[1,1]]]"],
}
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
# Random routings of all shapes together; the whole count is asked for with TAMOE_ROUTINGS=10000.
ROUTINGS = int(os.environ.get("TAMOE_ROUTINGS", "600"))


def tree(shape: str) -> Topology:
    """A topology of which only the shape matters."""
    levels = 1 + tree_depth(parse_tree(shape))
    return Topology.from_tree(shape, bandwidth_bytes_per_s=[1e9] * levels)


# ---- who relays --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["4x2", "[[2,1],[2]]", "[[[1,1],[2]],[[1,1],[1,1]]]", "[3,1]"])
def test_a_token_reaches_each_node_once_from_a_node_that_has_it(shape: str) -> None:
    topology = tree(shape)
    groups, num_nodes = sum_groups(topology), len(topology.nodes)
    generator = torch.Generator().manual_seed(1)
    for rank in range(topology.num_ranks):
        relays = make_relays(rank, topology.nodes, groups)
        key_n = torch.randint(0, num_nodes + 1, (60,), generator=generator)
        parent_TM, forward_MM = plan_forwarding(key_n, 20, relays)
        copies = list_copies(parent_TM, forward_MM.tolist())
        touch = [set(row.tolist()) - {num_nodes} for row in key_n.view(20, 3)]
        for token, nodes in enumerate(touch):
            parents = parent_TM[token].tolist()
            assert {n for n, p in enumerate(parents) if p >= 0} == nodes - {relays.node}
            for node in nodes - {relays.node}:
                source = parents[node]
                assert source in nodes | {relays.node}
                # One copy crosses into each group that the source is not in.
                for group_M in relays.group_LM:
                    inside = nodes - {relays.node}
                    inside = {n for n in inside if group_M[n] == group_M[node]}
                    crossing = [n for n in inside if group_M[parents[n]] != group_M[node]]
                    assert len(crossing) == (group_M[relays.node] != group_M[node])
        for node in range(num_nodes):
            listed = sorted(
                (parent_TM[t, node].item(), t) for t in range(20) if parent_TM[t, node] >= 0
            )
            place = [copies.position_TM[token, node].item() for _, token in listed]
            assert place == list(range(len(listed)))


# ---- equality ----------------------------------------------------------------------------------


def routing(generator: torch.Generator, tokens: int, experts: int, top_k: int) -> torch.Tensor:
    """Distinct experts for each token: even, skewed or one-hot; some choices dropped."""

    def uniform() -> float:
        return float(torch.rand((), generator=generator))

    skew = (0.0, 0.0, 5.0, 100.0)[int(uniform() * 4)]
    score = torch.rand(tokens, experts, generator=generator)
    score += skew * torch.rand(experts, generator=generator)
    index_TK = score.argsort(1, descending=True)[:, :top_k]
    dropped = (
        torch.rand(index_TK.shape, generator=generator) < (0.0, 0.3, 1.0)[int(uniform() * 2.2)]
    )
    return torch.where(dropped, -1, index_TK)


def experts_of(row_RD: torch.Tensor, expert_R: torch.Tensor) -> torch.Tensor:
    """A stand-in for experts whose bits do not depend on the other rows of a batch."""
    return torch.tanh(row_RD * (1 + expert_R[:, None]).to(row_RD.dtype) * 0.37)


def through(
    exchange: Exchange, x_TD: torch.Tensor, index: Any, weight: Any, experts: int, grad: Any
) -> list[torch.Tensor]:
    """Output, and gradients of tokens and weights."""
    x_TD = x_TD.clone().requires_grad_()
    weight = None if weight is None else weight.clone().requires_grad_()
    row_RD, handle = exchange.dispatch(x_TD, index, weight, num_experts=experts)
    local = torch.arange(len(handle.counts_E)) + exchange.rank * len(handle.counts_E)
    expert_R = local.repeat_interleave(torch.tensor(handle.counts_E))
    out_TD = exchange.combine(experts_of(row_RD, expert_R), handle)
    out_TD.backward(grad)
    assert x_TD.grad is not None
    weights = [] if weight is None else [weight.grad]
    return [row_RD.detach(), out_TD.detach(), x_TD.grad, *weights]


def alone(
    topology: Topology, x_TD: torch.Tensor, index: Any, weight: Any, experts: int, grad: Any
) -> list[torch.Tensor]:
    """The same without any exchange: every expert is here, sums in the canonical order."""
    top_k = index.shape[1]
    key = torch.where(index >= 0, index, experts).flatten()
    choice_n = torch.argsort(key, stable=True)[: int((index >= 0).sum())]
    token_n, expert_n = choice_n // top_k, key[choice_n]
    rank_n = expert_n // (experts // topology.num_ranks)
    plan = plan_sum(token_n, rank_n, len(x_TD), sum_groups(topology))
    row_nD = x_TD[token_n].requires_grad_()
    out_nD = experts_of(row_nD, expert_n)
    grad_nD = grad[token_n]
    weighted = out_nD.detach()
    grads = []
    if weight is not None:
        weight_n = weight.flatten()[choice_n]
        weighted = weigh(weighted, weight_n)
        grad_weight = torch.zeros(weight.numel(), dtype=weight.dtype)
        grad_weight[choice_n] = dot(grad_nD, out_nD.detach()).to(weight.dtype)
        grads = [grad_weight.view_as(weight)]
        grad_nD = weigh(grad_nD, weight_n)
    out_nD.backward(grad_nD)
    assert row_nD.grad is not None
    return [add_up(weighted, plan), add_up(row_nD.grad, plan), *grads]


def compare(group: Any, topology: Topology, seeds: range) -> int:
    """Every exchange against the reference on random routings; how many."""
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    exchanges = [
        Exchange(topology, group=group, kind="hierarchical", chunks=3),
        Exchange(topology, group=group, kind="flat", schedule="single"),
        Exchange(topology, group=group, kind="hierarchical", chunks=1),
        Exchange(topology, group=group, kind="flat", schedule="rounds"),
    ]
    for seed in seeds:
        common = torch.Generator().manual_seed(seed)
        experts = num_ranks * int(torch.randint(1, 5, (), generator=common))
        top_k = int(torch.randint(1, min(8, experts) + 1, (), generator=common))
        width = int(torch.randint(1, 20, (), generator=common))
        dtype = DTYPES[seed % 4]
        tokens = torch.randint(0, 12, (num_ranks,), generator=common)
        tokens[torch.rand(num_ranks, generator=common) < 0.2] = 0
        own = torch.Generator().manual_seed(1000 * seed + rank)
        x_TD = torch.randn(int(tokens[rank]), width, generator=own).to(dtype)
        index = routing(own, int(tokens[rank]), experts, top_k)
        weight = torch.rand(index.shape, generator=own).to((torch.float32, dtype)[seed % 2])
        grad = torch.randn(x_TD.shape, generator=own).to(dtype)
        given = (x_TD, index, None if seed % 5 == 0 else weight, experts, grad)
        wanted = alone(topology, *given)
        which = exchanges[: 2 + seed % 3]
        first = through(which[0], *given)
        for got in [first, *(through(exchange, *given) for exchange in which[1:])]:
            assert torch.equal(got[0], first[0])  # rows as the experts see them
            for name, a, b in zip(("out", "grad_x", "grad_weight"), got[1:], wanted, strict=False):
                assert torch.equal(a, b), f"{name}: seed {seed}, {topology.nodes}, {dtype}"
    return len(seeds)


def on_all_shapes(rank: int, routings: int) -> int:
    number = sum(map(len, SHAPES.values()))
    each, done = -(-routings // number), 0
    for num_ranks, shapes in SHAPES.items():
        group = dist.new_group(list(range(num_ranks)))
        for shape in shapes:
            if rank < num_ranks:
                compare(group, tree(shape), range(done, done + each))
            done += each
    strided = dist.new_group([1, 3, 4, 7])
    if rank in (1, 3, 4, 7):
        compare(strided, tree("2x2"), range(8))
        compare(strided, tree("2x4").subset([1, 3, 4, 7]), range(8))
    return done


@pytest.mark.ranks
@pytest.mark.timeout(0)  # run_ranks has one
def test_hierarchical_is_flat_is_one_process_to_the_bit() -> None:
    done = run_ranks(8, on_all_shapes, ROUTINGS, timeout_s=300 + ROUTINGS)
    assert min(done) >= ROUTINGS
