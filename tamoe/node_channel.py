"""Small messages between the ranks of one host, by Unix sockets.

A message through the process group wakes several threads at both ends, which costs several times
as much where ranks share cores.
"""

from __future__ import annotations

import os
import socket
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from tamoe.groups import group_timeout_s
from tamoe.waiting import Patience

# Of a message. All ranks send theirs before they read, so a socket has to hold one, or the ranks
# of a node would wait for each other.
MOST_BYTES = 2**17
T = TypeVar("T")
_FOLDER = "/dev/shm"  # of sockets that exist until all ranks have connected
_NAME_BYTES = 64
_MOST_TIMEOUT_S = 1e6  # sockets count in milliseconds of 32 bits


@dataclass(frozen=True, eq=False)
class NodeChannel:
    """A connection to each other rank of the node, by its rank in the group."""

    socket_of: Mapping[int, socket.socket]
    timeout_s: float  # where a caller's patience has none

    def __del__(self) -> None:
        for connection in self.socket_of.values():
            connection.close()  # without a shutdown: a forked process may go before its parent

    def close(self) -> None:
        """End all connections: peers that wait for this rank hear of it, and later swaps fail."""
        for connection in self.socket_of.values():
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
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
            A peer died or did not answer in time, or a swap before failed: the ranks could
            otherwise take old messages for new ones.
        """
        limit_s = min(patience.timeout_s or self.timeout_s, _MOST_TIMEOUT_S)
        try:
            with patience.trying(self.socket_of, where):
                for connection in self.socket_of.values():
                    if connection.fileno() < 0:
                        raise ConnectionError("it is closed, as a message failed before")
                    connection.settimeout(limit_s)
                for peer, message in tell.items():
                    self._send(peer, message)
                return {peer: self._received(peer, size) for peer, size in num_bytes.items()}
        except BaseException:
            self.close()
            raise

    def _send(self, peer: int, message: bytes) -> None:
        try:
            self.socket_of[peer].sendall(message)
        except OSError as error:
            raise ConnectionError(f"rank {peer} cannot be told: {error}") from error

    def _received(self, peer: int, size: int) -> bytes:
        message = bytearray(size)
        rest = memoryview(message)
        while rest:
            try:
                got = self.socket_of[peer].recv_into(rest)
            except OSError as error:
                raise ConnectionError(f"rank {peer} did not answer: {error}") from error
            if not got:
                raise ConnectionError(f"rank {peer} closed its connection: it died, or gave up")
            rest = rest[got:]
        return bytes(message)


def _connect(
    group: dist.ProcessGroup, rank: int, near: Sequence[int], patience: Patience
) -> NodeChannel | None:
    """Connections between the ranks of a node, or None on all where one cannot reach another."""
    peers = [peer for peer in near if peer != rank]
    where, timeout_s = "sockets of the node", group_timeout_s(group)
    limit_s = min(patience.timeout_s or timeout_s, _MOST_TIMEOUT_S)
    channel = NodeChannel({}, timeout_s)
    connected: dict[int, socket.socket] = {}
    listener, path = _listening(len(peers))
    try:
        name = path.encode().ljust(_NAME_BYTES, b"\0")
        names = _told(group, dict.fromkeys(peers, name), patience, where)
        works = listener is not None
        for peer in peers:
            if works and peer < rank:
                works = _open(connected, peer, names[peer].rstrip(b"\0"), rank, limit_s)
        said = _told(group, dict.fromkeys(peers, bytes([works])), patience, where)
        works = works and all(answer[0] for answer in said.values())
        if works and listener is not None:
            works = _accept(connected, [peer for peer in peers if peer > rank], listener, limit_s)
        channel = NodeChannel(connected, timeout_s)
        said = _told(group, dict.fromkeys(peers, bytes([works])), patience, where)
        works = works and all(answer[0] for answer in said.values())
    finally:
        if listener is not None:
            listener.close()
            os.unlink(path)
            os.rmdir(os.path.dirname(path))
    if not works:
        channel.close()
        return None
    return channel


def _listening(backlog: int) -> tuple[socket.socket | None, str]:
    """A socket in a folder of this user alone, and its path; None and "" where there is none."""
    with suppress(OSError):
        folder = tempfile.mkdtemp(prefix="tamoe-", dir=_FOLDER)
        try:
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(f"{folder}/socket")
            listener.listen(max(backlog, 1))
            return listener, f"{folder}/socket"
        except OSError:
            with suppress(OSError):
                os.unlink(f"{folder}/socket")
            os.rmdir(folder)
    return None, ""


def _open(
    connected: dict[int, socket.socket], peer: int, path: bytes, rank: int, limit_s: float
) -> bool:
    """Connect to a peer, and say who this is."""
    connection = socket.socket(socket.AF_UNIX)
    connected[peer] = connection
    try:
        connection.settimeout(limit_s)
        connection.connect(path)
        connection.sendall(struct.pack("i", rank))
        return _roomy(connection)
    except OSError:  # another host, or no room for more
        return False


def _accept(
    connected: dict[int, socket.socket],
    awaited: Sequence[int],
    listener: socket.socket,
    limit_s: float,
) -> bool:
    """Take the connections that the awaited ranks have made."""
    listener.settimeout(limit_s)
    for _ in awaited:
        try:
            connection, _ = listener.accept()
            connection.settimeout(limit_s)
            word = connection.recv(4, socket.MSG_WAITALL)
        except OSError:
            return False
        peer = struct.unpack("i", word)[0] if len(word) == 4 else -1
        if peer not in awaited or peer in connected or not _roomy(connection):
            connection.close()
            return False
        connected[peer] = connection
    return True


def _roomy(connection: socket.socket) -> bool:
    """Whether it holds the largest message; administrators can lower what a socket may hold."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MOST_BYTES)
    return connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) >= 2 * MOST_BYTES


def _told(
    group: dist.ProcessGroup, tell: Mapping[int, bytes], patience: Patience, where: str
) -> dict[int, bytes]:
    """Swap messages of one size through the process group."""
    given = {
        peer: torch.tensor(list(message), dtype=torch.uint8, device="cpu")
        for peer, message in tell.items()
    }
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


class OncePerNode(Generic[T]):
    """What the ranks of a node make together once, for every exchange of their group.

    All of them ask for the first time at the same point.
    """

    def __init__(
        self, make: Callable[[dist.ProcessGroup, int, Sequence[int], Patience], T]
    ) -> None:
        self._make = make
        self.made: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], T]]
        self.made = WeakKeyDictionary()

    def __call__(
        self, group: dist.ProcessGroup, rank: int, near: Sequence[int], patience: Patience
    ) -> T:
        by_node = self.made.setdefault(group, {})
        if tuple(near) not in by_node:
            by_node[tuple(near)] = self._make(group, rank, near, patience)
        return by_node[tuple(near)]


_channel_once = OncePerNode(_connect)


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
    return _channel_once(group, rank, near, patience)
