"""What a rank's own process does: move to its node, then call the function or run the command."""

from __future__ import annotations

import contextlib
import datetime
import os
import pickle
import signal
import socket
import sys
import traceback
from dataclasses import dataclass
from typing import Any

from tamoe.topology import linux, netns
from tamoe.topology.errors import InputError
from tamoe.topology.network import INTERFACE
from tamoe.topology.rank_protocol import Kind, Request, raised, send

COMMAND_PORT = 29500  # free: a cluster's namespaces are its own
_inside_rank: int | None = None


def inside_rank() -> int | None:
    """Number of the rank that this process was forked to be, or None."""
    return _inside_rank


@dataclass(frozen=True)
class Place:
    """Where a rank runs and what it must know of it."""

    rank: int
    node: int
    local_rank: int
    local_size: int
    num_nodes: int
    address: str  # of rank 0
    interface: str  # that leads to the other nodes
    namespace: int | None  # network namespace; None: the launcher's own
    node_namespace: int | None  # where the node's uplink is; None: it has none

    def environment(self, num_ranks: int, port: int) -> dict[str, str]:
        """What torchrun sets, and the interface for gloo."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_size),
            "GROUP_RANK": str(self.node),
            "GROUP_WORLD_SIZE": str(self.num_nodes),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": self.interface,
        }


def run_in_rank(
    request: Request, place: Place, job: socket.socket, streams: list[int], ports: tuple[int, int]
) -> None:
    """What a rank of ``run_ranks`` does: group up, function, result, wait for the end."""
    try:
        _become_rank(request, place, streams)
        # Ctrl-C is for the launcher, also where a rank shares its terminal.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(line_buffering=True)
        kind, payload = Kind.RESULT, _pickled_result(_call(request, place, ports))
    except BaseException as error:
        kind, payload = Kind.RAISED, pickle.dumps(raised(error, _traceback_of(error)))
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    send(job, place.rank, kind, payload)
    # Rank 0 holds the store and all hold connections: nobody leaves before everybody is done.
    while True:
        signal.pause()


def exec_in_rank(request: Request, place: Place, streams: list[int]) -> None:
    """What a rank of ``emulate`` does: become the command."""
    _become_rank(request, place, streams)
    os.setpgid(0, 0)  # signals go to the command and to what it starts
    os.environ.update(place.environment(request.num_ranks, COMMAND_PORT))
    os.environ.update(linux.environment_that_holds_freed_memory())
    for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):  # Python had changed them
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(request.command[0], request.command)
    except OSError as error:
        os.write(2, f"cannot run {request.command[0]!r}: {error.strerror}\n".encode())
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)


def _become_rank(request: Request, place: Place, streams: list[int]) -> None:
    """Move to the rank's node and take on its streams and environment."""
    global _inside_rank
    _inside_rank = place.rank
    empty = os.open(os.devnull, os.O_RDONLY)
    for descriptor, target in zip((empty, *streams), (0, 1, 2), strict=True):
        os.dup2(descriptor, target)
    os.environ.clear()
    os.environ.update(request.environ)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does
    sys.argv[:] = request.argv
    if place.node_namespace is not None:
        linux.setns(place.node_namespace, linux.CLONE_NEWNET)
        netns.watch_interface(INTERFACE)
    if place.namespace is not None:
        linux.setns(place.namespace, linux.CLONE_NEWNET)
        linux.unshare(linux.CLONE_NEWUTS)  # MPI takes ranks with one host name for one node
        socket.sethostname(f"node{place.node}")
    if place.node_namespace is None:
        netns.watch_interface(place.interface)


def _call(request: Request, place: Place, ports: tuple[int, int]) -> Any:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    linux.hold_freed_memory()
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()  # or all ranks would draw the same numbers
    if request.import_in_ranks:
        from tamoe.topology.rank_server import import_function_module

        error = import_function_module(request)
        if error is not None:
            raise error
    timeout = datetime.timedelta(seconds=request.timeout_s)
    store = _shared_store(place, request.num_ranks, ports, timeout)
    os.environ.update(place.environment(request.num_ranks, store.port))
    dist.init_process_group(
        "gloo", store=store, rank=place.rank, world_size=request.num_ranks, timeout=timeout
    )
    assert request.call is not None
    function, args = pickle.loads(request.call)
    return function(place.rank, *args)


def _shared_store(
    place: Place, num_ranks: int, ports: tuple[int, int], timeout: datetime.timedelta
) -> Any:
    """A TCPStore on a port that the kernel chose; rank 0 tells the others through a pipe."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    reader, writer = ports
    if place.rank == 0:
        store = TCPStore(place.address, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        os.write(writer, store.port.to_bytes(2, "big") * (num_ranks - 1))
    os.close(writer)
    if place.rank != 0:
        port = int.from_bytes(os.read(reader, 2), "big")
        store = TCPStore(place.address, port, is_master=False, timeout=timeout)
    os.close(reader)
    return store


def _pickled_result(value: Any) -> bytes:
    try:
        return pickle.dumps(value)
    except Exception as error:
        raise InputError(
            f"fn returned a {type(value).__name__} that cannot be pickled "
            f"({type(error).__name__}: {error}); allowed: values that pickle"
        ) from None


def _traceback_of(error: BaseException) -> str:
    """The traceback from the user's function on, without the frames of this file."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames))
