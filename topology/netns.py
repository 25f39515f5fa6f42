"""Network namespaces between processes: who keeps a cluster's network, and its counters in ranks.

The network of an emulated cluster belongs to one process, which hands the namespaces to the ranks'
parent as descriptors and reads the links' counters when all is done.
"""

from __future__ import annotations

import errno
import os
import pickle
import socket
from pathlib import Path

from tamoe.topology.errors import EmulationError, InputError
from tamoe.topology.network import Network
from tamoe.topology.rank_protocol import JOB_ITSELF, Kind, send
from tamoe.topology.spec import ClusterSpec

_FDS_PER_MESSAGE = 200  # the kernel takes 253


def serve_network(spec: ClusterSpec, sock: socket.socket, job: socket.socket) -> None:
    """Build a network, hand its namespaces over, keep it; when asked, report to the launcher.

    For a process of its own, which pyroute2 may fill with event loops.
    """
    try:
        network = Network(spec)
    except Exception as error:
        sock.send(pickle.dumps(build_error(error)))
        return
    descriptors = network.descriptors()
    sock.send(pickle.dumps(len(descriptors)))
    for start in range(0, len(descriptors), _FDS_PER_MESSAGE):
        socket.send_fds(sock, [b"fds"], descriptors[start : start + _FDS_PER_MESSAGE])
    if sock.recv(16):
        send(job, JOB_ITSELF, Kind.REPORT, pickle.dumps(network.report()))


def receive_namespaces(sock: socket.socket) -> list[int]:
    """What :meth:`Network.descriptors` gave, in the process that started the network's.

    Raises
    ------
    EmulationError
        The network could not be built.
    """
    count = pickle.loads(sock.recv(65536))
    if isinstance(count, Exception):
        raise count
    found: list[int] = []
    while len(found) < count:
        flags = socket.MSG_CMSG_CLOEXEC
        _, descriptors, _, _ = socket.recv_fds(sock, 16, _FDS_PER_MESSAGE, flags)
        found += descriptors
    return found


def build_error(error: Exception) -> EmulationError:
    from pyroute2 import NetlinkError

    from tamoe.topology.namespaces import refusal

    if isinstance(error, NetlinkError) and error.code in (errno.EPERM, errno.EACCES):
        return refusal(PermissionError(error.code, os.strerror(error.code)))
    if isinstance(error, OSError):
        return refusal(error)
    return EmulationError(
        f"the emulated network could not be built ({error}); the kernel needs veth, bridge, "
        f"sch_tbf, sch_htb and cls_u32 (as root: modprobe -a veth bridge sch_tbf sch_htb cls_u32)"
    )


# ---- counters, inside a rank ----------------------------------------------------------------

_counters: tuple[int, str] | None = None  # /proc/net/dev of this rank's node, and its interface


def watch_interface(interface: str) -> None:
    """Keep the counters of an interface of the namespace that this process is in now.

    An open /proc/net/dev stays with its namespace, wherever the process moves afterwards.
    """
    global _counters
    _counters = (os.open("/proc/self/net/dev", os.O_RDONLY | os.O_CLOEXEC), interface)


def interface_bytes() -> tuple[int, int]:
    """Bytes that this rank's node has received and sent over its interface so far.

    Score by received bytes: they are 1.003 to 1.006 of the payload, while sent ones also hold
    retransmissions. Ranks of one node see the same counters. On the loopback of plain ranks the
    traffic of other programs counts too.

    Returns
    -------
    tuple
        (received, sent), in bytes, since the interface was made.

    Raises
    ------
    InputError
        Outside a rank, where GLOO_SOCKET_IFNAME does not name the interface to read.
    """
    if _counters is None:
        interface = os.environ.get("GLOO_SOCKET_IFNAME", "")
        text = Path("/proc/self/net/dev").read_text()
    else:
        interface = _counters[1]
        text = _read_all(_counters[0]).decode()
    for line in text.splitlines():
        name, colon, values = line.partition(":")
        if colon and name.strip() == interface:
            columns = values.split()
            return int(columns[0]), int(columns[8])
    raise InputError(
        f"GLOO_SOCKET_IFNAME is {interface!r}; allowed: the name of an interface of this machine"
    )


def _read_all(descriptor: int) -> bytes:
    parts, at = [], 0
    while part := os.pread(descriptor, 65536, at):
        parts.append(part)
        at += len(part)
    return b"".join(parts)
