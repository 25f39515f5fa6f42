"""Hierarchical = flat = one process, to the bit, whatever the nodes and the routing."""

from __future__ import annotations

import gc
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tamoe.exchange import Exchange
from tamoe.hierarchical import RelayRoute
from tamoe.precision import dot, weigh
from tamoe.relays import count_copies, list_copies, plan_forwarding
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
ROUTINGS = int(os.environ.get("TAMOE_ROUTINGS", "150"))


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
        parent_TM = plan_forwarding(key_n, 20, relays)
        copies = list_copies(parent_TM, count_copies(parent_TM)[0].tolist())
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


def laid_out(values: torch.Tensor, how: int) -> torch.Tensor:
    """A copy: as usual, by columns, or one number off an aligned address."""
    if how == 1:
        return values.t().clone(memory_format=torch.contiguous_format).t()
    if how == 2:
        return values.new_empty(values.numel() + 1)[1:].view_as(values).copy_(values)
    return values.clone()


def relaid(row_RD: torch.Tensor, how: int) -> torch.Tensor:
    """Rows with their graph, by columns where ``how`` is 1."""
    return row_RD.t().contiguous().t() if how == 1 else row_RD


def through(
    exchange: Exchange,
    x_TD: torch.Tensor,
    index: torch.Tensor,
    weight: Any,
    experts: int,
    grad: Any,
    how: int = 0,
) -> list[torch.Tensor]:
    """Output, and gradients of tokens and weights; ranks differ in the dtype of their indices."""
    x_TD = laid_out(x_TD, how).requires_grad_()
    weight = None if weight is None else laid_out(weight, how).requires_grad_()
    dtypes = (torch.int64, torch.int32, torch.int16, torch.int8)
    index = laid_out(index.to(dtypes[exchange.rank % 4]), how)
    row_RD, handle = exchange.dispatch(x_TD, index, weight, num_experts=experts)
    local = exchange.placement_of(experts).experts_PE[exchange.rank]
    counted = zip(local, handle.counts_E, strict=True)
    expert_R = torch.tensor([e for e, n in counted for _ in range(n)], dtype=torch.int64)
    out_TD = exchange.combine(relaid(experts_of(row_RD, expert_R), how), handle)
    out_TD.backward(laid_out(grad, how))
    assert x_TD.grad is not None
    weights = [] if weight is None else [weight.grad]
    return [row_RD.detach(), out_TD.detach(), x_TD.grad, *weights]


