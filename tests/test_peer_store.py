"""Rows stored into the memory of other processes: the right ones, in order, round after round."""

from __future__ import annotations

import errno
import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tamoe import ops
from tamoe.peer_store import PeerStore
from tamoe.topology import InputError, run_ranks
from tamoe.topology.errors import KernelError, RankTimeoutError
from tests.shim_library import needs_gxx, on_shim, shim

pytestmark = [needs_gxx, pytest.mark.ranks]
ROUNDS = 1000


def revealing(sender: int, epoch: int, count: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows that tell who sent them, when, and which they are."""
    number = torch.arange(count * width).view(count, width) + epoch * 7919 + sender * 104729
    return (number % (251 if dtype == torch.uint8 else 65521)).to(dtype)


def counts_of(epoch: int, ranks: int, most: int) -> torch.Tensor:
    """``[P, P]`` rows from each rank to each other: the same on every rank, often 0."""
    generator = torch.Generator().manual_seed(epoch)
    return torch.randint(-2, most, (ranks, ranks), generator=generator).clamp_min(0)


def exchange_rounds(rank: int, rounds: int, width: int, dtype: torch.dtype, seed: int) -> int:
    ranks, most = dist.get_world_size(), 5
    moved = 0
    with on_shim(seed):
        store = PeerStore(None, capacity_rows=ranks * most, width=width, dtype=dtype)
        for epoch in range(1, rounds + 1):
            count_PP = counts_of(epoch, ranks, most)
            total = int(count_PP[rank].sum())
            row_ND = revealing(rank, epoch, total, width, dtype)
            source = None
            if epoch % 2:  # every other time out of order, through the index
                source = torch.randperm(total)
                row_ND = torch.empty_like(row_ND).index_copy_(0, source, row_ND)
            received = store.exchange(row_ND, count_PP[rank], source)
            store.check()
            assert torch.equal(received, count_PP[:, rank])
            start = 0
            for sender in range(ranks):
                sent = revealing(sender, epoch, int(count_PP[sender].sum()), width, dtype)
                mine = sent.split(count_PP[sender].tolist())[rank]
                got = store.buffer_RD[start : start + len(mine)]
                assert torch.equal(got, mine), (epoch, sender)
                start += len(mine)
            moved += start
    return moved


@pytest.mark.parametrize(
    ("ranks", "rounds", "width", "dtype", "seed"),
    [
        (2, ROUNDS, 36, torch.int32, 0),  # rows of 144 bytes: words of 16
        (4, ROUNDS, 36, torch.int32, 1),
        (3, 100, 5, torch.int32, 2),  # 20 bytes: words of 4
        (3, 100, 7, torch.uint8, 1),  # 7 bytes: words of 1
        (2, 50, 0, torch.int32, 3),
        (1, 50, 64, torch.float32, 0),
    ],
)
def test_every_row_arrives_in_order(ranks, rounds, width, dtype, seed):
    shim()  # built once, not by every rank
    moved = run_ranks(ranks, exchange_rounds, rounds, width, dtype, seed, timeout_s=250)
    expected = sum(counts_of(epoch, ranks, 5) for epoch in range(1, rounds + 1))
    assert moved == expected.sum(0).tolist()


def dispatch_and_combine(rank: int) -> None:
    """The stage of an exchange that stays in the node: index, pack and store, back, sum."""
    ranks, tokens, top_k, width = dist.get_world_size(), 37, 3, 24
    num_experts = 2 * ranks
    with on_shim():
        stores = [
            PeerStore(None, capacity_rows=ranks * tokens * top_k, width=width, dtype=torch.bfloat16)
            for _ in range(2)
        ]
        torch.manual_seed(rank)
        x_TD = torch.randn(tokens, width).to(torch.bfloat16)
        index_TK = torch.rand(tokens, num_experts).argsort(1)[:, :top_k]
        built = ops.build_index(index_TK, num_experts)
        send_P = built.count_N.view(ranks, -1).sum(1)
        received_P = stores[0].exchange(x_TD, send_P, built.choice // top_k)
        row_RD = stores[0].buffer_RD[: int(received_P.sum())] * 2
        stores[1].exchange(row_RD, received_P)
        order = torch.argsort(built.choice // top_k, stable=True)
        out_TD = ops.combine(stores[1].buffer_RD, torch.arange(tokens + 1) * top_k, order)
        for store in stores:
            store.check()
    assert torch.equal(out_TD, (x_TD.float() * 2 * top_k).to(torch.bfloat16))


def test_a_dispatch_and_its_way_back():
    shim()
    run_ranks(3, dispatch_and_combine)


def one_rank_stays_away(rank: int) -> str:
    with on_shim():
        store = PeerStore(None, capacity_rows=4, width=2, dtype=torch.float32, timeout_s=0.5)
        send = torch.ones(3, dtype=torch.int64)
        store.exchange(torch.zeros(3, 2), send)
        store.check()
        dist.barrier()
        if rank == 2:
            time.sleep(2)
            return "away"
        store.exchange(torch.zeros(3, 2), send)
        with pytest.raises(RankTimeoutError) as caught:
            store.check()
        assert caught.value.rank == 2
        return str(caught.value)


def test_a_rank_that_stays_away_is_named():
    shim()
    messages = run_ranks(3, one_rank_stays_away)
    assert messages[0] == (
        "rank 2 of the node did not answer rank 0 within 0.5 s in exchange 2 of peer stores"
    )
    assert messages[2] == "away"


def too_many_rows(rank: int) -> str:
    with on_shim():
        store = PeerStore(None, capacity_rows=3, width=16, dtype=torch.float32, timeout_s=5)
        guard = store.buffer_RD.clone().fill_(7)
        store.buffer_RD.copy_(guard)
        store.exchange(torch.ones(2, 16), torch.tensor([2, 0]))  # rank 0 would get 4
        with pytest.raises(InputError) as caught:
            store.check()
        if rank == 1:
            assert torch.equal(store.buffer_RD, guard)
        return str(caught.value)


def test_a_buffer_that_is_too_small_is_named_by_every_rank():
    shim()
    for message in run_ranks(2, too_many_rows):
        assert message == (
            "rank 0 of the node would receive more rows than capacity_rows, 3; allow for more"
        )


def counts_that_are_not_allowed(rank: int, wrong: list[int]) -> str:
    with on_shim():
        store = PeerStore(None, capacity_rows=8, width=4, dtype=torch.float32, timeout_s=30)
        guard = store.buffer_RD.clone().fill_(7)
        store.buffer_RD.copy_(guard)
        row_ND = torch.arange(12.0).view(3, 4) + rank
        received = store.exchange(row_ND, torch.tensor(wrong if rank == 1 else [1, 2]))
        with pytest.raises(InputError) as caught:
            store.check()
        assert torch.equal(store.buffer_RD, guard)
        assert received[1] == 0
        dist.barrier()
        received = store.exchange(row_ND, torch.tensor([2, 1]))  # goes on as if nothing had been
        store.check()
        assert received.tolist() == [[2, 2], [1, 1]][rank]
        assert torch.equal(store.buffer_RD[: received[0]], row_ND[2 * rank :][: received[0]] - rank)
        return str(caught.value)


@pytest.mark.parametrize("wrong", [[4, 0], [2, 2], [-5, 2], [3, 2**62]])
def test_counts_that_are_not_allowed_store_nothing_anywhere(wrong):
    shim()
    for message in run_ranks(2, counts_that_are_not_allowed, wrong):
        assert message == (
            "send_count_P of rank 1 of the node is below 0 or more than its rows to send; allowed: "
            ">= 0, in all at most as many as there are"
        )


def one_timeout_for_all_blocks(rank: int, timeout_s: float) -> float:
    """Seconds that an exchange of several blocks waits for a rank that does not come."""
    rows = 3 * 8 * 2  # of each block's warps
    with on_shim():
        store = PeerStore(
            None, capacity_rows=rows, width=1, dtype=torch.float32, timeout_s=timeout_s
        )
        began_s = time.monotonic()
        if rank == 0:
            store.exchange(torch.zeros(rows, 1), torch.tensor([rows, 0]))
            with pytest.raises(RankTimeoutError):
                store.check()
        waited_s = time.monotonic() - began_s
        dist.barrier()
        return waited_s


def test_an_exchange_has_one_timeout_however_many_blocks_it_has():
    shim()
    timeout_s = 3.0
    # With a timeout of each block's own, three blocks and the last wait would take four of them.
    waited_s = run_ranks(2, one_timeout_for_all_blocks, timeout_s)[0]
    assert timeout_s * 0.99 <= waited_s < 3 * timeout_s


def unequal_buffers(rank: int) -> str:
    with on_shim(), pytest.raises(InputError) as caught:
        PeerStore(None, capacity_rows=3 + rank, width=2, dtype=torch.float32)
    return str(caught.value)


def test_buffers_that_differ_are_refused_on_every_rank():
    shim()
    first, second = run_ranks(2, unequal_buffers)
    assert first == second
    assert "rank 0: capacity_rows 3, width 2, torch.float32; rank 1: capacity_rows 4" in first


def no_room(rank: int) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.posix_fallocate = full
    with on_shim():
        opened = len(os.listdir("/proc/self/fd"))
        with pytest.raises(KernelError, match=r"rank 0 cannot share .* No space left on device"):
            PeerStore(None, capacity_rows=1, width=1, dtype=torch.float32)
        assert len(os.listdir("/proc/self/fd")) == opened


def test_a_full_disk_is_named_and_leaves_nothing_open():
    shim()
    run_ranks(1, no_room)


def refusals(rank: int) -> None:
    with pytest.raises(KernelError, match="no kernels for cpu"):
        PeerStore(None, capacity_rows=1, width=1, dtype=torch.float32)
    with on_shim():
        with pytest.raises(InputError, match="capacity_rows is -1"):
            PeerStore(None, capacity_rows=-1, width=1, dtype=torch.float32)
        for timeout_s in (0, -1.0, float("inf"), None):
            with pytest.raises(InputError, match=r"timeout_s is .*; allowed: > 0 seconds"):
                PeerStore(None, capacity_rows=1, width=1, dtype=torch.half, timeout_s=timeout_s)
        store = PeerStore(None, capacity_rows=1, width=2, dtype=torch.float32)
        one = torch.ones(1, dtype=torch.int64)
        for row, send, source, message in (
            (torch.zeros(1, 3), one, None, r"row_ND is torch.float32 of shape \(1, 3\)"),
            (torch.zeros(1, 2).half(), one, None, "row_ND is torch.float16"),
            (torch.zeros(1, 2), one.int(), None, "send_count_P is torch.int32"),
            (torch.zeros(1, 2), torch.ones(2).long(), None, r"shape \(2,\); allowed: .*, \[1\]"),
            (torch.zeros(1, 2), one, torch.zeros(1), "source_n is torch.float32"),
            (torch.zeros(1, 2), one, one > 0, r"source_n is torch.bool of shape \(1,\)"),
            (torch.zeros(1, 2), one, one.to("meta"), "source_n is on meta; allowed: cpu"),
        ):
            with pytest.raises(InputError, match=message):
                store.exchange(row, send, source)
        with pytest.raises(KernelError, match="index is out of range"):
            store.exchange(torch.zeros(1, 2), one, torch.tensor([1]))


def test_what_is_refused():
    shim()
    run_ranks(1, refusals)
