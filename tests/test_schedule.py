"""Rounds: every pair once, nobody twice at the same time."""

from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given, settings, strategies as st

from tamoe.topology.schedule import (
    circle_rounds,
    flows_between,
    group_rounds,
    local_rounds,
    split_round,
)

sizes = st.lists(st.integers(1, 4), min_size=1, max_size=9)


def ranks_of(node_sizes):
    starts = [sum(node_sizes[:k]) for k in range(len(node_sizes))]
    return [
        tuple(range(start, start + size)) for start, size in zip(starts, node_sizes, strict=True)
    ]


def unordered(rounds):
    return Counter(frozenset(pair) for pairs in rounds for pair in pairs)


def assert_disjoint(rounds):
    for pairs in rounds:
        busy = [member for pair in pairs for member in pair]
        assert len(busy) == len(set(busy))


@pytest.mark.parametrize("count", range(34))
def test_circle_has_every_pair_once_and_nobody_twice_in_a_round(count):
    rounds = circle_rounds(count)
    assert unordered(rounds) == Counter(map(frozenset, combinations(range(count), 2)))
    assert_disjoint(rounds)
    assert len(rounds) == (0 if count < 2 else count - 1 + count % 2)


@pytest.mark.parametrize("count", [3, 8, 17, 64])
def test_everyone_begins_about_half_of_its_pairs(count):
    begun = Counter(first for pairs in circle_rounds(count) for first, _ in pairs)
    assert all(abs(begun[member] - (count - 1) / 2) <= 1 for member in range(count))


@settings(deadline=None)
@given(sizes, st.one_of(st.none(), st.integers(0, 5)))
def test_every_two_nodes_meet_once_with_one_active_rank_each(node_sizes, seed):
    nodes = ranks_of(node_sizes)
    node_of = {rank: k for k, ranks in enumerate(nodes) for rank in ranks}
    rounds = [[(node_of[a], node_of[b]) for a, b in pairs] for pairs in group_rounds(nodes, seed)]
    assert unordered(rounds) == Counter(map(frozenset, combinations(range(len(nodes)), 2)))
    assert_disjoint(rounds)


def test_active_rank_moves_on_and_rails_match():
    rounds = group_rounds([(0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11)], seed=3)
    rails = [{rank % 3 for pair in pairs for rank in pair} for pairs in rounds]
    assert rails == [{0}, {1}, {2}]


def test_order_depends_on_the_seed_alone():
    nodes = ranks_of([2] * 8)
    assert group_rounds(nodes, 1) == group_rounds(nodes, 1)
    assert group_rounds(nodes, 1) != group_rounds(nodes, 2)


@settings(deadline=None)
@given(sizes, st.data())
def test_local_rounds_have_every_pair_of_a_node_once_within_the_limit(node_sizes, data):
    nodes = ranks_of(node_sizes)
    machines = data.draw(st.lists(st.integers(0, 2), min_size=len(nodes), max_size=len(nodes)))
    limit = data.draw(st.one_of(st.none(), st.integers(1, 3)))
    rounds = local_rounds(nodes, machines, limit)
    inside = [pair for ranks in nodes for pair in combinations(ranks, 2)]
    assert unordered(rounds) == Counter(map(frozenset, inside))
    assert_disjoint(rounds)
    machine_of = {
        rank: machine for ranks, machine in zip(nodes, machines, strict=True) for rank in ranks
    }
    if limit is not None:
        for pairs in rounds:
            assert max(Counter(machine_of[a] for a, _ in pairs).values()) <= limit


def test_local_rounds_keep_some_pairs_of_every_node_when_sampled():
    nodes = ranks_of([4, 4, 2])
    rounds = local_rounds(nodes, [0, 0, 1], limit=1, pairs_per_node=2)
    per_node = Counter(next(k for k, n in enumerate(nodes) if a in n) for r in rounds for a, _ in r)
    assert per_node == {0: 2, 1: 2, 2: 1}


def test_split_rounds_lose_nothing():
    pairs = tuple((2 * k, 2 * k + 1) for k in range(7))
    parts = split_round(pairs, 3)
    assert [len(part) for part in parts] == [3, 3, 1]
    assert sum(parts, ()) == pairs
    assert split_round((), None) == []


@given(sizes, sizes)
def test_flows_use_a_rank_once_and_spread_over_nodes(source_sizes, target_sizes):
    nodes = ranks_of(source_sizes + target_sizes)
    sources, targets = nodes[: len(source_sizes)], nodes[len(source_sizes) :]
    flows = flows_between(sources, targets)
    assert_disjoint([flows])
    assert len(flows) == min(sum(source_sizes), sum(target_sizes))
    reached = Counter(k for _, j in flows for k, ranks in enumerate(targets) if j in ranks)
    if len(flows) >= len(targets):
        assert len(reached) == len(targets)