def alone(
    topology: Topology,
    x_TD: torch.Tensor,
    index: Any,
    weight: Any,
    experts: int,
    grad: Any,
    placement: list[int] | None = None,
) -> list[torch.Tensor]:
    """The same without any exchange: every expert is here, sums in the canonical order."""
    top_k = index.shape[1]
    even = [expert // (experts // topology.num_ranks or 1) for expert in range(experts)]
    rank_N = torch.tensor(placement or even)
    order = torch.where(index >= 0, rank_N[index] * experts + index, 2**31).flatten()
    choice_n = torch.argsort(order, stable=True)[: int((index >= 0).sum())]
    token_n, expert_n = choice_n // top_k, index.flatten()[choice_n]
    rank_n = rank_N[expert_n]
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


def compare(group: Any, topology: Topology, seeds: range, chunks: Any = 3) -> int:
    """Every exchange against the reference on random routings; how many."""
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    exchanges = [
        Exchange(topology, group=group, kind="hierarchical", chunks=chunks),
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
        weight = torch.rand(index.shape, generator=own).to((torch.float32, dtype)[seed // 4 % 2])
        grad = torch.randn(x_TD.shape, generator=own).to(dtype)
        given = (x_TD, index, None if seed % 5 == 0 else weight, experts, grad)
        wanted = alone(topology, *given)
        which = exchanges[: 2 + seed % 3]
        first, how = through(which[0], *given), seed // 4 % 3
        for got in [first, *(through(exchange, *given, how) for exchange in which[1:])]:
            assert torch.equal(got[0], first[0])  # rows as the experts see them
            for name, a, b in zip(("out", "grad_x", "grad_weight"), got[1:], wanted, strict=False):
                assert torch.equal(a, b), f"{name}: seed {seed}, {topology.nodes}, {dtype}"
    return len(seeds)


def on_all_shapes(rank: int, routings: int) -> tuple[int, int]:
    """Routings of all shapes, and those that this rank was part of and compared."""
    number = sum(map(len, SHAPES.values()))
    each, done, compared = -(-routings // number), 0, 0
    for num_ranks, shapes in SHAPES.items():
        group = dist.new_group(list(range(num_ranks)))
        for shape in shapes:
            if rank < num_ranks:
                compared += compare(group, tree(shape), range(done, done + each))
            done += each
    mixed = tree("2x4").subset([5, 0, 7, 2, 4, 1, 3, 6])  # ranks of a node are not neighbours
    compare(dist.group.WORLD, mixed, range(8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tamoe.solver.parts.PART_BYTES", 64)  # several parts for a few tokens
        patch.setattr("tamoe.solver.parts.FAR_BYTES", 64)
        for name in ("solver.parts.%s_INSIDE_BYTES", "summation.%s_PIECE_BYTES"):  # cut small
            for end in ("LEAST", "MOST"):
                patch.setattr("tamoe." + name % end, 64)
        compare(dist.group.WORLD, tree("[[2,1],[3,2]]"), range(8), chunks="auto")
    strided = dist.new_group([1, 3, 4, 7])
    if rank in (1, 3, 4, 7):
        compare(strided, tree("2x2"), range(8))
        compare(strided, tree("2x4").subset([1, 3, 4, 7]), range(8))
    for groups in (((0, 2, 4, 6), (1, 3, 5, 7)), ((0, 1, 2, 3), (4, 5, 6, 7)), ((0, 3, 6), (1, 2))):
        compare_groups(rank, "4x2", groups)
    return done, compared


def compare_groups(rank: int, shape: str, groups: tuple[tuple[int, ...], ...]) -> None:
    """Every group compares routings of its own while the others do, at its own pace."""
    handles = [dist.new_group(list(members)) for members in groups]
    for number, (members, group) in enumerate(zip(groups, handles, strict=True)):
        if rank in members:
            compare(group, tree(shape).subset(members), range(20 * number, 20 * number + 8))


def other_uses(rank: int) -> list[str]:
    """Uses that training has beside the plain one; names of those that differ from flat."""
    topology, wrong = tree("2x2"), []
    generator = torch.Generator().manual_seed(rank)
    index_TK = torch.rand(6, 8, generator=generator).argsort(1)[:, :3]

    def use(kind: Any, name: str) -> list[torch.Tensor | None]:
        exchange = Exchange(topology, kind=kind)
        own = torch.Generator().manual_seed(rank)
        x_TD = torch.randn(6, 40_000 if name == "wide" else 5, generator=own)
        x_TD.requires_grad_(name != "x without gradient")
        weight_TK = torch.rand(6, 3, generator=own)
        if name == "a weight is NaN":
            weight_TK[2, 1] = float("nan")
        weight_TK.requires_grad_(name != "weights without gradient")
        row_RD, handle = exchange.dispatch(x_TD, index_TK, weight_TK, num_experts=8)
        assert row_RD.requires_grad == (name != "x without gradient")
        out_TD = exchange.combine(row_RD * 1.5, handle)
        if name == "combined twice":
            out_TD = out_TD + exchange.combine(row_RD * 0.3, handle)
        if name == "dispatched again":
            again_RD, again = exchange.dispatch_again(x_TD.detach() + x_TD, handle)
            assert again.counts_E == handle.counts_E
            out_TD = out_TD + exchange.combine(again_RD * 0.3, again)
        if name == "dispatched anew":
            given = x_TD.detach() + x_TD, index_TK, weight_TK
            anew_RD, anew = exchange.dispatch(*given, num_experts=8)
            out_TD = out_TD + exchange.combine(anew_RD * 0.3, anew)
        if name == "a weight is NaN":
            assert out_TD.isnan().any(1).tolist() == [False, False, True, False, False, False]
        out_TD.sum().backward(retain_graph=name == "backward twice")
        if name == "backward twice":
            out_TD.sum().backward()
        return [out_TD.detach(), x_TD.grad, weight_TK.grad]

    for name in (
        "plain",
        "wide",
        "x without gradient",
        "weights without gradient",
        "a weight is NaN",
        "combined twice",
        "backward twice",
    ):
        pairs = list(zip(use("hierarchical", name), use("flat", name), strict=True))
        wrong += [] if all(alike(*pair) for pair in pairs) else [name]
    for kind in ("hierarchical", "flat", "none"):
        pairs = list(zip(use(kind, "dispatched again"), use(kind, "dispatched anew"), strict=True))
        wrong += [] if all(alike(*pair) for pair in pairs) else [f"dispatched again, {kind}"]
    return wrong


def alike(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Equal bits; NaNs, which have many, are alike."""
    if a is None or b is None:
        return a is b
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.ranks
def test_other_uses_agree_with_flat() -> None:
    assert run_ranks(4, other_uses, timeout_s=120) == [[]] * 4


def left_behind(rank: int) -> tuple[int, int, int]:
    """File descriptors, threads and routes that are alive after groups and steps have ended."""

    def step(group: Any) -> None:
        exchange = Exchange(tree("2x2"), group=group, kind="hierarchical")
        x_TD = torch.ones(4, 3, requires_grad=True)
        weight_TK = torch.ones(4, 1, requires_grad=True)
        index_TK = torch.arange(4)[:, None]
        row_RD, handle = exchange.dispatch(x_TD, index_TK, weight_TK, num_experts=4)
        exchange.combine(row_RD, handle).sum().backward()

    def held() -> tuple[int, int]:
        gc.collect()
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    step(dist.group.WORLD)
    gc.collect()
    gc.disable()  # a training loop may do that; nothing may wait for the collector
    for _ in range(5):
        step(dist.group.WORLD)
    alive = sum(isinstance(thing, RelayRoute) for thing in gc.get_objects())
    gc.enable()
    before = held()
    for _ in range(3):
        group = dist.new_group(list(range(4)))
        step(group)
        dist.barrier()
        dist.destroy_process_group(group)
        del group
    after = held()
    return after[0] - before[0], after[1] - before[1], alive


@pytest.mark.ranks
def test_nothing_is_left_of_steps_and_groups() -> None:
    assert run_ranks(4, left_behind, timeout_s=120) == [(0, 0, 0)] * 4


@pytest.mark.ranks
@pytest.mark.timeout(0)  # run_ranks has one
def test_hierarchical_is_flat_is_one_process_to_the_bit() -> None:
    counted = run_ranks(8, on_all_shapes, ROUTINGS, timeout_s=300 + ROUTINGS)
    assert counted[0] == (counted[0][1],) * 2  # rank 0 is part of all
    assert min(done for done, _ in counted) >= ROUTINGS
    assert counted[7][1] > 0  # and the last one of those of eight ranks
