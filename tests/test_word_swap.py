"""Messages that go by node are those that one all-to-all brings; dead peers are named."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tamoe import node_channel as channels
from tamoe.node_channel import NodeChannel
from tamoe.topology import run_ranks
from tamoe.topology.errors import ExchangeError
from tamoe.waiting import Patience
from tamoe.word_swap import WordSwap

PATIENCE = Patience("test", 20.0)
NODES = [
    ((0, 1, 2, 3, 4),),
    ((0, 1), (2, 3), (4,)),
    ((3, 0, 4), (1, 2)),  # not in order
    ((0,), (1, 2, 3, 4)),
    ((0, 1, 2), (3,), (4,)),
]


def message(rank: int, width: int) -> torch.Tensor:
    """Words that tell who sent them, and for whom they are."""
    words_PW = torch.arange(5 * width, dtype=torch.int32).view(5, width)
    return words_PW + 1000 * rank


def both_ways(rank: int) -> list[bool]:
    """Whether the two ways agree, and the short one was taken."""
    group, found = dist.group.WORLD, []
    assert group is not None
    for nodes in NODES:
        plain, short = WordSwap(group, rank), WordSwap(group, rank)
        short.agree(nodes, PATIENCE)
        for width in (1, 7, 256):
            given = message(rank, width)
            found.append(torch.equal(plain.swap(given, PATIENCE), short.swap(given, PATIENCE)))
        found.append(short._channel is not None)
        big_PW = message(rank, channels.MOST_BYTES // 20 + 1)  # goes as one all-to-all
        found.append(torch.equal(short.swap(big_PW, PATIENCE)[:, 0], message_heads(rank, big_PW)))
    return found


def message_heads(rank: int, sent_PW: torch.Tensor) -> torch.Tensor:
    """First words that a rank gets."""
    return torch.arange(5, dtype=torch.int32) * 1000 + rank * sent_PW.shape[1]


@pytest.mark.ranks
def test_both_ways_bring_the_same() -> None:
    assert run_ranks(5, both_ways, timeout_s=120) == [[True] * 5 * len(NODES)] * 5


def without_sockets(rank: int) -> tuple[bool, bool]:
    group = dist.group.WORLD
    assert group is not None
    if rank == 3:

        def fails(*_: Any) -> None:
            raise OSError("no such socket")

        channels._opened = fails
    swap = WordSwap(group, rank)
    swap.agree(NODES[1], PATIENCE)
    given = message(rank, 3)
    same = torch.equal(WordSwap(group, rank).swap(given, PATIENCE), swap.swap(given, PATIENCE))
    return swap._channel is None, same


@pytest.mark.ranks
def test_all_take_the_long_way_where_two_ranks_cannot_connect() -> None:
    assert run_ranks(5, without_sockets, timeout_s=120) == [(True, True)] * 5


@pytest.mark.parametrize("gone", [True, False])
def test_a_peer_that_died_or_does_not_answer_is_named(gone: bool) -> None:
    own, theirs = socket.socketpair()
    channel = NodeChannel({7: own}, 60.0)
    if gone:
        theirs.close()
    with pytest.raises(ExchangeError, match=r"flat exchange, here: failed with rank 7"):
        channel.swap({}, {7: 1}, Patience("flat exchange", 0.05), "here")
    theirs.close()


def test_another_user_is_not_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    own, theirs = socket.socketpair()
    with own, theirs:
        assert channels._is_own(own)
        monkeypatch.setattr(channels.os, "getuid", lambda: os.geteuid() + 1)
        assert not channels._is_own(own)
