"""Memory that the ranks of one host share, so that rows inside a node need no socket.

Every rank has an outbox that the other ranks of its node map. It writes rows there and tells each
peer where they lie, by a small message through a socket, which also orders the memory; the peers
read in place. Two halves are written in turn: once a peer has sent its next message, it is
done with the half before.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from weakref import ref

import torch
import torch.distributed as dist

from tamoe.node_channel import NodeChannel, OncePerNode, node_channel
from tamoe.waiting import Patience

_FOLDER = "/dev/shm"
_PATH_BYTES = 128
_ALIGNED_BYTES = 64
_BY_SOCKET = -1


class NodeMemory:
    """The outboxes of this rank and of the other ranks of its node; see :meth:`connect`."""

    def __init__(
        self, group: dist.ProcessGroup, rank: int, near: Sequence[int], channel: NodeChannel
    ) -> None:
        self._group_of, self._rank = ref(group), rank  # no cycle: the group keeps this alive
        self._peers, self._channel = [peer for peer in near if peer != rank], channel
        self._file = -1
        self._own = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._begin = 0  # of the half that is written now
        self._files: dict[int, int] = {}
        self._theirs: dict[int, torch.Tensor] = {}

    def __del__(self) -> None:
        for file in (self._file, *self._files.values()):
            with suppress(OSError):
                os.close(file)

    @classmethod
    def connect(
        cls, group: dist.ProcessGroup, rank: int, near: Sequence[int], patience: Patience
    ) -> NodeMemory | None:
        """Outboxes for all ranks of a node, or None on all of them where they share no memory.

        All ranks of the node call it at the same point.

        Parameters
        ----------
        group
            ProcessGroup that carries rows where an outbox cannot grow.
        rank
            This rank in the group.
        near
            Ranks of its node in the group, itself among them.
        patience
            How long to wait for them.
        """
        where = "shared memory of the node"
        channel = node_channel(group, rank, near, patience)
        if channel is None:
            return None
        memory = cls(group, rank, near, channel)
        path = memory._made()
        try:
            name = path.encode().ljust(_PATH_BYTES, b"\0")
            names = memory._told(dict.fromkeys(memory._peers, name), patience, where)
            works = bool(path)
            for peer in memory._peers:
                works = memory._opened(peer, names[peer]) and works
            answer = bytes([works])
            said = memory._told(dict.fromkeys(memory._peers, answer), patience, where)
        finally:
            if path:
                os.unlink(path)  # whoever opened it keeps it; nothing is left behind
        return memory if works and all(answer[0] for answer in said.values()) else None

    def close(self) -> None:
        """Let no swap follow: peers that wait for this rank hear of it, and later swaps fail."""
        self._channel.close()

    @property
    def num_bytes(self) -> int:
        """Size of this rank's outbox."""
        return len(self._own)

    def outbox(self, num_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """Room for rows, ``[num_rows, width]``, that :meth:`swap` then hands to the peers."""
        num_bytes = num_rows * width * dtype.itemsize
        half_ends = len(self._own) if self._begin else len(self._own) // 2
        if self._begin + num_bytes > half_ends and not self._grown(num_bytes):
            return torch.empty(num_rows, width, dtype=dtype, device="cpu")
        room = self._own[self._begin : self._begin + num_bytes]
        return room.view(dtype).view(num_rows, width)

    def swap(
        self,
        row_nD: torch.Tensor,
        send_splits: Sequence[int],
        receive_splits: Sequence[int],
        patience: Patience,
        phase: str,
    ) -> list[torch.Tensor]:
        """Rows from each rank of the node, by rank, to be read before the next swap.

        Parameters
        ----------
        row_nD
            The last :meth:`outbox`, with rows sorted by the rank that they are for.
        send_splits, receive_splits
            Rows for each rank and from each rank of the group; 0 outside the node.
        patience, phase
            How long to wait for the peers, and what an error calls this swap.
        """
        where = f"{phase}, inside the node"
        blocks = row_nD.split(list(send_splits))
        row_bytes = row_nD.shape[1] * row_nD.element_size()
        shared = row_nD.numel() == 0 or self._holds(row_nD)
        tell, start = {}, self._begin
        for rank, rows in enumerate(send_splits):
            if rank in self._peers:
                begin = start if shared else _BY_SOCKET
                tell[rank] = struct.pack("qq", begin, len(self._own))
            start += rows * row_bytes
        told = self._told(tell, patience, where)
        arrived = {self._rank: blocks[self._rank]}
        by_socket: dict[int, torch.Tensor] = {}
        for peer, answer in told.items():
            begin, size = struct.unpack("qq", answer)
            shape = (receive_splits[peer], row_nD.shape[1])
            if begin == _BY_SOCKET:
                arrived[peer] = by_socket[peer] = row_nD.new_empty(shape)
            else:
                part = self._box(peer, size)[begin : begin + shape[0] * row_bytes]
                arrived[peer] = part.view(row_nD.dtype).view(shape)
        if not shared or by_socket:
            sends = {} if shared else {peer: blocks[peer] for peer in self._peers}
            self._transfer(sends, by_socket, patience, where)
        if shared:
            self._begin = 0 if self._begin else len(self._own) // 2
        return [arrived[rank] for rank in sorted(arrived)]

    # ---- messages -----------------------------------------------------------------------------

    def _told(self, tell: Mapping[int, bytes], patience: Patience, where: str) -> dict[int, bytes]:
        """Swap messages of one size with the peers."""
        sizes = {peer: len(message) for peer, message in tell.items()}
        return self._channel.swap(tell, sizes, patience, where)

    def _transfer(
        self,
        sends: Mapping[int, torch.Tensor],
        receives: Mapping[int, torch.Tensor],
        patience: Patience,
        where: str,
    ) -> None:
        works = []
        for call, rows_of in ((self._receive, receives), (self._send, sends)):
            for peer, rows in rows_of.items():
                if rows.numel():
                    with patience.trying([peer], where):
                        works.append((call(rows, peer), (peer,)))
        patience.wait(works, where)

    def _receive(self, rows: torch.Tensor, peer: int) -> dist.Work:
        return _started(dist.irecv(rows, group=self._group_of(), group_src=peer))

    def _send(self, rows: torch.Tensor, peer: int) -> dist.Work:
        return _started(dist.isend(rows, group=self._group_of(), group_dst=peer))

    # ---- files --------------------------------------------------------------------------------

    def _made(self) -> str:
        """A small file of this rank's own; its path, or "" where there is no shared memory."""
        try:
            self._file, path = tempfile.mkstemp(prefix="tamoe-", dir=_FOLDER)
        except OSError:
            return ""
        if not self._grown(_ALIGNED_BYTES):
            os.unlink(path)
            return ""
        return path

    def _opened(self, peer: int, name: bytes) -> bool:
        path = name.rstrip(b"\0").decode()
        try:
            self._files[peer] = os.open(path, os.O_RDWR)
        except OSError:  # another host, or none was made
            return False
        return True

    def _grown(self, num_bytes: int) -> bool:
        """Enlarge the outbox; False where there is no room.

        The half that peers may still read stays as it is: the new second half begins behind it.
        Halves are powers of two, so rows that grow little by little do not leave room unused.
        """
        wanted = max(_ALIGNED_BYTES, 1 << (num_bytes - 1).bit_length())
        half = max(wanted, len(self._own) // 2 if self._begin else len(self._own))
        try:
            os.posix_fallocate(self._file, 0, 2 * half)
            self._own = _mapped(self._file, 2 * half)
        except OSError:
            return False
        self._begin = half
        return True

    def _box(self, peer: int, size: int) -> torch.Tensor:
        if peer not in self._theirs or len(self._theirs[peer]) != size:
            self._theirs[peer] = _mapped(self._files[peer], size)
        return self._theirs[peer]

    def _holds(self, row_nD: torch.Tensor) -> bool:
        begin = self._own.data_ptr()
        return begin <= row_nD.data_ptr() < begin + len(self._own)


def _started(work: dist.Work | None) -> dist.Work:
    assert work is not None  # only for ranks outside the group
    return work


def _mapped(file: int, size: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(file, size), dtype=torch.uint8)


_memory_once = OncePerNode(NodeMemory.connect)


def node_memory(
    group: dist.ProcessGroup, rank: int, near: Sequence[int], patience: Patience
) -> NodeMemory | None:
    """The outboxes of a node; one set serves every exchange of a group.

    The first call connects, so all ranks of the node make it at the same point.
    """
    return _memory_once(group, rank, near, patience)


def outbox_bytes(group: dist.ProcessGroup | None) -> int:
    """Shared memory that this rank keeps for exchanges of a group; that of its peers is theirs."""
    by_node = _memory_once.made.get(group, {}) if group is not None else {}
    return sum(memory.num_bytes for memory in by_node.values() if memory is not None)
