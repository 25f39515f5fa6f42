"""Messages that go by node are those that one all-to-all brings; dead peers are named."""

from __future__ import annotations

import socket
from pathlib import Path

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
        short._channel = object()  # type: ignore[assignment]  # no way by node
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
        channels._open = lambda *_: False
    swap = WordSwap(group, rank)
    swap.agree(NODES[1], PATIENCE)
    given = message(rank, 3)
    same = torch.equal(WordSwap(group, rank).swap(given, PATIENCE), swap.swap(given, PATIENCE))
    return swap._channel is None, same


@pytest.mark.ranks
def test_all_take_the_long_way_where_two_ranks_cannot_connect() -> None:
    assert run_ranks(5, without_sockets, timeout_s=120) == [(True, True)] * 5


def test_a_peer_that_died_is_named() -> None:
    own, theirs = socket.socketpair()
    theirs.close()
    with pytest.raises(ExchangeError, match=r"flat exchange, here: .* rank 7 closed its conn"):
        NodeChannel({7: own}, 60.0).swap({}, {7: 1}, Patience("flat exchange"), "here")


def test_after_a_silent_peer_no_swap_works_and_the_peer_hears_of_it() -> None:
    own, theirs = socket.socketpair()
    channel, impatience = NodeChannel({7: own}, 60.0), Patience("flat exchange", 0.05)
    own.settimeout(0.05)
    with theirs:
        with pytest.raises(ExchangeError, match=r"rank 7 did not answer: timed out"):
            channel.swap({7: b"a"}, {7: 1}, impatience, "here")
        with pytest.raises(BrokenPipeError):
            theirs.sendall(b"b")  # late, and not taken for the next answer
        with pytest.raises(ExchangeError, match=r"a message failed before"):
            channel.swap({7: b"c"}, {7: 1}, impatience, "here")
        assert (theirs.recv(4), theirs.recv(4)) == (b"a", b"")


def with_little_room(rank: int) -> bool:
    if rank == 1:
        channels._roomy = lambda _: False
    swap = WordSwap(dist.group.WORLD, rank)  # type: ignore[arg-type]
    swap.agree(NODES[1], PATIENCE)
    return swap._channel is None and not list(Path(channels._FOLDER).glob("tamoe-*/socket"))


@pytest.mark.ranks
def test_sockets_that_hold_too_little_are_not_used_and_none_is_left() -> None:
    assert run_ranks(5, with_little_room, timeout_s=120) == [True] * 5
