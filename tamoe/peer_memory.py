"""Memory that every rank of a node can store into: the only place that knows where it comes from.

On GPUs CUDA's handles for other processes, which work over NVLink, over PCIe and for processes that
share a GPU; on the CPU a file in memory that all processes map, which serves the tests.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import tempfile
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from tamoe.kernel_library import HANDLE_BYTES, KernelLibrary
from tamoe.topology.errors import KernelError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_BLOCK_BYTES = 2 * 2**20


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


def allocate(
    num_bytes: int, group: ProcessGroup | None, device: torch.device, library: KernelLibrary
) -> PeerMemory:
    """Buffers of ``num_bytes`` for every rank of a group on one node; a collective call.

    On a GPU a rank's own buffer lives as long as its process.

    Raises
    ------
    KernelError
        On every rank: some rank cannot reach another's memory.
    """
    if device.type == "cpu":
        return _shared_file(num_bytes, group)
    with torch.cuda.device(device):
        return _by_handles(num_bytes, group, device, library)


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
            try:  # without room, a full disk is a SIGBUS later
                os.posix_fallocate(descriptor, 0, stride * size)
            finally:
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
    problems = _told_all(problem, group)  # also: all have mapped it
    if rank == 0 and path[0]:
        Path(path[0]).unlink()
    if problems:
        other, text = problems[0]
        raise KernelError(
            f"rank {other} cannot share {stride * size} bytes of memory with the rest: {text}. "
            f"Are all ranks on one node, with room in /dev/shm?"
        )
    assert memory is not None
    addresses = tuple(memory.data_ptr() + peer * stride for peer in range(size))
    own = memory[rank * stride : rank * stride + num_bytes]
    return PeerMemory(own, addresses, rank, memory)


def _told_all(problem: str | None, group: ProcessGroup | None) -> list[tuple[int, str]]:
    """Ranks that have a problem, and what it is."""
    problems: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(problems, problem, group=group)
    return [(rank, text) for rank, text in enumerate(problems) if text is not None]


@dataclass(frozen=True)
class _Bytes:
    """Memory on a GPU as PyTorch takes it over without a copy."""

    address: int
    size: int

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": (self.size,),
            "typestr": "|u1",
            "data": (self.address, False),
            "strides": None,
            "version": 3,
        }


def _by_handles(
    num_bytes: int, group: ProcessGroup | None, device: torch.device, library: KernelLibrary
) -> PeerMemory:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    library.call("use_device", torch.cuda.current_device())
    address, handle = ctypes.c_void_p(), ctypes.create_string_buffer(HANDLE_BYTES)
    problem: str | None = None
    # Whole blocks: CUDA puts small ones together, and a handle shows its peers all that is there.
    size_bytes = max(-(-num_bytes // _BLOCK_BYTES), 1) * _BLOCK_BYTES
    try:
        library.call("share_memory", size_bytes, ctypes.byref(address), handle)
    except KernelError as error:
        problem = str(error)
    if problems := _told_all(problem, group):
        other, text = problems[0]
        raise KernelError(
            f"rank {other} cannot share {num_bytes} bytes of its GPU's memory: {text}"
        )
    handles: list[Any] = [None] * size
    dist.all_gather_object(handles, handle.raw, group=group)
    addresses, mapped = [], []
    for peer, raw in enumerate(handles):
        at = ctypes.c_void_p(address.value)
        if peer != rank and problem is None:
            try:
                library.call("map_memory", raw, ctypes.byref(at))
                mapped.append(at)
            except KernelError as error:
                problem = f"memory of rank {peer}: {error}"
        addresses.append(at.value or 0)
    problems = _told_all(problem, group)
    if problems:
        _unmap(library, mapped, device)
        other, text = problems[0]
        raise KernelError(
            f"rank {other} cannot map its peers' GPU memory: {text}. The ranks of a node need peer "
            f"access to each other's GPUs"
        )
    own = torch.as_tensor(_Bytes(addresses[rank], num_bytes), device=device)
    memory = PeerMemory(own, tuple(addresses), rank, mapped)
    weakref.finalize(memory, _unmap, library, mapped, device)
    return memory


def _unmap(library: KernelLibrary, mapped: list[ctypes.c_void_p], device: torch.device) -> None:
    with torch.cuda.device(device):
        with contextlib.suppress(
            RuntimeError
        ):  # where a kernel failed before, nothing is under way
            torch.cuda.synchronize()
        library.code("use_device", torch.cuda.current_device())
        for address in mapped:
            library.code("unmap_memory", address)
