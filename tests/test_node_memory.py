"""Rows through shared memory are the rows that were sent, also where memory runs out."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tamoe import node_memory
from tamoe.node_memory import NodeMemory
from tamoe.topology import run_ranks
from tamoe.waiting import Patience

PATIENCE = Patience("test", 60.0)
FOLDER = Path(node_memory._FOLDER)


def rows_of(sender: int, receiver: int, step: int, rows: int, width: int) -> torch.Tensor:
    """Numbers that tell where they come from."""
    first = float(sender * 1000 + receiver * 100 + step)
    return first + torch.arange(rows * width).view(rows, width) / 1024


def swaps(memory: NodeMemory, rank: int, near: list[int], steps: range) -> int:
    """Swap blocks of random sizes; returns how many rows came."""
    seen = 0
    for step in steps:
        common = torch.Generator().manual_seed(step)
        size = 1 if step < 10 else 60 if step < 20 else 8
        rows_PP = torch.randint(0, size * 4, (4, 4), generator=common)
        rows_PP[torch.rand(4, 4, generator=common) < 0.2] = 0
        width = 1 + step % 7
        sends = [int(rows_PP[rank, peer]) if peer in near else 0 for peer in range(4)]
        receives = [int(rows_PP[peer, rank]) if peer in near else 0 for peer in range(4)]
        room = memory.outbox(sum(sends), width, torch.float32)
        room.copy_(torch.cat([rows_of(rank, p, step, n, width) for p, n in enumerate(sends)]))
        for peer, came in zip(
            near, memory.swap(room, sends, receives, PATIENCE, "swap"), strict=True
        ):
            assert torch.equal(came, rows_of(peer, rank, step, receives[peer], width))
            seen += len(came)
    return seen


def in_ranks(rank: int, failing: str | None) -> Any:
    near = [0, 2, 3] if rank != 1 else [1]
    group = dist.group.WORLD
    assert group is not None
    if failing == "folder" and rank == 2:
        node_memory._FOLDER = "/nowhere"
    memory = NodeMemory.connect(group, rank, near, PATIENCE)
    dist.barrier()  # others may still be about to open theirs
    left = [path.name for path in FOLDER.glob("tamoe-*")]
    if memory is None:
        return None, left, 0
    seen = swaps(memory, rank, near, range(10))
    if failing == "room" and rank == 3:

        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        os.posix_fallocate = full
    by_socket, send = [], memory._send

    def counted(rows: torch.Tensor, peer: int) -> Any:
        by_socket.append(peer)
        return send(rows, peer)

    memory._send = counted  # type: ignore[method-assign]
    return seen + swaps(memory, rank, near, range(10, 30)), left, len(by_socket)


@pytest.mark.ranks
def test_rows_arrive_and_no_file_is_left() -> None:
    before = set(FOLDER.glob("tamoe-*"))
    answers = run_ranks(4, in_ranks, None, timeout_s=120)
    assert all(seen > 100 for seen, _, _ in answers)
    assert all({FOLDER / name for name in left} <= before for _, left, _ in answers)
    assert set(FOLDER.glob("tamoe-*")) <= before


@pytest.mark.ranks
def test_a_rank_without_room_sends_by_socket() -> None:
    answers = run_ranks(4, in_ranks, "room", timeout_s=120)
    assert [sockets > 0 for _, _, sockets in answers] == [False, False, False, True]


@pytest.mark.ranks
def test_ranks_that_share_no_memory_all_do_without() -> None:
    answers = run_ranks(4, in_ranks, "folder", timeout_s=120)
    assert [seen is None for seen, _, _ in answers] == [True, False, True, True]
