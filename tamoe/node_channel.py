"""Small messages between the ranks of one host, by Unix sockets.

A message through the process group wakes several threads at both ends, which costs ten times as
much where ranks share cores.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from tamoe.groups import group_timeout_s
from tamoe.waiting import Patience

MOST_BYTES = 2**17  # of a message; all are sent before any is read, so sockets have to hold them
_NAME_BYTES = 16


@dataclass(frozen=True, eq=False)
class NodeChannel:
    """A connection to each other rank of the node, by its rank in the group."""

    socket_of: Mapping[int, socket.socket]
    timeout_s: float  # where a caller's patience has none

    def __del__(self) -> None:
        for connection in self.socket_of.values():
            connection.close()

    def swap(
        self,
        tell: Mapping[int, bytes],
        num_bytes: Mapping[int, int],
        patience: Patience,
        where: str,
    ) -> dict[int, bytes]:
        """Send each peer its message, and get one of the expected size from each; 0 means none.

        Raises
        ------
        ExchangeError
            A peer died, or did not answer in time.
        """
        for peer, message in tell.items():
            with patience.trying([peer], where):
                self._try(peer, patience).sendall(message)
        return {
            peer: self._received(peer, size, patience, where) for peer, size in num_bytes.items()
        }

    def _received(self, peer: int, size: int, patience: Patience, where: str) -> bytes:
        message = bytearray(size)
        rest = memoryview(message)
        with patience.trying([peer], where):
            connection = self._try(peer, patience)
            while rest:
                got = connection.recv_into(rest)
                if not got:
                    raise ConnectionError("it closed the connection")
                rest = rest[got:]
        return bytes(message)

    def _try(self, peer: int, patience: Patience) -> socket.socket:
        connection = self.socket_of[peer]
        connection.settimeout(patience.timeout_s or self.timeout_s)
        return connection


def _connect(
    group: dist.ProcessGroup, rank: int, peers: Sequence[int], patience: Patience
) -> NodeChannel | None:
    """Connections to the peers, or None on all of them where one cannot be reached."""
    where, timeout_s = "sockets of the node", group_timeout_s(group)
    connected: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")  # Linux names it, in the network namespace, and leaves no file
        listener.listen(len(peers))
        name = listener.getsockname()[1:].ljust(_NAME_BYTES, b"\0")
        names = _told(group, dict.fromkeys(peers, name), patience, where)
        for peer in peers:
            if peer < rank:
                with suppress(OSError):
                    connected[peer] = _opened(b"\0" + names[peer].rstrip(b"\0"), rank)
        reached = all(peer in connected for peer in peers if peer < rank)
        said = _told(group, dict.fromkeys(peers, bytes([reached])), patience, where)
        if not reached or not all(answer[0] for answer in said.values()):
            return None  # closing what is connected
        listener.settimeout(patience.timeout_s or timeout_s)
        while len(connected) < len(peers):
            with patience.trying([peer for peer in peers if peer not in connected], where):
                connection, _ = listener.accept()
                if _is_own(connection):
                    peer = struct.unpack("i", connection.recv(4, socket.MSG_WAITALL))[0]
                    connected[peer] = connection
    return NodeChannel(connected, timeout_s)


def _opened(name: bytes, rank: int) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(name)
    connection.sendall(struct.pack("i", rank))
    return connection


def _is_own(connection: socket.socket) -> bool:
    """Whether the other end is a process of this user; such sockets have no permissions."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return bool(struct.unpack("3i", credentials)[1] == os.getuid())


def _told(
    group: dist.ProcessGroup, tell: Mapping[int, bytes], patience: Patience, where: str
) -> dict[int, bytes]:
    """Swap messages of one size through the process group."""
    given = {peer: torch.tensor(list(message), dtype=torch.uint8) for peer, message in tell.items()}
    heard = {peer: torch.empty_like(message) for peer, message in given.items()}
    works: list[tuple[dist.Work, tuple[int, ...]]] = []
    for peer in tell:
        with patience.trying([peer], where):
            for work in (
                dist.irecv(heard[peer], group=group, group_src=peer),
                dist.isend(given[peer], group=group, group_dst=peer),
            ):
                assert work is not None  # only for ranks outside the group
                works.append((work, (peer,)))
    patience.wait(works, where)
    return {peer: bytes(message.tolist()) for peer, message in heard.items()}


_connected: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], NodeChannel | None]]
_connected = WeakKeyDictionary()


def node_channel(
    group: dist.ProcessGroup, rank: int, near: Sequence[int], patience: Patience
) -> NodeChannel | None:
    """Connections between the ranks of a node; one set serves every exchange of a group.

    The first call connects, so all ranks of the node make it at the same point.

    Parameters
    ----------
    group
        ProcessGroup with gloo.
    rank
        This rank in the group.
    near
        Ranks of its node in the group, itself among them.
    patience
        How long to wait for them.

    Returns
    -------
    NodeChannel or None
        None on all ranks of the node where one cannot reach another.
    """
    by_node = _connected.setdefault(group, {})
    if tuple(near) not in by_node:
        peers = [peer for peer in near if peer != rank]
        by_node[tuple(near)] = _connect(group, rank, peers, patience)
    return by_node[tuple(near)]
