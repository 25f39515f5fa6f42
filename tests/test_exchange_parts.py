"""In how many parts a hierarchical exchange travels: as many as what leaves the nodes is worth."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tamoe.exchange import Exchange
from tamoe.hierarchical import RelayRoute
from tamoe.solver.exchange_rows import rows_of_group
from tamoe.topology import Topology, run_ranks

TREE = Topology.from_tree("4x2", bandwidth_bytes_per_s=(1e9, 1e7))
TOKENS, ROW_BYTES = 64, 16
NEAR = [[rank // 2 * 2, rank // 2 * 2 + 1] for rank in range(8)]  # experts, one on each rank
FAR = [[0, 7], *NEAR[1:]]  # one rank alone sends rows to another node


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


def make_small(patch: pytest.MonkeyPatch) -> None:
    """So that few tokens are worth several parts."""
    patch.setattr("tamoe.solver.parts.PART_BYTES", 64)
    patch.setattr("tamoe.solver.parts.FAR_BYTES", 64)


def parts_of_dispatches(rank: int) -> list[int]:
    exchange = Exchange(TREE, kind="hierarchical")
    found = []
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        for experts in (NEAR, NEAR, FAR, NEAR, NEAR):
            index_TK = torch.tensor([experts[rank]]).repeat(TOKENS, 1)
            x_TD = torch.full((TOKENS, ROW_BYTES // 4), float(rank))
            row_RD, handle = exchange.dispatch(x_TD, index_TK, num_experts=8)
            assert torch.equal(exchange.combine(row_RD, handle), 2 * x_TD)
            assert isinstance(handle.route, RelayRoute)
            found.append(len(handle.route.parts))
    return found


@pytest.mark.ranks
def test_parts_follow_what_left_the_nodes_in_the_dispatch_before() -> None:
    # At first nothing is known; the square root of 1,024 bytes over 64 is 4.
    assert run_ranks(8, parts_of_dispatches, timeout_s=120) == [[6, 1, 1, 4, 1]] * 8


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("experts", "parts"), [(NEAR, 1), (FAR, 4)])
def test_the_cost_model_counts_the_same_parts(experts: list[list[int]], parts: int) -> None:
    counts_pN, forward_pMM = np.zeros((8, 8)), np.zeros((8, 4, 4))
    for rank, chosen in enumerate(experts):
        counts_pN[rank, chosen] = TOKENS
        for node in {TREE.node_of[expert] for expert in chosen} - {TREE.node_of[rank]}:
            forward_pMM[rank, TREE.node_of[rank], node] = TOKENS
    each = np.full(8, TOKENS)
    sums_pL = np.stack([each, each], 1)
    ranks = tuple(range(8))
    rows = rows_of_group(TREE, ranks, counts_pN, forward_pMM, ranks, ROW_BYTES, each, sums_pL)
    assert len(rows["hierarchical", "dispatch"].parts) == parts
