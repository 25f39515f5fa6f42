"""Experts anywhere: every exchange is one process to the bit, on random placements."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tamoe.exchange import Exchange
from tamoe.topology import run_ranks
from tests.test_hierarchical import DTYPES, alone, routing, through, tree

SHAPES = {1: ["1x1"], 2: ["2x1"], 4: ["2x2", "[3,1]"], 5: ["[[2,1],[2]]", "[4,1]"]}
EACH = 16  # random placements of a shape


def random_placement(generator: torch.Generator, num_ranks: int, kind: int) -> list[int]:
    """Random ranks; all experts on one rank; a permutation; some ranks empty."""
    experts = int(torch.randint(1, 3 * num_ranks + 1, (), generator=generator))
    ranks = torch.randint(0, num_ranks, (experts,), generator=generator)
    if kind == 1:
        ranks = ranks[:1].expand(experts)
    elif kind == 2:
        ranks = torch.randperm(2 * num_ranks, generator=generator) // 2
    elif kind == 3:
        ranks = ranks // 2 * 2
    return ranks.tolist()


def given_to(rank: int, seed: int, experts: int) -> tuple[torch.Tensor, torch.Tensor, Any, Any]:
    """Tokens, experts, weights and gradients of a rank, the same wherever they are asked for."""
    own = torch.Generator().manual_seed(1000 * seed + rank)
    tokens = max(0, int(torch.randint(-3, 12, (), generator=own)))
    x_TD = torch.randn(tokens, 1 + seed % 7, generator=own).to(DTYPES[seed % 4])
    index = routing(own, tokens, experts, 1 + seed % min(4, experts))
    weight = None if seed % 5 == 0 else torch.rand(index.shape, generator=own)
    return x_TD, index, weight, torch.randn(x_TD.shape, generator=own).to(x_TD.dtype)


def compare(group: Any, shape: str, seed: int) -> None:
    """Flat, hierarchical and one process, on one random placement."""
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    placement = random_placement(torch.Generator().manual_seed(seed), num_ranks, seed % 4)
    experts, topology = len(placement), tree(shape)
    make = partial(Exchange, topology, group=group, placement=placement)
    x_TD, index, weight, grad = given_to(rank, seed, experts)
    wanted = alone(topology, x_TD, index, weight, experts, grad, placement)
    rows = [
        others[0][(others[1] == expert).any(1)]
        for expert in range(experts)
        if placement[expert] == rank
        for others in (given_to(source, seed, experts) for source in range(num_ranks))
    ]
    for exchange in (
        make(kind="flat", schedule="single"),
        make(kind="flat", schedule="rounds"),
        make(kind="hierarchical", chunks=1),
        make(kind="hierarchical", chunks=3),
    ):
        got = through(exchange, x_TD, index, weight, experts, grad)
        assert torch.equal(got[0], torch.cat([x_TD[:0], *rows]))
        for name, a, b in zip(("out", "grad_x", "grad_weight"), got[1:], wanted, strict=False):
            assert torch.equal(a, b), f"{name}: seed {seed}, {exchange}, {placement}"
        _, handle = exchange.dispatch(x_TD, index, num_experts=experts)
        assert len(handle.counts_E) == placement.count(rank)
        counts = [int((index == expert).sum()) for expert in range(experts)]
        assert list(handle.sent_counts_N) == counts


def on_shapes(rank: int) -> None:
    """Random placements on all shapes."""
    for num_ranks, shapes in SHAPES.items():
        group = dist.new_group(list(range(num_ranks)))
        for number, shape in enumerate(shapes):
            for seed in range(EACH) if rank < num_ranks else ():
                compare(group, shape, 100 * number + seed)


@pytest.mark.ranks
@pytest.mark.slow
def test_every_exchange_is_one_process_to_the_bit_wherever_the_experts_are() -> None:
    run_ranks(max(SHAPES), on_shapes, timeout_s=200)  # the assertions run on the ranks
