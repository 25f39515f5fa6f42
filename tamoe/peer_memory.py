"""Memory that every rank of a node can store into: the only place that knows where it comes from.

On GPUs it is PyTorch's symmetric memory, which maps the peers' buffers over NVLink or PCIe; on the
CPU a file in memory that all processes map, which serves the tests.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from tamoe.topology.errors import KernelError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, eq=False)
class PeerMemory:
    """One buffer a rank, zeroed, all of one size.

    ``addresses`` are the buffers of all ranks as this process sees them; ``own`` is this rank's,
    ``[num_bytes]`` uint8.
    """

    own: torch.Tensor
    addresses: tuple[int, ...]
    rank: int
    keep: Any = field(repr=False)  # what must live as long as the addresses


def allocate(num_bytes: int, group: ProcessGroup | None, device: torch.device) -> PeerMemory:
    """Buffers of ``num_bytes`` for every rank of a group on one node; a collective call.

    Raises
    ------
    KernelError
        The ranks cannot reach each other's memory.
    """
    if device.type == "cpu":
        return _shared_file(num_bytes, group)
    return _symmetric(num_bytes, group, device)


def _shared_file(num_bytes: int, group: ProcessGroup | None) -> PeerMemory:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    page = mmap.PAGESIZE
    stride = (num_bytes + page - 1) // page * page
    path: list[Any] = [None]
    problem: str | None = None
    if rank == 0:
        folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        try:
            descriptor, name = tempfile.mkstemp(prefix="tamoe-", dir=folder)
            path = [name]
            os.posix_fallocate(descriptor, 0, stride * size)  # else a full disk is a SIGBUS later
            os.close(descriptor)
        except OSError as error:
            problem = f"{error.strerror}"
    dist.broadcast_object_list(path, group=group, group_src=0)
    memory: torch.Tensor | None = None
    try:
        if problem is None:
            with open(path[0], "r+b") as file:
                memory = torch.frombuffer(
                    mmap.mmap(file.fileno(), stride * size), dtype=torch.uint8
                )
    except (OSError, TypeError, ValueError) as error:
        problem = str(error)
    problems: list[Any] = [None] * size
    dist.all_gather_object(problems, problem, group=group)  # also: all have mapped it
    if rank == 0 and path[0]:
        Path(path[0]).unlink()
    for other, text in enumerate(problems):
        if text is not None:
            raise KernelError(
                f"rank {other} cannot share {stride * size} bytes of memory with the rest: {text}. "
                f"Are all ranks on one node, with room in /dev/shm?"
            )
    assert memory is not None
    addresses = tuple(memory.data_ptr() + peer * stride for peer in range(size))
    own = memory[rank * stride : rank * stride + num_bytes]
    return PeerMemory(own, addresses, rank, memory)


def _symmetric(num_bytes: int, group: ProcessGroup | None, device: torch.device) -> PeerMemory:
    """Written after PyTorch's documentation; not run yet on a GPU."""
    import torch.distributed._symmetric_memory as symmetric

    resolved = group if group is not None else dist.group.WORLD
    assert resolved is not None
    try:
        own = symmetric.empty(num_bytes, dtype=torch.uint8, device=device)
        own.zero_()
        handle = symmetric.rendezvous(own, resolved)
    except RuntimeError as error:
        raise KernelError(
            f"PyTorch's symmetric memory is not there: {error}. The ranks of a node need peer "
            f"access to each other's GPUs"
        ) from None
    torch.cuda.synchronize(device)
    dist.barrier(resolved)  # every header is zero before anyone stores
    addresses = tuple(int(pointer) for pointer in handle.buffer_ptrs)
    return PeerMemory(own, addresses, handle.rank, handle)
