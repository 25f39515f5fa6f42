"""What a launcher and the processes that run its ranks say to each other.

One SOCK_SEQPACKET socket serves a whole job: its packets stay whole whoever sends them, so all
ranks share one end of it. Longer messages are cut into packets that carry their rank's number.
"""

from __future__ import annotations

import enum
import pickle
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

_HEADER = struct.Struct("<iBB")  # rank, kind, last packet of the message
_PACKET_BYTES = 65536  # under the kernel's default socket buffer
JOB_ITSELF = -1  # the rank field of messages that belong to no rank
# A server's answers: the job has ended; its module starts threads, so that this process must not be
# forked any more; its module has another file now than when it was imported.
IDLE, SPOILED, STALE = b"idle", b"spoiled", b"stale"


class Kind(enum.IntEnum):
    """What a message holds."""

    REQUEST = 0  # launcher to server: a Request
    STARTED = 1  # the ranks are being forked
    RESULT = 2  # what the function returned
    RAISED = 3  # a Raised
    EXITED = 4  # a rank's process ended: its wait status
    STDOUT = 5  # whole lines that a rank wrote
    STDERR = 6
    REFUSED = 7  # the job could not start: a TamoeError
    REPORT = 8  # what the emulated network saw
    SIGNAL = 9  # launcher to job: a signal number for every rank
    END = 10  # launcher to job: all done


@dataclass(frozen=True)
class Request:
    """A job: a function or a command for each rank, and where to run them."""

    nodes: tuple[tuple[int, ...], ...]  # ranks of each node
    cluster: Any  # ClusterSpec, or None for plain processes on this machine's loopback
    call: bytes | None  # pickled (fn, args), or None for a command
    command: tuple[str, ...]
    module: str | None  # module of fn; None for a command
    module_file: str | None  # where the launcher has it from
    main: dict[str, str]  # how to import the launcher's __main__; empty where not needed
    import_in_ranks: bool  # the module starts threads on import: no preloading
    environ: dict[str, str]
    directory: str
    path: tuple[str, ...]  # sys.path
    argv: tuple[str, ...]  # sys.argv
    timeout_s: float

    @property
    def num_ranks(self) -> int:
        """Number of ranks."""
        return sum(len(ranks) for ranks in self.nodes)


@dataclass(frozen=True)
class Raised:
    """An exception of a rank, in words, and itself where it can be pickled."""

    summary: str
    traceback: str
    exception: bytes | None


def send(sock: socket.socket, rank: int, kind: Kind, payload: bytes = b"") -> None:
    """Send one message; blocks while the reader is busy."""
    view = memoryview(payload)
    starts = range(0, max(len(view), 1), _PACKET_BYTES)
    for start in starts:
        header = _HEADER.pack(rank, kind, start == starts[-1])
        sock.sendmsg([header, view[start : start + _PACKET_BYTES]])


@dataclass
class Inbox:
    """Puts the packets of a job's socket together into messages."""

    sock: socket.socket
    _parts: dict[tuple[int, int], list[bytes]] = field(default_factory=dict)

    def messages(self) -> Iterator[tuple[int, Kind, bytes]]:
        """Messages as they arrive, until the other side has closed or the socket times out."""
        while True:
            packet = self.sock.recv(_HEADER.size + _PACKET_BYTES)
            if not packet:
                return
            rank, number, last = _HEADER.unpack_from(packet)
            parts = self._parts.setdefault((rank, number), [])
            parts.append(packet[_HEADER.size :])
            if last:
                yield rank, Kind(number), b"".join(self._parts.pop((rank, number)))

    def next(self) -> tuple[int, Kind, bytes] | None:
        """The next message, or None when the other side has closed.

        Raises
        ------
        TimeoutError
            The socket's timeout passed without a packet.
        """
        return next(self.messages(), None)


def raised(error: BaseException, traceback_text: str) -> Raised:
    """Describe an exception so that the launcher can raise it again."""
    try:
        pickled: bytes | None = pickle.dumps(error)
        pickle.loads(pickled or b"")  # some exceptions pickle and cannot be read back
    except Exception:
        pickled = None
    summary = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return Raised(summary, traceback_text, pickled)
