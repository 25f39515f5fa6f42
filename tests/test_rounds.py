"""Rows in rounds: ranks send round by round, and take what comes from the start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tamoe import transfer as transfer_module
from tamoe.schedules import Mover
from tamoe.solver.constants import ROUNDS_AHEAD
from tamoe.topology import run_ranks
from tamoe.transfer import Round, Transfer, Waiting
from tamoe.waiting import Patience

NODES = ((0,), (1,), (2,))


def mover(rank: int, num_nodes: int) -> Mover:
    nodes = tuple((node,) for node in range(num_nodes))
    return Mover(dist.group.WORLD, nodes, rank, "rounds", Patience("test", 20.0))


def late_sender(rank: int) -> list[float]:
    """Rank 2 sends nothing before it has what the others send it in their second round."""
    row_nD = torch.full((3, 4), float(rank))
    if rank != 2:
        return mover(rank, 3).move(row_nD, [1] * 3, [1] * 3, "dispatch")[:, 0].tolist()
    arrived_D = {peer: torch.empty(4) for peer in (0, 1)}
    for peer, into_D in arrived_D.items():
        dist.recv(into_D, peer, tag=transfer_module._AHEAD_TAG)
    for peer in (0, 1):
        dist.send(row_nD[peer], peer, tag=transfer_module._AHEAD_TAG)
    return [*(float(into_D[0]) for into_D in arrived_D.values()), 2.0]


@pytest.mark.ranks
def test_a_rank_that_gets_nothing_yet_sends_its_own_rows_on() -> None:
    # In round 1 rank 2 sends to rank 0, which sends to rank 2 in round 2.
    assert run_ranks(3, late_sender, timeout_s=60) == [[0.0, 1.0, 2.0]] * 3


def order_of_waits(rank: int, num_nodes: int, ahead: bool) -> list[tuple[str, list[int]]]:
    """What is waited for in each round: ranks sent to and received from, here places of nodes."""
    waited: list[tuple[str, list[int]]] = []

    def start(self: Transfer, step: Round, where: str, tag: int = 0) -> Waiting:
        def wait() -> None:
            for way, peers in (("to", step.targets), ("from", step.sources)):
                if peers:
                    waited.append((way, list(peers)))

        return wait

    transfer = mover(0, num_nodes).transfer(
        torch.zeros(num_nodes, 1), [1] * num_nodes, [1] * num_nodes, "test"
    )
    transfer._takes_ahead = ahead
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transfer, "_start", start)
        for number in range(1, num_nodes):
            transfer.start(number)()
            waited.append(("end", [number]))
    return waited


@pytest.mark.ranks
@pytest.mark.parametrize("num_nodes", [1, 2, 4, 5, 8])
def test_no_rank_is_more_rounds_ahead_than_allowed(num_nodes: int) -> None:
    (waited,) = run_ranks(1, order_of_waits, num_nodes, True)
    last, arrived = num_nodes - 1, 0
    for way, peers in waited:
        if way == "from":
            arrived += 1
            assert peers == [num_nodes - arrived]  # in the order in which they are sent
        if way == "end":
            (number,) = peers
            assert arrived == (last if number == last else max(number - ROUNDS_AHEAD, 0))
    assert [peers for way, peers in waited if way == "to"] == [[n] for n in range(1, num_nodes)]
    assert arrived == last


@pytest.mark.ranks
def test_where_messages_wait_for_those_before_them_rounds_end_one_by_one() -> None:
    (waited,) = run_ranks(1, order_of_waits, 4, False)
    expected: list[Sequence[Any]] = []
    for number in (1, 2, 3):
        expected += [("to", [number]), ("from", [4 - number]), ("end", [number])]
    assert waited == expected
