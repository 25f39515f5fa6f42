"""One order of summation, to the bit; and rounds in which no two nodes share a node."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings, strategies as st

from tamoe.precision import weigh
from tamoe.schedules import rounds_of
from tamoe.solver.relays import sum_groups
from tamoe.summation import add_up, plan_sum
from tamoe.topology import Topology


def tree(shape: Any) -> Topology:
    """A topology of which only the shape matters."""
    from tamoe.topology.tree import parse_tree, tree_depth

    levels = 1 + tree_depth(parse_tree(shape))
    return Topology.from_tree(shape, bandwidth_bytes_per_s=[1e9] * levels)


# ---- order of summation ------------------------------------------------------------------------


def bfloat16(value: np.float32) -> np.float32:
    """Round to nearest even, by hand: torch is what is tested."""
    bits = int(np.float32(value).view(np.uint32))
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return np.uint32(bits).view(np.float32)


def brute_sum(terms: list[tuple[list[int], np.float32]], wire: torch.dtype) -> np.float32:
    """Nested sums of (path of groups, outermost first; value), each rounded to the wire dtype."""

    def rounded(value: np.float32) -> np.float32:
        return bfloat16(value) if wire == torch.bfloat16 else value

    if not terms[0][0]:
        parts = [value for _, value in terms]
    else:
        by_group: dict[int, list[tuple[list[int], np.float32]]] = {}
        for path, value in terms:
            by_group.setdefault(path[0], []).append((path[1:], value))
        parts = [brute_sum(by_group[group], wire) for group in sorted(by_group)]
    total = parts[0]
    for part in parts[1:]:
        total = np.float32(total + part)
    return rounded(total)


@settings(max_examples=150, deadline=None)
@given(
    shape=st.sampled_from(["1x4", "2x2", "4x1", "[3,1]", "[[2,1],[1]]", "[[1,1],[1,[1,1]]]"]),
    wire=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
    top_k=st.integers(1, 6),
    numbering=st.permutations(range(4)),
    num_tokens=st.integers(1, 5),
)
def test_sum_is_nested_in_expert_order_to_the_bit(shape, wire, seed, top_k, numbering, num_tokens):
    generator = torch.Generator().manual_seed(seed)
    topology = tree(shape).subset(numbering)  # ranks of a node need not be neighbours
    num_experts = 2 * topology.num_ranks
    index_TK = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :top_k]
    index_TK[torch.rand(index_TK.shape, generator=generator) < 0.2] = -1
    keep = index_TK.flatten() >= 0
    order = torch.argsort(torch.where(keep, index_TK.flatten(), 999), stable=True)[: keep.sum()]
    expert_n, token_n = index_TK.flatten()[order], order // top_k
    row_n1 = torch.randn(len(order), 1, generator=generator).exp().to(wire)
    plan = plan_sum(token_n, expert_n // 2, num_tokens, sum_groups(topology))
    got_T = add_up(row_n1, plan).flatten()
    for token in range(num_tokens):
        # Path from the root: the groups of each level above the rank, outermost first.
        terms = [
            (
                [group[int(expert) // 2] for group in reversed(sum_groups(topology))],
                np.float32(row.item()),
            )
            for expert, row, owner in zip(expert_n, row_n1, token_n, strict=True)
            if owner == token
        ]
        expected = brute_sum(terms, wire) if terms else np.float32(0)
        assert got_T[token].item() == float(expected)


def test_nodes_count_in_their_own_order_where_each_gives_one_row():
    # Experts 0, 1, 2 on nodes 2, 1, 0: (1 - 1e8) + 1e8 is 0 in float32, (1e8 - 1e8) + 1 is 1.
    groups = sum_groups(tree("3x1").subset([2, 1, 0]))
    plan = plan_sum(torch.zeros(3, dtype=torch.int64), torch.arange(3), 1, groups)
    assert add_up(torch.tensor([[1e8], [-1e8], [1.0]]), plan).item() == 0.0


def test_sum_groups_are_nodes_then_switches():
    assert sum_groups(tree("4x2")) == ((0, 0, 1, 1, 2, 2, 3, 3),)
    assert sum_groups(tree("[[2,2],[2]]")) == ((0, 0, 1, 1, 2, 2), (0, 0, 0, 0, 1, 1))
    assert sum_groups(tree("1x4")) == ()
    # Nodes whose ranks are not neighbours: expert order inside a node, then node order.
    strided = Topology.from_matrices(np.ones((4, 4)), np.ones((4, 4)), nodes=[(0, 2), (1, 3)])
    assert sum_groups(strided) == ((0, 1, 0, 1),)


def test_weights_are_rounded_to_the_wire_dtype_before_the_sum():
    row_nD = torch.tensor([[1.0078125]], dtype=torch.bfloat16)  # 1 + 2^-7, the smallest step
    weight_n = torch.tensor([1.00390625])  # 1 + 2^-8: half a step, so the product must round
    assert weigh(row_nD, weight_n).item() == float(bfloat16(np.float32(1.0078125 * 1.00390625)))


# ---- schedules ---------------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6), data=st.data())
def test_rounds_are_node_disjoint_and_meet_every_rank_once(sizes, data):
    order = data.draw(st.permutations(range(sum(sizes))))
    nodes = tuple(tuple(order[sum(sizes[:i]) : sum(sizes[: i + 1])]) for i in range(len(sizes)))
    node_of = {rank: number for number, ranks in enumerate(nodes) for rank in ranks}
    plans = {rank: rounds_of(nodes, rank) for rank in order}
    for rank, plan in plans.items():
        others = sorted(set(order) - {rank})
        assert sorted(peer for step in plan for peer in step.targets) == others
        assert sorted(peer for step in plan for peer in step.sources) == others
        for number, step in enumerate(plan):
            assert len({node_of[peer] for peer in step.targets}) <= 1
            assert len({node_of[peer] for peer in step.sources}) <= 1
            assert all(rank in plans[peer][number].sources for peer in step.targets)
