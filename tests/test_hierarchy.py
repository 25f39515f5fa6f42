"""Levels from times: random trees with noise, bad pairs, chains; partitions and their agreement."""

import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from tamoe.topology import InputError
from tamoe.topology.hierarchy import (
    Group,
    adjusted_rand_index,
    best_partition,
    find_levels,
    group_tree,
    prune,
)


def random_tree(rng, depth):
    """Nested lists of node numbers with every leaf at the same depth."""
    numbers = iter(range(10**6))

    def make(level):
        if level == 0:
            return next(numbers)
        return [make(level - 1) for _ in range(rng.integers(2, 5))]

    return make(depth)


def partitions_of(tree):
    """Partitions at every level below the root, finest first, single members left out."""

    def members(part):
        return [part] if isinstance(part, int) else [m for child in part for m in members(child)]

    levels, current = [], tree
    while any(isinstance(part, list) for part in current):
        levels.append(tuple(tuple(members(part)) for part in current))
        current = [child for part in current for child in part]
    return levels[::-1]


def times_of(tree, times, rng, noise):
    partitions = partitions_of(tree)
    count = sum(map(len, partitions[0])) if partitions else len(tree)
    matrix = np.full((count, count), times[-1])
    for level, partition in reversed(list(enumerate(partitions))):
        for group in partition:
            matrix[np.ix_(group, group)] = times[level]
    return matrix * np.exp(noise * rng.standard_normal(matrix.shape))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.integers(0, 10**6))
def test_random_trees_with_noise_are_found_exactly(depth, seed):
    rng = np.random.default_rng(seed)
    tree = random_tree(rng, depth)
    times = np.cumprod(rng.uniform(1.5, 8.0, depth)) * 1e-3
    levels = find_levels(times_of(tree, times, rng, noise=0.01), noise=0.01)
    assert list(levels.partitions) == partitions_of(tree)
    assert levels.is_tree


def test_bad_pairs_never_split_a_group():
    rng = np.random.default_rng(0)
    tree = [[list(range(16 * leaf + 4 * n, 16 * leaf + 4 * n + 4)) for n in range(4)]
            for leaf in range(4)]  # fmt: skip
    time_NN = times_of(tree, [1e-3, 6e-3, 7.5e-3], rng, 0.03)
    for _ in range(20):
        i, j = rng.choice(64, 2, replace=False)
        time_NN[i, j] *= rng.uniform(2, 10)
    levels = find_levels(time_NN, noise=0.01)
    assert list(levels.partitions) == partitions_of(tree)


def test_one_relay_is_what_single_linkage_forgives():
    """A chain of ever slower pairs is one group: no step in it is a jump."""
    position = np.arange(12) * 0.1
    time_NN = np.exp(np.abs(position[:, None] - position[None, :]))
    assert find_levels(time_NN).partitions == ()


def test_flat_cluster_has_no_level_under_noise():
    rng = np.random.default_rng(1)
    time_NN = np.exp(0.03 * rng.standard_normal((32, 32)))
    assert find_levels(time_NN, noise=0.03).partitions == ()


def test_noise_raises_the_step_that_counts():
    near, far = 1.0, 1.5
    time_NN = [[1, near, far], [near, 1, far], [far, far, 1]]
    assert find_levels(time_NN, noise=0.05).partitions == (((0, 1), (2,)),)
    assert find_levels(time_NN, noise=0.1).partitions == ()


def test_slower_direction_counts():
    assert find_levels([[0, 1, 9], [1, 0, 1], [9, 9, 0]]).partitions == (((0, 1), (2,)),)


def test_ring_is_not_called_a_tree():
    hops = np.abs(np.arange(8)[:, None] - np.arange(8)[None, :])
    time_NN = np.exp(np.minimum(hops, 8 - hops).astype(float))
    assert not find_levels(time_NN).is_tree


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_times_must_be_positive(bad):
    with pytest.raises(InputError, match="time_s"):
        find_levels([[0, bad], [1, 0]])


def test_shape_must_be_square():
    with pytest.raises(InputError, match=r"\(1, 2\)"):
        find_levels([[0, 1]])


def test_tree_of_groups_collapses_single_children():
    tree = group_tree(5, [((0, 1), (2,), (3, 4)), ((0, 1, 2), (3, 4))])
    assert tree == Group((Group((Group((0, 1)), 2)), Group((3, 4))))
    assert (tree.depth, tree.members) == (3, (0, 1, 2, 3, 4))
    assert [group.members for group in tree.groups()] == [
        (0, 1, 2, 3, 4), (0, 1, 2), (0, 1), (3, 4),
    ]  # fmt: skip


def test_pruning_moves_children_up_and_keeps_the_rest():
    tree = group_tree(5, [((0, 1), (2,), (3, 4)), ((0, 1, 2), (3, 4))])
    kept = prune(tree, lambda group: group.members != (0, 1, 2))
    assert kept == Group((Group((0, 1)), 2, Group((3, 4))))
    assert prune(tree, lambda group: False) == Group((0, 1, 2, 3, 4))


def slow_rand_index(first, second, count):
    """Adjusted Rand index from its definition over all pairs of members."""

    def together(partition):
        where = {m: k for k, group in enumerate(partition) for m in group}
        return np.array([where[i] == where[j] for i in range(count) for j in range(i)])

    a, b = together(first), together(second)
    expected = a.sum() * b.sum() / len(a)
    most = (a.sum() + b.sum()) / 2
    return 1.0 if most == expected else ((a & b).sum() - expected) / (most - expected)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=12))
def test_rand_index_equals_its_definition(labels):
    def partition(position):
        groups = {}
        for member, label in enumerate(labels):
            groups.setdefault(label[position], []).append(member)
        return tuple(map(tuple, groups.values()))

    first, second = partition(0), partition(1)
    expected = slow_rand_index(first, second, len(labels))
    assert adjusted_rand_index(first, second) == pytest.approx(expected, abs=1e-12)


def test_best_partition_is_the_measured_level_that_matches():
    time_NN = np.full((8, 8), 30.0)
    for group in ((0, 1, 2, 3), (4, 5, 6, 7)):
        time_NN[np.ix_(group, group)] = 6.0
    for group in ((0, 1), (2, 3), (4, 5), (6, 7)):
        time_NN[np.ix_(group, group)] = 1.0
    levels = find_levels(time_NN)
    hosts = ((0, 1, 2, 3), (4, 5, 6, 7))
    assert best_partition(levels, hosts) == (hosts, 1.0)
    measured, score = best_partition(levels, ((0, 1, 2), (3, 4, 5, 6, 7)))
    assert score < 1
    assert measured in levels.partitions
